"""Implicit methods for stiff problems: Rosenbrock methods, linear systems only.

A step factorises one matrix ``I / gamma - h J`` for each lane and solves one system a
stage. There is no iteration, so that the host waits for the device once a step, for
the error, as with explicit methods. The Jacobian is that of the step's start; it is
kept while steps are rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sknode.ode.rodas import RODAS5P, RosenbrockTableau
from sknode.ode.runge_kutta import StageTimes, dense_values
from sknode.ode.stepper import Stepper

__all__ = ["RosenbrockStepper"]


class RosenbrockStepper(Stepper):
    """A Rosenbrock method at work.

    References
    ----------
    Hairer & Wanner, "Solving Ordinary Differential Equations II", 2nd edition, Springer
    1996, section IV.7.
    """

    tableau: RosenbrockTableau = RODAS5P

    def __init__(self, field, options):
        super().__init__(field, options)
        self.error_order = self.tableau.error_order
        self._derivatives: tuple[Tensor, Tensor | None] | None = None

    def attempt(self, t, t1, h, y, k):
        times = StageTimes(self.field, self.tableau, t, t1, y)
        if self._derivatives is None:
            self._derivatives = self.field.jacobian(times[0], y)
        jacobian, by_time = self._derivatives
        # A matrix that is not finite would upset the factorisation: such a lane gets
        # a stage that is not a number instead, and with it a rejection.
        matrix = _matrix(self.tableau, h, jacobian)
        good = torch.isfinite(matrix).all(2).all(1)[:, None]
        matrix = torch.where(good[:, :, None], matrix, torch.eye(y.shape[1]).to(matrix))
        length = torch.where(good, h, torch.nan)
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)

        def solve(right):
            return torch.linalg.lu_solve(lu, pivots, right[:, :, None])[:, :, 0]

        self._y = y
        self._stages, y1 = _take_step(
            self.tableau, self.field, times, length, y, k, solve, by_time
        )
        return y1, self.field.evaluate(times[-1], y1)

    def errors(self):
        weights = self.tableau.tensors(self._y.dtype, self._y.device).error
        return [torch.mv(_columns(self._stages), weights).view_as(self._y)]

    def accept(self, moved):
        if moved.any():
            self._derivatives = None

    def restart(self, jumped, k):
        self._derivatives = None

    def dense(self, lanes, theta):
        return dense_values(self.tableau, self._y, self._stages, lanes, theta)

    def select(self, index):
        if self._derivatives is not None:
            kept = torch.from_numpy(index).to(self._y.device)
            self._derivatives = tuple(
                None if x is None else x[kept] for x in self._derivatives
            )

    def evaluations(self, trace) -> np.ndarray:
        """Return how many slopes were computed; the Jacobians are not counted."""
        return trace.n_steps * self.tableau.n_stages + trace.n_jumps

    def replay(self, field, t, t1, h, y, inside):
        tableau = self.tableau
        times = [(t + c * (t1 - t) if c < 1 else t1).to(h.dtype) for c in tableau.c]
        times = [time[:, None] for time in times]
        jacobian, by_time = field.jacobian(times[0], y)
        k = field.evaluate(times[0], y)
        matrix = _matrix(tableau, h, jacobian)

        def solve(right):
            # factorised anew by every stage: the derivative of a factorisation costs
            # far more than the factorisation
            return torch.linalg.solve_ex(matrix, right).result

        stages, y1 = _take_step(tableau, field, times, h, y, k, solve, by_time)

        def dense(lanes, theta):
            return dense_values(tableau, y, stages, lanes, theta)

        return y1, dense


def _matrix(tableau: RosenbrockTableau, h: Tensor, jacobian: Tensor) -> Tensor:
    """Return ``I / gamma - h J``: the identity for a step of length zero, nearly."""
    unit = torch.eye(jacobian.shape[1], dtype=h.dtype, device=h.device)
    return unit / tableau.gamma - h[:, :, None] * jacobian


def _columns(stages: Tensor) -> Tensor:
    """Return stages, (stages, lanes, n), as the columns of a matrix."""
    return stages.view(len(stages), -1).t()


def _take_step(
    tableau: RosenbrockTableau,
    field,
    times,
    h: Tensor,
    y: Tensor,
    k: Tensor,
    solve: Callable[[Tensor], Tensor],
    by_time: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Take a step by differentiable operations.

    Parameters
    ----------
    tableau : RosenbrockTableau
        The method.
    field : BoundField
        The vector field.
    times : sequence of Tensor of shape (lanes, 1)
        The times of the stages.
    h : Tensor of shape (lanes, 1)
        Signed lengths; zero leaves a state as it is, to the bit.
    y, k : Tensor of shape (lanes, n)
        States and slopes at the start.
    solve : callable
        Solves a linear system for every lane: ``(I / gamma - h J) x = right``.
    by_time : Tensor of shape (lanes, n) or None
        Derivatives of the slopes by time.

    Returns
    -------
    stages : Tensor of shape (n_stages, lanes, n)
    y1 : Tensor of shape (lanes, n)
    """
    coefficients, flat = tableau.tensors(y.dtype, y.device), y.reshape(-1)
    drift = None if by_time is None else h * h * by_time
    stages: list[Tensor] = []
    for i in range(tableau.n_stages):
        right = k * h
        if i:
            earlier = _columns(torch.stack(stages))
            state = torch.addmv(flat, earlier, coefficients.a[i]).view_as(y)
            slope = field.evaluate(times[i], state)
            history = torch.mv(earlier, coefficients.C[i]).view_as(y)
            right = torch.addcmul(history, slope, h)
        if drift is not None and tableau.d[i]:
            right = torch.add(right, drift, alpha=tableau.d[i])
        stages.append(solve(right))
    stages = torch.stack(stages)
    y1 = torch.addmv(flat, _columns(stages), coefficients.b).view_as(y)
    return stages, y1
