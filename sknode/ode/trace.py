"""What an integration leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from sknode.ode.stepper import Stepper
    from sknode.ode.tape import LiveTape

__all__ = ["StepRecord", "Trace"]


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
    start_stop: np.ndarray | None = None  # stops reached before and after the step
    end_stop: np.ndarray | None = None


@dataclass
class Trace:
    """Everything that an integration leaves behind; one entry per lane."""

    y: Tensor  # (lanes, n_times, n)
    status: np.ndarray
    n_steps: np.ndarray
    n_rejected: np.ndarray
    next_output: np.ndarray  # first output time that was not reached
    t_reached: np.ndarray
    records: list[StepRecord] | Any | None  # a kernel has its own kind
    # status and statistics as `solve_ode` returns them, from a kernel; else from these
    statistics: np.ndarray | None = None
    n_dense: np.ndarray | None = None  # steps that needed the dense output's stages
    moving: np.ndarray | None = None  # whether the interval has a length
    # what only the reverse of `integrate` asks for
    at_start: np.ndarray | None = None  # (lanes, n_times), times that equal the first
    k0: Tensor | None = None  # first slope
    n_padded: int = 0  # lanes counted by the records' rows
    n_jumps: np.ndarray | None = None  # stops at which the slope was computed anew
    stepper: Stepper | None = None
    n_evaluations: np.ndarray | None = None  # after the first slopes
    tape: LiveTape | None = None  # what torch needs to reverse the first records
