"""Integrate until a function of time and state crosses zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from sknode.ode.solution import Status
from sknode.ode.torchdiffeq.adams import AdamsSteps
from sknode.ode.torchdiffeq.fixed_grid import interpolate
from sknode.ode.torchdiffeq.forward import numerics, run, stop_times, watched
from sknode.ode.torchdiffeq.problem import OdeintError, Problem, invalid

__all__ = ["EventFunction", "Found", "find", "integrate_until"]

# How far to look, in units of t[1] - t[0], and how often to look further.
HORIZON = 1e4
EXTENSIONS = 4
# Steps on a grid after which to give up.
GRID_STEPS = 20_000


class EventFunction:
    """Several event functions as one: the least, turned positive at the start.

    Parameters
    ----------
    event_fn : callable
        ``event_fn(t, y)`` returns a tensor of any shape.
    problem : Problem
        For the state's layout.
    """

    def __init__(self, event_fn: Callable, problem: Problem):
        self.event_fn, self.problem = event_fn, problem
        self.dtype = problem.y0.abs().dtype
        with torch.no_grad():
            value = event_fn(*self._inputs(problem.t[0], problem.y0))
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise TypeError(f"event_fn must return a tensor. Got {kind} instead.")
            self.signs = torch.sign(value)

    def _inputs(self, t: Tensor, y: Tensor):
        t = torch.as_tensor(t, dtype=self.dtype, device=y.device)
        return t, self.problem.layout.restore(y.reshape(-1))

    def __call__(self, t, y: Tensor) -> Tensor:
        """Return the scalar that crosses zero, differentiable."""
        return (self.event_fn(*self._inputs(t, y)) * self.signs).min()

    def at(self, t: float, y: Tensor) -> float:
        """Return its value as a number."""
        with torch.no_grad():
            value = float(self(t, y))
        if np.isnan(value):
            raise ValueError(f"event_fn is not a number at t = {t:.6g}.")
        return value


@dataclass
class Found:
    """An event: its time and state, and the steps that led to it."""

    t: float
    y: Tensor  # (n,)
    step_end: float
    first_step: float | None = None


class Crossing:
    """Watches the steps of a solve and ends it at the event.

    Parameters
    ----------
    event : EventFunction
        What has to cross zero.
    """

    def __init__(self, event: EventFunction):
        self.event = event
        self.found: Found | None = None
        self._first_step: float | None = None

    def look(self, rows, t, t1, y, y1, moved, sign, dense):
        """Return the mask of ended lanes with their times and states, or None."""
        start, length = float(t[0]), float(t1[0] - t[0])
        if self._first_step is None:
            self._first_step = length
        after = self.event.at(sign * float(t1[0]), y1)
        if after > 0:
            return None

        def state(theta):
            place = torch.tensor([theta], dtype=y.abs().dtype, device=y.device)
            return dense(torch.zeros(1, dtype=torch.int64, device=y.device), place)

        theta = locate(
            lambda x: self.event.at(sign * (start + x * length), state(x)), after
        )
        ends, y_event = start + theta * length, state(theta)
        self.found = Found(
            t=sign * ends,
            y=y_event[0],
            step_end=sign * float(t1[0]),
            first_step=self._first_step,
        )
        return np.array([True]), np.array([ends]), y_event


def locate(value: Callable[[float], float], after: float) -> float:
    """Return where in [0, 1] a function reaches zero that ends at or below it."""
    before = value(0.0)
    if before <= 0:
        return 0.0
    if after == 0:
        return 1.0
    ends = {0.0: before, 1.0: after}
    return brentq(lambda x: ends[x] if x in ends else value(x), 0.0, 1.0, xtol=1e-14)


def find(problem: Problem, event: EventFunction) -> Found:
    """Look for the event, without gradients."""
    t0, t1 = problem.t.detach().double().tolist()
    if event.at(t0, problem.y0) == 0:
        return Found(t0, problem.y0.detach(), t0)
    if problem.family == "scipy":
        raise invalid("method", "one that supports event_fn", problem.method)
    if problem.family == "adaptive":
        reach, attempts = HORIZON * (t1 - t0), EXTENSIONS
    else:
        reach, attempts = problem.sign * GRID_STEPS * _step_size(problem), 1
    for _ in range(attempts):
        watch = Crossing(event)
        times = problem.t.new_tensor([t0, t0 + reach], dtype=torch.float64)
        solution = watched(replace(problem, t=times), times, watch)
        if int(solution.status[0]) == Status.EVENT:
            return watch.found
        reach *= HORIZON
    raise _nothing(t0 + reach / HORIZON)


def integrate_until(problem: Problem, event_fn: Callable, gradient: str):
    """Return the time of the event, and the states at the start and there.

    The state has its gradient at a fixed time of the event.

    Returns
    -------
    event_t : Tensor of shape ()
    y : Tensor of shape (2, n)
    """
    if len(problem.t) != 2:
        raise invalid("t", "of length 2 with event_fn", f"length {len(problem.t)}")
    event = EventFunction(event_fn, problem)
    if problem.family == "adams":
        return _adams_until(problem, event)
    found = find(problem, event)
    event_t = problem.t.new_tensor(found.t)
    at_start = found.step_end == float(problem.t[0].detach())
    if not torch.is_grad_enabled() or at_start:
        return event_t, torch.stack([problem.y0, found.y])
    # the same steps again, with the event as an output inside the last one
    ends = problem.t.new_tensor([found.t, found.step_end], dtype=torch.float64)
    times = torch.cat([problem.t[:1].double(), ends])
    settings = numerics(problem)
    if problem.family == "adaptive":
        settings["stops"] = stop_times(replace(problem, t=times[[0, 2]].detach()))
        settings["first_step"] = found.first_step
    y = run(problem, times, gradient, monitor=None, **settings)
    return event_t, y[:2]


def _adams_until(problem: Problem, event: EventFunction):
    """Take Adams steps until the event."""
    step, t0, y = problem.sign * _step_size(problem), problem.t[0].double(), problem.y0
    if event.at(float(t0.detach()), y) == 0:
        return problem.t[0].detach().clone(), torch.stack([y, y])
    steps = AdamsSteps(problem)
    for _ in range(GRID_STEPS):
        t1 = t0 + step
        y1 = steps.step(t0, t1, y)
        after = event.at(float(t1.detach()), y1)
        if not after > 0:
            break
        t0, y = t1, y1
    else:
        raise _nothing(float(t0.detach()))
    grid, states = torch.stack([t0, t1]), torch.stack([y, y1])

    def state(theta):
        return interpolate(problem, grid, states, (t0 + theta * (t1 - t0))[None])[0]

    def value(theta):
        with torch.no_grad():
            return event.at(float((t0 + theta * (t1 - t0)).detach()), state(theta))

    theta = locate(value, after)
    event_t = (t0 + theta * (t1 - t0)).detach()
    y_event = interpolate(problem, grid, states, event_t[None])[0]
    return event_t.to(problem.t.dtype), torch.stack([problem.y0, y_event])


def _step_size(problem: Problem) -> float:
    """Return the step of methods without error control."""
    step_size = problem.options.get("step_size")
    if step_size is None:
        raise invalid("options", "with step_size for event_fn", problem.options)
    return float(step_size)


def _nothing(t: float) -> OdeintError:
    return OdeintError(f"event_fn did not cross zero before t = {t:.6g}.")
