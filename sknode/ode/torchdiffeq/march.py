"""Steps on a grid under torch's autograd: the times of the grid move freely."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sknode.ode.control import real_dtype
from sknode.ode.runge_kutta import combine, taped_stages
from sknode.ode.tableaus import Tableau
from sknode.ode.torchdiffeq.fixed_grid import grid_times, interpolate
from sknode.ode.torchdiffeq.problem import Problem

__all__ = ["RungeKuttaSteps", "march", "step_grid"]


def march(problem: Problem, grid: Tensor, step) -> Tensor:
    """Return the states at the output times, of shape (n_times, n).

    Parameters
    ----------
    problem : Problem
        What is solved.
    grid : Tensor of shape (m,)
        The grid from the first to the last output time; differentiable.
    step : callable
        ``step(t0, t1, y)`` returns the state at ``t1``.
    """
    states = [problem.y0]
    for t0, t1 in pairwise(grid.double()):
        states.append(step(t0, t1, states[-1]))
    states = torch.stack(states)
    if grid is problem.t:
        return states
    inner = interpolate(problem, grid, states, problem.t[1:])
    return torch.cat([states[:1], inner])


def step_grid(problem: Problem) -> Tensor:
    """Return the grid of a problem: its output times, or what its options say."""
    grid = grid_times(problem)
    step_size = problem.options.get("step_size")
    if grid is not None or step_size is None or len(problem.t) == 1:
        return problem.t if grid is None else grid
    t0, t1 = problem.t[0].double(), problem.t[-1].double()
    step = float(step_size)
    # steps that divide the interval are that many, however their sum rounds
    n = max(int(torch.ceil((t1 - t0).detach().abs() / step - 1e-6)), 1)
    steps = torch.arange(n, dtype=t0.dtype, device=t0.device)
    return torch.cat([t0 + problem.sign * step * steps, t1[None]])


class RungeKuttaSteps:
    """Explicit Runge-Kutta steps, differentiable also by their times."""

    def __init__(self, problem: Problem, tableau: Tableau):
        self.field, self.tableau = problem.field, tableau
        self.dtype = real_dtype(problem.y0.dtype)
        self.perturb = bool(problem.options.get("perturb", False))

    def time(self, t: Tensor, towards: Tensor) -> Tensor:
        """Return a grid point as the field sees it from a step towards another."""
        time = t.to(self.dtype)
        if self.perturb:
            inside = torch.nextafter(time.detach(), towards.detach().to(self.dtype))
            time = inside + (time - time.detach())
        return time

    def step(
        self, t0: Tensor, t1: Tensor, y: Tensor, slope: Tensor | None = None
    ) -> Tensor:
        """Return the state at t1; the slope at t0 may be known."""
        h, tableau = t1 - t0, self.tableau
        last = tableau.n_stages - 1
        times = []
        for c in tableau.c[:last].tolist():
            if c == 0 or c == 1:
                times.append(self.time(t1, t0) if c else self.time(t0, t1))
            else:
                times.append((t0 + c * h).to(self.dtype))
        h = h.to(self.dtype)
        first = None if slope is None else slope[None]
        k = taped_stages(self.field, tableau, times, h, y[None], first)
        return combine(y[None], k, tableau.rows[last])[0]
