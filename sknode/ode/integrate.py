"""The integration loop: many lanes, each with its own time, step size and fate.

A lane is a sample under per-sample control, or the whole batch under shared control.
All lanes step at once; one that rejects a step stays where it is, one that has arrived
takes steps of length zero (the identity, to the bit) until it leaves the batch.

States live on the device, as torch tensors. What steers the loop (times, step sizes,
statuses: a few numbers a lane) lives on the host, as NumPy arrays in float64, where
such small operations are cheapest. The only thing that crosses over in a step is the
error of every lane, so the host waits for the device once a step.

Time runs upwards inside the loop, whatever the direction of the interval: ``t`` here is
``direction * time``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import StepController, error_ratio, initial_step
from sknode.ode.runge_kutta import (
    StageBuffer,
    StageTimes,
    dense_values,
    extend,
    step,
)
from sknode.ode.solution import Status
from sknode.ode.tableaus import Tableau

__all__ = ["Grid", "Options", "StepRecord", "Trace", "check_order", "integrate"]

# Matrix products treat full blocks of rows alike; a remainder goes through other
# instructions and rounds differently. Batches that are multiples of this make a row's
# result independent of how many others there are.
ROW_BLOCK = 16

# Lanes that have arrived leave when they are this share of the batch, in batches
# large enough for the arithmetic to cost more than the leaving.
LEAVE_SHARE = 0.2
LEAVE_BATCH = 256

# The smallest step worth taking, relative to the time.
RESOLUTION = 4 * np.finfo(np.float64).eps


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


@dataclass(frozen=True)
class Grid:
    """Output times in ascending order and the sign that turns them back.

    Attributes
    ----------
    times : ndarray of shape (n_times,) or (lanes, n_times)
    direction : float or ndarray of shape (lanes,)
    """

    times: np.ndarray
    direction: float | np.ndarray

    @property
    def at_start(self) -> np.ndarray:
        """Which times equal the first: they are reached before any step."""
        return self.times == self.times[..., :1]

    @classmethod
    def from_times(cls, t: np.ndarray) -> Grid:
        """Orient times as `check_order` lets them pass."""
        sign = np.where(t[..., -1:] < t[..., :1], -1.0, 1.0)
        times = t * sign
        uniform = len(np.unique(sign)) <= 1
        direction = float(sign.flat[0]) if uniform and sign.size else sign[..., 0]
        return cls(times, direction if sign.size else 1.0)


def check_order(t: np.ndarray) -> np.ndarray:
    """Raise unless times are finite and in order, row by row."""
    if not np.isfinite(t).all():
        raise ValueError("t must be finite.")
    change = np.diff(t)
    if not ((change >= 0).all(-1) | (change <= 0).all(-1)).all():
        raise ValueError("t must be monotonic (equal times may repeat).")
    return t


@dataclass
class StepRecord:
    """A step as it was taken, for going back over it.

    Attributes
    ----------
    rows : Tensor of shape (m,) or None
        The lanes that moved; None for all of them, in order.
    t, t1 : ndarray of shape (m,)
        Start and end in the direction of the interval, as the vector field saw them.
    h : Tensor of shape (m, 1)
        The signed step in the state's dtype, zero where a lane did not move.
    y : Tensor of shape (m, n)
        State at the start.
    arrived : ndarray of shape (m,)
        Whether the step ended at the end of the lane's interval.
    outputs : tuple of Tensor (lanes, columns, theta), or None
        The inner output times that fell into the step: position in ``rows``, index of
        the time, place in the step.
    """

    rows: Tensor | None
    t: np.ndarray
    t1: np.ndarray
    h: Tensor
    y: Tensor
    arrived: np.ndarray
    outputs: tuple[Tensor, Tensor, Tensor] | None


@dataclass
class Trace:
    """Everything that an integration leaves behind; one entry per lane."""

    y: Tensor  # (lanes, n_times, n)
    status: np.ndarray
    n_steps: np.ndarray
    n_rejected: np.ndarray
    n_dense: np.ndarray  # steps that needed the extra stages of the dense output
    next_output: np.ndarray  # first output time that was not reached
    t_reached: np.ndarray
    moving: np.ndarray  # whether the interval has a length
    records: list[StepRecord] | Any | None  # a kernel has its own kind
    # what only the reverse of `integrate` asks for
    at_start: np.ndarray | None = None  # (lanes, n_times), times that equal the first
    k0: Tensor | None = None  # first slope
    n_padded: int = 0  # lanes counted by the records' rows


@dataclass
class _Lanes:
    """State of the lanes still in the batch; every array has them first."""

    y: Tensor
    k: Tensor  # slope at (t, y)
    rows: np.ndarray
    t: np.ndarray
    t_end: np.ndarray
    near_end: np.ndarray  # a step that gets here goes to the end
    floor: np.ndarray  # smallest step, relative to the interval
    h: np.ndarray
    running: np.ndarray
    status: np.ndarray
    n_steps: np.ndarray
    n_rejected: np.ndarray
    n_dense: np.ndarray
    next_output: np.ndarray
    history: np.ndarray  # errors before, (lanes, n_history)

    def select(self, index: np.ndarray) -> _Lanes:
        """Keep some lanes."""
        index_y = torch.from_numpy(index).to(self.y.device)
        return _Lanes(
            self.y[index_y],
            self.k[index_y],
            **{f.name: getattr(self, f.name)[index] for f in fields(self)[2:]},
        )

    def store(self, total: _Lanes) -> None:
        """Write back into the arrays of all lanes."""
        if total is self:
            return
        rows = torch.from_numpy(self.rows).to(self.y.device)
        total.y = total.y.index_copy(0, rows, self.y)
        for f in fields(self)[3:]:
            getattr(total, f.name)[self.rows] = getattr(self, f.name)


def integrate(
    field,
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
    field : BoundField
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
    tableau, controller = options.tableau, options.controller
    if field.row_wise:
        y0, grid, k0 = _pad(y0, grid, k0)
    lanes = total = _start(field, y0, grid, options, k0)
    k0, records = total.k, [] if record else None
    # a column an output time; none but the first is known yet
    outputs_y = y0[:, None, :].repeat(1, n_times, 1)
    buffer = StageBuffer(tableau.n_stages, y0, reuse=field.row_wise)
    n_running, attempt = np.count_nonzero(lanes.running), 0
    while n_running:
        if attempt == options.max_steps:
            lanes.status[lanes.running] = Status.MAX_STEPS
            break
        attempt += 1

        # attempt a step
        t, y, running = lanes.t, lanes.y, lanes.running
        t1 = t + lanes.h
        t1 = np.where(t1 >= lanes.near_end, lanes.t_end, t1)
        length = t1 - t
        sign = grid.direction
        if isinstance(sign, np.ndarray):
            sign = sign[lanes.rows]
        h = to_device(length * sign, y)[:, None]
        times = StageTimes(field, tableau, t * sign, t1 * sign, y)
        if buffer.lanes != y.shape[0]:
            buffer = StageBuffer(tableau.n_stages, y, reuse=field.row_wise)
        y1, slope = step(field, tableau, times, h, y, lanes.k, buffer)

        # accept or reject: here the host waits for the device
        ratio, accept = _judge(options, buffer, y, y1)
        moved = accept & running
        n_moved = np.count_nonzero(moved)
        t_new = np.where(accept, t1, t)

        # evaluate what fell into the step
        outputs = None
        if n_times > 2:
            reached = _outputs_reached(grid, lanes.rows, t_new, lanes.next_output)
            counts = reached - lanes.next_output
            if counts.any():
                outputs = _locate(grid, lanes, length, counts)
                k = extend(field, tableau, times, h, y, buffer)
                values = dense_values(tableau, y, k, outputs[0], outputs[2])
                rows = to_device(lanes.rows, y)[outputs[0]]
                outputs_y[rows, outputs[1]] = values
                lanes.n_dense += counts > 0
            lanes.next_output = reached
        if record and n_moved:
            arrived = t1 == lanes.t_end
            entry = StepRecord(None, t * sign, t1 * sign, h, y, arrived, outputs)
            rows = None if lanes is total else lanes.rows
            records.append(_keep_moved(entry, rows, moved, n_moved, field.row_wise))

        # move
        everyone = n_moved == y.shape[0]
        if everyone:
            lanes.y, lanes.k = y1, slope
        else:
            mask = torch.from_numpy(moved).to(y.device)[:, None]
            lanes.y = torch.where(mask, y1, y)
            lanes.k = torch.where(mask, slope, lanes.k)
        lanes.t = t_new
        lanes.n_steps += running

        # choose the next step
        if ratio is not None:
            factor = controller.factor(ratio, lanes.history, tableau.error_order)
            floor = np.maximum(np.abs(t_new) * RESOLUTION, lanes.floor)
            lanes.h = np.maximum(length * factor, floor)
            if controller.n_history:
                recent = np.maximum(ratio, 1e-4)[:, None]
                recent = np.concatenate([recent, lanes.history[:, :-1]], axis=1)
                lanes.history = np.where(moved[:, None], recent, lanes.history)
        if n_moved < n_running:
            _give_up(lanes, running & ~accept, ratio, length)
        lanes.running = t_new < lanes.t_end
        n_running = np.count_nonzero(lanes.running)

        # leave the batch
        size = -(-n_running // ROW_BLOCK) * ROW_BLOCK
        large = field.row_wise and y.shape[0] >= LEAVE_BATCH
        if large and 0 < size <= (1 - LEAVE_SHARE) * y.shape[0]:
            lanes.store(total)
            # running ones first; some that have arrived fill the last block
            lanes = lanes.select(np.argsort(~lanes.running, kind="stable")[:size])
    lanes.store(total)
    _fill(outputs_y, total)
    interval = grid.times[..., -1] - grid.times[..., 0]
    moving = np.broadcast_to(interval > 0, len(y0))
    reached = total.t * grid.direction
    return Trace(
        y=outputs_y[:n_lanes],
        status=total.status[:n_lanes],
        n_steps=total.n_steps[:n_lanes],
        n_rejected=total.n_rejected[:n_lanes],
        n_dense=total.n_dense[:n_lanes],
        next_output=total.next_output[:n_lanes],
        t_reached=reached[:n_lanes],
        moving=moving[:n_lanes],
        at_start=np.broadcast_to(grid.at_start, (len(y0), n_times))[:n_lanes],
        k0=k0[:n_lanes],
        n_padded=len(k0),
        records=records,
    )


def to_device(values: np.ndarray, like: Tensor) -> Tensor:
    """Bring an array to the device, real numbers in the dtype of the states."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    dtype = like.dtype if tensor.is_floating_point() else None
    return tensor.to(device=like.device, dtype=dtype, non_blocking=True)


