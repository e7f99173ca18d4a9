"""The rows that `CNFDensity` learns from: checked, merged, held out."""

from __future__ import annotations

import warnings

import numpy as np

from sknode._warning import stacklevel_of_caller
from sknode._warp import find_collinear, find_constant

__all__ = ["check_columns", "deal", "hold_out", "merge_rows", "warn_of_columns"]


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


def warn_of_columns(X, values, weight, tied, name):
    """Warn about columns that look discrete, and about collinear ones.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows.
    values : ndarray of shape (n, n_values)
        Values that their density depends on, if any.
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
    n_values = values.shape[1]
    if len(X) <= X.shape[1] + n_values:
        return
    collinear = find_collinear(np.hstack([X, values]), weight)[: X.shape[1]]
    if collinear.any():
        warnings.warn(
            "X has columns that are linear combinations of each other"
            f"{' or of y' if n_values else ''}, so that "
            f"it has no density: among {name(collinear)}. Drop "
            "some of them. The density is that with a little noise.",
            UserWarning,
            stacklevel=stacklevel_of_caller(),
        )


def hold_out(n, fraction, seed, strata=None):
    """Return indices of the rows for training and of those held out.

    Parameters
    ----------
    n : int
        Number of rows.
    fraction : float
        Share that is held out, at least one row unless it is zero.
    seed : int
        Draws them.
    strata : ndarray of shape (n,), optional
        Labels of which the share is held out each, none of a few rows.
    """
    order = np.random.RandomState(seed).permutation(n)
    if not fraction:
        return order, order[:0]
    n_held_out = max(1, round(fraction * n))
    if strata is not None:
        labels = strata[order]
        rank = np.empty(n, dtype=int)
        for label in np.unique(labels):
            rank[labels == label] = np.arange((labels == label).sum())
        size = np.bincount(strata)[labels]
        held_out = rank < np.round(fraction * size)
        if held_out.any():
            return order[~held_out], order[held_out]
    return order[n_held_out:], order[:n_held_out]


def deal(order, strata, n_parts):
    """Return an order whose ``n_parts`` parts have equal shares of all strata."""
    order = order[np.argsort(strata[order], kind="stable")]
    return np.concatenate([order[i::n_parts] for i in range(n_parts)])
