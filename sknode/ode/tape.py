"""Steps on autograd's tape: for fields that only torch knows how to reverse.

A `LiveTape` has them as they are taken, as long as the memory for it suffices; a `Tape`
takes recorded steps again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sknode.ode.grid import Grid
from sknode.ode.lanes import to_device
from sknode.ode.options import Options
from sknode.ode.runge_kutta import (
    StageBuffer,
    StageTimes,
    combine,
    outputs_cotangents,
    taped_stages,
)
from sknode.ode.tableaus import Tableau
from sknode.ode.trace import StepRecord
from sknode.ode.vector_field import FirstSlope

__all__ = ["LiveTape", "Tape"]

# Memory for what the reverse of steps needs: what would take more is computed again.
TAPE_BYTES = 2**28


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
        before, k = self._before, self._steps[-1][2]
        start, slopes = outputs_cotangents(
            self._coefficients, before, lanes, theta, cotangent
        )
        for result, part in ((before, start), *zip(k, slopes.unbind(), strict=True)):
            if result.requires_grad:  # constant slopes do not
                self._results.append(result)
                self._cotangents.append(part)

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


class LiveTape:
    """The first steps of a solve as they are taken, on autograd's tape.

    The states have the values that they have without it, to the bit. Times and step
    sizes are constants.

    Parameters
    ----------
    field : BoundField
        The vector field, evaluated by differentiable operations.
    tableau : Tableau
        The method.
    first : FirstSlope
        The first states and slopes.
    y, k : Tensor of shape (lanes, n)
        Their values, with those of further lanes that fill up the batch.

    Attributes
    ----------
    running : bool
        Whether steps go to the tape.
    n_records : int
        Steps on it.
    """

    def __init__(self, field, tableau: Tableau, first: FirstSlope, y, k):
        self.field, self.tableau = field, tableau
        self._coefficients = tableau.tensors(y.dtype, y.device)
        self._used = [
            [j for j, weight in enumerate(row) if weight] for row in tableau.rows
        ]
        self._start = first.y
        with torch.enable_grad():
            self._y, self._slope = (
                _fill_up(taped.reshape(-1, y.shape[1]), values)
                for taped, values in ((first.y, y), (first.slope, k))
            )
        # the states of all lanes; which of these are in the batch, None for all
        self._total, self._rows = self._y, None
        self._bytes_each = sum(first.saved.values()) * (tableau.n_stages - 1)
        self._left = TAPE_BYTES
        self.running, self.n_records = self._bytes_each <= self._left, 0
        self._masked = False
        self._steps: list[tuple | None] = []

    @staticmethod
    def suits(options: Options, grid: Grid) -> bool:
        """Return whether a tape knows everything in a solve."""
        tableau = options.tableau
        return (
            tableau is not None
            and grid.stops is None
            and options.watch is None
            # outputs are of the stages that a step has anyway
            and (
                tableau.n_stages_extended == tableau.n_stages
                or grid.times.shape[-1] <= 2
            )
        )

    def step(self, times: StageTimes, h: Tensor, flat: Tensor, buffer: StageBuffer):
        """Fill a buffer with the scaled slopes of all stages but the first, which it
        has; return state and slope at the end of the step.
        """
        slopes, weights = [self._slope], self._coefficients.a
        with torch.enable_grad():
            for i in range(1, self.tableau.n_stages):
                used = self._used[i]
                state = _Combination.apply(
                    (buffer, flat, i, weights[i], used, h),
                    self._y,
                    *(slopes[j] for j in used),
                )
                slopes.append(self.field.evaluate(times[i], state))
                torch.mul(slopes[i].detach(), h, out=buffer.rows[i])
        self._tried, self._outputs = (state, slopes, h), None
        return state.detach(), slopes[-1].detach()

    def look(self, lanes: Tensor, theta: Tensor) -> None:
        """Note which states inside the latest step are asked for."""
        self._outputs = lanes, theta

    def accept(self, moved: np.ndarray) -> None:
        """Let lanes move to the end of the latest step."""
        if not moved.any():
            return
        y1, slopes, h = self._tried
        inside = None if self._outputs is None else (self._y, slopes, h, *self._outputs)
        self._steps.append(inside)
        self.n_records += 1
        if moved.all():
            self._y, self._slope = y1, slopes[-1]
        else:
            self._masked = True
            mask = to_device(moved, y1)[:, None]
            with torch.enable_grad():
                self._y = torch.where(mask, y1, self._y)
                self._slope = torch.where(mask, slopes[-1], self._slope)
        self._left -= self._bytes_each
        if self._left < self._bytes_each:
            self.close()

    def select(self, index: np.ndarray) -> None:
        """Keep some lanes in the batch."""
        index = to_device(index, self._y)
        self._store()
        self._rows = index if self._rows is None else self._rows[index]
        with torch.enable_grad():
            self._y, self._slope = self._y[index], self._slope[index]

    def _store(self) -> None:
        """Take note of the states of lanes that may leave."""
        with torch.enable_grad():
            if self._rows is None:
                self._total = self._y
            else:
                self._total = self._total.index_copy(0, self._rows, self._y)

    def close(self) -> None:
        """Let no further steps go to the tape."""
        if self.running:
            self._store()
        self.running = False
        self._y = self._slope = self._tried = None

    def reverse(
        self, lam: Tensor, cotangents: Sequence[Tensor | None]
    ) -> Tensor | None:
        """Return the cotangent of the first states from that of the last ones.

        Gradients of the parameters go to the field. None, and nothing else, is returned
        if what is not finite has come in from the trials of lanes that did not move.

        Parameters
        ----------
        lam : Tensor of shape (lanes, n)
            Cotangent after the last step on the tape.
        cotangents : sequence of Tensor of shape (m, n) or None
            Those of the states inside each step.
        """
        results, given = [self._total], [lam]
        for inside, cotangent in zip(self._steps, cotangents, strict=True):
            if inside is None:
                continue
            y, slopes, h, lanes, theta = inside
            start, scaled = outputs_cotangents(
                self._coefficients, y, lanes, theta, cotangent
            )
            pairs = (y, start), *zip(slopes, (scaled * h).unbind(), strict=True)
            for result, part in pairs:
                if result.requires_grad:  # constant slopes do not
                    results.append(result)
                    given.append(part)
        self.field.check_captured(results, [self._start])
        # tensors that the field has captured may have a history that all steps share
        by_start, *found = torch.autograd.grad(
            results,
            [self._start, *self.field.parameters],
            given,
            allow_unused=True,
            retain_graph=True,
        )
        if self._masked:
            values = [x for x in (by_start, *found) if x is not None]
            if not all(bool(torch.isfinite(x).all()) for x in values):
                return None
        self.field.add_gradients(found)
        return by_start.reshape(-1, lam.shape[1])


def _fill_up(taped: Tensor, values: Tensor) -> Tensor:
    """Return what is on the tape with the values of further rows."""
    return (
        torch.cat([taped, values[len(taped) :]]) if len(values) > len(taped) else taped
    )


class _Combination(torch.autograd.Function):
    """A state of a step: ``y + h * sum_j weights_j slopes_j``."""

    @staticmethod
    def forward(ctx, step, y, *slopes):
        buffer, flat, stage, weights, used, h = step
        ctx.weights = weights if len(used) == stage else weights[used]
        ctx.h = h
        return buffer.combine(flat, stage, weights)

    @staticmethod
    def backward(ctx, grad):
        scaled = ctx.weights[:, None, None] * (grad * ctx.h)
        return None, grad, *scaled.unbind()