def _pad(y0: Tensor, grid: Grid, k0: Tensor | None):
    """Fill the batch up to whole blocks with lanes that have nowhere to go."""
    extra = -len(y0) % ROW_BLOCK
    if not extra:
        return y0, grid, k0
    n, n_times = len(y0), grid.times.shape[-1]
    y0 = torch.cat([y0, y0.new_zeros(extra, y0.shape[1])])
    k0 = None if k0 is None else torch.cat([k0, k0.new_zeros(extra, k0.shape[1])])
    times = np.broadcast_to(grid.times, (n, n_times))
    start = np.broadcast_to(times[:1, :1], (extra, n_times))
    direction = grid.direction
    if isinstance(direction, np.ndarray):
        direction = np.concatenate([direction, np.repeat(direction[:1], extra)])
    return y0, Grid(np.concatenate([times, start]), direction), k0


def _start(field, y0: Tensor, grid: Grid, options: Options, k0) -> _Lanes:
    """Evaluate the first slope and choose the first step."""
    n, n_times = len(y0), grid.times.shape[-1]
    t = np.broadcast_to(grid.times[..., 0], n).copy()
    t_end = np.broadcast_to(grid.times[..., -1], n).copy()
    interval = t_end - t
    sign = grid.direction

    def evaluate(t, y):
        time = to_device(t * sign, y)[:, None] if field.uses_time else None
        return field.evaluate(time, y)

    if k0 is None:
        k0 = evaluate(t, y0)
    good = torch.isfinite(y0).all(1) & torch.isfinite(k0).all(1)
    status = np.zeros(n, dtype=np.int64)
    y, k, fine = y0, k0, good.cpu().numpy()
    if not fine.all():
        # a lane that cannot start stays at a place where nothing can happen
        y = torch.where(good[:, None], y0, torch.zeros_like(y0))
        k = torch.where(good[:, None], k0, torch.zeros_like(k0))
        status[~fine & (interval > 0)] = Status.NON_FINITE
        t_end = np.where(fine, t_end, t)
    least = max(options.min_step, np.finfo(np.float64).tiny)
    floor = np.maximum(interval * (1e-3 * np.finfo(np.float64).eps), least)

    if options.step_size is not None:
        h = np.full(n, float(options.step_size))
    elif options.first_step is not None:
        h = np.minimum(float(options.first_step), interval)
    else:

        def probe(t1, length):
            signed = to_device(length * sign, y)[:, None]
            return evaluate(t1, torch.addcmul(y, k, signed))

        order = options.tableau.error_order
        h = initial_step(probe, t, t_end, y, k, order, options.rtol, options.atol)
        h = np.maximum(h, floor)
    n_history = options.controller.n_history if options.step_size is None else 0
    largest = np.maximum(np.abs(t), np.abs(t_end))
    # constant steps that divide the interval are that many, however their sum rounds
    slack = 1e-6 * (options.step_size or 0.0)
    return _Lanes(
        y=y,
        k=k,
        rows=np.arange(n),
        t=t,
        t_end=t_end,
        near_end=t_end - np.maximum(4 * RESOLUTION * largest, slack),
        floor=floor,
        h=h,
        running=t < t_end,
        status=status,
        n_steps=np.zeros(n, dtype=np.int64),
        n_rejected=np.zeros(n, dtype=np.int64),
        n_dense=np.zeros(n, dtype=np.int64),
        next_output=np.minimum(np.broadcast_to(grid.at_start.sum(-1), n), n_times - 1),
        history=np.ones((n, n_history)),
    )


