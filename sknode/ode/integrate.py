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

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import initial_step, just_inside
from sknode.ode.grid import Grid, Stops
from sknode.ode.lanes import RESOLUTION, Lanes, to_device
from sknode.ode.options import Options
from sknode.ode.solution import Status
from sknode.ode.stepper import Stepper
from sknode.ode.tape import LiveTape
from sknode.ode.trace import StepRecord, Trace
from sknode.ode.vector_field import FirstSlope

__all__ = ["integrate"]

# Matrix products treat full blocks of rows alike; a remainder goes through other
# instructions and rounds differently. Batches that are multiples of this make a row's
# result independent of how many others there are.
ROW_BLOCK = 16

# Lanes that have arrived leave when they are this share of the batch, in batches
# large enough for the arithmetic to cost more than the leaving.
LEAVE_SHARE = 0.2
LEAVE_BATCH = 256


def integrate(
    field,
    y0: Tensor,
    grid: Grid,
    options: Options,
    *,
    k0: Tensor | None = None,
    record: bool = False,
    first: FirstSlope | None = None,
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
    first : FirstSlope, optional
        The first states and slopes on autograd's tape: then what torch needs to reverse
        the steps is kept, too, within bounds. Not for gradients by times.

    Returns
    -------
    Trace
    """
    n_lanes, n_times = len(y0), grid.times.shape[-1]
    if field.row_wise:
        y0, grid, k0 = _pad(y0, grid, k0)
    stepper = options.make_stepper(field, options)
    lanes = total = _start(field, y0, grid, options, stepper, k0)
    k0, records, stops = total.k, [] if record else None, grid.stops
    # a column an output time; none but the first is known yet
    outputs_y = y0[:, None, :].repeat(1, n_times, 1)
    stepper.start(lanes)
    live = None
    if first is not None and LiveTape.suits(options, grid):
        live = LiveTape(field, options.tableau, first, lanes.y, lanes.k)
        stepper.tape = live
    n_running, attempt = np.count_nonzero(lanes.running), 0
    even = options.step_size is None and stepper.even_steps
    while n_running:
        if attempt == options.max_steps:
            lanes.status[lanes.running] = Status.MAX_STEPS
            break
        attempt += 1

        # attempt a step
        t, y, running = lanes.t, lanes.y, lanes.running
        given = attempt == 1 and options.first_step is not None
        t1 = t + (lanes.even_steps() if even and not given else lanes.h)
        t1 = np.where(t1 >= lanes.near_goal, lanes.goal, t1)
        length = t1 - t
        sign = grid.direction
        if isinstance(sign, np.ndarray):
            sign = sign[lanes.rows]
        h = to_device(length * sign, y)[:, None]
        if options.monitor is not None:
            options.monitor.on_step(float((t * sign)[0]), y, float(length[0]))
        y1, slope = stepper.attempt(t * sign, t1 * sign, h, y, lanes.k)

        # accept or reject: here the host waits for the device
        ratio, accept = stepper.judge(y, y1)
        if options.force_min_step:
            # it may have become longer by rounding
            asked = np.minimum(length, lanes.h)
            accept |= (asked <= options.min_step) & np.isfinite(ratio)
        moved = accept & running
        n_moved = np.count_nonzero(moved)
        if options.monitor is not None:
            notice = options.monitor.on_accept if n_moved else options.monitor.on_reject
            notice(float((t * sign)[0]), y, float(length[0]))
        if options.watch is not None and n_moved:
            t1, y1 = _end_early(options.watch, lanes, stepper, t1, y1, moved, sign)
        t_new = np.where(accept, t1, t)

        # evaluate what fell into the step
        outputs = None
        if n_times > 2:
            reached = _outputs_reached(grid, lanes.rows, t_new, lanes.next_output)
            counts = reached - lanes.next_output
            if counts.any() and stops is not None and stops.tied:
                # one lane, whose step has ended at this time
                outputs_y[:, lanes.next_output[0] : reached[0]] = y1[:, None]
            elif counts.any():
                outputs = _locate(grid, lanes, length, counts)
                values = stepper.dense(outputs[0], outputs[2])
                rows = to_device(lanes.rows, y)[outputs[0]]
                outputs_y[rows, outputs[1]] = values
                lanes.n_dense += counts > 0
            lanes.next_output = reached
        if record and n_moved:
            arrived = t1 == lanes.t_end
            entry = StepRecord(None, t * sign, t1 * sign, h, y, arrived, outputs)
            if stops is not None:
                entry.start_stop = lanes.next_stop
                entry.end_stop = stops.count(lanes.rows, t1)
            rows = None if lanes is total else lanes.rows
            records.append(_keep_moved(entry, rows, moved, n_moved, field.row_wise))

        # move
        stepper.accept(moved)
        if n_moved == y.shape[0]:
            lanes.y, lanes.k = y1, slope
        else:
            mask = to_device(moved, y)[:, None]
            lanes.y = torch.where(mask, y1, y)
            lanes.k = torch.where(mask, slope, lanes.k)
        lanes.t = t_new
        lanes.n_steps += running

        # choose the next step
        planned = lanes.h
        # it may have become longer, by rounding or to reach the goal: what was asked
        # for is what has to shrink
        tried = np.where(moved, length, np.minimum(length, planned))
        if ratio is not None:
            proposed = stepper.propose(lanes, tried, ratio, moved)
            lanes.rejected = ~accept
            if stops is not None:
                # a step that was cut short by a stop says little about the next one
                cut = moved & (t1 == lanes.goal) & (length < planned)
                proposed = np.where(cut, np.maximum(proposed, planned), proposed)
            floor = lanes.shortest()
            lanes.h = np.minimum(np.maximum(proposed, floor), options.max_step)
        if n_moved < n_running:
            _give_up(lanes, running & ~accept, ratio, tried)
        if stops is not None and n_moved:
            _pass_stops(stops, lanes, stepper, moved)
        lanes.running = t_new < lanes.t_end
        n_running = np.count_nonzero(lanes.running)

        # leave the batch
        size = -(-n_running // ROW_BLOCK) * ROW_BLOCK
        large = field.row_wise and y.shape[0] >= LEAVE_BATCH
        if large and 0 < size <= (1 - LEAVE_SHARE) * y.shape[0]:
            lanes.store(total)
            # running ones first; some that have arrived fill the last block
            index = np.argsort(~lanes.running, kind="stable")[:size]
            lanes = lanes.select(index)
            stepper.select(index)
    lanes.store(total)
    _fill(outputs_y, total)
    interval = grid.times[..., -1] - grid.times[..., 0]
    moving = np.broadcast_to(interval > 0, len(y0))
    reached = total.t * grid.direction
    trace = Trace(
        y=outputs_y[:n_lanes],
        status=total.status[:n_lanes],
        n_steps=total.n_steps[:n_lanes],
        n_rejected=total.n_rejected[:n_lanes],
        n_dense=total.n_dense[:n_lanes],
        n_jumps=total.n_jumps[:n_lanes],
        next_output=total.next_output[:n_lanes],
        t_reached=reached[:n_lanes],
        moving=moving[:n_lanes],
        at_start=np.broadcast_to(grid.at_start, (len(y0), n_times))[:n_lanes],
        k0=k0[:n_lanes],
        n_padded=len(k0),
        records=records,
        stepper=stepper,
    )
    trace.n_evaluations = stepper.evaluations(trace)
    if live is not None:
        live.close()
        trace.tape, stepper.tape = live, None
    return trace


def _end_early(watch, lanes: Lanes, stepper, t1, y1, moved, sign):
    """Let lanes end inside their step."""
    found = watch.look(lanes.rows, lanes.t, t1, lanes.y, y1, moved, sign, stepper.dense)
    if found is None:
        return t1, y1
    ended, at, states = found
    lanes.t_end = np.where(ended, at, lanes.t_end)
    lanes.goal = np.where(ended, at, lanes.goal)
    lanes.near_goal = np.where(ended, at, lanes.near_goal)
    lanes.status = np.where(ended, Status.EVENT, lanes.status)
    mask = to_device(ended, y1)[:, None]
    return np.where(ended, at, t1), torch.where(mask, states, y1)


def _pass_stops(stops: Stops, lanes: Lanes, stepper: Stepper, moved) -> None:
    """Note the stops that were reached, and let states and slopes jump there."""
    before = lanes.next_stop
    reached = np.where(
        moved, np.maximum(stops.count(lanes.rows, lanes.t), before), before
    )
    landed = reached > before
    if not landed.any():
        return
    lanes.next_stop = reached
    _aim(lanes, stops)
    if stops.on_reach is None:
        return
    y, k = stops.on_reach(lanes.rows, before, reached, lanes.t, lanes.y, lanes.k)
    if k is not lanes.k:
        lanes.n_jumps += landed
        stepper.restart(landed, k)
    lanes.y, lanes.k = y, k


def _aim(lanes: Lanes, stops: Stops | None, slack: float = 0.0) -> None:
    """Set the goal of every lane's next steps: its next stop or its end."""
    goal = lanes.t_end
    if stops is not None:
        goal = np.minimum(goal, stops.next(lanes.rows, lanes.next_stop))
    largest = np.maximum(np.abs(lanes.t), np.abs(goal))
    lanes.goal = goal
    lanes.near_goal = goal - np.maximum(4 * RESOLUTION * largest, slack)


def _pad(y0: Tensor, grid: Grid, k0: Tensor | None):
    """Fill the batch up to whole blocks with lanes that have nowhere to go."""
    extra = -len(y0) % ROW_BLOCK
    if not extra:
        return y0, grid, k0
    n, n_times = len(y0), grid.times.shape[-1]
    y0 = torch.cat([y0, y0[-1:].expand(extra, -1)])
    k0 = None if k0 is None else torch.cat([k0, k0[-1:].expand(extra, -1)])
    times = np.broadcast_to(grid.times, (n, n_times))
    start = np.broadcast_to(times[-1:, :1], (extra, n_times))
    direction, stops = grid.direction, grid.stops
    if isinstance(direction, np.ndarray):
        direction = np.concatenate([direction, np.repeat(direction[-1:], extra)])
    if stops is not None and stops.times.ndim == 2:
        none = np.full((extra, stops.times.shape[1]), np.inf)
        stops = replace(stops, times=np.concatenate([stops.times, none]))
    return y0, Grid(np.concatenate([times, start]), direction, stops), k0


def _start(
    field, y0: Tensor, grid: Grid, options: Options, stepper: Stepper, k0
) -> Lanes:
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
        first = just_inside(t, t_end, y0.dtype) if options.open_steps else t
        k0 = evaluate(first, y0)
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

        h = initial_step(
            probe,
            t,
            t_end,
            y,
            k,
            stepper.error_order,
            options.rtol,
            options.atol,
            options.norm,
            stepper.first_error,
        )
        h = np.maximum(h, floor)
    n_history = options.controller.n_history if options.step_size is None else 0
    lanes = Lanes(
        y=y,
        k=k,
        rows=np.arange(n),
        t=t,
        t_end=t_end,
        goal=t_end,
        near_goal=t_end,
        next_stop=np.zeros(n, dtype=np.int64),
        floor=floor,
        h=np.minimum(h, options.max_step),
        running=t < t_end,
        status=status,
        n_steps=np.zeros(n, dtype=np.int64),
        n_rejected=np.zeros(n, dtype=np.int64),
        n_dense=np.zeros(n, dtype=np.int64),
        n_jumps=np.zeros(n, dtype=np.int64),
        next_output=np.minimum(np.broadcast_to(grid.at_start.sum(-1), n), n_times - 1),
        history=np.ones((n, n_history)),
        rejected=np.zeros(n, dtype=bool),
    )
    # constant steps that divide the interval are that many, however their sum rounds
    constant = np.isfinite(options.step_size or np.inf)
    _aim(lanes, grid.stops, 1e-6 * options.step_size if constant else 0.0)
    return lanes


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


def _locate(grid: Grid, lanes: Lanes, length: np.ndarray, counts: np.ndarray):
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
        start_stop=None if entry.start_stop is None else entry.start_stop[index],
        end_stop=None if entry.end_stop is None else entry.end_stop[index],
    )


