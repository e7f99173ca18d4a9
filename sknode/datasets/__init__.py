"""Data to try things on: distributions whose densities are known, and time series."""

from sknode.datasets.density import log_density, make_density
from sknode.datasets.series import load_co2, make_spirals

__all__ = ["load_co2", "log_density", "make_density", "make_spirals"]
