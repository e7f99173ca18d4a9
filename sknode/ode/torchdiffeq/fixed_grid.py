"""Runge-Kutta steps on a grid of times, without error control."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sknode.ode.methods import Method
from sknode.ode.runge_kutta import ExplicitStepper, StageBuffer
from sknode.ode.tableaus import Tableau
from sknode.ode.torchdiffeq.problem import Problem, invalid

__all__ = ["UNLIMITED", "FixedGridStepper", "grid_times", "interpolate", "on_grid"]

# A step as long as the grid has room for.
UNLIMITED = 1e300


class FixedGridStepper(ExplicitStepper):
    """Explicit Runge-Kutta steps that never look ahead.

    The slope at the end of a step is computed when the next one needs it, so the field
    is not called at the last time, and sees the time just after a grid point where
    ``perturb`` asks for this.
    """

    def __init__(self, field, options):
        super().__init__(field, options)
        self._started = False

    def _step(self, h, y, k1, buffer: StageBuffer):
        tableau, times = self.tableau, self._times
        a, last = tableau.tensors(y.dtype, y.device).a, tableau.n_stages - 1
        rows, flat = buffer.rows, y.view(-1)
        slope = self.field.evaluate(times[0], y) if self._started else k1
        self._started = True
        torch.mul(slope, h, out=rows[0])
        for i in range(1, last):
            slope = self.field.evaluate(times[i], buffer.combine(flat, i, a[i]))
            torch.mul(slope, h, out=rows[i])
        # the increment first: adding its parts to y would round as often
        y1 = torch.mv(buffer.columns[last], a[last]).add_(flat).view(y.shape)
        rows[last].zero_()
        self._y1 = y1
        return y1, k1

    def _extend(self):
        if self.tableau.dense[-1].any():
            slope = self.field.evaluate(self._times[-1], self._y1)
            torch.mul(slope, self._h, out=self._buffer.rows[-1])
        return self._buffer.values

    def evaluations(self, trace):
        per_step = self.tableau.n_stages - 1
        dense = trace.n_dense * bool(self.tableau.dense[-1].any())
        return np.maximum(trace.n_steps * per_step - 1, 0) + dense


@cache
def on_grid(tableau: Tableau, interp: str) -> Method:
    """Return a method that takes the steps of a grid.

    Parameters
    ----------
    tableau : Tableau
        The Runge-Kutta method.
    interp : {"linear", "cubic"}
        What is between the grid points: a straight line, or the cubic polynomial with
        the slopes at both.
    """
    if interp == "linear":
        weights = np.zeros((tableau.n_stages, 1))
        weights[:, 0] = tableau.b
        tableau = replace(tableau, dense=weights, dense_order=1, _cache={})
    return Method(tableau.name, False, FixedGridStepper, tableau)


def grid_times(problem: Problem) -> Tensor | None:
    """Return the grid that the user's constructor makes, None if there is none."""
    construct = problem.options.get("grid_constructor")
    if construct is None:
        return None
    t = problem.t
    y0 = problem.layout.restore(problem.y0)
    grid = construct(problem.func, y0, t)
    good = isinstance(grid, Tensor) and grid.ndim == 1 and len(grid) > 1
    if good:
        points = grid.detach().to(t.device)
        good = bool((torch.diff(points) * problem.sign > 0).all())
        good &= bool(points[0] == t[0]) and bool(points[-1] == t[-1])
    if not good:
        expected = "a function that returns monotonic times from t[0] to t[-1]"
        raise invalid("grid_constructor", expected, grid)
    return grid.to(t.device)


def interpolate(problem: Problem, grid: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Return states between grid points, differentiable also by all the times.

    Parameters
    ----------
    problem : Problem
        For the field, whose slopes a cubic needs, and for ``interp``.
    grid : Tensor of shape (m,)
        Grid points.
    y : Tensor of shape (m, n)
        States at the grid points.
    t : Tensor of shape (k,)
        Times between the first and the last grid point.

    Returns
    -------
    Tensor of shape (k, n)
    """
    sign = problem.sign
    ascending = (sign * grid).detach().contiguous()
    index = torch.searchsorted(ascending, (sign * t).detach().to(grid.dtype))
    left = (index - 1).clamp(0, len(grid) - 2)
    start, end = grid[left], grid[left + 1]
    real = problem.y0.abs().dtype
    theta = ((t - start) / (end - start)).to(real)[:, None]
    y0, y1 = y[left], y[left + 1]
    if problem.options.get("interp", "linear") == "linear":
        return y0 + theta * (y1 - y0)
    field, h = problem.field, (end - start).to(real)[:, None]

    def slopes(times, states):
        pairs = zip(times.to(real), states, strict=True)
        return torch.stack([field(time, state[None])[0] for time, state in pairs])

    k0, k1 = slopes(start, y0), slopes(end, y1)
    rest = 1 - theta
    return (
        y0 * rest**2 * (1 + 2 * theta)
        + y1 * theta**2 * (3 - 2 * theta)
        + h * theta * rest * (k0 * rest - k1 * theta)
    )
