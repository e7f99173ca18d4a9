"""The rows that `CNFDensity` learns from: checked, merged, held out."""

from __future__ import annotations

import warnings

import numpy as np

from sknode._warning import stacklevel_of_caller
from sknode._warp import find_collinear, find_constant, kish

__all__ = ["hold_out", "merge_rows", "warn_of_ties"]

# From so many rows on, a share of equal values in a column that is worth a warning.
TIED_ROWS, TIED_SHARE = 50, 0.05


def merge_rows(X, weight, name):
    """Return different rows in sorted order, and their weights.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows, with positive weights.
    weight : ndarray of shape (n,)
        Their weights.
    name : callable
        Names columns by their mask, for messages.

    Returns
    -------
    X : ndarray of shape (m, d)
        Rows without repetitions.
    weight : ndarray of shape (m,)
        Weights that add up to the number of rows that they amount to.
    """
    X, group = np.unique(X, axis=0, return_inverse=True)
    weight = np.bincount(group.ravel(), weights=weight)
    if len(X) < 2:
        raise ValueError(
            "X must have at least 2 different rows with positive weight. Got "
            f"n_samples = {len(X)}."
        )
    constant = find_constant(X, weight)
    if constant.any():
        raise ValueError(
            "X has constant columns, which have no density: "
            f"{name(constant)}. Drop them."
        )
    if len(X) > X.shape[1]:
        collinear = find_collinear(X, weight)
        if collinear.any():
            warnings.warn(
                "X has columns that are linear combinations of each other, so that "
                f"it has no density: among {name(collinear)}. Drop "
                "some of them. The density is that with a little noise.",
                UserWarning,
                stacklevel=stacklevel_of_caller(),
            )
    return X, weight * (kish(weight) / weight.sum())


def warn_of_ties(X, name):
    """Warn about columns that look discrete."""
    if len(X) < TIED_ROWS:
        return
    most = np.array([np.unique(c, return_counts=True)[1].max() for c in X.T])
    tied = (most > TIED_SHARE * len(X)) & (most < len(X))
    if tied.any():
        warnings.warn(
            "X has columns in which a value occurs again and again: "
            f"{name(tied)}. Discrete values have no density. Add "
            "uniform noise as wide as their resolution.",
            UserWarning,
            stacklevel=stacklevel_of_caller(),
        )


def hold_out(n, fraction, seed):
    """Return indices of the rows for training and of those held out."""
    order = np.random.RandomState(seed).permutation(n)
    n_held_out = max(1, round(fraction * n)) if fraction else 0
    return order[n_held_out:], order[:n_held_out]
