"""Gradients of a solve: the discrete adjoint, and plain backpropagation to check it.

The discrete adjoint is the exact reverse of the steps that were taken. With the
cotangent ``lam`` of a step's end, the stages ``i = s, ..., 1`` give

    kappa_i = h (b_i lam + sum_{j>i} a_ji l_j),    l_i = (df/dy)^T kappa_i,

the parameters receive ``(df/dtheta)^T kappa_i`` and ``lam + sum_i l_i`` is the
cotangent of the step's start. An output at ``theta`` inside the step with cotangent
``g`` adds
``h b_i(theta) g`` to ``kappa_i`` and ``g`` to ``lam``. Only ``(t, h, y)`` of accepted
steps are kept; stages are computed again.

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

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sknode.ode import kernels
from sknode.ode.control import real_dtype
from sknode.ode.integrate import Grid, Options, StepRecord, Stops, Trace, integrate
from sknode.ode.runge_kutta import StageBuffer, StageTimes, powers
from sknode.ode.vector_field import BoundField

__all__ = ["Run", "discrete_adjoint", "dot", "replay"]


@dataclass
class Run:
    """One solve: what is integrated and how, and, afterwards, what happened."""

    field: BoundField
    times: np.ndarray
    options: Options
    stops: Stops | None = None
    adjoint: Options | None = None  # for a solve backwards
    fused: bool = False  # by a kernel
    k0: Tensor | None = None
    trace: Trace | None = None

    def forward(self, y0: Tensor, record: bool) -> Tensor:
        """Integrate without gradients."""
        if self.fused:
            self.trace = kernels.solve(
                self.field.network, y0, self.times, self.options, record
            )
            return self.trace.y
        with torch.no_grad():
            self.field.prepare()
            grid = Grid.from_times(self.times, self.stops)
            self.trace = integrate(
                self.field, y0, grid, self.options, k0=self.k0, record=record
            )
        return self.trace.y


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
        y = run.forward(y0, record=True)
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
        sweep = _Sweep(run, times, grad, ctx.needs_input_grad[2])
        grad_y0, grad_times = sweep.reverse()
        parameters = run.field.parameter_gradients()
        return None, grad_y0, grad_times, *parameters


class _Sweep:
    """Going back over the steps of a trace."""

    def __init__(self, run: Run, times: Tensor, grad: Tensor, need_times: bool):
        self.field, self.tableau, self.trace = run.field, run.options.tableau, run.trace
        self.coefficients = self.tableau.tensors(grad.dtype, grad.device)
        self.grad = grad  # (lanes, n_times, n)
        self.times = times
        # one row per lane, summed at the end where lanes share their times
        self.grad_times = None
        self._buffers: dict[tuple[int, int], tuple[StageBuffer, ...]] = {}
        if need_times:
            shape = (self.trace.n_padded, grad.shape[1])
            self.grad_times = times.new_zeros(shape)

    def reverse(self) -> tuple[Tensor, Tensor | None]:
        """Return the cotangents of the initial states and of the output times."""
        self.field.begin_reverse()
        lam = self._cotangent_at_end()
        n_lanes = len(lam)
        if self.trace.n_padded > n_lanes:
            extra = self.trace.n_padded - n_lanes
            lam = torch.cat([lam, lam.new_zeros(extra, lam.shape[1])])
        for record in reversed(self.trace.records):
            if record.rows is None:
                lam = self._step(record, lam)
            else:
                moved = self._step(record, lam[record.rows])
                lam = lam.index_copy(0, record.rows, moved)
        if self.grad.shape[1] == 2 and self.trace.moving.all():
            lam = lam[:n_lanes] + self.grad[:, 0]
        else:
            at_start = self._tensor(self.trace.at_start, self.grad.dtype)
            lam = lam[:n_lanes] + torch.einsum("ltn,lt->ln", self.grad, at_start)
        return lam, self._times_gradient(n_lanes)

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
        return torch.from_numpy(np.array(values)).to(self.grad.device, dtype)

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
            outputs = self._outputs_cotangent(record)  # (degree + 1, m, n)
            weighted = coefficients.dense @ outputs[1:].flatten(1)
            weighted = weighted.view(n, *y.shape)
        k, states, kappa, stack = self._memory(n, y)
        times = StageTimes(field, self.tableau, record.t, record.t1, y)

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
            self._add_times(record, k.values, by_length, by_start, by_end)
        lam = stack.values.sum(0)
        return lam if weighted is None else lam.add_(outputs[0])

    def _outputs_cotangent(self, record: StepRecord) -> Tensor:
        """Gather the cotangents of a step's outputs by the power of theta."""
        lanes, columns, theta = record.outputs
        x = powers(theta, self.coefficients.dense.shape[1]).to(self.grad.dtype)
        g = self.grad[self._rows(record)[lanes], columns]
        if len(record.y) == 1:
            return (x.t() @ g)[:, None]
        total = g.new_zeros(len(record.y), x.shape[1], g.shape[1])
        total.index_add_(0, lanes, x[:, :, None] * g[:, None, :])
        return total.transpose(0, 1)

    def _rows(self, record: StepRecord) -> Tensor:
        if record.rows is not None:
            return record.rows
        return torch.arange(len(record.y), device=record.y.device)

    def _add_times(self, record, k, by_length, by_start, by_end) -> None:
        """Add what a step contributes to the gradients of the times."""
        dtype, rows, h = self.grad_times.dtype, self._rows(record), record.h[:, 0]
        still = h == 0
        by_length = torch.where(still, 0.0, by_length / torch.where(still, 1.0, h))
        by_start, by_end = by_start - by_length, by_end + by_length
        if record.outputs is not None:
            lanes, columns, theta = record.outputs
            slope = self._dense_slope(k, lanes, theta) / h[lanes, None]
            moved = dot(self.grad[rows[lanes], columns], slope)
            at = (rows[lanes], columns)
            self.grad_times.index_put_(at, moved.to(dtype), accumulate=True)
            # theta = (t_out - start) / (end - start)
            by_start = by_start.index_add(0, lanes, (theta - 1) * moved)
            by_end = by_end.index_add(0, lanes, -theta * moved)
        columns = step_ends(record, self.trace, self.grad.shape[1])
        for column, value in zip(columns, (by_start, by_end), strict=True):
            value = torch.where(still, 0.0, value).to(dtype)
            at = (rows, self._tensor(column))
            self.grad_times.index_put_(at, value, accumulate=True)

    def _dense_slope(self, k: Tensor, lanes: Tensor, theta: Tensor) -> Tensor:
        """Return the derivative of dense outputs by theta."""
        p = self.coefficients.dense
        degrees = torch.arange(
            1, p.shape[1] + 1, dtype=theta.dtype, device=theta.device
        )
        x = (degrees * powers(theta, p.shape[1] - 1)).to(p.dtype)
        polynomial = (p.t() @ k.flatten(1)).view(-1, *k.shape[1:]).transpose(0, 1)
        return torch.einsum("md,mdn->mn", x, polynomial[lanes])

    def _times_gradient(self, n_lanes: int) -> Tensor | None:
        if self.grad_times is None:
            return None
        total = self.grad_times[:n_lanes]
        if total.shape[1] > 1:
            # the first time once more, before any step, still has a slope
            slopes = dot(self.grad, self.trace.k0[:, None, :])
            slopes = torch.where(self._tensor(self.trace.at_start), slopes, 0.0)
            slopes[:, 0] = -slopes[:, 1:].sum(1)
            total = total + slopes.to(total.dtype)
        return total if self.times.ndim == 2 else total.sum(0)


