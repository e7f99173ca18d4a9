"""Columns of `CNFDensity` with rounded values: noise for them, and back to the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np

from sknode._density_bounds import find_column

__all__ = ["Grid", "count_repetitions", "find_tied"]

# From so many rows on, a share of equal values in a column that says it is discrete.
TIED_ROWS, TIED_SHARE = 50, 0.05
# Values count as equal that differ by so many roundings of the largest one.
ROUNDINGS = 32
# Of repeated rows there are so many in all, at most, each with noise of its own.
MOST_COPIES = 100_000


def count_repetitions(weight):
    """Return how many rows each row stands for: whole weights are repetitions."""
    # beyond the last one all numbers are whole
    whole = (weight == np.round(weight)).all() and weight.max() < 2**53
    return weight if whole else np.ones_like(weight)


def find_tied(X, count):
    """Return which columns have a value that occurs again and again, but no other."""
    n = count.sum()
    if n < TIED_ROWS:
        return np.zeros(X.shape[1], dtype=bool)

    def most(column):
        _, group = np.unique(column, return_inverse=True)
        return np.bincount(group, weights=count).max()

    largest = np.array([most(column) for column in X.T])
    return (largest > TIED_SHARE * n) & (largest < n)


@dataclass(frozen=True)
class Grid:
    """The values ``offset + k * width`` of rounded columns.

    Attributes
    ----------
    offset : ndarray of shape (d,)
        Smallest values.
    width : ndarray of shape (d,)
        Distances of neighbours, 0 for columns that are not rounded.
    """

    offset: np.ndarray
    width: np.ndarray

    @classmethod
    def none(cls, dim: int):
        """Return that of columns none of which is rounded."""
        return cls(np.zeros(dim), np.zeros(dim))

    @classmethod
    def fit(cls, dequantize, X, count, names, eps):
        """Learn the grids that a parameter asks for.

        Parameters
        ----------
        dequantize : bool, dict or array-like
            The parameter.
        X : ndarray of shape (n, d)
            Rows.
        count : ndarray of shape (n,)
            How many rows each stands for.
        names : ndarray of shape (d,)
            Names of the columns, or their positions where they have no names.
        eps : float
            Relative rounding of X.
        """
        if isinstance(dequantize, bool | np.bool_):
            chosen = np.flatnonzero(find_tied(X, count)) if dequantize else []
            widths = dict.fromkeys(chosen)
        else:
            widths = _read_columns(dequantize, names)
        width = np.zeros(X.shape[1])
        for i, given in widths.items():
            width[i] = _resolution(X[:, i], eps) if given is None else given
        return cls(X.min(0), width)

    def spread(self, X, count, low, high, rng):
        """Spread rows over the cells around their values.

        Parameters
        ----------
        X : ndarray of shape (n, d)
            Rows.
        count : ndarray of shape (n,)
            How many rows each stands for.
        low, high : ndarray of shape (d,)
            Limits of the columns, that no cell crosses.
        rng : Generator
            Draws the noise.

        Returns
        -------
        X : ndarray of shape (m, d)
            Rows with uniform noise as wide as the cells.
        source : ndarray of shape (m,)
            The rows that they come from. If all columns are rounded there are as many
            as rows were repeated, each with noise of its own. Otherwise there is one
            each: of several with the same continuous values some would be held out, and
            found again among the others.
        """
        rounded = self.width > 0
        source = np.arange(len(X))
        if rounded.all():
            share = min(1.0, MOST_COPIES / count.sum())
            source = np.repeat(source, np.ceil(count * share).astype(np.int64))
        X = X[source]
        first = np.maximum(X - self.width / 2, low)[:, rounded]
        last = np.minimum(X + self.width / 2, high)[:, rounded]
        X[:, rounded] = first + (last - first) * rng.uniform(size=first.shape)
        return X, source

    def round(self, X, low, high):
        """Return rows with rounded columns on their grids, between limits (d,)."""
        X = X.copy()
        for i in np.flatnonzero(self.width):
            k = np.rint((X[:, i] - self.offset[i]) / self.width[i])
            # whole cells are between the limits, but for rounding
            first = np.ceil((low[i] - self.offset[i]) / self.width[i] + 0.499)
            last = np.floor((high[i] - self.offset[i]) / self.width[i] - 0.499)
            X[:, i] = self.offset[i] + np.clip(k, first, last) * self.width[i]
        return X


def _read_columns(dequantize, names):
    """Return a dict from positions of columns to widths, None where not given."""
    if isinstance(dequantize, Mapping):
        for name, width in dequantize.items():
            good = isinstance(width, Real) and 0 < width < np.inf
            if not good or isinstance(width, bool):
                raise ValueError(
                    "dequantize must have positive widths. "
                    f"Got {width!r} for column {name!r}."
                )
        return {
            find_column(name, names, "dequantize"): float(width)
            for name, width in dequantize.items()
        }
    columns = list(np.asarray(dequantize, dtype=object))
    if columns and all(isinstance(c, bool | np.bool_) for c in columns):
        if len(columns) != len(names):
            raise ValueError(
                f"dequantize must have an entry for each of the {len(names)} columns "
                f"of X if it is a mask. Got {len(columns)}."
            )
        columns = list(np.flatnonzero(columns))
    return dict.fromkeys(find_column(c, names, "dequantize") for c in columns)


def _resolution(column, eps) -> float:
    """Return the smallest gap between values that are not equal up to rounding."""
    gaps = np.diff(np.unique(column))
    gaps = gaps[gaps > ROUNDINGS * eps * np.abs(column).max()]
    return float(gaps.min()) if len(gaps) else 1.0
