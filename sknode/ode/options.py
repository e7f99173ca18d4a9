"""What the integration loop needs to know beside the problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from sknode.ode.control import StepController
from sknode.ode.tableaus import Tableau

if TYPE_CHECKING:
    from sknode.ode.stepper import Stepper
    from sknode.ode.trace import Trace

__all__ = ["Monitor", "Options", "Watch"]


class Monitor(Protocol):
    """Someone who is told of every step, under shared control."""

    def on_step(self, t: float, y: Tensor, h: float) -> None:
        """Called before a step is attempted."""

    def on_accept(self, t: float, y: Tensor, h: float) -> None:
        """Called after a step was accepted."""

    def on_reject(self, t: float, y: Tensor, h: float) -> None:
        """Called after a step was rejected."""


class Watch(Protocol):
    """Someone who may end a lane inside an accepted step, as events do."""

    def look(self, rows, t, t1, y, y1, moved, sign, dense):
        """Return the mask of lanes that end, their times and their states, or None.

        ``dense(lanes, theta)`` gives states inside the step. Times are ascending.
        """


@dataclass(frozen=True)
class Options:
    """What the loop needs to know beside the problem."""

    tableau: Tableau | None  # of an explicit Runge-Kutta method
    rtol: float | Tensor
    atol: float | Tensor
    max_steps: int
    controller: StepController
    first_step: float | None = None
    min_step: float = 0.0
    step_size: float | None = None  # a constant step, without error control
    grid: tuple[float, ...] | None = None  # ends of all steps; only for kernels
    max_step: float = np.inf
    force_min_step: bool = False  # accept steps that cannot be shortened
    open_steps: bool = False  # fields jump at ends of steps: see times just inside
    norm: Callable[[Tensor], np.ndarray] | None = None  # (lanes, n) -> (lanes,)
    monitor: Monitor | None = None
    watch: Watch | None = None
    make_stepper: Callable[[Any, Options], Stepper] | None = None
    loop: Callable[..., Trace] | None = None  # to be used instead of `integrate`

    @cached_property
    def plain(self) -> bool:
        """Whether there is nothing here that a kernel does not know."""
        return (
            self.tableau is not None
            and self.max_step == np.inf
            and not self.force_min_step
            and not self.open_steps
            and self.norm is None
            and self.monitor is None
            and self.watch is None
            and not isinstance(self.rtol, Tensor)
            and not isinstance(self.atol, Tensor)
        )
