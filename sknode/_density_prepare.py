"""From the rows and targets given to `CNFDensity` to those that it learns from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sknode._base import near_one
from sknode._density_bounds import Bounds, check_bounds
from sknode._density_condition import (
    ClassCondition,
    Given,
    Unconditional,
    ValueCondition,
    check_target,
    fit_condition,
)
from sknode._density_dequantize import Grid, count_repetitions, find_tied
from sknode._density_rows import check_columns, merge_rows, warn_of_columns
from sknode._warp import check_spread, kish

__all__ = ["Maps", "prepare_rows"]


@dataclass(frozen=True)
class Maps:
    """What is known about columns and targets.

    Attributes
    ----------
    condition : Unconditional, ClassCondition or ValueCondition
        Encodes targets.
    grid : Grid
        Values of rounded columns.
    bounds : Bounds
        Map of columns with limits, which are moved for rounded ones.
    """

    condition: Unconditional | ClassCondition | ValueCondition
    grid: Grid
    bounds: Bounds

    @classmethod
    def none(cls, dim: int):
        """Return that of nothing known."""
        return cls(Unconditional(), Grid.none(dim), Bounds.none(dim))


def prepare_rows(X, y, weight, names, seed, parameters, maps=None):
    """Return rows to learn from: different ones, in sorted order, within limits.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows.
    y : array-like or None
        Targets.
    weight : ndarray of shape (n,)
        Weights, not negative.
    names : ndarray of shape (d,)
        Names of the columns, or their positions where they have no names.
    seed : int
        Draws the noise of rounded columns.
    parameters : dict
        Parameters ``bounds``, ``dequantize`` and ``conditional`` of the estimator.
    maps : Maps, optional
        From an earlier fit that goes on.

    Returns
    -------
    X : ndarray of shape (m, d)
        Rows, with noise where columns are rounded.
    given : Given
        What their density depends on.
    weight : ndarray of shape (m,)
        Weights that add up to the number of rows that they amount to.
    maps : Maps
        What was learned about columns and targets.
    """
    eps, X = np.finfo(X.dtype).eps, X.astype(np.float64, copy=False)
    count = count_repetitions(weight)
    weight, _ = near_one(weight)
    kept, kind = weight > 0, parameters["conditional"]
    if kind:
        y = check_target(y, len(X))[kept]
    if maps is not None:
        condition = maps.condition
    else:
        condition = fit_condition(y, weight[kept], kind) if kind else Unconditional()
    X, weight = X[kept], weight[kept]
    rows = np.hstack([X, condition.encode(y, len(X))])
    rows, weight, count = merge_rows(rows, weight, count[kept])
    X, C = np.split(rows, [X.shape[1]], axis=1)

    def name(mask):
        return ", ".join(map(str, names[mask]))

    check_spread(X, weight, names, "X")
    check_columns(X, weight, name)
    if maps is None:
        grid = Grid.fit(parameters["dequantize"], X, count, names, eps)
    else:
        grid = maps.grid
    tied = find_tied(X, count) & (grid.width == 0)
    low, high = check_bounds(parameters["bounds"], names)
    low, high = low - grid.width / 2, high + grid.width / 2
    limits = Bounds(low, high, np.ones(len(low)))
    limits.check(X, names)
    rng = np.random.default_rng([seed, 1])  # not the draws of anything else
    X, source = grid.spread(X, count, low, high, rng)
    X, weight = limits.keep_inside(X), weight[source] / np.bincount(source)[source]
    weight *= kish(weight) / weight.sum()
    C = C[source]
    values = C if condition.kind == "values" else C[:, :0]
    warn_of_columns(X, values, weight, tied, name)
    bounds = Bounds.fit(low, high, X, weight) if maps is None else maps.bounds
    bounds.check(X, names)
    return X, Given(condition, C), weight, Maps(condition, grid, bounds)
