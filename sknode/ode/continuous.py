"""The continuous adjoint: gradients in memory that does not depend on the steps.

The cotangent ``a`` of the state obeys ``da/dt = -(df/dy)^T a`` between output times and
jumps by the cotangent of an output where there is one. Going back, the state is solved
for again together with ``a``, so that nothing of the steps forward is kept but the
outputs, to which the state is set back on the way. The parameters receive ``int
(df/dtheta)^T a dt``. Three things differ from the usual implementation:

- The integral is a quadrature over the stages of the steps back, added up at once over
  all samples. It is no part of the state: a sample with steps of its own needs no
  integral of its own, and the error of a step is that of ``(y, a)`` alone, the seminorm
  of Kidger et al.
- Steps end at output times, but step size and stages are carried over: an output costs
  one evaluation, not a start.
- As the equation is linear in ``a``, every sample's cotangents are scaled to a largest
  entry of one. Absolute tolerances then mean the same whatever the loss is divided by.

References
----------
Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential Equations",
NeurIPS 2018.
Kidger, Chen & Lyons, "'Hey, that's not an ODE': faster ODE adjoints via seminorms",
ICML 2021.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sknode.ode import kernels
from sknode.ode.gradients import Run, dot
from sknode.ode.grid import Grid, Stops
from sknode.ode.integrate import integrate
from sknode.ode.lanes import to_device
from sknode.ode.once_differentiable import once_differentiable
from sknode.ode.options import Options
from sknode.ode.solution import SolverError, failure_report
from sknode.ode.stepper import Stepper
from sknode.ode.trace import Trace
from sknode.ode.vector_field import BoundField

__all__ = ["continuous_adjoint"]

# Nodes of the quadrature on the dense output of a method without stages of its own:
# Gauss-Legendre, of order 8.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(4)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


def continuous_adjoint(run: Run, y0: Tensor, times: Tensor) -> Tensor:
    """Integrate, with the continuous adjoint as the gradient.

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
    return _ContinuousAdjoint.apply(run, y0, times, *run.field.parameters)