def step_ends(record: StepRecord, trace: Trace, n_times: int):
    """Return the output times with which the start and the end of a step move.

    The start moves with t0. The end does so too, with the step size kept, unless it is
    the end of the interval. Where steps run between output times, both move with those.
    """
    last = n_times - 1
    if record.start_stop is None:
        return np.zeros(len(record.t), np.int64), np.where(record.arrived, last, 0)
    # under shared control: all lanes have the same times
    first_stop = trace.at_start[0].sum()
    start = np.where(record.start_stop > 0, first_stop + record.start_stop - 1, 0)
    end = np.where(record.arrived, last, first_stop + record.end_stop - 1)
    return start, end


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
    trace, tableau, n_lanes = run.trace, run.options.tableau, len(y0)
    device = y0.device
    y = torch.cat([y0, y0.new_zeros(trace.n_padded - n_lanes, y0.shape[1])])
    # zero, but with a gradient
    shift = (times - times.detach()).expand(n_lanes, -1)
    extra = times.new_zeros(trace.n_padded - n_lanes, times.shape[-1])
    shift = torch.cat([shift, extra])
    coefficients = tableau.tensors(y.dtype, device)
    outputs = []
    for record in trace.records:
        rows = record.rows
        if rows is None:
            rows = torch.arange(len(record.y), device=device)
        ends = step_ends(record, trace, times.shape[-1])
        start_column, end_column = (torch.from_numpy(x).to(device) for x in ends)
        t = torch.from_numpy(record.t).to(times) + shift[rows, start_column]
        t1 = torch.from_numpy(record.t1).to(times) + shift[rows, end_column]
        length = t1 - t
        change = (length - length.detach()).to(real_dtype(y.dtype))[:, None]
        h = record.h + torch.where(record.h != 0, change, torch.zeros_like(change))
        start = y[rows]
        k = _stages(field, tableau, t, t1, h, start, record.outputs is not None)
        weights = coefficients.a[tableau.n_stages - 1]
        end = start + torch.einsum("s,sln->ln", weights, torch.stack(k[: len(weights)]))
        y = y.index_copy(0, rows, end)
        if record.outputs is not None:
            lanes, columns, theta = record.outputs
            grid = times.expand(n_lanes, -1) if times.ndim == 1 else times
            exact = (grid[rows[lanes], columns] - t[lanes]) / length[lanes]
            theta = theta + (exact - exact.detach()).to(theta.dtype)
            degree = coefficients.dense.shape[1]
            x = torch.stack([theta ** (i + 1) for i in range(degree)], 1)
            values = start[lanes] + torch.einsum(
                "ms,smn->mn",
                x.to(y.dtype) @ coefficients.dense.t(),
                torch.stack(k)[:, lanes],
            )
            outputs.append((rows[lanes], columns, values))
    return _assemble(trace, y0, y[:n_lanes], times, outputs)


def _stages(field, tableau, t, t1, h, y, extended: bool) -> list[Tensor]:
    """Return the scaled slopes of a step, differentiable."""
    coefficients = tableau.tensors(y.dtype, y.device)
    n = tableau.n_stages_extended if extended else tableau.n_stages - 1
    k: list[Tensor] = []
    for i in range(n):
        stage = y
        if i:
            stage = y + torch.einsum("s,sln->ln", coefficients.a[i], torch.stack(k))
        c = coefficients.c[i]
        time = t1 if c == 1.0 else t + c * (t1 - t)
        k.append(field.evaluate(time.to(h.dtype)[:, None], stage) * h)
    return k


def _assemble(trace: Trace, y0, y, times, outputs) -> Tensor:
    """Place differentiable states at their output times."""
    n_lanes, n_times = len(y0), times.shape[-1]
    grid = times.expand(n_lanes, -1) if times.ndim == 1 else times
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
