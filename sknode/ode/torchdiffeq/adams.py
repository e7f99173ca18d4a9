"""Adams methods on a grid of times, which need not be uniform.

With the grid ``t_0, t_1, ...`` and slopes ``f_n``, in terms of modified divided
differences

    phi_0(n) = f_n,   phi_{j+1}(n) = phi_j(n) - phi*_j(n-1),
    phi*_j(n) = beta_j(n) phi_j(n),

the explicit method of order k and the implicit one of order k + 1 are

    p = y_n + h sum_{j<k} g_j phi*_j(n),   y_{n+1} = p + h g_k phi_k(n+1),

where ``beta`` and ``g`` are numbers that depend on the grid alone. The first steps are
Runge-Kutta's. Everything is done with torch operations: gradients, also by the times,
are autograd's.

References
----------
Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", 2nd edition,
Springer 1993, section III.5.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from torch import Tensor

from sknode.ode.tableaus import get_tableau
from sknode.ode.torchdiffeq.march import RungeKuttaSteps
from sknode.ode.torchdiffeq.problem import Monitor, Problem, invalid

__all__ = ["AdamsSteps"]

# Order from which on Adams takes over from Runge-Kutta, and the highest there is.
MIN_ORDER, MAX_ORDER = 3, 12


class AdamsSteps:
    """Adams steps one after the other.

    Parameters
    ----------
    problem : Problem
        Its options ``max_order`` (12; one more than the order of the explicit method)
        and ``max_iters`` (4; evaluations that the implicit equation may take) count.
    """

    def __init__(self, problem: Problem):
        options = problem.options
        self.problem, self.field = problem, problem.field
        self.implicit = problem.method != "explicit_adams"
        self.max_order = int(options.get("max_order", MAX_ORDER))
        if not 1 <= self.max_order <= MAX_ORDER:
            raise invalid("max_order", f"between 1 and {MAX_ORDER}", self.max_order)
        self.max_iters = int(options.get("max_iters", 4))
        self._start = RungeKuttaSteps(problem, get_tableau("rk4"))
        self.times: list[Tensor | float] = []  # the latest first
        self.phi: list[Tensor] = []  # phi*_j of the step before
        self.monitor = Monitor(problem)

    def step(self, t0: Tensor, t1: Tensor, y: Tensor) -> Tensor:
        """Return the state at t1, of shape (n,), from that at t0."""
        slope = self._slope(t0, y, towards=t1)
        # plain numbers, unless gradients have to flow through them
        flows = t0.requires_grad or t1.requires_grad
        numbers = float(t0.detach()), float(t1.detach())
        self.monitor.on_step(numbers[0], y, abs(numbers[1] - numbers[0]))
        start, end = (t0, t1) if flows else numbers
        h = end - start
        beta = self._beta(start, end)
        phi = [slope]
        for old in self.phi[: len(beta) - 1]:
            phi.append(phi[-1] - old)
        self.times = [start, *self.times][: self.max_order - 1]
        self.phi = [b * p for b, p in zip(beta, phi, strict=True)]
        if len(phi) < MIN_ORDER:
            return self._runge_kutta(t0, t1, y, slope)
        g = self._weights(start, end, len(phi) + 1)
        order = self._order(g)
        increment = _sum(g[:order], self.phi) * h
        if not self.implicit:
            return y + increment
        expected = sum(self.phi[:order])
        return self._correct(t1, t0, y + increment, expected, g[order] * h)

    def _order(self, g) -> int:
        """Return how many terms to take: up to the smallest.

        Terms grow again where they are mostly rounding, or where a method of this
        order is not stable.
        """
        n = len(self.phi)
        if n == MIN_ORDER:
            return n
        with torch.no_grad():
            sizes = torch.stack(self.phi).abs().amax(1).tolist()
        numbers = [float(torch.as_tensor(w).detach()) for w in g]
        terms = [abs(w) * s for w, s in zip(numbers, sizes, strict=False)]
        return min(range(MIN_ORDER - 1, n), key=lambda j: (terms[j], -j)) + 1

    def _correct(self, t1, t0, predicted, expected, weight) -> Tensor:
        """Solve the implicit equation by iteration."""
        problem = self.problem
        state = predicted
        rounding = 4 * torch.finfo(predicted.dtype).eps
        for _ in range(self.max_iters):
            slope = self._slope(t1, state, towards=t0)
            before, state = state, predicted + weight * (slope - expected)
            size = torch.maximum(before.abs(), state.abs()).detach()
            tolerance = problem.atol + torch.clamp(problem.rtol, min=rounding) * size
            if bool(((state - before).detach().abs() <= tolerance).all()):
                return state
        warnings.warn(
            f"The implicit equation of an Adams step to t = {float(t1.detach()):.6g} "
            f"was not solved in max_iters={self.max_iters} iterations: take smaller "
            "steps.",
            stacklevel=2,
        )
        return state

    def _beta(self, t0, t1) -> list:
        """Return beta_j for this step: as many as the history allows, and one."""
        beta = [1.0]
        before = [t0, *self.times]
        for i in range(min(len(self.phi), self.max_order - 2)):
            beta.append(beta[-1] * ((t1 - before[i]) / (t0 - before[i + 1])))
        return beta

    def _weights(self, t0, t1, n: int) -> list:
        """Return the first n numbers g_j."""
        h = t1 - t0
        c = [1.0 / q for q in range(1, n + 1)]
        g = [c[0]]
        for j in range(1, n):
            # h over the distance to a point j - 1 steps back; the point itself at first
            ratio = 1.0 if j == 1 else h / (t1 - self.times[j - 1])
            c = [a - b * ratio for a, b in pairwise(c)]
            g.append(c[0])
        return g

    def _runge_kutta(self, t0, t1, y, slope) -> Tensor:
        """Take a step of the fourth order, for the start."""
        return self._start.step(t0, t1, y, slope)

    def _slope(self, t: Tensor, y: Tensor, towards: Tensor) -> Tensor:
        """Evaluate the field, just inside the step if this is wanted."""
        return self.field(self._start.time(t, towards), y[None])[0]


def _sum(weights, values) -> Tensor:
    """Return a weighted sum; weights beyond the values count for nothing."""
    return sum(w * v for w, v in zip(weights, values, strict=False))
