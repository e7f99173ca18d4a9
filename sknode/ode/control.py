"""Step-size control: error norm, first step, next step.

A *lane* is whatever has a step size of its own: a sample, or the whole batch under
shared control. All functions work on lanes, arrays of shape (lanes, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "StepController",
    "error_ratio",
    "even_steps",
    "initial_step",
    "just_inside",
    "make_controller",
    "real_dtype",
    "rms_norm",
    "scaled_norms",
]


@dataclass(frozen=True)
class StepController:
    """Proportional-integral-derivative step-size controller.

    The next step is ``h * factor`` with ``factor = safety * r_n^-b1 * r_{n-1}^-b2 *
    r_{n-2}^-b3``, where ``r`` is the scaled error of a step (1 is the tolerance),
    ``k`` the order of its estimate plus one and ``b1 = (p + i + d) / k``,
    ``b2 = -(p + 2 d) / k``, ``b3 = d / k``. A step with ``r > 1`` is rejected, and the
    first step accepted after that is followed by none larger: what was too long just
    now would be too long again.

    Parameters
    ----------
    pcoeff, icoeff, dcoeff : float, default=0.2, 0.65, 0
        The coefficients p, i, d. The default is that of Hairer's DOPRI5: it rejects few
        steps. ``(0, 1, 0)`` is the integral controller, which only knows the last
        error; ``(0.2, 0.5, 0)`` takes smoother steps where stability limits them.
    safety : float, default=0.9
        Aim this much below the step that would just meet the tolerance.
    factor_min, factor_max : float, default=0.2, 10
        Bounds on the change of the step size.

    References
    ----------
    Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", 2nd edition,
    Springer 1993, and its program DOPRI5: ``BETA = 0.04``.
    Soderlind, "Digital filters in adaptive time-stepping", ACM Transactions on
    Mathematical Software 29 (2003), 1-26.
    """

    pcoeff: float = 0.2
    icoeff: float = 0.65
    dcoeff: float = 0.0
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0

    def __post_init__(self):
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety must be in (0, 1]. Got {self.safety!r} instead.")
        if not 0 < self.factor_min < 1 < self.factor_max:
            raise ValueError(
                "factor_min and factor_max must satisfy 0 < factor_min < 1 < "
                f"factor_max. Got {self.factor_min!r} and {self.factor_max!r} instead."
            )

    @property
    def n_history(self) -> int:
        """How many earlier errors the controller looks at."""
        return 2 if self.dcoeff else 1 if self.pcoeff else 0

    def factor(
        self,
        ratio: np.ndarray,
        history: np.ndarray,
        order: int,
        after_rejection: np.ndarray | bool = False,
    ) -> np.ndarray:
        """Return the factor for the next step.

        Parameters
        ----------
        ratio : ndarray of shape (lanes,)
            Scaled error of the attempted step, infinite if it is not a number.
        history : ndarray of shape (lanes, n_history)
            Scaled errors of the accepted steps before, the latest first.
        order : int
            Order of the error estimate plus one.
        after_rejection : ndarray of shape (lanes,) or bool, default=False
            Whether the attempt before this one was rejected.

        Returns
        -------
        ndarray of shape (lanes,)
            The factors.
        """
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        # an error of zero means the largest factor; this only avoids 1 / 0
        factor = self.safety * np.maximum(ratio, 1e-100) ** (-(p + i + d) / order)
        for past, beta in zip(history.T, (-(p + 2 * d), d), strict=False):
            factor *= past ** (-beta / order)
        most = np.where(after_rejection, 1.0, self.factor_max)
        if self.n_history:
            # with a memory, a rejected step could be proposed to grow
            most = np.where(ratio > 1, self.safety, most)
        # several times as fast as `clip` for a few numbers
        return np.maximum(np.minimum(factor, most), self.factor_min)


def make_controller(controller) -> StepController:
    """Return a `StepController` for "PI", "I", "PID" or an instance."""
    if isinstance(controller, StepController):
        return controller
    if controller == "PI":
        return StepController()
    if controller == "I":
        return StepController(pcoeff=0.0, icoeff=1.0)
    if controller == "PID":
        return StepController(pcoeff=0.2, icoeff=0.5)
    raise ValueError(
        "controller must be 'PI', 'I', 'PID' or a StepController. "
        f"Got {controller!r} instead."
    )


def even_steps(
    length: np.ndarray, to_goal: np.ndarray, to_near: np.ndarray, least: np.ndarray
) -> np.ndarray:
    """Shorten steps so that they lead to their goal in equal ones.

    They are as many as it takes to the goal anyway. A last step that is cut short would
    make no use of its evaluations; shared among all, the rest makes them more accurate.

    Parameters
    ----------
    length : ndarray of shape (lanes,)
        Lengths of the next steps.
    to_goal, to_near : ndarray of shape (lanes,)
        What is left, and how much of it a step has to take to be led to the goal.
    least : ndarray of shape (lanes,)
        Steps that would become shorter than this stay as they are.

    Returns
    -------
    ndarray of shape (lanes,)

    References
    ----------
    Shampine & Watts, "The art of writing a Runge-Kutta code II", Applied Mathematics
    and Computation 5 (1979), 93-121: their RKF45 looks ahead two steps.
    """
    with np.errstate(over="ignore"):
        even = to_goal / np.maximum(np.ceil(to_near / length), 1.0)
    return np.where(even >= least, even, length)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a state's magnitudes, and of its times."""
    return dtype.to_real() if dtype.is_complex else dtype


