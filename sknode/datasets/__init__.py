"""Data to try things on: distributions whose densities are known."""

from sknode.datasets.density import log_density, make_density

__all__ = ["log_density", "make_density"]