def _judge(options: Options, buffer: StageBuffer, y: Tensor, y1: Tensor):
    """Return the scaled error, if there is one, and whether the step is accepted."""
    if options.step_size is not None:
        return None, torch.isfinite(y1).all(1).cpu().numpy()
    weights = options.tableau.tensors(y.dtype, y.device).error
    errors = [torch.mv(buffer.columns[-1], w).view_as(y) for w in weights]
    ratio = error_ratio(errors, y, y1, options.rtol, options.atol)
    return ratio, ratio <= 1


def _outputs_reached(grid: Grid, rows, t: np.ndarray, before: np.ndarray):
    """Return the index of the first inner output time that lies ahead of t."""
    if grid.times.ndim == 1:
        reached = np.searchsorted(grid.times, t, side="right")
    else:
        times = grid.times if len(rows) == len(grid.times) else grid.times[rows]
        reached = torch.searchsorted(
            torch.from_numpy(np.ascontiguousarray(times)),
            torch.from_numpy(t)[:, None],
            right=True,
        )
        reached = reached[:, 0].numpy()
    # the last time is not an inner one: the end of the last step serves it
    return np.maximum(np.minimum(reached, grid.times.shape[-1] - 1), before)


def _locate(grid: Grid, lanes: _Lanes, length: np.ndarray, counts: np.ndarray):
    """List the outputs of a step: which lane, which output time, where in the step."""
    lane = np.repeat(np.arange(len(counts)), counts)
    before = counts.cumsum() - counts - lanes.next_output
    column = np.arange(len(lane)) - before[lane]
    if grid.times.ndim == 1:
        at = grid.times[column]
    else:
        at = grid.times[lanes.rows[lane], column]
    theta = np.clip((at - lanes.t[lane]) / length[lane], 0.0, 1.0)
    return tuple(to_device(x, lanes.y) for x in (lane, column, theta))