def just_inside(t: np.ndarray, towards, dtype: torch.dtype) -> np.ndarray:
    """Return the times next to t, as the states' dtype sees them."""
    kind = torch.empty((), dtype=real_dtype(dtype)).numpy().dtype
    return np.nextafter(np.asarray(t, kind), np.asarray(towards, kind))


def _scale(size: Tensor, rtol: float | Tensor, atol: float | Tensor) -> Tensor:
    """Return ``atol + rtol * size``, in the memory of size.

    Never zero: a component that is and stays zero has no error, whatever atol is.
    """
    tiny = torch.finfo(size.dtype).tiny
    if isinstance(atol, Tensor):
        return size.mul_(rtol).add_(atol).clamp_(min=tiny)
    return size.mul_(rtol).add_(max(atol, tiny))


def rms_norm(x: Tensor) -> np.ndarray:
    """Root mean square of every row of a (lanes, n) tensor, on the host."""
    norm = torch.linalg.vector_norm(x, dim=1).cpu().numpy()
    return norm * float(x.shape[1] ** -0.5)


def _norms(parts: Tensor, norm) -> np.ndarray:
    """Return the norms of (m, lanes, n) tensors, in one transfer if possible."""
    if norm is None:
        norms = rms_norm(parts.flatten(0, 1)).astype(np.float64)
        return norms.reshape(parts.shape[:2])
    return np.stack([np.asarray(norm(part), dtype=np.float64) for part in parts])


def scaled_norms(
    errors: Tensor, y: Tensor, y1: Tensor, rtol, atol, norm=None
) -> np.ndarray:
    """Return norms of errors (m, lanes, n) in units of the tolerance of a step.

    The tolerance is that of `error_ratio`; the errors are overwritten.
    """
    scale = _scale(torch.maximum(y.abs(), y1.abs()), rtol, atol)
    return _norms(errors.div_(scale), norm)


def error_ratio(
    errors: list[Tensor],
    y: Tensor,
    y1: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    norm: Callable[[Tensor], np.ndarray] | None = None,
) -> np.ndarray:
    """Return the error of a step in units of its tolerance, for every lane.

    The tolerance of a component is ``atol + rtol * max(|y|, |y1|)``, the norm is the
    root mean square over the lane's own components unless another one is given. What is
    not a number is infinite.
    """
    stack = torch.stack(errors) if len(errors) > 1 else errors[0][None]
    norms = scaled_norms(stack, y, y1, rtol, atol, norm)
    ratio = norms[0]
    if len(norms) == 2:
        # DOP853: the third-order estimate keeps the fifth-order one from being fooled
        fine, coarse = norms
        with np.errstate(invalid="ignore", over="ignore"):
            ratio = fine**2 / np.sqrt(fine**2 + 0.01 * coarse**2 + 1e-300)
    return np.where(np.isnan(ratio), np.inf, ratio)


def initial_step(
    probe,
    t: np.ndarray,
    t_end: np.ndarray,
    y: Tensor,
    k: Tensor,
    order: int,
    rtol,
    atol,
    norm,
    aim: float,
) -> np.ndarray:
    """Choose the first step of every lane, inside its interval, by one evaluation.

    Parameters
    ----------
    probe : callable
        ``probe(t, length)`` returns the slope after an Euler step of this length.
    t, t_end : ndarray of shape (lanes,)
        The interval, in ascending time.
    y, k : Tensor of shape (lanes, n)
        State and slope at t.
    order : int
        Order of the error estimate plus one.
    rtol, atol : float or Tensor of shape (n,)
        Tolerances.
    norm : callable or None
        Norm of the rows of a (lanes, n) tensor; None for their root mean square.
    aim : float
        Error that the step is chosen for, in tolerances; a crude estimate of it.

    Returns
    -------
    ndarray of shape (lanes,)

    References
    ----------
    Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", section II.4.
    """
    interval = t_end - t
    scale = _scale(y.abs(), rtol, atol)
    d0, d1 = _norms(torch.stack([y, k]).div_(scale), norm)
    with np.errstate(all="ignore"):
        h0 = np.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        # an infinite or undefined norm must not make the step so
        h0 = np.minimum(np.where(np.isfinite(h0), h0, 1e-6), interval)
        change = probe(np.minimum(t + h0, t_end), h0) - k
        d2 = _norms((change / scale)[None], norm)[0] / h0
        steepest = np.maximum(d1, d2)
        h1 = np.where(
            steepest <= 1e-15,
            np.maximum(1e-6, h0 * 1e-3),
            (aim / steepest) ** (1 / order),
        )
        h = np.minimum(100 * h0, h1)
    h = np.where(np.isfinite(h), h, h0)
    return np.minimum(h, interval)
