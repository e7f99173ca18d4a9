"""Columns of `CNFDensity` with known limits: maps from the inside to the whole line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri, ndtri_exp

__all__ = ["Bounds", "check_bounds", "find_column"]

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
# The smallest share of a range, or of a mean, that a distance is taken for.
TINY = np.finfo(np.float64).tiny


def find_column(key, names, parameter) -> int:
    """Return the position of a column given by name or position.

    Parameters
    ----------
    key : str or int
        What was given.
    names : ndarray of shape (d,)
        Names of the columns, or their positions where they have no names.
    parameter : str
        Where it was given, for messages.
    """
    if isinstance(key, str):
        found = np.flatnonzero(names == key) if names.dtype == object else ()
        if not len(found):
            raise ValueError(
                f"{parameter} names a column {key!r}, which X does not have: "
                f"{', '.join(map(str, names))}."
            )
        return int(found[0])
    good = isinstance(key, int | np.integer) and not isinstance(key, bool | np.bool_)
    if not good or not 0 <= key < len(names):
        raise ValueError(
            f"{parameter} must have columns by name or by position from 0 to "
            f"{len(names) - 1}. Got {key!r}."
        )
    return int(key)


def check_bounds(bounds, names):
    """Return the lower and upper limits (d,) that a parameter means.

    Parameters
    ----------
    bounds : None, dict or array-like of shape (d, 2)
        The parameter.
    names : ndarray of shape (d,)
        Names of the columns, or their positions where they have no names.
    """
    dim = len(names)
    if bounds is None:
        pairs = {}
    elif isinstance(bounds, Mapping):
        pairs = {find_column(k, names, "bounds"): v for k, v in bounds.items()}
    else:
        pairs = dict(enumerate(np.asarray(bounds, dtype=object)))
        if len(pairs) != dim:
            raise ValueError(
                f"bounds must have a pair of limits for each of the {dim} columns of "
                f"X, or be a dict. Got {len(pairs)} of them."
            )
    low, high = np.full(dim, -np.inf), np.full(dim, np.inf)
    for i, pair in pairs.items():
        low[i], high[i] = _check_pair(pair, names[i])
    return low, high


def _check_pair(pair, name):
    """Return the limits of a column as numbers."""
    good = np.ndim(pair) == 1 and len(pair) == 2
    if not good or not all(x is None or isinstance(x, Real) for x in pair):
        raise ValueError(
            "bounds must have pairs (low, high) of numbers, or None where there is no "
            f"limit. Got {pair!r} for column {name}."
        )
    low = -np.inf if pair[0] is None else float(pair[0])
    high = np.inf if pair[1] is None else float(pair[1])
    overflow = math.isinf(high - low) and not (math.isinf(low) or math.isinf(high))
    if not low < high or overflow:
        raise ValueError(
            "bounds must have low < high, not NaN and not further apart than numbers "
            f"reach. Got ({low}, {high}) for column {name}."
        )
    return low, high


@dataclass(frozen=True)
class Bounds:
    """The map of columns with limits to the whole line.

    A column with two limits goes from the uniform distribution to the normal one, a
    column with one limit from the exponential distribution with the column's mean. Both
    densities are positive at their limits, so that the density of the column can be
    anything there, which logarithms and logits make hard to learn.

    Attributes
    ----------
    low, high : ndarray of shape (d,)
        The limits, infinite where there is none.
    scale : ndarray of shape (d,)
        Distance of two limits, mean distance to a single one, or 1.
    """

    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray

    @classmethod
    def none(cls, dim: int):
        """Return that without limits."""
        return cls(np.full(dim, -np.inf), np.full(dim, np.inf), np.ones(dim))

    @classmethod
    def fit(cls, low, high, X, weight):
        """Learn the mean distances from weighted rows, all within the limits."""
        scale = np.ones(len(low))
        for i, column in enumerate(X.T):
            if np.isfinite(low[i]) and np.isfinite(high[i]):
                scale[i] = high[i] - low[i]
            elif np.isfinite(low[i]):
                scale[i] = np.average(column - low[i], weights=weight)
            elif np.isfinite(high[i]):
                scale[i] = np.average(high[i] - column, weights=weight)
        return cls(low, high, scale)

    def is_inside(self, X):
        """Return which rows (n,) are between all limits, on none."""
        return ((X > self.low) & (X < self.high)).all(1)

    def check(self, X, names):
        """Raise an error that names the columns with values on or beyond limits."""
        found = []
        for i, column in enumerate(X.T):
            below, above = (column <= self.low[i]).sum(), (column >= self.high[i]).sum()
            if below:
                found.append(f"{names[i]} ({below} rows at or below {self.low[i]:g})")
            if above:
                found.append(f"{names[i]} ({above} rows at or above {self.high[i]:g})")
        if found:
            raise ValueError(
                "X has values on or beyond the limits that bounds gives: "
                f"{', '.join(found)}. Drop these rows or move the limits outwards; "
                "where values are rounded, name the column in dequantize, which moves "
                "them by half a width."
            )

    def forward(self, X):
        """Return the mapped rows and the log-determinants of the map, (n,)."""
        Z, log_det = X.copy(), np.zeros(len(X))
        for i in np.flatnonzero(np.isfinite(self.low) | np.isfinite(self.high)):
            below = np.maximum((X[:, i] - self.low[i]) / self.scale[i], TINY)
            above = np.maximum((self.high[i] - X[:, i]) / self.scale[i], TINY)
            log_density = -math.log(self.scale[i])
            if math.isinf(self.high[i]):
                Z[:, i] = -ndtri_exp(-below)
                log_density = log_density - below
            elif math.isinf(self.low[i]):
                Z[:, i] = ndtri_exp(-above)
                log_density = log_density - above
            else:  # from the nearer limit, for accuracy
                Z[:, i] = np.where(below < above, ndtri(below), -ndtri(above))
            log_det += log_density + 0.5 * Z[:, i] ** 2 + LOG_ROOT_2PI
        return Z, log_det

    def inverse(self, Z):
        """Return rows in the original units."""
        X = Z.copy()
        for i in np.flatnonzero(np.isfinite(self.low) | np.isfinite(self.high)):
            z, low, high, scale = Z[:, i], self.low[i], self.high[i], self.scale[i]
            if math.isinf(high):
                X[:, i] = low - scale * log_ndtr(-z)
            elif math.isinf(low):
                X[:, i] = high + scale * log_ndtr(z)
            else:
                near = scale * ndtr(-np.abs(z))
                X[:, i] = np.where(z < 0, low + near, high - near)
        return X

    def keep_inside(self, X):
        """Return rows in their own dtype, those that rounding put on a limit inside."""
        low, high = self.low.astype(X.dtype), self.high.astype(X.dtype)
        after, before = np.nextafter(low, high), np.nextafter(high, low)
        first = np.where(low > self.low, low, after)
        last = np.where(high < self.high, high, before)
        return np.clip(X, first, last)