def _give_up(lanes: Lanes, rejected, ratio: np.ndarray | None, tried) -> None:
    """Count rejected steps; freeze the lanes that cannot step any smaller."""
    lanes.n_rejected += rejected
    if ratio is None:
        hopeless, code = rejected, Status.NON_FINITE
    else:
        floor = lanes.shortest()
        hopeless = rejected & (tried <= floor * 1.001)
        code = np.where(np.isinf(ratio), Status.NON_FINITE, Status.STEP_TOO_SMALL)
    if hopeless.any():
        lanes.status = np.where(hopeless, code, lanes.status)
        lanes.t_end = np.where(hopeless, lanes.t, lanes.t_end)
        lanes.goal = lanes.near_goal = np.where(hopeless, lanes.t, lanes.goal)


def _fill(outputs_y: Tensor, total: Lanes) -> None:
    """Write the last states where they belong: the last time, and those not reached."""
    n_times = outputs_y.shape[1]
    started = total.n_steps > 0
    if n_times == 1:
        return
    if started.all():
        outputs_y[:, -1] = total.y
    else:
        mask = to_device(started, outputs_y)[:, None]
        outputs_y[:, -1] = torch.where(mask, total.y, outputs_y[:, -1])
    short = started & (total.next_output < n_times - 1)
    for row in np.flatnonzero(short):
        outputs_y[row, total.next_output[row] :] = total.y[row]
