"""Events: zero crossings of functions of time and state, for every sample its own.

A watch looks at every accepted step of the integration loop, finds the sign changes and
locates them on the step's dense output. Where gradients are wanted, the samples are
solved once more with the located times as output times and ends, by the very gradient
that the solve has; the times themselves get theirs from the implicit function theorem,
``dt = -dg / (dg/dt + dg/dy f)``: one Newton step, which is as good as zero itself.

References
----------
Chen, Amos & Nickel, "Learning Neural Event Functions for Ordinary Differential
Equations", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import real_dtype
from sknode.ode.lanes import to_device
from sknode.ode.solution import Occurrences, Status
from sknode.ode.vector_field import bind

__all__ = ["Event", "check_events", "solve_with_events"]

# Bisection alone needs as many halvings as a double has bits.
MAX_ITERATIONS = 60


@dataclass(frozen=True)
class Event:
    """A zero crossing of a function, to stop at or to take note of.

    Parameters
    ----------
    function : callable
        ``function(t, y)`` returns a number for every sample, shape (batch,) or
        (batch, 1), from times and states as the vector field gets them; under shared
        control a single number for the whole batch. A sample's number must depend on
        its own row only.
    terminal : bool or int, default=True
        Whether the sample ends at the event; a number ends it at so many of them.
    direction : {-1, 0, 1}, default=0
        1 counts only crossings from negative to positive along the integration, -1 only
        those from positive to negative.

    Notes
    -----
    A zero at the start itself is no event. Two crossings within one step are not seen:
    use ``max_step`` where that may happen.

    Examples
    --------
    A ball falls to the ground; when does it get there, and how does that change with
    its height?

    >>> import torch
    >>> from sknode.ode import Event, solve_ode
    >>> def fall(t, y):
    ...     return torch.stack([y[:, 1], -9.81 * torch.ones_like(y[:, 1])], 1)
    >>> y0 = torch.tensor([[10.0, 0.0], [20.0, 0.0]], requires_grad=True)
    >>> ground = Event(lambda t, y: y[:, 0], direction=-1)
    >>> solution = solve_ode(fall, y0, torch.tensor([0.0, 10.0]), event=ground)
    >>> solution.events[0].t
    tensor([1.4278, 2.0193], grad_fn=...)
    >>> torch.autograd.grad(solution.events[0].t.sum(), y0)[0][:, 0]
    tensor([0.0714, 0.0505])
    """

    function: Callable[[Tensor, Tensor], Tensor]
    terminal: bool | int = True
    direction: int = 0

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(
                f"event must be callable. Got {type(self.function).__name__} instead."
            )
        if not isinstance(self.terminal, Integral) or self.terminal < 0:
            raise ValueError(
                "terminal of an event must be a bool or a positive integer. "
                f"Got {self.terminal!r} instead."
            )
        if self.direction not in (-1, 0, 1):
            raise ValueError(
                f"direction of an event must be -1, 0 or 1. Got {self.direction!r}."
            )


def check_events(event) -> tuple[Event, ...]:
    """Return the events of an argument: an `Event`, a function, or several."""
    several = event if isinstance(event, Sequence) else [event]
    return tuple(x if isinstance(x, Event) else Event(x) for x in several)


class _Watch:
    """Looks at every accepted step of a loop; see `sknode.ode.integrate.Watch`.

    Event functions may hold tensors with an entry per sample, so they always get the
    whole batch, whichever lanes are still in it.
    """

    def __init__(self, events, y0: Tensor, shared: bool):
        self.events, self.shared, self.shape = events, shared, y0.shape
        self.n_lanes = 1 if shared else len(y0)
        n_state = y0[0].numel() if not shared else y0.numel()
        # padded lanes, which have nowhere to go, may come on top
        self._y = y0.detach().reshape(self.n_lanes, n_state).clone()
        self._t = np.zeros(self.n_lanes)
        self._before: np.ndarray | None = None  # (events, lanes)
        self._counts = np.zeros((len(events), self.n_lanes), dtype=np.int64)
        self.log: list[list[tuple]] = [[] for _ in events]

    def evaluate(self, t: Tensor, y: Tensor, which=None) -> list[Tensor]:
        """Return the values (lanes,) of the events, from (lanes,) times."""
        if self.shared:
            t, y = t.reshape(()), y.reshape(self.shape)
        else:
            t, y = t.view(-1, *(1 for _ in self.shape[1:])), y.reshape(self.shape)
        chosen = self.events if which is None else [self.events[which]]
        values = []
        for event in chosen:
            value = event.function(t, y)
            if not isinstance(value, Tensor) or value.numel() != self.n_lanes:
                expected = "a single number" if self.shared else "one number a sample"
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value)
                raise ValueError(
                    f"an event must return {expected}, a tensor of shape "
                    f"({self.n_lanes},). Got {got} instead."
                )
            values.append(value.reshape(self.n_lanes))
        return values

    def _at(self, rows, t: np.ndarray, y: Tensor, which=None) -> np.ndarray:
        """Return the values (events, lanes) for some rows, on the host."""
        real = rows < self.n_lanes
        self._t[rows[real]] = t[real]
        index = torch.from_numpy(rows[real]).to(y.device)
        kept = y[torch.from_numpy(real).to(y.device)]
        self._y = self._y.index_copy(0, index, kept)
        values = self.evaluate(to_device(self._t, y), self._y, which)
        values = torch.stack(values).to(torch.float64).cpu().numpy()
        found = np.full((len(values), len(rows)), np.nan)
        found[:, real] = values[:, rows[real]]
        return found

    def look(self, rows, t, t1, y, y1, moved, sign, dense):
        if self._before is None:
            first = self._at(rows, t * sign, y)
            self._before = first[:, np.argsort(rows)]
        before, after = self._before[:, rows], self._at(rows, t1 * sign, y1)
        up, down = (before < 0) & (after >= 0), (before > 0) & (after <= 0)
        direction = np.array([event.direction for event in self.events])[:, None]
        crossed = moved & ((up & (direction >= 0)) | (down & (direction <= 0)))
        self._before[:, rows] = np.where(moved, after, before)
        if not crossed.any():
            return None

        length = t1 - t
        theta = np.full(crossed.shape, np.inf)
        for i in np.flatnonzero(crossed.any(1)):
            at = self._locate(i, rows, t, length, before[i], after[i], sign, dense)
            theta[i] = np.where(crossed[i], at, np.inf)
        limit = np.array([int(event.terminal) for event in self.events])[:, None]
        real = rows < self.n_lanes
        counts = np.zeros_like(crossed, dtype=np.int64)
        counts[:, real] = self._counts[:, rows[real]] + crossed[:, real]
        ends = crossed & (limit > 0) & (counts >= limit)
        end = np.where(ends, theta, np.inf).min(0)
        happened = crossed & (theta <= end)
        self._note(happened, theta, rows, t, length, sign, dense)
        ended = np.isfinite(end)
        if not ended.any():
            return None
        place = np.where(ended, end, 0.0)
        everyone = torch.arange(len(rows), device=y.device)
        return ended, t + place * length, dense(everyone, to_device(place, y))

    def _locate(self, i, rows, t, length, left, right, sign, dense) -> np.ndarray:
        """Find the zero of an event inside the step of every lane, by its place.

        The Illinois method (regula falsi that halves the value of an end that stays),
        with a bisection where it does not halve the bracket.
        """
        low, high = np.zeros(len(t)), np.ones(len(t))
        f_low, f_high = left.copy(), right.copy()
        everyone = torch.arange(len(t), device=self._y.device)
        sided = np.zeros(len(t))
        for iteration in range(MAX_ITERATIONS):
            with np.errstate(invalid="ignore", divide="ignore"):
                middle = low - f_low * (high - low) / (f_high - f_low)
            inside = (middle > low) & (middle < high)
            # every third time: keeps the method from creeping
            halve = ~inside | (iteration % 3 == 2)
            middle = np.where(halve, 0.5 * (low + high), middle)
            states = dense(everyone, to_device(middle, self._y))
            value = self._at(rows, (t + middle * length) * sign, states, i)[0]
            same = np.sign(value) == np.sign(left)
            f_high = np.where(same & (sided > 0), 0.5 * f_high, f_high)
            f_low = np.where(~same & (sided < 0), 0.5 * f_low, f_low)
            low, f_low = np.where(same, middle, low), np.where(same, value, f_low)
            high, f_high = np.where(same, high, middle), np.where(same, f_high, value)
            sided = np.where(same, 1.0, -1.0)
            resolution = (
                4
                * np.finfo(np.float64).eps
                * np.abs(t)
                / np.maximum(length, np.finfo(np.float64).tiny)
            )
            wide = high - low > np.maximum(resolution, 1e-14)
            if not (wide & (value != 0)).any():
                break
        # the side that has crossed, so that going on does not find it again
        return high

    def _note(self, happened, theta, rows, t, length, sign, dense) -> None:
        """Write down what happened, in the order of time within a sample."""
        for i in np.flatnonzero(happened.any(1)):
            lanes = np.flatnonzero(happened[i])
            place = to_device(theta[i, lanes], self._y)
            states = dense(to_device(lanes, self._y), place)
            at = (t + np.where(happened[i], theta[i], 0.0) * length) * sign
            self.log[i].append((rows[lanes], at[lanes], states))
            self._counts[i, rows[lanes]] += 1


def solve_with_events(solve, f, y0: Tensor, t: Tensor, event, *, shared, **settings):
    """Solve with events.

    Parameters
    ----------
    solve : callable
        The solver without events.
    f, y0, t
        The checked problem; t in double precision.
    event : Event, callable or sequence of them
        What to look for.
    shared : bool
        Whether the batch is one system.

    Returns
    -------
    Solution
    """
    events = check_events(event)
    watch = _Watch(events, y0, shared)
    with torch.no_grad():
        solution = solve(f, y0, t, watch=watch, **settings)
    found = [_collect(log, watch, y0) for log in watch.log]
    if _needs_grad(f, y0, t, shared, watch):
        return _differentiable(solve, f, y0, t, watch, solution, found, **settings)
    times = (x.t.to(real_dtype(y0.dtype)) for x in found)
    solution.events = tuple(
        Occurrences(x.sample, at, _reshaped(x.y, watch))
        for x, at in zip(found, times, strict=True)
    )
    return solution


def _reshaped(y: Tensor, watch: _Watch) -> Tensor:
    """Return (m, n) states in the user's shape."""
    shape = watch.shape if watch.shared else watch.shape[1:]
    return y.reshape(len(y), *shape)


