"""The integration loop: many lanes, each with its own time, step size and fate.

A lane is a sample under per-sample control, or the whole batch under shared control. All
lanes step at once; who rejects a step stays where it is, who has arrived takes steps of
length zero (the identity, to the bit) until it leaves the batch.

Time runs upwards inside the loop, whatever the direction of the interval: ``t`` here is
``direction * time``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sknode.ode.control import StepController, error_ratio, initial_step
from sknode.ode.runge_kutta import dense_values, extend, step
from sknode.ode.solution import Status
from sknode.ode.tableaus import Tableau
from sknode.ode.vector_field import FieldView

__all__ = ["Options", "StepRecord", "Trace", "integrate"]

# Matrix products treat full blocks of rows alike; a remainder goes through other
# instructions and rounds differently. Batches that are multiples of this make a row's
# result independent of how many others there are.
ROW_BLOCK = 16

# Leave the batch when at most this share of the lanes is still under way.
COMPACT_BELOW = 0.8


@dataclass(frozen=True)
class Options:
    """What the loop needs to know beside the problem."""

    tableau: Tableau
    rtol: float
    atol: float
    max_steps: int
    controller: StepController
    first_step: float | None = None
    min_step: float = 0.0
    step_size: float | None = None  # a constant step, without error control


@dataclass
class StepRecord:
    """A step as it was taken, for going back over it.

    Attributes
    ----------
    rows : Tensor of shape (m,) or None
        The lanes that moved; None for all of them, in order.
    t, t1 : Tensor of shape (m,)
        Start and end in the direction of the interval, as the vector field saw them.
    h : Tensor of shape (m, 1)
        The signed step in the state's dtype, zero where a lane did not move.
    y : Tensor of shape (m, n)
        State at the start.
    arrived : Tensor of shape (m,)
        Whether the step ended at the end of the lane's interval.
    outputs : tuple of Tensor (lanes, columns, theta), or None
        The inner output times that fell into the step: position in ``rows``, index of
        the time, place in the step.
    """

    rows: Tensor | None
    t: Tensor
    t1: Tensor
    h: Tensor
    y: Tensor
    arrived: Tensor
    outputs: tuple[Tensor, Tensor, Tensor] | None


@dataclass
class Trace:
    """Everything that an integration leaves behind; one entry per lane."""

    y: Tensor  # (lanes, n_times, n)
    status: Tensor
    n_steps: Tensor
    n_rejected: Tensor
    n_dense: Tensor  # steps that needed the extra stages of the dense output
    next_output: Tensor  # first output time that was not reached
    t_reached: Tensor
    moving: Tensor  # whether the interval has a length
    k0: Tensor  # first slope
    n_padded: int  # lanes counted by the records' rows
    records: list[StepRecord] | None


@dataclass
class _Lanes:
    """State of the lanes still in the batch; every tensor has them first."""

    rows: Tensor
    t: Tensor
    t_end: Tensor
    near_end: Tensor  # a step that gets here goes to the end
    floor: Tensor  # smallest step, relative to the interval
    h: Tensor
    y: Tensor
    k: Tensor  # slope at (t, y)
    running: Tensor
    status: Tensor
    n_steps: Tensor
    n_rejected: Tensor
    n_dense: Tensor
    next_output: Tensor
    history: Tensor | None  # errors before, (lanes, n_history)
    grid: Tensor | None  # output times, (lanes, n_times) where lanes differ
    direction: Tensor | None  # where lanes differ

    def select(self, index: Tensor) -> _Lanes:
        """Keep some lanes."""
        kept = {
            f.name: None if value is None else value[index]
            for f in fields(self)
            for value in (getattr(self, f.name),)
        }
        return _Lanes(**kept)


@dataclass(frozen=True)
class Grid:
    """Output times in ascending order and the sign that turns them back.

    Attributes
    ----------
    times : Tensor of shape (n_times,) or (lanes, n_times)
    direction : float or Tensor of shape (lanes,)
    """

    times: Tensor
    direction: float | Tensor

    @classmethod
    def from_times(cls, t: Tensor) -> Grid:
        """Check user times (monotonic rows) and orient them."""
        first, last = t[..., :1], t[..., -1:]
        sign = torch.where(last < first, -1.0, 1.0).to(t.dtype)
        times = t * sign
        facts = [
            torch.isfinite(t).all(),
            (times[..., 1:] >= times[..., :-1]).all(),
            (sign > 0).all(),
            (sign < 0).all(),
        ]
        finite, monotonic, up, down = torch.stack(facts).tolist()
        if not finite:
            raise ValueError("t must be finite.")
        if not monotonic:
            raise ValueError("t must be monotonic (equal times may repeat).")
        return cls(times, 1.0 if up else -1.0 if down else sign.flatten())


def integrate(
    field: FieldView,
    y0: Tensor,
    grid: Grid,
    options: Options,
    *,
    k0: Tensor | None = None,
    record: bool = False,
) -> Trace:
    """Integrate all lanes over their intervals.

    Parameters
    ----------
    field : FieldView
        The vector field on (lanes, n) states.
    y0 : Tensor of shape (lanes, n)
        States at the first output time.
    grid : Grid
        Output times; the first and last bound the interval.
    options : Options
        Method and control.
    k0 : Tensor of shape (lanes, n), optional
        The first slope, where it is known already.
    record : bool, default=False
        Keep every accepted step, for gradients.

    Returns
    -------
    Trace
    """
    n_lanes, n_times = len(y0), grid.times.shape[-1]
    if field.row_wise:
        y0, grid, k0 = _pad(y0, grid, k0)
    shared_times = grid.times if grid.times.ndim == 1 else None
    total = _start(field, y0, grid, options, k0)
    trace_y = y0[:, None, :].repeat(1, n_times, 1)
    records: list[StepRecord] = []
    lanes = replace(total)
    k = y0.new_empty(options.tableau.n_stages, *y0.shape)
    k0, n_running = total.k, int(lanes.running.sum())
    for attempt in range(options.max_steps + 1):
        if not n_running:
            break
        if attempt == options.max_steps:
            code = torch.full_like(lanes.status, Status.MAX_STEPS)
            lanes.status = torch.where(lanes.running, code, lanes.status)
            break

        # attempt a step
        t, y, running = lanes.t, lanes.y, lanes.running
        t1 = t + lanes.h
        t1 = torch.where(t1 >= lanes.near_end, lanes.t_end, t1)
        length = t1 - t
        direction = grid.direction if lanes.direction is None else lanes.direction
        t_field, t1_field = _orient(t, direction), _orient(t1, direction)
        h = _orient(length, direction).to(y.dtype)[:, None]
        if k.shape[1] != len(y):
            k = y.new_empty(options.tableau.n_stages, *y.shape)
        field_times = (t_field, t1_field) if field.uses_time else (None, None)
        y1, slope = step(field, options.tableau, *field_times, h, y, lanes.k, k)

        # accept or reject
        ratio, accept = _judge(options, k, y, y1, t.dtype)
        t_new = torch.where(accept, t1, t)
        moved = accept & running
        lanes.running = t_new < lanes.t_end
        reached, counts = lanes.next_output, None
        if n_times > 2:
            times = shared_times if lanes.grid is None else lanes.grid
            reached = _outputs_reached(times, t_new, lanes.next_output)
            counts = reached - lanes.next_output
        # the only time in a step that the host waits for the device
        n_moved, n_ahead, n_outputs = _sums(moved, lanes.running, counts)

        # evaluate what fell into the step
        outputs = None
        if n_outputs:
            outputs = _locate(times, t, length, counts, lanes.next_output, n_outputs, y)
            full = extend(field, options.tableau, *field_times, h, y, k)
            values = dense_values(options.tableau, y, full, outputs[0], outputs[2])
            trace_y[lanes.rows[outputs[0]], outputs[1]] = values
            lanes.n_dense = lanes.n_dense + (counts > 0)
        if record and n_moved:
            arrived = t1 == lanes.t_end
            entry = StepRecord(None, t_field, t1_field, h, y, arrived, outputs)
            rows = lanes.rows if len(lanes.rows) < len(total.rows) else None
            records.append(_keep_moved(entry, rows, moved, n_moved, field.row_wise))

        # move
        everyone = n_moved == len(y)
        if everyone:
            lanes.y, lanes.k = y1, slope
        else:
            lanes.y = torch.where(moved[:, None], y1, y)
            lanes.k = torch.where(moved[:, None], slope, lanes.k)
        lanes.t, lanes.next_output = t_new, reached
        lanes.n_steps = lanes.n_steps + running

        # choose the next step
        if ratio is not None:
            order = options.tableau.error_order
            history = None if lanes.history is None else lanes.history.t()
            factor = options.controller.factor(ratio, history, order)
            floor = torch.maximum(t_new.abs() * _resolution(t), lanes.floor)
            lanes.h = torch.maximum(length * factor, floor)
            if history is not None:
                recent = torch.cat([ratio[None].clamp(min=1e-4), history[:-1]])
                lanes.history = torch.where(moved, recent, history).t()
        if not everyone and n_moved < n_running:
            _give_up(lanes, running & ~accept, ratio, length)

        # leave the batch
        n_running = n_ahead
        size = -(-n_running // ROW_BLOCK) * ROW_BLOCK
        if field.row_wise and 0 < size <= COMPACT_BELOW * len(y):
            _store(total, lanes)
            order = torch.argsort(lanes.running.int(), descending=True, stable=True)
            lanes = lanes.select(order[:size])
    _store(total, lanes)
    return _finish(total, trace_y, grid, k0, n_lanes, records if record else None)


def _pad(y0, grid, k0):
    """Fill the batch up to whole blocks with lanes that have nowhere to go."""
    extra = -len(y0) % ROW_BLOCK
    if not extra:
        return y0, grid, k0
    y0 = torch.cat([y0, y0.new_zeros(extra, y0.shape[1])])
    k0 = None if k0 is None else torch.cat([k0, k0.new_zeros(extra, k0.shape[1])])
    times, direction = grid.times, grid.direction
    n_times = times.shape[-1]
    if times.ndim == 1:
        times = times.expand(len(y0) - extra, n_times)
    start = times[:1, :1].expand(extra, n_times)
    times = torch.cat([times, start])
    if isinstance(direction, Tensor):
        direction = torch.cat([direction, direction[:1].expand(extra)])
    return y0, Grid(times, direction), k0


def _start(field, y0, grid, options, k0) -> _Lanes:
    """Evaluate the first slope and choose the first step."""
    n = len(y0)
    times, direction = grid.times, grid.direction
    per_lane = times.ndim == 2
    rows = torch.arange(n, device=y0.device)
    t = (times[:, 0] if per_lane else times[:1].expand(n)).contiguous()
    t_end = (times[:, -1] if per_lane else times[-1:].expand(n)).contiguous()
    interval = t_end - t
    if k0 is None:
        k0 = field.evaluate(_orient(t, direction) if field.uses_time else None, y0)
    good = torch.isfinite(y0).all(1) & torch.isfinite(k0).all(1)
    code = torch.full_like(rows, Status.NON_FINITE)
    status = torch.where(good | (interval == 0), torch.zeros_like(rows), code)
    # a lane that cannot start stays at a place where nothing can happen
    y = torch.where(good[:, None], y0, torch.zeros_like(y0))
    k = torch.where(good[:, None], k0, torch.zeros_like(k0))
    t_end = torch.where(good, t_end, t)
    floor = interval * (1e-3 * torch.finfo(t.dtype).eps)
    floor = floor.clamp(min=max(options.min_step, torch.finfo(t.dtype).tiny))

    if options.step_size is not None:
        h = torch.full_like(t, options.step_size)
    elif options.first_step is not None:
        h = torch.minimum(torch.full_like(t, options.first_step), interval)
    else:

        def evaluate(t1, length):
            signed = _orient(length, direction).to(y.dtype)[:, None]
            time = _orient(t1, direction) if field.uses_time else None
            return field.evaluate(time, torch.addcmul(y, k, signed))

        order = options.tableau.error_order
        h = initial_step(evaluate, t, t_end, y, k, order, options.rtol, options.atol)
        h = torch.maximum(h, floor)
    n_history = options.controller.n_history if options.step_size is None else 0
    n_times = times.shape[-1]
    zero = torch.zeros_like(rows)
    return _Lanes(
        rows=rows,
        t=t,
        t_end=t_end,
        near_end=t_end - 4 * _resolution(t) * torch.maximum(t.abs(), t_end.abs()),
        floor=floor,
        h=h,
        y=y,
        k=k,
        running=t < t_end,
        status=status,
        n_steps=zero,
        n_rejected=zero,
        n_dense=zero,
        next_output=torch.where(interval == 0, n_times - 1, min(1, n_times - 1)),
        history=torch.ones(n, n_history, dtype=t.dtype, device=t.device)
        if n_history
        else None,
        grid=times if per_lane and n_times > 2 else None,
        direction=direction if isinstance(direction, Tensor) else None,
    )


def _orient(t: Tensor, direction: float | Tensor) -> Tensor:
    """Turn ascending time (or a length) into the direction of the interval."""
    if isinstance(direction, float):
        return t if direction > 0 else -t
    return t * direction


def _resolution(t: Tensor) -> float:
    """Return the smallest step worth taking, relative to the time."""
    return 4 * torch.finfo(t.dtype).eps


def _judge(options, k, y, y1, dtype):
    """Return the scaled error, if there is one, and whether the step is accepted."""
    if options.step_size is not None:
        return None, torch.isfinite(y1).all(1)
    weights = options.tableau.tensors(y.dtype, y.device).error
    flat = k.view(len(k), -1).t()
    errors = [torch.mv(flat, w).view_as(y) for w in weights]
    ratio = error_ratio(errors, y, y1, options.rtol, options.atol).to(dtype)
    return ratio, ratio <= 1


def _outputs_reached(times: Tensor, t: Tensor, before: Tensor) -> Tensor:
    """Return the index of the first inner output time that lies ahead of t."""
    if times.ndim == 1:
        reached = torch.searchsorted(times, t, right=True)
    else:
        reached = torch.searchsorted(times, t[:, None], right=True)[:, 0]
    # the last time is not an inner one: the end of the last step serves it
    return torch.maximum(reached.clamp_(max=times.shape[-1] - 1), before)


def _sums(moved: Tensor, running: Tensor, counts: Tensor | None) -> Iterator[int]:
    """Bring the numbers that steer the loop to the host, in one transfer."""
    if counts is None:
        return *torch.stack([moved, running]).sum(1).tolist(), 0
    return torch.stack([moved.sum(), running.sum(), counts.sum()]).tolist()


def _locate(times, t, length, counts, first, n_outputs, y):
    """List the outputs of a step: which lane, which output time, where in the step."""
    arange = torch.arange(len(t), device=t.device)
    lanes = torch.repeat_interleave(arange, counts, output_size=n_outputs)
    before = counts.cumsum(0) - counts - first
    columns = torch.arange(n_outputs, device=t.device) - before[lanes]
    at = times[columns] if times.ndim == 1 else times[lanes, columns]
    theta = ((at - t[lanes]) / length[lanes]).clamp_(0.0, 1.0).to(y.dtype)
    return lanes, columns, theta


def _keep_moved(entry: StepRecord, rows, moved, n_moved: int, row_wise: bool):
    """Reduce a record to the lanes that moved, where rows may be taken apart."""
    if n_moved == len(moved):
        return replace(entry, rows=rows)
    if not row_wise or n_moved > COMPACT_BELOW * len(moved):
        # f may want all its rows, and taking a few out costs more than it saves:
        # those that did not move get a step of length zero
        still = torch.zeros_like(entry.h)
        return replace(entry, rows=rows, h=torch.where(moved[:, None], entry.h, still))
    index = torch.argsort(moved.int(), descending=True, stable=True)[:n_moved]
    outputs = entry.outputs
    if outputs is not None:
        position = moved.cumsum(0) - 1
        outputs = (position[outputs[0]], *outputs[1:])
    return StepRecord(
        rows=index if rows is None else rows[index],
        t=entry.t[index],
        t1=entry.t1[index],
        h=entry.h[index],
        y=entry.y[index],
        arrived=entry.arrived[index],
        outputs=outputs,
    )


def _give_up(lanes: _Lanes, rejected: Tensor, ratio: Tensor | None, length: Tensor):
    """Count rejected steps; freeze the lanes that cannot step any smaller."""
    lanes.n_rejected = lanes.n_rejected + rejected
    non_finite = torch.full_like(lanes.status, Status.NON_FINITE)
    if ratio is None:
        hopeless, code = rejected, non_finite
    else:
        floor = torch.maximum(lanes.t.abs() * _resolution(lanes.t), lanes.floor)
        hopeless = rejected & (length <= floor * 1.001)
        too_small = torch.full_like(lanes.status, Status.STEP_TOO_SMALL)
        code = torch.where(torch.isinf(ratio), non_finite, too_small)
    lanes.status = torch.where(hopeless, code, lanes.status)
    lanes.t_end = torch.where(hopeless, lanes.t, lanes.t_end)
    lanes.near_end = torch.where(hopeless, lanes.t, lanes.near_end)
    lanes.running = lanes.running & ~hopeless


def _store(total: _Lanes, lanes: _Lanes) -> None:
    """Write back what the lanes have become."""
    if lanes.rows is total.rows:
        for f in fields(total):
            setattr(total, f.name, getattr(lanes, f.name))
        return
    names = ("t", "y", "status", "n_steps", "n_rejected", "n_dense", "next_output")
    for name in names:
        value = getattr(total, name).index_copy(0, lanes.rows, getattr(lanes, name))
        setattr(total, name, value)


def _finish(total, y: Tensor, grid: Grid, k0: Tensor, n_lanes: int, records) -> Trace:
    """Fill the last outputs and drop the padding."""
    n_times = y.shape[1]
    moving = grid.times[..., -1] > grid.times[..., 0]
    moving = moving.expand(len(y))
    started = total.n_steps > 0
    if n_times > 1:
        columns = torch.arange(n_times, device=y.device)
        # the last time, and those that a failed lane did not reach
        ahead = (columns >= total.next_output[:, None]) & started[:, None]
        if n_times == 2:
            y[:, 1] = torch.where(started[:, None], total.y, y[:, 1])
        else:
            y = torch.where(ahead[:, :, None], total.y[:, None, :], y)
    return Trace(
        y=y[:n_lanes],
        status=total.status[:n_lanes],
        n_steps=total.n_steps[:n_lanes],
        n_rejected=total.n_rejected[:n_lanes],
        n_dense=total.n_dense[:n_lanes],
        next_output=total.next_output[:n_lanes],
        t_reached=_orient(total.t, grid.direction)[:n_lanes],
        moving=moving[:n_lanes],
        k0=k0[:n_lanes],
        n_padded=len(k0),
        records=records,
    )