def _keep_moved(entry: StepRecord, rows, moved, n_moved: int, row_wise: bool):
    """Reduce a record to the lanes that moved, where rows may be taken apart."""
    if n_moved == len(moved) or not row_wise or n_moved > 0.5 * len(moved):
        # f may want all its rows, and taking some out costs more than it saves:
        # those that did not move get a step of length zero
        if n_moved < len(moved):
            entry.h = entry.h * to_device(moved, entry.h)[:, None]
        entry.rows = None if rows is None else to_device(rows, entry.y)
        return entry
    # whole blocks again, filled up with lanes that did not move
    size = min(-(-n_moved // ROW_BLOCK) * ROW_BLOCK, len(moved))
    index = np.argsort(~moved, kind="stable")[:size]
    index_y = to_device(index, entry.y)
    outputs = entry.outputs
    if outputs is not None:
        position = to_device(np.cumsum(moved) - 1, entry.y)
        outputs = (position[outputs[0]], *outputs[1:])
    return StepRecord(
        rows=index_y if rows is None else to_device(rows[index], entry.y),
        t=entry.t[index],
        t1=entry.t1[index],
        h=entry.h[index_y] * to_device(moved[index], entry.h)[:, None],
        y=entry.y[index_y],
        arrived=entry.arrived[index],
        outputs=outputs,
    )


def _give_up(lanes: _Lanes, rejected, ratio: np.ndarray | None, length) -> None:
    """Count rejected steps; freeze the lanes that cannot step any smaller."""
    lanes.n_rejected += rejected
    if ratio is None:
        hopeless, code = rejected, Status.NON_FINITE
    else:
        floor = np.maximum(np.abs(lanes.t) * RESOLUTION, lanes.floor)
        hopeless = rejected & (length <= floor * 1.001)
        code = np.where(np.isinf(ratio), Status.NON_FINITE, Status.STEP_TOO_SMALL)
    if hopeless.any():
        lanes.status = np.where(hopeless, code, lanes.status)
        lanes.t_end = np.where(hopeless, lanes.t, lanes.t_end)
        lanes.near_end = np.where(hopeless, lanes.t, lanes.near_end)


def _fill(outputs_y: Tensor, total: _Lanes) -> None:
    """Write the last states where they belong: the last time, and those not reached."""
    n_times = outputs_y.shape[1]
    started = total.n_steps > 0
    if n_times == 1:
        return
    if started.all():
        outputs_y[:, -1] = total.y
    else:
        mask = torch.from_numpy(started).to(outputs_y.device)[:, None]
        outputs_y[:, -1] = torch.where(mask, total.y, outputs_y[:, -1])
    short = started & (total.next_output < n_times - 1)
    for row in np.flatnonzero(short):
        outputs_y[row, total.next_output[row] :] = total.y[row]
