"""Output times, and the times inside the interval at which steps have to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Grid", "Stops", "check_order"]


@dataclass(frozen=True)
class Stops:
    """Times inside the interval at which steps have to end.

    Attributes
    ----------
    times : ndarray of shape (n_stops,) or (lanes, n_stops)
        Ascending, after the start, infinite where a lane has fewer.
    on_reach : callable or None
        ``on_reach(rows, first, last, t, y, k)``, called when lanes have reached a stop,
        with the rows of all lanes, the range of stops that each has reached (empty for
        those that have not) and their ascending times; returns states and slopes.
    tied : bool
        Whether the stops are the inner output times themselves, and move with them;
        only for a single lane.
    """

    times: np.ndarray
    on_reach: Callable[..., tuple[Tensor, Tensor]] | None = None
    tied: bool = False

    def next(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the time of the stop with this index, infinite if there is none."""
        n = self.times.shape[-1]
        row = rows if self.times.ndim == 2 else 0
        times = np.atleast_2d(self.times)[row, np.minimum(index, n - 1)]
        return np.where(index < n, times, np.inf)

    def count(self, rows: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return how many stops lie at or before t."""
        if self.times.ndim == 1:
            return np.searchsorted(self.times, t, side="right")
        return (self.times[rows] <= t[:, None]).sum(1)


@dataclass(frozen=True)
class Grid:
    """Output times in ascending order and the sign that turns them back.

    Attributes
    ----------
    times : ndarray of shape (n_times,) or (lanes, n_times)
    direction : float or ndarray of shape (lanes,)
    stops : Stops or None
        Times at which steps have to end.
    """

    times: np.ndarray
    direction: float | np.ndarray
    stops: Stops | None = None

    @property
    def at_start(self) -> np.ndarray:
        """Which times equal the first: they are reached before any step."""
        return self.times == self.times[..., :1]

    @classmethod
    def from_times(cls, t: np.ndarray, stops: Stops | None = None) -> Grid:
        """Orient times as `check_order` lets them pass; stops are so already."""
        sign = np.where(t[..., -1:] < t[..., :1], -1.0, 1.0)
        times = t * sign
        uniform = len(np.unique(sign)) <= 1
        direction = float(sign.flat[0]) if uniform and sign.size else sign[..., 0]
        return cls(times, direction if sign.size else 1.0, stops)


def check_order(t: np.ndarray) -> np.ndarray:
    """Raise unless times are finite and in order, row by row."""
    if t.shape == (2,) and math.isfinite(t[0]) and math.isfinite(t[1]):
        return t  # the usual case
    if not np.isfinite(t).all():
        raise ValueError("t must be finite.")
    change = np.diff(t)
    if not ((change >= 0).all(-1) | (change <= 0).all(-1)).all():
        raise ValueError("t must be monotonic (equal times may repeat).")
    return t