def _collect(log, watch: _Watch, y0: Tensor) -> Occurrences:
    """Join what was noted of one event, sorted by sample; times in double precision."""
    if not log:
        return Occurrences(
            torch.zeros(0, dtype=torch.int64, device=y0.device),
            torch.zeros(0, dtype=torch.float64, device=y0.device),
            watch._y[:0],
        )
    samples = np.concatenate([rows for rows, _, _ in log])
    order = np.argsort(samples, kind="stable")
    index = torch.from_numpy(order).to(y0.device)
    times = torch.from_numpy(np.concatenate([t for _, t, _ in log])[order])
    return Occurrences(
        torch.from_numpy(samples[order]).to(y0.device),
        times.to(y0.device),
        torch.cat([y for _, _, y in log])[index],
    )


def _needs_grad(f, y0: Tensor, t: Tensor, shared: bool, watch: _Watch) -> bool:
    """Return whether anything that the result depends on requires gradients."""
    if not torch.is_grad_enabled():
        return False
    if y0.requires_grad or t.requires_grad:
        return True
    field = bind(f, len(y0), y0.shape[1:], shared)
    start = t.detach()[..., :1].expand(watch.n_lanes, 1)
    start = start.to(y0.device, real_dtype(y0.dtype))
    if field.probed:
        field.discover(start, watch._y)
    if any(p.requires_grad for p in field.parameters):
        return True
    return any(x.requires_grad for x in watch.evaluate(start[:, 0], watch._y))


