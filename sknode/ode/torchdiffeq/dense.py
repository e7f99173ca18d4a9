"""`odeint_dense`: the solution as a function of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sknode.ode.runge_kutta import powers
from sknode.ode.torchdiffeq.forward import numerics, run, stop_times, watched
from sknode.ode.torchdiffeq.problem import Problem, invalid

__all__ = ["odeint_dense"]


def odeint_dense(
    func: Callable,
    y0,
    t0: Tensor,
    t1: Tensor,
    *,
    rtol=1e-7,
    atol=1e-9,
    method: str | None = None,
    options: dict | None = None,
) -> Callable:
    """Solve from t0 to t1 and return the solution as a function of time.

    Parameters
    ----------
    func, y0 : callable, Tensor or tuple of Tensor
        As for `odeint`.
    t0, t1 : Tensor of shape () or float
        The interval.
    rtol, atol, method, options : various
        As for `odeint`; ``method`` is one of the adaptive Runge-Kutta methods.

    Returns
    -------
    callable
        ``solution(t)`` for a time, or a vector of times, in the interval returns the
        state, or states with the times first. It is the method's dense output, and
        differentiable.

    Examples
    --------
    >>> import torch
    >>> from sknode.ode import odeint_dense
    >>> solution = odeint_dense(lambda t, y: -y, torch.ones(1), 0.0, 1.0)
    >>> solution(torch.tensor([0.5, 1.0]))
    tensor([[0.6065],
            [0.3679]])
    """
    dtype = t0.dtype if isinstance(t0, Tensor) else torch.float64
    ends = [torch.as_tensor(x, dtype=dtype) for x in (t0, t1)]
    t = torch.stack(ends)
    problem = Problem.check(func, y0, t, rtol, atol, method, options)
    tableau = problem.core_method.tableau if problem.family == "adaptive" else None
    if tableau is None:
        raise invalid("method", "an adaptive Runge-Kutta method", problem.method)
    steps = _StepEnds()
    watched(problem, problem.t, steps)
    # the same steps again, with as many outputs in each as its polynomial needs
    degree = tableau.dense.shape[1]
    theta = (1 - np.cos(np.pi * np.arange(degree + 1) / degree)) / 2
    points = np.array([problem.sign * float(t[0].detach()), *steps.ends])
    inner = points[:-1, None] + np.diff(points)[:, None] * theta[1:]
    times = problem.sign * np.concatenate([points[:1], inner.ravel()])
    times = torch.from_numpy(times).to(problem.y0.device)
    if problem.t.requires_grad:
        times = torch.cat([problem.t[:1].double(), times[1:-1], problem.t[1:].double()])
    settings = numerics(problem) | {"stops": stop_times(problem), "monitor": None}
    y = run(
        replace(problem, options=_uncounted(problem)), times, "discrete", **settings
    )
    return _DenseOutput(problem, points, theta, y)


def _uncounted(problem: Problem) -> dict:
    """Return the options without the limit of steps, which has been kept already."""
    return {k: v for k, v in problem.options.items() if k != "max_num_steps"}


class _StepEnds:
    """Watches a solve and remembers where its steps end."""

    def __init__(self):
        self.ends: list[float] = []

    def look(self, rows, t, t1, y, y1, moved, sign, dense):
        self.ends.append(float(t1[0]))


class _DenseOutput:
    """A polynomial in every step, through states at some places in it."""

    def __init__(self, problem: Problem, points, theta, y: Tensor):
        self.problem = problem
        real = problem.y0.abs().dtype
        device = y.device
        self.points = torch.from_numpy(points).to(device)
        powers_at = np.vander(theta, increasing=True)
        # rows: power of theta; columns: place in the step
        self.weights = torch.from_numpy(np.linalg.inv(powers_at)).to(device, real)
        n = len(theta)
        index = torch.arange(len(points) - 1, device=device)[:, None] * (n - 1)
        self.y = y[index + torch.arange(n, device=device)]  # (steps, places, n)

    def __call__(self, t):
        """Return the states at one or several times."""
        problem = self.problem
        t = torch.as_tensor(t, dtype=torch.float64, device=self.y.device)
        if t.ndim > 1:
            raise invalid("t", "a scalar or a vector", tuple(t.shape))
        ascending = problem.sign * t.reshape(-1)
        values = ascending.detach()
        if not bool(((values >= self.points[0]) & (values <= self.points[-1])).all()):
            raise invalid("t", "in the interval of the solution", t)
        step = torch.searchsorted(self.points, values).clamp(min=1) - 1
        start, end = self.points[step], self.points[step + 1]
        theta = ((ascending - start) / (end - start)).to(self.weights.dtype)
        basis = powers(theta, len(self.weights) - 1) @ self.weights
        flat = torch.einsum("mp,mpn->mn", basis.to(self.y.dtype), self.y[step])
        if t.ndim == 0:
            return problem.layout.restore(flat[0])
        return problem.restore(flat)