class _ContinuousAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, y0, times, *parameters):
        y = run.forward(y0, record=False)
        ctx.run = run
        ctx.save_for_backward(y, times, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, times, *_ = ctx.saved_tensors
        back = _Backward(ctx.run, y, times, grad, ctx.needs_input_grad[2])
        return None, *back.solve()


class _Backward:
    """One solve backwards.

    Output times are told apart by where they lie: at the start of a lane's interval,
    inside it, where steps have to stop, or held, from the last state on.
    """

    def __init__(self, run: Run, y, times: Tensor, grad: Tensor, need_times: bool):
        self.run, self.y, self.times = run, y, times
        n_lanes, self.n_times, self.n = y.shape
        t = np.broadcast_to(run.times, (n_lanes, self.n_times))
        self.sign = np.where(t[:, -1] < t[:, 0], -1.0, 1.0)
        t = t * self.sign[:, None]  # ascending
        last = run.trace.t_reached * self.sign
        self.at_start = t == t[:, :1]
        self.held = ~self.at_start & (t >= last[:, None])
        self.inner = ~self.at_start & ~self.held
        self.t, self.last = t, last

        size = grad.abs().amax((1, 2))
        defined = torch.isfinite(size)
        self.undefined = not bool(defined.all())
        self.grad = grad
        if self.undefined:
            self.grad = torch.where(defined[:, None, None], grad, 0.0)
            size = torch.where(defined, size, 0.0)
        self.nan = torch.where(defined, 0.0, torch.nan)[:, None]
        scale = size.cpu().numpy().astype(np.float64)
        # who has nothing to bring back stays
        self.active = (scale > 0) & (last > t[:, 0])
        self.scale = np.where(self.active, scale, 1.0)
        self.inverse = to_device(1 / self.scale, y)[:, None]
        self.grad_times = times.new_zeros(n_lanes, self.n_times) if need_times else None

    def solve(self) -> list[Tensor | None]:
        """Return the cotangents of initial states, output times and parameters."""
        run, field = self.run, self.run.field
        # the kernels do not give gradients to the times
        fused = (
            run.fused
            and run.adjoint.plain
            and kernels.serves(field, self.y[:, 0], self.times)
        )
        end = a = self._sum(self.held)
        if self.active.any() and fused:
            trace, found, parameters = kernels.adjoint(
                field.network,
                self.y,
                run.times,
                run.adjoint,
                self.grad,
                run.trace.t_reached,
                self.active * self.scale,
            )
            self._check(trace)
        else:
            field.prepare()
            field.begin_reverse()
            if self.active.any():
                trace = self._integrate(end)
                found = trace.y[:, -1, self.n :] / self.inverse
            parameters = field.parameter_gradients()
        if not self.active.any():
            # zero, as by the other gradients, not none: an optimizer tells them apart
            parameters = [torch.zeros_like(p) for p in field.parameters]
        else:
            a = torch.where(self._tensor(self.active)[:, None], found, end)
            if self.grad_times is not None:
                self._end_times(trace.k0[:, : self.n])
        if self.grad_times is not None:
            self._start_times(a)
        if self.undefined:
            # as autograd does with cotangents that are not numbers
            parameters = [p if p is None else p * torch.nan for p in parameters]
        grad_y0 = a + self._sum(self.at_start) + self.nan
        return [grad_y0, self._times_gradient(), *parameters]

    def _tensor(self, values: np.ndarray, dtype=None) -> Tensor:
        return torch.from_numpy(np.array(values)).to(self.y.device, dtype)

    def _sum(self, which: np.ndarray) -> Tensor:
        """Sum the cotangents of some outputs of every lane."""
        which = self._tensor(which, self.grad.dtype)
        return torch.einsum("ltn,lt->ln", self.grad, which)

    def _integrate(self, end: Tensor) -> Trace:
        """Integrate state and scaled cotangent back to the first time."""
        options = self.run.adjoint
        n_slots = len(NODES) if options.tableau is None else options.tableau.n_stages
        self.field = AdjointField(self.run.field, self.n, n_slots)
        self.grid = self._grid()
        state = torch.cat([self.y[:, -1], end * self.inverse], 1)
        # Lanes that stay are a copy of one that does not: f is defined there, whatever
        # became of them.
        if not self.active.all():
            first = int(np.argmax(self.active))
            state = torch.where(
                self._tensor(self.active)[:, None], state, state[first : first + 1]
            )

        def make_stepper(field, options):
            return QuadratureStepper(field, options, self.active * self.scale)

        trace = integrate(
            self.field, state, self.grid, _augmented(options, self.n, make_stepper)
        )
        self._check(trace)
        return trace

    def _grid(self) -> Grid:
        """Return the times of the solve backwards, ascending as the loop wants them."""
        start, end = -self.last, -self.t[:, 0]
        count = self.inner.sum(1)
        # inner output times are consecutive; stop i of a lane is output top - i
        self.top = self.at_start.sum(1) + count - 1
        column = np.maximum(self.top[:, None] - np.arange(count.max()), 0)
        stops = -np.take_along_axis(self.t, column, 1)
        stops[np.arange(count.max()) >= count[:, None]] = np.inf
        direction = -self.sign
        if not self.active.all():
            first = np.argmax(self.active)
            start = np.where(self.active, start, start[first])
            end = np.where(self.active, end, start[first])
            stops[~self.active] = np.inf
            direction = np.where(self.active, direction, direction[first])
        bounds = np.stack([start, end], 1)
        uniform = (direction == direction[0]).all()
        if uniform and (bounds == bounds[0]).all() and (stops == stops[0]).all():
            bounds, stops = bounds[0], stops[0]
        direction = float(direction[0]) if uniform else direction
        jumps = Stops(stops, self._jump) if stops.size else None
        return Grid(bounds, direction, jumps)

    def _jump(self, rows, first, last, t, state, k):
        """Add the cotangents of outputs; set the state back to them."""
        n, field, like = self.n, self.field, self.y
        rows = np.minimum(rows, len(self.y) - 1)
        at = to_device(rows, like)
        y, a, passed = state[:, :n], state[:, n:], []
        for index in range((last - first).max()):
            landed = to_device(first + index < last, like)
            column = to_device(np.maximum(self.top[rows] - first - index, 0), like)
            if index == 0:
                y = torch.where(landed[:, None], self.y[at, column], y)
            g = torch.where(landed[:, None], self.grad[at, column], 0.0)
            a = torch.addcmul(a, g, self.inverse[at])
            passed.append((column, g))
        state = torch.cat([y, a], 1)
        direction = self.grid.direction
        if isinstance(direction, np.ndarray):
            direction = direction[rows]
        k = field.begin(t * direction, state)
        if self.grad_times is not None:
            for column, g in passed:
                self._add_times(at, column, dot(g, k[:, :n]))
        return state, k

    def _add_times(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        values = values.to(self.grad_times.dtype)
        self.grad_times.index_put_((rows, columns), values, accumulate=True)

    def _end_times(self, f: Tensor) -> None:
        """Add what moving the last state along its slope f contributes."""
        slopes = dot(self.grad, f[:, None]).to(self.grad_times.dtype)
        held = self.held & self.active[:, None]
        reached = held & (self.t == self.last[:, None])
        self.grad_times += torch.where(self._tensor(reached), slopes, 0.0)
        # a lane that failed did so a number of steps after its start
        missed = self._tensor(held & ~reached)
        self.grad_times[:, 0] += torch.where(missed, slopes, 0.0).sum(1)

    def _start_times(self, a: Tensor) -> None:
        """Add what moving the first time does: it moves the state along -f."""
        f = self.run.trace.k0
        if f is None:  # not every way forward tells its first slope
            t = to_device(self.t[:, 0] * self.sign, self.y)[:, None]
            field = self.run.field
            f = field.evaluate(t if field.uses_time else None, self.y[:, 0])
        dtype = self.grad_times.dtype
        moved = torch.where(self._tensor(self.active), dot(a, f), 0.0).to(dtype)
        # the first time once more, before any step, still has a slope
        slopes = dot(self.grad, f[:, None]).to(dtype)
        slopes = torch.where(self._tensor(self.at_start), slopes, 0.0)
        slopes[:, 0] = -slopes[:, 1:].sum(1) - moved
        self.grad_times += slopes

    def _times_gradient(self) -> Tensor | None:
        total = self.grad_times
        if total is None:
            return None
        total = total + self.nan.to(total.dtype)
        return total if self.times.ndim == 2 else total.sum(0)

    def _check(self, trace: Trace) -> None:
        """Raise if the solve failed: what it would lead to is no gradient."""
        if not trace.status.any():
            return
        report = failure_report(trace.status, trace.t_reached)
        raise SolverError(
            "The solve backwards in time, for gradient='continuous', failed: "
            f"{report} gradient='discrete' goes back over the steps that were taken "
            "and cannot fail."
        )


def _augmented(options: Options, n: int, make_stepper) -> Options:
    """Return the options for a state and its cotangent."""

    def twice(tolerance):
        # with an entry per component: the cotangents have the same ones
        if not isinstance(tolerance, Tensor):
            return tolerance
        return tolerance.expand(n).repeat(2)

    norm = options.norm
    if norm is not None:

        def norm(x, inner=options.norm):
            return np.maximum(inner(x[:, :n]), inner(x[:, n:]))

    inner = options.make_stepper
    return replace(
        options,
        rtol=twice(options.rtol),
        atol=twice(options.atol),
        norm=norm,
        monitor=None,
        watch=None,
        make_stepper=lambda field, options: make_stepper(
            field, replace(options, make_stepper=inner)
        ),
    )


class AdjointField:
    """The field ``d(y, a)/dt = (f, -(df/dy)^T a)`` of a state and its cotangent.

    What the field keeps of an evaluation, for its share in the parameters' gradients,
    lies in slots, which go around: the last stage of a step is the first of the next.

    Parameters
    ----------
    field : BoundField
        The field of the state.
    n : int
        Size of the state.
    n_slots : int
        How many evaluations to remember: the stages of a step.
    """

    reusable = True
    probed = False
    network = None

    def __init__(self, field: BoundField, n: int, n_slots: int):
        self.field, self.n, self.n_slots = field, n, n_slots
        self.row_wise, self.uses_time = field.row_wise, field.uses_time
        self.first = 0  # slot of the first stage
        self.fresh = False  # whether it is that of the state that comes next
        self.times: list[Tensor | None] = [None] * n_slots
        self.states = self.cotangents = None
        self._stage = 0

    def slot(self, stage: int) -> int:
        """Return where a stage is kept."""
        return (self.first + stage) % self.n_slots

    def begin(self, t: np.ndarray, state: Tensor) -> Tensor:
        """Evaluate a first stage."""
        self._stage, self.fresh = 0, True
        return self.evaluate(
            to_device(t, state)[:, None] if self.uses_time else None, state
        )

    def continue_from(self, stage: int) -> None:
        """Say which stage the next evaluation is."""
        self._stage = stage

    def evaluate(self, t, state):
        """Return the slopes; keep the evaluation as the next stage."""
        slot = self.slot(self._stage)
        self._stage += 1
        return self.linearize(slot, t, state)

    def linearize(self, slot: int, t: Tensor | None, state: Tensor) -> Tensor:
        """Return the slopes; keep the evaluation in a slot."""
        n = self.n
        if self.states is None or self.states.shape[1] != len(state):
            shape = (self.n_slots, len(state), n)
            self.states, self.cotangents = state.new_empty(2, *shape).unbind(0)
            # stages that no step has reached yet have no weight, but must be numbers
            self.states.zero_(), self.cotangents.zero_()
        y, minus_a = self.states[slot], self.cotangents[slot]
        y.copy_(state[:, :n])
        torch.neg(state[:, n:], out=minus_a)
        self.times[slot] = t
        slope = torch.empty_like(state)
        slope[:, :n] = self.field.linearize(slot, t, y)
        self.field.pullback_state(slot, minus_a, slope[:, n:])
        return slope

    def accumulate(self, stages, weights: np.ndarray) -> None:
        """Add up the parameters' gradients over stages.

        Parameters
        ----------
        stages : list of int
            Slots to sum over.
        weights : ndarray of shape (n_slots, lanes)
            Their weights; zero for other slots.
        """
        weights = to_device(weights, self.states)[:, :, None]
        self.field.accumulate(stages, self.states, self.cotangents, weights)


class QuadratureStepper(Stepper):
    """A method at work on an `AdjointField`, with the quadrature at accepted steps.

    Parameters
    ----------
    field : AdjointField
        The field.
    options : Options
        Settings; ``make_stepper`` makes the method itself.
    scale : ndarray of shape (lanes,)
        Factor of every lane's contribution.
    """

    def __init__(self, field: AdjointField, options: Options, scale: np.ndarray):
        super().__init__(field, options)
        self.inner = options.make_stepper(field, options)
        self.error_order = self.inner.error_order
        self.first_error = self.inner.first_error
        self.even_steps = self.inner.even_steps
        self.errors, self.propose = self.inner.errors, self.inner.propose
        self.dense, self.evaluations = self.inner.dense, self.inner.evaluations
        self.scale = scale
        self.weights = None  # of the stages, if the method has any
        tableau = options.tableau
        if tableau is not None:
            # the last stage is at the end of the step
            self.weights = np.append(tableau.a[tableau.n_stages - 1], 0.0)
            self.weights = self.weights[: tableau.n_stages]

    def start(self, lanes):
        self.field.fresh = True
        extra = np.zeros(len(lanes.rows) - len(self.scale))
        self.scale = np.concatenate([self.scale, extra])
        self.inner.start(lanes)

    def attempt(self, t, t1, h, y, k):
        if not self.field.fresh and self.weights is not None:
            self.field.begin(t, y)
        self.field.continue_from(1)
        self._t, self._length, self._y, self._ratio = t, t1 - t, y, None
        return self.inner.attempt(t, t1, h, y, k)

    def judge(self, y, y1):
        self._ratio, accept = self.inner.judge(y, y1)
        return self._ratio, accept

    def accept(self, moved):
        if moved.any():
            if self.weights is None:
                self._add_nodes(moved)
            else:
                self._add_stages(moved)
        self.inner.accept(moved)

    def _add_stages(self, moved: np.ndarray) -> None:
        field, n = self.field, len(self.weights)
        weights = np.zeros((n, len(moved)))
        used = [i for i in range(n) if self.weights[i]]
        slots = [field.slot(i) for i in used]
        weights[slots] = np.outer(self.weights[used], self._factor(moved))
        failed = ~moved & ~np.isfinite(0.0 if self._ratio is None else self._ratio)
        if failed.any() or (self._ratio is None and not moved.all()):
            # weights of zero do not do away with what is not a number
            mask = to_device(moved, self._y)[:, None]
            for slot in range(n):
                whole = torch.cat([field.states[slot], -field.cotangents[slot]], 1)
                state = torch.where(mask, whole, self._y)
                field.linearize(slot, field.times[slot], state)
        field.accumulate(slots, weights)
        field.fresh = bool(moved.all())
        if field.fresh:
            field.first = field.slot(n - 1)

    def _add_nodes(self, moved: np.ndarray) -> None:
        field, lanes = self.field, np.arange(len(moved))
        at = to_device(lanes, self._y)
        mask = to_device(moved, self._y)[:, None]
        for slot, node in enumerate(NODES):
            theta = to_device(np.full(len(moved), node), self._y)
            state = torch.where(mask, self.dense(at, theta), self._y)
            time = to_device(self._t + node * self._length, self._y)[:, None]
            field.linearize(slot, time if field.uses_time else None, state)
        weights = np.outer(WEIGHTS, self._factor(moved))
        field.accumulate(list(range(len(NODES))), weights)

    def _factor(self, moved: np.ndarray) -> np.ndarray:
        return np.where(moved, self._length, 0.0) * self.scale

    def select(self, index):
        self.scale = self.scale[index]
        self.field.fresh = False
        self.inner.select(index)

    def restart(self, jumped, k):
        self.inner.restart(jumped, k)