def _differentiable(solve, f, y0, t, watch, solution, found, **settings):
    """Solve again with the events as output times and ends; link up the gradients."""
    n_lanes, n_times = watch.n_lanes, t.shape[-1]
    rows = t if t.ndim == 2 else t.expand(n_lanes, -1)
    # every lane's outputs, then its events, in the order of time
    end = solution.t_reached[:n_lanes, None].to(rows.device)
    sign = torch.where(rows[:, -1:] < rows[:, :1], -1.0, 1.0)
    beyond = rows.detach() * sign > end * sign
    outputs = torch.where(beyond, end, rows)
    extra, places = _event_columns(found, n_times, end)
    columns = torch.cat([outputs, extra], 1)
    order = torch.argsort(columns.detach() * sign, dim=1, stable=True)
    back = torch.argsort(order, dim=1)
    ordered = columns.gather(1, order)
    if watch.shared:
        states = solve(f, y0, ordered[0], **settings).y  # (batch, times, *state)
        states = states.transpose(0, 1).reshape(1, columns.shape[1], -1)
    else:
        states = solve(f, y0, ordered, **settings).y.flatten(2)
    lanes = torch.arange(n_lanes, device=y0.device)[:, None]
    states = states[lanes, back]

    y, ends = states[:, :n_times], torch.zeros_like(beyond)
    held = torch.zeros_like(states[:, 0])
    events = []
    for i, (one, place) in enumerate(zip(found, places, strict=True)):
        at, state = _linked(f, watch, i, one, states[one.sample, place])
        final = one.t == end[one.sample, 0]
        stopped = solution.status[: watch.n_lanes] == Status.EVENT
        terminal = final & stopped[one.sample]
        chosen = one.sample[terminal]
        held = held.index_copy(0, chosen, state[terminal])
        ends[chosen] = beyond[chosen]
        events.append(
            Occurrences(
                one.sample, at.to(real_dtype(y0.dtype)), _reshaped(state, watch)
            )
        )
    y = torch.where(ends[:, :, None], held[:, None, :], y)
    if watch.shared:
        y = y[0].reshape(n_times, *y0.shape).transpose(0, 1)
    solution.y, solution.events = y.reshape(solution.y.shape), tuple(events)
    return solution


