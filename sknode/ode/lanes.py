"""The lanes of the integration loop: each has its own time, step size and fate."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import even_steps, real_dtype

__all__ = ["RESOLUTION", "Lanes", "to_device"]

# The smallest step worth taking, relative to the time.
RESOLUTION = 4 * np.finfo(np.float64).eps


@dataclass
class Lanes:
    """State of the lanes still in the batch; every array has them first."""

    y: Tensor
    k: Tensor  # slope at (t, y)
    rows: np.ndarray
    t: np.ndarray
    t_end: np.ndarray
    goal: np.ndarray  # the next stop, or the end
    near_goal: np.ndarray  # a step that gets here goes to the goal
    next_stop: np.ndarray
    floor: np.ndarray  # smallest step, relative to the interval
    h: np.ndarray
    running: np.ndarray
    status: np.ndarray
    n_steps: np.ndarray
    n_rejected: np.ndarray
    n_dense: np.ndarray
    n_jumps: np.ndarray
    next_output: np.ndarray
    history: np.ndarray  # errors before, (lanes, n_history)
    rejected: np.ndarray  # whether the latest attempt was

    def shortest(self) -> np.ndarray:
        """Return the shortest steps that can be taken."""
        return np.maximum(np.abs(self.t) * RESOLUTION, self.floor)

    def even_steps(self) -> np.ndarray:
        """Return the next steps, shortened to lead to their goal in equal ones."""
        to_goal, to_near = self.goal - self.t, self.near_goal - self.t
        return even_steps(self.h, to_goal, to_near, self.shortest())

    def select(self, index: np.ndarray) -> Lanes:
        """Keep some lanes."""
        index_y = to_device(index, self.y)
        return Lanes(
            self.y[index_y],
            self.k[index_y],
            **{f.name: getattr(self, f.name)[index] for f in fields(self)[2:]},
        )

    def store(self, total: Lanes) -> None:
        """Write back into the arrays of all lanes."""
        if total is self:
            return
        rows = to_device(self.rows, self.y)
        total.y = total.y.index_copy(0, rows, self.y)
        for f in fields(self)[3:]:
            getattr(total, f.name)[self.rows] = getattr(self, f.name)


def to_device(values: np.ndarray, like: Tensor) -> Tensor:
    """Bring an array to the device, real numbers in the dtype of the states."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    dtype = real_dtype(like.dtype) if tensor.is_floating_point() else None
    return tensor.to(device=like.device, dtype=dtype, non_blocking=True)
