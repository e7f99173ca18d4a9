"""What the integration loop asks of a method: one step of many lanes at once.

The loop in `integrate` owns time, step sizes and fates; a stepper owns everything that
depends on the method: how a step is taken, what its error is, what lies inside it, and
how long the next one should be. It works on arrays with the lanes first, and remembers
what it needs of the latest attempt, which is the one it is asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import error_ratio

if TYPE_CHECKING:
    from sknode.ode.lanes import Lanes
    from sknode.ode.options import Options
    from sknode.ode.trace import Trace
    from sknode.ode.vector_field import BoundField

__all__ = ["Stepper"]


class Stepper:
    """A method at work on one solve; the base of all.

    Parameters
    ----------
    field : BoundField
        The vector field.
    options : Options
        Tolerances and controller.
    """

    error_order: int
    """Order of the error estimate plus one."""
    first_error = 1.0
    """Error that the first step aims at, in tolerances. The literature aims at 0.01, as
    the estimate is crude; the first step is then the only short one of a few."""
    even_steps = True
    """Whether steps may be shortened to lead to their goal in equal ones."""

    def __init__(self, field: BoundField, options: Options):
        self.field, self.options = field, options

    def start(self, lanes: Lanes) -> None:
        """Get ready for the first step."""

    def attempt(
        self, t: np.ndarray, t1: np.ndarray, h: Tensor, y: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take a step; return state and slope at its end.

        Parameters
        ----------
        t, t1 : ndarray of shape (lanes,)
            Start and end in the direction of the interval, as the field wants them.
        h : Tensor of shape (lanes, 1)
            ``t1 - t`` in the real dtype of the states.
        y, k : Tensor of shape (lanes, n)
            State and slope at the start.
        """
        raise NotImplementedError

    def errors(self) -> list[Tensor]:
        """Return the error estimates of the latest attempt, each (lanes, n)."""
        raise NotImplementedError

    def judge(self, y: Tensor, y1: Tensor) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the scaled error of every lane, if there is one, and who is accepted.

        This is where the host waits for the device.
        """
        if self.options.step_size is not None:
            return None, torch.isfinite(y1).all(1).cpu().numpy()
        options = self.options
        ratio = error_ratio(
            self.errors(), y, y1, options.rtol, options.atol, options.norm
        )
        return ratio, ratio <= 1

    def accept(self, moved: np.ndarray) -> None:
        """Learn who moved, before lanes leave or the next step is chosen."""

    def propose(
        self, lanes: Lanes, length: np.ndarray, ratio: np.ndarray, moved: np.ndarray
    ) -> np.ndarray:
        """Return the length of the next step of every lane."""
        controller = self.options.controller
        factor = controller.factor(
            ratio, lanes.history, self.error_order, lanes.rejected
        )
        if controller.n_history:
            recent = np.maximum(ratio, 1e-4)[:, None]
            recent = np.concatenate([recent, lanes.history[:, :-1]], axis=1)
            lanes.history = np.where(moved[:, None], recent, lanes.history)
        return length * factor

    def dense(self, lanes: Tensor, theta: Tensor) -> Tensor:
        """Return states inside the latest step.

        Parameters
        ----------
        lanes, theta : Tensor of shape (m,)
            Which lane, and where in [0, 1] of its step.

        Returns
        -------
        Tensor of shape (m, n)
        """
        raise NotImplementedError

    def replay(
        self,
        field: BoundField,
        t: Tensor,
        t1: Tensor,
        h: Tensor,
        y: Tensor,
        inside: bool,
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Take a step by differentiable operations, for gradients.

        Parameters
        ----------
        field : BoundField
            The vector field, of differentiable operations.
        t, t1, h, y
            As for `attempt`, all of them tensors.
        inside : bool
            Whether the inside of the step will be looked at.

        Returns
        -------
        y1 : Tensor of shape (lanes, n)
            State at the end.
        dense : callable
            ``dense(lanes, theta)`` returns states inside the step.
        """
        raise NotImplementedError

    def select(self, index: np.ndarray) -> None:
        """Keep some lanes."""

    def restart(self, jumped: np.ndarray, k: Tensor) -> None:
        """Forget the past of lanes whose state or slope has jumped to a new slope."""

    def evaluations(self, trace: Trace) -> np.ndarray:
        """Return how many evaluations each lane needed after its first slopes."""
        raise NotImplementedError
