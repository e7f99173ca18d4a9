"""Steps on autograd's tape: for fields that only torch knows how to reverse."""

from __future__ import annotations

import torch
from torch import Tensor

from sknode.ode.runge_kutta import StageTimes, combine, taped_outputs, taped_stages
from sknode.ode.tableaus import Tableau
from sknode.ode.trace import StepRecord

__all__ = ["Tape"]


class Tape:
    """Consecutive steps of the same lanes, taken again and reversed together.

    Parameters
    ----------
    field : BoundField
        The vector field, evaluated by differentiable operations.
    tableau : Tableau
        The method.
    need_times : bool
        Whether the derivatives by times are wanted.
    open_steps : bool
        As in `Options`.
    """

    def __init__(self, field, tableau: Tableau, need_times: bool, open_steps: bool):
        self.field, self.tableau = field, tableau
        self.need_times, self.open_steps = need_times, open_steps
        self._results: list[Tensor] = []
        self._cotangents: list[Tensor] = []
        self._steps: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []

    def start(self, y: Tensor) -> None:
        """Begin with states of shape (lanes, n)."""
        self._start = self._y = y.detach().requires_grad_()
        self._coefficients = self.tableau.tensors(y.dtype, y.device)

    def step(self, record: StepRecord) -> None:
        """Take a step."""
        tableau, need = self.tableau, self.need_times
        last = tableau.n_stages - 1
        n = last if record.outputs is None else tableau.n_stages_extended
        ends, y = (record.t, record.t1), self._y
        at = StageTimes(self.field, tableau, *ends, record.y, self.open_steps)
        times = [at[i] for i in range(n)]
        if need:
            times = [time.detach().requires_grad_() for time in times]
        h = record.h.detach().requires_grad_(need)
        with torch.enable_grad():
            k = taped_stages(self.field, tableau, times, h, y)
            self._before = y
            self._y = combine(y, k[:last], tableau.rows[last])
        self._steps.append((h, times, k))

    def outputs(self, lanes: Tensor, theta: Tensor, cotangent: Tensor) -> None:
        """Note the cotangent of outputs inside the latest step."""
        k = self._steps[-1][2]
        with torch.enable_grad():
            values = taped_outputs(self._coefficients, self._before, k, lanes, theta)
        self._results.append(values)
        self._cotangents.append(cotangent)

    def state(self, cotangent: Tensor | float) -> None:
        """Note a cotangent of the states at the end of the latest step."""
        if isinstance(cotangent, Tensor):
            self._results.append(self._y)
            self._cotangents.append(cotangent)

    def reverse(self, lam: Tensor) -> Tensor:
        """Return the cotangent of the first states from that of the last ones.

        Gradients of the parameters go to the field.
        """
        self.state(lam)
        parameters = self.field.parameters
        inputs = [self._start, *parameters]
        if self.need_times:
            for h, times, _ in self._steps:
                inputs += [h, *times]
        first = [self._start, *(x for h, times, _ in self._steps for x in (h, *times))]
        self.field.check_captured(self._results, first)
        # tensors that the field has captured may have a history that all steps share
        grads = torch.autograd.grad(
            self._results,
            inputs,
            self._cotangents,
            allow_unused=True,
            retain_graph=True,
        )
        count = 1 + len(parameters)
        self.field.add_gradients(grads[1:count])
        self._by_times = grads[count:]
        return grads[0]

    def moved_times(self):
        """Yield scaled slopes and the gradients by length, start and end of steps."""
        grads = iter(self._by_times)
        for h, times, k in self._steps:
            by_length = next(grads)
            by_length = torch.zeros_like(h) if by_length is None else by_length * h
            by_start = by_end = torch.zeros_like(by_length[:, 0])
            for c, _ in zip(self._coefficients.c, times, strict=False):
                grad = next(grads)
                if grad is not None:
                    by_start = by_start + (1 - c) * grad.reshape(-1)
                    by_end = by_end + c * grad.reshape(-1)
            slopes = torch.stack([x.detach() for x in k])
            yield slopes, by_length[:, 0].detach(), by_start, by_end
