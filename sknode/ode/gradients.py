"""Gradients of a solve: the discrete adjoint, and plain backpropagation to check it.

The discrete adjoint is the exact reverse of the steps that were taken. With the
cotangent ``lam`` of a step's end, the stages ``i = s, ..., 1`` give

    kappa_i = h (b_i lam + sum_{j>i} a_ji l_j),    l_i = (df/dy)^T kappa_i,

the parameters receive ``(df/dtheta)^T kappa_i`` and ``lam + sum_i l_i`` is the
cotangent of the step's start. An output at ``theta`` inside the step with cotangent
``g`` adds
``h b_i(theta) g`` to ``kappa_i`` and ``g`` to ``lam``. Only ``(t, h, y)`` of accepted
steps are kept; stages are computed again.

A method that is not an explicit Runge-Kutta one is reversed by torch: one step at a
time is taken again under autograd and pulled back. What is kept is the same.

Step sizes are constants. Moving t0 moves all steps but the end of the last one, moving
the last time stretches the last step, and steps that run from one output time to the
next move with both: these gradients, too, are those of the numbers computed, not of the
exact solution.

References
----------
Matsubara, Miyatake & Yaguchi, "Symplectic adjoint method for exact gradient of neural
ODE with minimal memory", NeurIPS 2021.
Sanz-Serna, "Symplectic Runge-Kutta schemes for adjoint equations, automatic
differentiation, optimal control, and more", SIAM Review 58 (2016), 3-33.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sknode.ode import kernels
from sknode.ode.grid import Grid, Stops
from sknode.ode.integrate import integrate
from sknode.ode.once_differentiable import once_differentiable
from sknode.ode.options import Options
from sknode.ode.runge_kutta import (
    StageBuffer,
    StageTimes,
    outputs_cotangents,
    powers,
)
from sknode.ode.tape import Tape
from sknode.ode.trace import StepRecord, Trace
from sknode.ode.vector_field import BoundField

__all__ = ["Run", "discrete_adjoint", "dot", "replay"]

# Steps that are reversed by autograd together: how many, and how many numbers.
LONGEST_TAPE = 16
TAPE_NUMBERS = 100_000


@dataclass
class Run:
    """One solve: what is integrated and how, and, afterwards, what happened."""

    field: BoundField
    replayable: Callable[[], BoundField]  # makes the field of differentiable operations
    times: np.ndarray
    options: Options
    stops: Stops | None = None
    adjoint: Options | None = None  # for a solve backwards
    fused: bool = False  # by a kernel
    k0: Tensor | None = None
    trace: Trace | None = None

    def forward(self, y0: Tensor, record: bool, tape: bool = False) -> Tensor:
        """Integrate without gradients; keep steps, and what autograd needs for them."""
        if self.fused:
            self.trace = kernels.solve(
                self.field.network, y0, self.times, self.options, record
            )
        else:
            first = self.field.take_first() if self.field.probed else None
            first = first if tape else None
            loop = self.options.loop or partial(integrate, first=first)
            with torch.no_grad():
                self.field.prepare()
                grid = Grid.from_times(self.times, self.stops)
                self.trace = loop(
                    self.field, y0, grid, self.options, k0=self.k0, record=record
                )
        # the result's graph holds this run: it must not hold the result in turn
        y, self.trace.y = self.trace.y, None
        return y


def discrete_adjoint(run: Run, y0: Tensor, times: Tensor) -> Tensor:
    """Integrate, with the discrete adjoint as the gradient.

    Parameters
    ----------
    run : Run
        The solve; its trace is filled.
    y0 : Tensor of shape (lanes, n)
        Initial states.
    times : Tensor of shape (n_times,) or (lanes, n_times)
        Output times as the user gave them.

    Returns
    -------
    Tensor of shape (lanes, n_times, n)
    """
    return _DiscreteAdjoint.apply(run, y0, times, *run.field.parameters)


def dot(cotangent: Tensor, value: Tensor) -> Tensor:
    """Return the cotangent of a real factor of value, summed over the last axis."""
    if cotangent.is_complex():
        return (cotangent * value.conj()).real.sum(-1)
    return (cotangent * value).sum(-1)


class _DiscreteAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, y0, times, *parameters):
        y = run.forward(y0, record=True, tape=not ctx.needs_input_grad[2])
        ctx.run = run
        # saved although unused, so that torch notices changes made in between
        ctx.save_for_backward(times, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        times, *_ = ctx.saved_tensors
        run = ctx.run
        if run.fused:
            grad_y0, parameters = kernels.reverse(run.field.network, run.trace, grad)
            return None, grad_y0, None, *parameters
        explicit = run.options.tableau is not None
        kind = _RungeKuttaSweep if explicit else _TapedSweep
        sweep = kind(run, times, grad, ctx.needs_input_grad[2])
        grad_y0, grad_times = sweep.reverse()
        return None, grad_y0, grad_times, *sweep.parameter_gradients()


class _Sweep:
    """Going back over the steps of a trace; how one step is reversed is left open."""

    def __init__(self, run: Run, times: Tensor, grad: Tensor, need_times: bool):
        self.run, self.trace = run, run.trace
        self.grad = grad  # (lanes, n_times, n)
        self.times = times
        self.tied = run.stops is not None and run.stops.tied
        # one row per lane, summed at the end where lanes share their times
        self.grad_times = None
        if need_times:
            # a column an output time, and one for what moves with none of them
            shape = (self.trace.n_padded, grad.shape[1] + 1)
            self.grad_times = times.new_zeros(shape, device=grad.device)

    def _step(self, record: StepRecord, lam: Tensor) -> Tensor:
        """Return the cotangent of the step's start from that of its end."""
        raise NotImplementedError

    def parameter_gradients(self) -> list[Tensor | None]:
        """Return the gradients of the field's parameters, after the reverse."""
        raise NotImplementedError

    def reverse(self) -> tuple[Tensor, Tensor | None]:
        """Return the cotangents of the initial states and of the output times."""
        lam = self._cotangent_at_end()
        n_lanes = len(lam)
        if self.trace.n_padded > n_lanes:
            extra = self.trace.n_padded - n_lanes
            lam = torch.cat([lam, lam.new_zeros(extra, lam.shape[1])])
        records, tape = self.trace.records, self.trace.tape
        n_taped = 0 if tape is None else tape.n_records
        lam = self._over(records[n_taped:], lam)
        if n_taped:
            lam = self._over_tape(records[:n_taped], lam)
        if self.grad.shape[1] == 2 and self.trace.moving.all():
            lam = lam[:n_lanes] + self.grad[:, 0]
        else:
            at_start = self._tensor(self.trace.at_start, self.grad.dtype)
            lam = lam[:n_lanes] + torch.einsum("ltn,lt->ln", self.grad, at_start)
        return lam, self._times_gradient(n_lanes)

    def _over(self, records: list[StepRecord], lam: Tensor) -> Tensor:
        """Return the cotangent of all lanes before some steps from that after them."""
        for some in self._groups(records):
            rows = some[0].rows
            moved = self._back(some, lam if rows is None else lam[rows])
            lam = moved if rows is None else lam.index_copy(0, rows, moved)
        return lam

    def _over_tape(self, records: list[StepRecord], lam: Tensor) -> Tensor:
        """Return the same for the steps on a tape."""
        cotangents = []
        for record in records:
            cotangents.append(None)
            if record.outputs is not None:
                lanes, columns, _ = record.outputs
                cotangents[-1] = self.grad[self._rows(record)[lanes], columns]
        before = self.trace.tape.reverse(lam, cotangents)
        if not _graph_is_kept():
            self.trace.tape = None  # as torch lets go of what it has saved
        # recorded steps are without the trials of lanes that did not move
        return self._over(records, lam) if before is None else before

    def _groups(self, records: list[StepRecord]) -> Iterator[list[StepRecord]]:
        """Yield the steps to go back over together, the last ones first."""
        for record in reversed(records):
            yield [record]

    def _back(self, records: list[StepRecord], lam: Tensor) -> Tensor:
        """Return the cotangent of the start of steps from that of their end."""
        (record,) = records
        return self._step(record, lam + self._at_end_of(record))

    def _at_end_of(self, record: StepRecord) -> Tensor | float:
        """Return the cotangent of the outputs that are the end of a step."""
        if not self.tied or record.arrived[0]:
            return 0.0
        return self.grad[:, tied_outputs(record, self.trace)].sum(1)

    def _cotangent_at_end(self) -> Tensor:
        """Sum the cotangents of the outputs that hold a lane's last state."""
        n_times = self.grad.shape[1]
        if n_times == 1:
            return torch.zeros_like(self.grad[:, 0])
        if n_times == 2 and self.trace.moving.all():
            return self.grad[:, 1]
        held = np.arange(n_times) >= self.trace.next_output[:, None]
        held &= ~self.trace.at_start
        return torch.einsum(
            "ltn,lt->ln", self.grad, self._tensor(held, self.grad.dtype)
        )

    def _tensor(self, values: np.ndarray, dtype=None) -> Tensor:
        tensor = torch.from_numpy(np.array(values))
        return tensor.to(self.grad.device, dtype, non_blocking=True)

    def _rows(self, record: StepRecord) -> Tensor:
        if record.rows is not None:
            return record.rows
        return torch.arange(len(record.y), device=record.y.device)

    def _add_times(self, record: StepRecord, by_start: Tensor, by_end: Tensor) -> None:
        """Add what the start and the end of a step contribute."""
        columns = step_ends(record, self.trace, self.grad.shape[1], self.tied)
        for column, value in zip(columns, (by_start, by_end), strict=True):
            self._add(self._rows(record), self._tensor(column), value)

    def _add(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """Add to the gradients of some output times."""
        values = values.to(self.grad_times.dtype)
        self.grad_times.index_put_((rows, columns), values, accumulate=True)

    def _times_gradient(self, n_lanes: int) -> Tensor | None:
        if self.grad_times is None:
            return None
        total = self.grad_times[:n_lanes, :-1]
        if total.shape[1] > 1:
            # the first time once more, before any step, still has a slope
            slopes = dot(self.grad, self.trace.k0[:, None, :])
            slopes = torch.where(self._tensor(self.trace.at_start), slopes, 0.0)
            slopes[:, 0] = -slopes[:, 1:].sum(1)
            total = total + slopes.to(total.dtype)
        total = total if self.times.ndim == 2 else total.sum(0)
        return total.to(self.times.device)


def _graph_is_kept() -> bool:
    """Return whether the backward pass may be asked for again, by ``retain_graph``."""
    # torch itself asks so, but has no public name for it
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class _RungeKuttaSweep(_Sweep):
    """The reverse of an explicit Runge-Kutta method, stage by stage."""

    def __init__(self, run, times, grad, need_times):
        super().__init__(run, times, grad, need_times)
        self.field, self.tableau = run.field, run.options.tableau
        self.coefficients = self.tableau.tensors(grad.dtype, grad.device)
        self.open_steps = run.options.open_steps
        self._buffers: dict[tuple[int, int], tuple[StageBuffer, ...]] = {}
        self.field.begin_reverse()

    def parameter_gradients(self):
        return self.field.parameter_gradients()

    def _groups(self, records):
        most = 1
        if self.field.probed and records:
            # torch reverses such fields: the fewer calls the better, as long as the
            # states of some steps take no memory to speak of
            numbers = records[0].y.numel() * self.tableau.n_stages
            most = max(1, min(LONGEST_TAPE, TAPE_NUMBERS // numbers))
        end = len(records)
        while end:
            start = end - 1
            if records[start].rows is None:
                while start and end - start < most and records[start - 1].rows is None:
                    start -= 1
            yield records[start:end]
            end = start

    def _back(self, records, lam):
        if not self.field.probed:
            return super()._back(records, lam)
        need_times = self.grad_times is not None
        tape = Tape(self.field, self.tableau, need_times, self.open_steps)
        tape.start(records[0].y)
        for record in records:
            tape.step(record)
            if record.outputs is not None:
                lanes, columns, theta = record.outputs
                cotangent = self.grad[self._rows(record)[lanes], columns]
                tape.outputs(lanes, theta, cotangent)
            tape.state(self._at_end_of(record))
        lam = tape.reverse(lam)
        if need_times:
            for record, moved in zip(records, tape.moved_times(), strict=True):
                self._reverse_times(record, *moved)
        return lam

    def _memory(self, n: int, like: Tensor) -> tuple[StageBuffer, ...]:
        """Return buffers for stages, their states, and both kinds of cotangents."""
        key = (n, like.shape[0])
        if key not in self._buffers:
            sizes = (n, n, n, n + 1)
            self._buffers[key] = tuple(StageBuffer(size, like) for size in sizes)
        return self._buffers[key]

    def _step(self, record: StepRecord, lam: Tensor) -> Tensor:
        """Return the cotangent of the step's start from that of its end."""
        y, h, field = record.y, record.h, self.field
        coefficients, n = self.coefficients, self.tableau.n_stages - 1
        backward, weighted = coefficients.backward, None
        if record.outputs is not None:
            n = self.tableau.n_stages_extended
            backward = coefficients.backward_extended
            lanes, columns, theta = record.outputs
            g = self.grad[self._rows(record)[lanes], columns]
            start, weighted = outputs_cotangents(coefficients, y, lanes, theta, g)
        k, states, kappa, stack = self._memory(n, y)
        ends = record.t, record.t1
        times = StageTimes(field, self.tableau, *ends, y, self.open_steps)

        flat = y.view(-1)
        states.rows[0].copy_(y)
        for i in range(n):
            state = states.rows[i]
            if i:
                out = states.flat[i]
                torch.addmv(flat, k.columns[i], coefficients.a[i], out=out)
            torch.mul(field.linearize(i, times[i], state), h, out=k.rows[i])

        need_times = self.grad_times is not None
        by_length, by_start, by_end = 0.0, 0.0, 0.0
        stack.rows[0].copy_(lam)  # then l_s, ..., l_1
        for m, i in enumerate(reversed(range(n)), start=1):
            cotangent = torch.mv(stack.columns[m], backward[i]).view(y.shape)
            if weighted is not None:
                cotangent += weighted[i]
            torch.mul(cotangent, h, out=kappa.rows[i])
            time = field.pullback(i, kappa.rows[i], need_times, stack.rows[m])
            if need_times:
                by_length = by_length + dot(cotangent, k.rows[i])
                if time is not None:
                    c = coefficients.c[i]
                    by_start = by_start + (1 - c) * time
                    by_end = by_end + c * time
        field.flush(states.values, kappa.values)
        if need_times:
            self._reverse_times(record, k.values, by_length, by_start, by_end)
        lam = stack.values.sum(0)
        return lam if weighted is None else lam.add_(start)

    def _reverse_times(self, record, k, by_length, by_start, by_end) -> None:
        """Add what a step contributes to the gradients of the times."""
        rows, h = self._rows(record), record.h[:, 0]
        still = h == 0
        by_length = torch.where(still, 0.0, by_length / torch.where(still, 1.0, h))
        by_start, by_end = by_start - by_length, by_end + by_length
        if record.outputs is not None:
            lanes, columns, theta = record.outputs
            slope = self._dense_slope(k, lanes, theta) / h[lanes, None]
            moved = dot(self.grad[rows[lanes], columns], slope)
            self._add(rows[lanes], columns, moved)
            # theta = (t_out - start) / (end - start)
            by_start = by_start.index_add(0, lanes, (theta - 1) * moved)
            by_end = by_end.index_add(0, lanes, -theta * moved)
        self._add_times(
            record, torch.where(still, 0.0, by_start), torch.where(still, 0.0, by_end)
        )

    def _dense_slope(self, k: Tensor, lanes: Tensor, theta: Tensor) -> Tensor:
        """Return the derivative of dense outputs by theta."""
        p = self.coefficients.dense
        degrees = torch.arange(
            1, p.shape[1] + 1, dtype=theta.dtype, device=theta.device
        )
        x = (degrees * powers(theta, p.shape[1] - 1)).to(p.dtype)
        polynomial = (p.t() @ k.flatten(1)).view(-1, *k.shape[1:]).transpose(0, 1)
        return torch.einsum("md,mdn->mn", x, polynomial[lanes])


class _TapedSweep(_Sweep):
    """The reverse of any one-step method, by autograd through one step at a time."""

    def __init__(self, run, times, grad, need_times):
        super().__init__(run, times, grad, need_times)
        self.field = run.replayable()
        self.parameters = list(run.field.parameters)
        self._gradients: list[Tensor | None] = [None] * len(self.parameters)

    def parameter_gradients(self):
        return self._gradients

    def _step(self, record, lam):
        need_times = self.grad_times is not None
        y = record.y.detach().requires_grad_()
        ends = [
            self._tensor(t).requires_grad_(need_times) for t in (record.t, record.t1)
        ]
        at, cotangents = None, [lam]
        if record.outputs is not None:
            lanes, columns, _ = record.outputs
            rows = self._rows(record)[lanes]
            grid = _rows_of(self.times.detach().to(rows.device), len(self.grad))
            at = grid[rows, columns].requires_grad_(need_times)
            cotangents.append(self.grad[rows, columns])
        with torch.enable_grad():
            values = _take_again(self.run, self.field, record, y, *ends, at)
        times = [*ends, *([] if at is None else [at])] if need_times else []
        inputs = [y, *times, *self.parameters]
        # captured tensors may have a history that all steps share: keep it
        grads = torch.autograd.grad(
            values[: len(cotangents)],
            inputs,
            cotangents,
            retain_graph=True,
            allow_unused=True,
        )
        for i, grad in enumerate(grads[1 + len(times) :]):
            if grad is not None:
                total = self._gradients[i]
                self._gradients[i] = grad if total is None else total + grad
        if need_times:
            zeros = (torch.zeros_like(x) for x in times)
            moved = [
                z if g is None else g for z, g in zip(zeros, grads[1:], strict=False)
            ]
            self._add_times(record, *moved[:2])
            if at is not None:
                self._add(rows, columns, moved[2])
        return grads[0]


def step_ends(record: StepRecord, trace: Trace, n_times: int, tied: bool):
    """Return the output times with which the start and the end of a step move.

    The start moves with t0. The end does so too, with the step size kept, unless it is
    the end of the interval. Where steps run between output times, both move with those.
    Stops that are no output times move with none of them, which is the number
    ``n_times`` here, and neither do the steps after one.
    """
    last = n_times - 1
    if record.start_stop is None:
        return np.zeros(len(record.t), np.int64), np.where(record.arrived, last, 0)
    if not tied:
        start = np.where(record.start_stop > 0, n_times, 0)
        end = np.where(record.end_stop > 0, n_times, 0)
        return start, np.where(record.arrived, last, end)
    # a single lane
    first_stop = trace.at_start[0].sum()
    start = np.where(record.start_stop > 0, first_stop + record.start_stop - 1, 0)
    end = np.where(record.arrived, last, first_stop + record.end_stop - 1)
    return start, end


def tied_outputs(record: StepRecord, trace: Trace) -> slice:
    """Return the output times that are the end of a step, where stops are tied."""
    before = trace.at_start[0].sum() - 1
    return slice(before + record.start_stop[0] + 1, before + record.end_stop[0] + 1)


def replay(run: Run, field: BoundField, y0: Tensor, times: Tensor) -> Tensor:
    """Integrate, then take the same steps again under torch's autograd.

    The reference for the discrete adjoint: all stages of all steps stay in memory.

    Parameters
    ----------
    run : Run
        The solve; its trace is filled.
    field : BoundField
        The vector field, evaluated by differentiable operations.
    y0, times
        As for `discrete_adjoint`.
    """
    run.forward(y0.detach(), record=True)
    trace, n_lanes, device = run.trace, len(y0), y0.device
    times = times.to(device)
    y = torch.cat([y0, y0.new_zeros(trace.n_padded - n_lanes, y0.shape[1])])
    # zero, but with a gradient
    shift = (times - times.detach()).expand(n_lanes, -1)
    extra = times.new_zeros(trace.n_padded - n_lanes, times.shape[-1])
    # the last column is for what moves with none of the times
    shift = torch.nn.functional.pad(torch.cat([shift, extra]), (0, 1))
    tied = run.stops is not None and run.stops.tied
    outputs = []
    for record in trace.records:
        rows = record.rows
        if rows is None:
            rows = torch.arange(len(record.y), device=device)
        ends = step_ends(record, trace, times.shape[-1], tied)
        start_column, end_column = (torch.from_numpy(x).to(device) for x in ends)
        t = torch.from_numpy(record.t).to(times) + shift[rows, start_column]
        t1 = torch.from_numpy(record.t1).to(times) + shift[rows, end_column]
        at = None
        if record.outputs is not None:
            lanes, columns, _ = record.outputs
            at = _rows_of(times, n_lanes)[rows[lanes], columns]
        end, values = _take_again(run, field, record, y[rows], t, t1, at)
        y = y.index_copy(0, rows, end)
        if tied and not record.arrived[0]:
            columns = torch.arange(times.shape[-1])[tied_outputs(record, trace)]
            outputs.append((rows, columns.to(device), end))
        if at is not None:
            lanes, columns, _ = record.outputs
            outputs.append((rows[lanes], columns, values))
    return _assemble(trace, y0, y[:n_lanes], times, outputs)


def _rows_of(times: Tensor, n_lanes: int) -> Tensor:
    """Return output times with a row for every lane."""
    return times.expand(n_lanes, -1) if times.ndim == 1 else times


def _take_again(
    run: Run,
    field: BoundField,
    record: StepRecord,
    y: Tensor,
    t: Tensor,
    t1: Tensor,
    at: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Take a recorded step by differentiable operations.

    Parameters
    ----------
    run : Run
        The solve.
    field : BoundField
        The vector field, of differentiable operations.
    record : StepRecord
        The step.
    y : Tensor of shape (m, n)
        States at its start.
    t, t1 : Tensor of shape (m,)
        Its start and end.
    at : Tensor of shape (n_outputs,) or None
        The output times inside it.

    Returns
    -------
    end : Tensor of shape (m, n)
    values : Tensor of shape (n_outputs, n) or None
    """
    length = t1 - t
    # zero, but with a gradient
    change = (length - length.detach()).to(record.h.dtype)[:, None]
    h = record.h + torch.where(record.h != 0, change, torch.zeros_like(change))
    inside = at is not None
    stepper = run.options.make_stepper(field, run.options)
    end, dense = stepper.replay(field, t, t1, h, y, inside)
    if not inside:
        return end, None
    lanes, _, theta = record.outputs
    exact = (at - t[lanes]) / length[lanes]
    return end, dense(lanes, theta + (exact - exact.detach()).to(theta.dtype))


def _assemble(trace: Trace, y0, y, times, outputs) -> Tensor:
    """Place differentiable states at their output times."""
    n_lanes, n_times = len(y0), times.shape[-1]
    grid = _rows_of(times, n_lanes)
    at_start = torch.from_numpy(trace.at_start.copy()).to(y0.device)[:, :, None]
    # where nothing moved yet: the first state, which has a slope in time
    still = (grid - grid[:, :1]).to(y0.dtype)[:, :, None] * trace.k0[:, None, :]
    result = y0[:, None, :] + torch.where(at_start, still, 0.0)
    columns = torch.arange(n_times, device=y0.device)
    ahead = torch.from_numpy(trace.next_output).to(y0.device)[:, None]
    held = (columns >= ahead)[:, :, None] & ~at_start
    result = torch.where(held, y[:, None, :], result)
    for rows, column, values in outputs:
        result = result.index_put((rows, column), values)
    return result
