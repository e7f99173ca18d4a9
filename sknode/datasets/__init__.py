"""Data to try things on: distributions whose densities are known, and a time series."""

from sknode.datasets.density import log_density, make_density
from sknode.datasets.series import load_co2

__all__ = ["load_co2", "log_density", "make_density"]