def _event_columns(found, n_times: int, end: Tensor):
    """Lay out the events of every lane in columns, filled up with the lane's end.

    Returns the times (lanes, n_columns) and, for every event, the column in which each
    of its occurrences will be found behind the ``n_times`` of the outputs.
    """
    number = _occurrence_number(torch.cat([one.sample for one in found]))
    places = number.split([len(one.sample) for one in found])
    n_columns = int(number.max()) + 1 if len(number) else 0
    extra = end.repeat(1, n_columns)
    for one, place in zip(found, places, strict=True):
        extra[one.sample, place] = one.t
    return extra, [place + n_times for place in places]


def _linked(f, watch: _Watch, i: int, one: Occurrences, state: Tensor):
    """Return times and states of an event with their gradients.

    At a fixed time the state has its gradient already. The time moves by
    ``-dg / (dg/dt + dg/dy f)`` and takes the state along.
    """
    at, lanes = one.t, one.sample
    if not len(lanes):
        return at, state
    dtype = real_dtype(state.dtype)
    corrections = []
    # event functions get the whole batch: one occurrence of every lane at a time
    turn = _occurrence_number(lanes)
    total_t = torch.zeros(watch.n_lanes, dtype=dtype, device=state.device)
    for k in range(int(turn.max()) + 1):
        chosen = turn == k
        t_all = total_t.index_copy(0, lanes[chosen], at[chosen].to(dtype))
        y_all = watch._y.index_copy(0, lanes[chosen], state[chosen])
        correction, slope = _newton(f, watch, i, t_all, y_all)
        corrections.append((chosen, correction[lanes[chosen]], slope[lanes[chosen]]))
    shift, drift = torch.zeros_like(at), torch.zeros_like(state)
    for chosen, correction, slope in corrections:
        index = chosen.nonzero()[:, 0]
        shift = shift.index_copy(0, index, correction.to(shift.dtype))
        drift = drift.index_copy(0, index, slope)
    moved = state + drift * shift.to(dtype)[:, None]
    return at + shift, moved


def _newton(f, watch: _Watch, i: int, t: Tensor, y: Tensor):
    """Return one Newton step of the event times, and the slopes there."""
    with torch.enable_grad():
        t_, y_ = t.detach().requires_grad_(), y.detach().requires_grad_()
        (value,) = watch.evaluate(t_, y_, i)
        by_t, by_y = torch.autograd.grad(value.sum(), (t_, y_), allow_unused=True)
    with torch.no_grad():
        field = bind(f, watch.shape[0], watch.shape[1:], watch.shared)
        field.prepare()
        time = t.detach()[:, None] if field.uses_time else None
        slope = field.evaluate(time, y.detach())
        rate = torch.zeros_like(t) if by_t is None else by_t
        if by_y is not None:
            rate = rate + (by_y.conj() * slope).real.sum(1)
    (value,) = watch.evaluate(t.detach(), y, i)
    # a crossing without speed has no derivative; it also stands for lanes without one
    return -value / torch.where(rate == 0, torch.inf, rate), slope


def _occurrence_number(lanes: Tensor) -> Tensor:
    """Return how many entries of the same lane come before each entry."""
    numbers, seen = [], {}
    for lane in lanes.tolist():
        numbers.append(seen.get(lane, 0))
        seen[lane] = numbers[-1] + 1
    return torch.tensor(numbers, device=lanes.device)
