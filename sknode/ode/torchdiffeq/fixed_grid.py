"""Runge-Kutta steps on a grid of times, without error control."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import real_dtype
from sknode.ode.grid import Grid
from sknode.ode.lanes import to_device
from sknode.ode.methods import Method
from sknode.ode.options import Options
from sknode.ode.runge_kutta import (
    ExplicitStepper,
    StageBuffer,
    StageTimes,
    dense_values,
)
from sknode.ode.solution import Status
from sknode.ode.tableaus import Tableau
from sknode.ode.torchdiffeq.problem import Problem, invalid
from sknode.ode.trace import StepRecord, Trace

__all__ = ["UNLIMITED", "grid_times", "interpolate", "on_grid", "walk"]

# A step as long as the grid has room for.
UNLIMITED = 1e300


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
    return Method(tableau.name, False, ExplicitStepper, tableau)


def walk(
    field,
    y0: Tensor,
    grid: Grid,
    options: Options,
    *,
    k0: Tensor | None = None,
    record: bool = False,
) -> Trace:
    """Take the steps of a grid, instead of `integrate`; for one lane.

    There is nothing to decide, so this is much shorter. It computes the slope at a grid
    point when the step from it is taken: the field is not called at the last time, and
    sees the time just after a grid point where ``perturb`` asks for this. Parameters
    and result are those of `integrate`.
    """
    points, stops_passed = _points(grid, options)
    n_steps, n_times, sign = len(points) - 1, len(grid.times), grid.direction
    cut = np.searchsorted(grid.times, points, side="right").clip(max=n_times - 1)
    step = _Step(field, options, sign * points[:-1], sign * points[1:], y0)
    outputs_y, records, y = y0[:, None].repeat(1, n_times, 1), [], y0
    tied = grid.stops is not None and grid.stops.tied
    status, last, n_dense = Status.SUCCESS, n_steps, 0
    for i in range(n_steps):
        t, t1 = points[i : i + 1], points[i + 1 : i + 2]
        if options.monitor is not None:
            options.monitor.on_step(float(sign * t[0]), y, float(t1[0] - t[0]))
        y1, slope = step.take(i, y, k0 if i == 0 else None)
        k0 = slope if k0 is None else k0
        outputs = None
        if tied:
            outputs_y[:, cut[i] : cut[i + 1]] = y1[:, None]
        elif cut[i + 1] > cut[i]:
            outputs = step.outputs(np.arange(cut[i], cut[i + 1]), grid.times, t, t1)
            outputs_y[0, outputs[1]] = step.dense(outputs[0], outputs[2])
            n_dense += 1
        if record:
            ends, arrived = (sign * t, sign * t1), np.array([i == n_steps - 1])
            entry = StepRecord(None, *ends, step.h, y, arrived, outputs)
            if grid.stops is not None:
                entry.start_stop = stops_passed[i : i + 1]
                entry.end_stop = stops_passed[i + 1 : i + 2]
            records.append(entry)
        if options.watch is not None:
            moved = np.array([True])
            found = options.watch.look(None, t, t1, y, y1, moved, sign, step.dense)
            if found is not None:
                status, last, points[i + 1], y = (
                    Status.EVENT,
                    i + 1,
                    found[1][0],
                    found[2],
                )
                break
        y = y1
        if stops_passed[i + 1] > stops_passed[i] and grid.stops.on_reach is not None:
            first, after = stops_passed[i : i + 1], stops_passed[i + 1 : i + 2]
            y, _ = grid.stops.on_reach(None, first, after, t1, y, None)
    if n_steps:
        outputs_y[:, -1] = y

    def one(value):
        return np.array([value])

    return Trace(
        y=outputs_y,
        status=one(int(status)),
        n_steps=one(last),
        n_rejected=one(0),
        n_dense=one(n_dense),
        next_output=one(n_times - 1),
        t_reached=one(sign * points[last]),
        moving=one(n_steps > 0),
        records=records if record else None,
        at_start=grid.at_start[None],
        k0=torch.zeros_like(y0) if k0 is None else k0,
        n_padded=1,
        n_evaluations=one(step.n_evaluations - (n_steps > 0)),
    )


class _Step:
    """Steps of a Runge-Kutta method on a grid.

    Parameters
    ----------
    field : BoundField
        The vector field.
    options : Options
        For the tableau.
    t, t1 : ndarray of shape (n_steps,)
        Where they start and end, in the direction of the interval.
    like : Tensor of shape (1, n)
        A state.
    """

    def __init__(self, field, options: Options, t, t1, like: Tensor):
        self.field, self.tableau = field, options.tableau
        self.coefficients = self.tableau.tensors(like.dtype, like.device)
        self._buffer = StageBuffer(self.tableau.n_stages, like, field.reusable)
        self._times = None
        if field.uses_time:
            # all of them at once: a step then needs no transfer
            inside = options.open_steps
            times = StageTimes(field, self.tableau, t, t1, like, inside)
            columns = [times[stage] for stage in range(self.tableau.n_stages)]
            self._times = torch.cat(columns, 1)
        real = real_dtype(like.dtype)
        self._at = [None] * self.tableau.n_stages
        self._h = torch.from_numpy(t1 - t).to(like.device, real)[:, None, None]
        self.n_evaluations = 0

    def _evaluate(self, stage: int, y: Tensor) -> Tensor:
        self.n_evaluations += 1
        return self.field.evaluate(self._at[stage], y)

    def take(self, i: int, y: Tensor, slope: Tensor | None):
        """Take step i; return the state at its end and the slope at its start."""
        buffer, a, h = self._buffer, self.coefficients.a, self._h[i]
        last, flat = self.tableau.n_stages - 1, y.view(-1)
        if self._times is not None:
            self._at = self._times[i].unbind(0)
        if slope is None:
            slope = self._evaluate(0, y)
        torch.mul(slope, h, out=buffer.rows[0])
        for stage in range(1, last):
            state = buffer.combine(flat, stage, a[stage])
            torch.mul(self._evaluate(stage, state), h, out=buffer.rows[stage])
        # the increment first: adding its parts to y would round as often
        y1 = torch.mv(buffer.columns[last], a[last]).add_(flat).view(y.shape)
        self.h, self._y, self._y1, self._whole = h, y, y1, False
        return y1, slope

    def outputs(self, columns: np.ndarray, times: np.ndarray, t, t1):
        """Return lanes, columns and places in the step of some output times."""
        theta = np.clip((times[columns] - t) / (t1 - t), 0.0, 1.0)
        lanes = np.zeros_like(columns)
        return tuple(to_device(x, self._y) for x in (lanes, columns, theta))

    def dense(self, lanes: Tensor, theta: Tensor) -> Tensor:
        """Return states inside the step."""
        if not self._whole:
            last, self._whole = self.tableau.n_stages - 1, True
            row = self._buffer.rows[last]
            if self.tableau.dense[-1].any():
                slope = self._evaluate(last, self._y1)
                torch.mul(slope, self.h, out=row)
            else:
                row.zero_()
        return dense_values(self.tableau, self._y, self._buffer.values, lanes, theta)


def _points(grid: Grid, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending ends of all steps, and the stops passed at each of them."""
    stops = np.zeros(0) if grid.stops is None else grid.stops.times
    ends = np.concatenate([stops, grid.times[-1:]])
    points, passed, start = [grid.times[:1]], [np.zeros(1, np.int64)], grid.times[0]
    for index, end in enumerate(ends):
        # steps that divide the piece are that many, however their sum rounds
        n = max(int(np.ceil((end - start) / options.step_size - 1e-6)), 1)
        if end == start:
            continue
        points.append(np.append(start + options.step_size * np.arange(1, n), end))
        count = np.full(n, index, np.int64)
        count[-1] = min(index + 1, len(stops))
        passed.append(count)
        start = end
    return np.concatenate(points), np.concatenate(passed)


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
