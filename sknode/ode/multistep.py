"""The Adams method of variable step and order: a predictor, a corrector, a memory.

The slopes of past steps are kept as modified divided differences, which for equal steps
are backward differences. With ``psi_j(n) = t_n - t_{n-j}`` they are

    phi_j(n) = psi_1(n) ... psi_j(n) f[t_n, ..., t_{n-j}],

and a step of length h at order k goes as follows:

    beta_j     = prod_{i<=j} psi_i(n+1) / psi_i(n),     phi*_j = beta_j phi_j(n)
    predict    p = y_n + h sum_{j<k} g_j phi*_j,        e_j = sum_{j<=i<k} phi*_i
    evaluate   d = f(t_{n+1}, p) - e_0
    correct    y_{n+1} = p + h g_k d
    evaluate   d = f(t_{n+1}, y_{n+1}) - e_0,           phi_j(n+1) = e_j + d,

where g_j are integrals of the polynomials that belong to the differences. The corrector
is of order k + 1; its distance from the one of order k, ``h (g_k - g_{k-1}) d``, is the
error estimate.

References
----------
Shampine & Gordon, "Computer Solution of Ordinary Differential Equations: The Initial
Value Problem", Freeman 1975 (the code is known as DE/STEP).
Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", 2nd edition,
sections III.5 and III.7.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import scaled_norms
from sknode.ode.integrate import to_device
from sknode.ode.stepper import Stepper

__all__ = ["MAX_ORDER", "AdamsStepper", "basis_integrals"]

MAX_ORDER = 12

# After this many rejections in a row the past is of no use.
PATIENCE = 3


def basis_integrals(moments, length, above, below) -> list:
    """Integrate the polynomials that belong to modified divided differences.

    These are ``b_j(u) = prod_{i<j} (u length + above_i) / below_i``, over u in [0, 1].
    The recursion is for the moments of ``(1 - u)^q``.

    Parameters
    ----------
    moments : array or Tensor of shape (n + 1, 1)
        Those of the first polynomial: ``1 / (q + 1)``.
    length : array or Tensor of shape (m,)
        Distance to integrate over.
    above, below : array or Tensor of shape (n, m)
        Distances of the nodes before the start, and the scales of the differences.

    Returns
    -------
    list of n + 1 arrays of shape (m,), the first of them of shape (1,)
    """
    integrals = [moments[0]]
    gamma, eta = (length + above) / below, length / below
    for g, e in zip(gamma, eta, strict=True):
        moments = g * moments[:-1] - e * moments[1:]
        integrals.append(moments[0])
    return integrals


_MOMENTS = 1 / np.arange(1.0, MAX_ORDER + 3)[:, None]


def _error_constants() -> np.ndarray:
    """Return those of the implicit formulas with equal steps, by order from 0 on."""
    below = np.arange(1.0, MAX_ORDER + 2)[:, None]
    g = np.concatenate(basis_integrals(_MOMENTS, 1.0, below - 1, below))
    return np.abs(np.diff(g, prepend=0.0))


ERROR_CONSTANTS = _error_constants()


class AdamsStepper(Stepper):
    """Adams-Bashforth-Moulton in PECE mode, orders 1 to 12.

    Every lane has its own order, step sizes and past. Arrays have the order first and
    the lanes last, the differences (order, lanes, n).

    Parameters
    ----------
    field, options
        As for every stepper.
    order : int, optional
        Keep to this order as soon as there is enough past; by default the order is
        chosen step by step.
    """

    error_order = 2  # it starts at order one

    def __init__(self, field, options, order: int | None = None):
        super().__init__(field, options)
        self.fixed_order = order

    def start(self, lanes):
        n = len(lanes.y)
        self._phi = lanes.k.new_zeros(MAX_ORDER + 2, *lanes.k.shape)
        self._phi[0] = lanes.k
        self._next_phi = torch.empty_like(self._phi)
        self._lane = torch.arange(n, device=lanes.k.device)
        self._order = np.ones(n, np.int64)
        self._past = np.zeros(n, np.int64)  # steps whose slopes are remembered
        self._equal = np.zeros(n, np.int64)  # how many of them had the same length
        self._starting = np.ones(n, bool)
        self._failures = np.zeros(n, np.int64)  # in a row
        self._lengths = np.ones((MAX_ORDER + 1, n))  # the latest first

    def attempt(self, t, t1, h, y, k):
        length, order = np.abs(t1 - t), self._order
        self._weigh(t1 - t, length, y)
        time = to_device(t1, y)[:, None] if self.field.uses_time else None
        predicted = self._predict(y)
        slope = self.field.evaluate(time, predicted)
        d = slope - self._next_phi[0]
        y1 = torch.addcmul(predicted, self._corrector, d)
        self._ratio, self._accept = self._estimate(d, y, y1, length, order)
        if (self._accept & (length > 0)).any():
            corrected = self.field.evaluate(time, y1)
            # at the edge of where f is defined the prediction's slope has to do
            fine = torch.isfinite(corrected).all(1, keepdim=True)
            slope, first = torch.where(fine, corrected, slope), slope
            # what the second evaluation would have changed, for the dense output
            self._change = (slope - first).mul_(self._corrector)
        self._length, self._slope, self._y1, self._h = length, slope, y1, h
        return y1, slope

    def _weigh(self, step: np.ndarray, length: np.ndarray, y: Tensor) -> None:
        """Compute the coefficients of every lane's step."""
        order, lane = self._order, np.arange(len(length))
        self._top = top = int(order.max())
        # a lane that stays where it is must not divide by zero
        length = np.where(length > 0, length, 1.0)
        before = self._lengths[: top + 1].cumsum(0)
        with np.errstate(all="ignore"):
            after = np.empty_like(before)  # psi(n+1)
            after[0] = length
            np.add(before[:-1], length, out=after[1:])
            beta = np.ones((top + 1, len(length)))
            np.cumprod(after[:-1] / before[:-1], axis=0, out=beta[1:])
            eta = length / after
            g = np.ones((top + 1, len(length)))
            moments = _MOMENTS[: top + 1]
            for j in range(top):
                moments = moments[:-1] - eta[j] * moments[1:]
                g[j + 1] = moments[0]
            # turn differences into those of equal steps
            sigma = np.ones((top + 2, len(length)))
            np.cumprod(
                eta * np.arange(1.0, top + 2)[:, None], axis=0, out=sigma[1:]
            )
            used = np.arange(top)[:, None] < order
            slopes = np.where(used, beta[:-1], 0.0)
            states = slopes * g[:-1] * step
        three = order + np.array([[0], [-1], [-2]])
        three = np.maximum(three, 0)
        weights = np.concatenate(
            [slopes, states, (step * g[order, lane])[None], beta[three, lane]]
        )
        weights = to_device(weights, y)[:, :, None]
        self._slope_weights, self._state_weights = weights[:top], weights[top : 2 * top]
        self._corrector, self._three_weights = weights[2 * top], weights[2 * top + 1 :]
        self._three = to_device(three, y)
        self._after = after
        self._error_weight = np.abs(g[order, lane] - g[order - 1, lane])
        four = order + np.array([[1], [0], [-1], [-2]])
        four = np.maximum(four, 0)
        self._four_weights = ERROR_CONSTANTS[four] * sigma[four, lane]

    def _predict(self, y: Tensor) -> Tensor:
        """Extrapolate state and differences.

        One operation an order: sums along an axis would round differently in batches of
        different sizes.
        """
        phi, e, top = self._phi, self._next_phi, self._top
        e[top].zero_()
        state = y
        for j in reversed(range(top)):
            torch.addcmul(e[j + 1], self._slope_weights[j], phi[j], out=e[j])
            state = torch.addcmul(state, self._state_weights[j], phi[j])
        return state

    def _estimate(self, d, y, y1, length, order):
        """Return the scaled error of every lane and who is accepted.

        Beside the difference of the step's order, which is d, those of one order more,
        one less and two less are looked at.
        """
        parts = d.new_empty(4, *d.shape)
        torch.mul(self._phi[self._three, self._lane], self._three_weights, out=parts[1:])
        parts[0] = parts[1].neg_()
        self._higher = parts[1].clone()
        parts[1] = 0
        parts[3] += parts[2]
        parts += d
        options = self.options
        norms = scaled_norms(
            list(parts), y, y1, options.rtol, options.atol, options.norm
        )
        norms = np.stack(norms)
        norms[np.isnan(norms)] = np.inf
        with np.errstate(all="ignore"):
            ratio = np.where(length > 0, length * self._error_weight * norms[1], 0.0)
            errors = length * self._four_weights * norms
        self._errors = np.where(np.isnan(errors), np.inf, errors)
        accept = ratio <= 1
        if options.force_min_step:
            accept |= length <= options.min_step
        return ratio, accept

    def judge(self, y, y1):
        return self._ratio, self._accept

    def accept(self, moved):
        top, lane, order = self._top, np.arange(len(moved)), self._order
        if not moved.any():
            return
        phi, e = self._phi, self._next_phi
        e[top + 1].zero_()
        e[to_device(order + 1, self._y1), self._lane] = self._higher
        d = self._slope - e[0]
        e[: top + 2] += d
        if moved.all():
            self._phi, self._next_phi = e, phi
        else:
            mask = torch.from_numpy(moved).to(d.device)[:, None]
            phi[: top + 2] = torch.where(mask, e[: top + 2], phi[: top + 2])
        same = np.abs(self._length - self._lengths[0]) <= 1e-6 * self._length
        self._equal = np.where(moved, np.where(same, self._equal, 0) + 1, self._equal)
        older = np.concatenate([self._length[None], self._lengths[:-1]])
        self._lengths = np.where(moved, older, self._lengths)
        self._past = np.where(moved, self._past + 1, self._past)

    def propose(self, lanes, length, ratio, moved):
        higher, error, lower, lowest = self._errors
        k = self._order
        known = self._past - moved  # when the step was taken
        # order
        down = np.where(
            k > 2,
            np.maximum(k * lower, (k - 1) * lowest) <= (k + 1) * error,
            (k == 2) & (lower <= 0.5 * error),
        )
        rejected = ~moved
        starting = self._starting & moved & ~down & (k < MAX_ORDER)
        sure = (known >= k) & (self._equal > k) & ~down & moved
        down |= sure & (k > 1) & (lower <= np.minimum(error, higher))
        up = sure & ~down & (k < MAX_ORDER)
        up &= np.where(k > 1, higher < error, higher < 0.5 * error)
        up |= starting
        new = k + up - down
        error = np.where(up & ~starting, higher, np.where(down, lower, error))
        with np.errstate(all="ignore"):
            room = np.maximum(2 * error, 1e-100) ** (-1.0 / (new + 1))
        factor = np.where(room >= 2, 2.0, np.where(room >= 1, 1.0, np.clip(room, 0.5, 0.9)))
        factor = np.where(starting, 2.0, factor)
        # rejected
        failures = np.where(moved, 0, self._failures + 1)
        hopeless = rejected & (failures >= PATIENCE)
        new = np.where(hopeless, 1, new)
        self._past = np.where(hopeless, 0, self._past)
        starting |= hopeless | (rejected & self._starting & (k == 1))
        factor = np.where(rejected, 0.5, factor)
        factor = np.where(rejected & (k == 1), np.clip(0.7 * ratio**-0.5, 1e-3, 0.5), factor)
        if self.fixed_order is not None:
            new = np.minimum(self.fixed_order, self._past + 1)
        self._order, self._failures, self._starting = new, failures, starting
        return length * factor

    def dense(self, lanes, theta):
        # from the end back, as the differences are known there
        top, order = self._top, to_device(self._order, self._y1)[lanes]
        after = torch.from_numpy(self._after[:top]).to(theta.device)[:, lanes]
        length = torch.from_numpy(np.where(self._length > 0, self._length, 1.0))
        length = length.to(theta.device)[lanes]
        place = theta.to(torch.float64)
        above = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
        moments = torch.from_numpy(_MOMENTS[: top + 1]).to(theta.device)
        back = (place - 1) * length
        integrals = basis_integrals(moments, back, above, after)
        x = ((place - 1).to(theta.dtype) * self._h[lanes, 0])[:, None]
        d, e = (self._slope - self._next_phi[0])[lanes], self._next_phi
        total = torch.zeros_like(d)
        for j, g in enumerate(integrals):
            g = torch.where(j <= order, g, 0.0).to(theta.dtype)[:, None]
            total = torch.addcmul(total, g, e[j, lanes] + d)
        value = torch.addcmul(self._y1[lanes], x, total)
        # The polynomial starts where a second correction would have: close that gap,
        # with both slopes kept.
        gap = ((1 - place) ** 2 * (1 + 2 * place)).to(theta.dtype)[:, None]
        return torch.addcmul(value, gap, self._change[lanes])

    def select(self, index):
        at = torch.from_numpy(index).to(self._phi.device)
        self._phi = self._phi[:, at]
        self._next_phi = torch.empty_like(self._phi)
        self._lane = self._lane[: len(index)]
        for name in ("order", "past", "equal", "starting", "failures"):
            setattr(self, f"_{name}", getattr(self, f"_{name}")[index])
        self._lengths = self._lengths[:, index]

    def restart(self, jumped, k):
        mask = torch.from_numpy(jumped).to(k.device)[:, None]
        self._phi[0] = torch.where(mask, k, self._phi[0])
        self._order = np.where(jumped, 1, self._order)
        self._past = np.where(jumped, 0, self._past)
        self._starting |= jumped
        self._failures = np.where(jumped, 0, self._failures)

    def evaluations(self, trace):
        count = 2 * trace.n_steps - trace.n_rejected
        return count if trace.n_jumps is None else count + trace.n_jumps
