"""The rows that `CNFDensity` learns from: checked, merged, held out."""

from __future__ import annotations

import warnings

import numpy as np

from sknode._warning import stacklevel_of_caller
from sknode._warp import find_collinear, find_constant

__all__ = ["check_columns", "hold_out", "merge_rows", "warn_of_columns"]


def merge_rows(X, *sums):
    """Return different rows in sorted order, and what belongs to them, added up.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows.
    *sums : ndarray of shape (n,)
        Weights and the like.
    """
    X, group = np.unique(X, axis=0, return_inverse=True)
    if len(X) < 2:
        raise ValueError(
            "X must have at least 2 different rows with positive weight. Got "
            f"n_samples = {len(X)}."
        )
    return X, *(np.bincount(group.ravel(), weights=x) for x in sums)


def check_columns(X, weight, name):
    """Raise an error that names the columns that are constant."""
    constant = find_constant(X, weight)
    if constant.any():
        raise ValueError(
            "X has constant columns, which have no density: "
            f"{name(constant)}. Drop them."
        )


def warn_of_columns(X, weight, tied, name):
    """Warn about columns that look discrete, and about collinear ones.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows.
    weight : ndarray of shape (n,)
        Their weights.
    tied : ndarray of shape (d,)
        Which columns look discrete.
    name : callable
        Names columns by their mask.
    """
    if tied.any():
        warnings.warn(
            "X has columns in which a value occurs again and again: "
            f"{name(tied)}. Discrete values have no density. Name the columns in "
            "dequantize, which adds uniform noise as wide as their resolution.",
            UserWarning,
            stacklevel=stacklevel_of_caller(),
        )
    if len(X) <= X.shape[1]:
        return
    collinear = find_collinear(X, weight)
    if collinear.any():
        warnings.warn(
            "X has columns that are linear combinations of each other, so that "
            f"it has no density: among {name(collinear)}. Drop "
            "some of them. The density is that with a little noise.",
            UserWarning,
            stacklevel=stacklevel_of_caller(),
        )


def hold_out(n, fraction, seed):
    """Return indices of the rows for training and of those held out."""
    order = np.random.RandomState(seed).permutation(n)
    n_held_out = max(1, round(fraction * n)) if fraction else 0
    return order[n_held_out:], order[:n_held_out]
