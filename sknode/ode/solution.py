"""What a solve returns: states, statuses, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "STATISTICS",
    "Occurrences",
    "Solution",
    "SolverError",
    "SolverWarning",
    "Status",
    "failure_report",
]

STATISTICS = ("n_steps", "n_accepted", "n_rejected", "n_f_evals")


class SolverWarning(RuntimeWarning):
    """A solve ended early for some samples."""


class SolverError(ValueError):
    """A solve failed where its result was needed, as in ``fit``."""


class Status(IntEnum):
    """How the solve of a sample ended.

    Every member carries a sentence for people in ``message``.
    """

    SUCCESS = 0, "The end of the interval was reached."
    MAX_STEPS = (
        1,
        "max_steps was reached before the end of the interval. Raise max_steps, or "
        "loosen rtol and atol.",
    )
    STEP_TOO_SMALL = (
        2,
        "The step size fell below min_step or below what the time's precision can "
        "resolve. Loosen rtol and atol, or use float64; the problem may be stiff or "
        "blow up at this time.",
    )
    NON_FINITE = (
        3,
        "The state or its derivative is not finite. Check y0 and the parameters of "
        "the vector field; the solution may blow up at this time.",
    )
    EVENT = 4, "A terminal event ended the integration."

    def __new__(cls, value, message):
        member = int.__new__(cls, value)
        member._value_ = value
        member.message = message
        return member


DONE = (Status.SUCCESS, Status.EVENT)


@dataclass
class Occurrences:
    """When and where one event happened, by sample and then by time.

    Attributes
    ----------
    sample : Tensor of shape (m,), dtype int64
        The samples; none, one or several entries for each.
    t : Tensor of shape (m,)
        The times, differentiable.
    y : Tensor of shape (m, \\*state)
        The states at these times, differentiable.
    """

    sample: Tensor
    t: Tensor
    y: Tensor


def failure_report(codes: np.ndarray, t_reached: np.ndarray) -> str:
    """Say how many samples failed, which, why and where.

    Parameters
    ----------
    codes, t_reached : ndarray of shape (batch,)
        Statuses and times of the last good states.

    Returns
    -------
    str
        A sentence for each way to fail; empty if none did.
    """
    lines = []
    for status in Status:
        rows = np.flatnonzero(codes == status)
        if status in DONE or not len(rows):
            continue
        shown = ", ".join(str(i) for i in rows[:5].tolist())
        shown += ", ..." if len(rows) > 5 else ""
        times = t_reached[rows]
        lines.append(
            f"{len(rows)} of {len(codes)} samples ({shown}) stopped at "
            f"t = {times.min():.4g} to {times.max():.4g}: {status.message}"
        )
    return " ".join(lines)


@dataclass(repr=False)
class Solution:
    """Solution of an initial value problem, as returned by `solve_ode`.

    Attributes
    ----------
    t : Tensor of shape (n_times,) or (batch, n_times)
        The output times as given.
    y : Tensor of shape (batch, n_times, \\*state)
        The states at the output times. Where a sample failed, the times that it did not
        reach hold its last good state.
    status : Tensor of shape (batch,), dtype int64
        A `Status` for every sample; 0 is success, 4 the end by a terminal event.
    stats : dict of str to Tensor of shape (batch,), dtype int64
        ``n_steps`` (attempted), ``n_accepted``, ``n_rejected``, ``n_f_evals`` (the
        evaluations of the vector field that the sample needed).
    t_reached : Tensor of shape (batch,)
        Time of the last good state: the end of the interval unless a sample failed or
        was ended by an event.
    events : tuple of Occurrences
        When and where each event happened.
    """

    t: Tensor
    y: Tensor
    # On the host, of one lane if the batch is one; tensors are only made of what is
    # asked for. Rows of counts: the status, the `STATISTICS`.
    _counts: np.ndarray
    _t_reached: np.ndarray
    _resolve: Callable[[Tensor], Solution]
    events: tuple[Occurrences, ...] = ()

    def __repr__(self):
        names = "t", "y", "status", "stats", "t_reached", "events"
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"Solution({shown})"

    @cached_property
    def status(self) -> Tensor:
        """A `Status` for every sample."""
        return self._of_samples(self._counts[0])

    @cached_property
    def stats(self) -> dict[str, Tensor]:
        """What the solve of each sample took."""
        counts = self._of_samples(self._counts[1 : 1 + len(STATISTICS)])
        return dict(zip(STATISTICS, counts.unbind(), strict=True))

    @cached_property
    def t_reached(self) -> Tensor:
        """Time of the last good state of every sample."""
        return self._of_samples(self._t_reached)

    def _of_samples(self, values: np.ndarray) -> Tensor:
        """Return values of lanes as those of samples, on the device of the states."""
        values = torch.from_numpy(values).to(self.y.device)
        return values.expand(*values.shape[:-1], len(self.y))

    @property
    def success(self) -> bool:
        """Whether all samples reached the end of the interval or a terminal event."""
        codes = self._counts[0]
        return not np.count_nonzero(codes) or bool(np.isin(codes, DONE).all())

    @property
    def messages(self) -> list[str]:
        """A readable sentence for every sample."""
        return [Status(code).message for code in self.status.tolist()]

    def failure_report(self) -> str:
        """Say how many samples failed, which, why and where.

        Returns
        -------
        str
            A sentence for each way to fail; empty if none did.
        """
        host = (x.numpy(force=True) for x in (self.status, self.t_reached))
        return failure_report(*host)

    def interpolate(self, t: Tensor) -> Tensor:
        """Evaluate the dense output at further times inside the interval.

        The same steps are taken again, with outputs at `t`: nothing is stored for this
        during a solve. The vector field must still be what it was.

        Parameters
        ----------
        t : Tensor of shape (n,) or (batch, n)
            Times between the first and the last output time, in the same direction.

        Returns
        -------
        y : Tensor of shape (batch, n, \\*state)
            States at these times, differentiable as the solution itself.
        """
        t = torch.as_tensor(t, dtype=self.t.dtype, device=self.t.device)
        if t.ndim not in (1, 2) or (t.ndim == 2 and len(t) != len(self.y)):
            raise ValueError(
                "t must have shape (n,) or (batch, n) with the batch of the solution. "
                f"Got {tuple(t.shape)} instead."
            )
        grid = self.t
        if t.ndim == 2 and grid.ndim == 1:
            grid = grid.expand(len(t), -1)
        if grid.ndim == 2 and t.ndim == 1:
            t = t.expand(len(grid), -1)
        first, last = grid[..., :1], grid[..., -1:]
        inside = (t - first) * (t - last) <= 0
        if not bool(inside.all()):
            raise ValueError(
                "t must lie between the first and the last output time of the solution."
            )
        descending = bool((last < first).any())
        if descending and bool((last > first).any()):
            # rows that run forwards and rows that run backwards
            sign = torch.where(last < first, -1.0, 1.0).to(t.dtype)
        else:
            sign = -1.0 if descending else 1.0
        order = torch.argsort(t * sign, dim=-1)
        inverse = torch.argsort(order, dim=-1)
        ordered = torch.cat([first, t.gather(-1, order), last], dim=-1)
        y = self._resolve(ordered).y[:, 1:-1]
        if inverse.ndim == 1:
            return y[:, inverse]
        rows = torch.arange(len(y), device=y.device)[:, None]
        return y[rows, inverse]
