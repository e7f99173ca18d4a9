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
from sknode.ode.lanes import to_device
from sknode.ode.stepper import Stepper

__all__ = ["MAX_ORDER", "AdamsStepper", "basis_integrals"]

MAX_ORDER = 12

# After this many rejections in a row the past is of no use.
PATIENCE = 3


def basis_integrals(moments, eta, gamma=None) -> list:
    """Integrate the polynomials that belong to modified divided differences.

    These are products ``b_j(u) = b_{j-1}(u) (u x + a_j) / c_j`` over u in [0, 1], of
    which the moments of ``(1 - u)^q`` satisfy a recursion.

    Parameters
    ----------
    moments : array or Tensor of shape (n, 1)
        Those of ``b_0 = 1``, that is ``1 / (q + 1)``.
    eta : array or Tensor of shape (at least n - 1, m)
        ``x / c_j``.
    gamma : array or Tensor of shape (at least n - 1, m), optional
        ``(x + a_j) / c_j``; by default one, as it is if the integral runs from one node
        to the next.

    Returns
    -------
    list of n arrays of shape (m,), the first of shape (1,)
    """
    integrals = [moments[0]]
    for j in range(len(moments) - 1):
        first = moments[:-1] if gamma is None else gamma[j] * moments[:-1]
        moments = first - eta[j] * moments[1:]
        integrals.append(moments[0])
    return integrals


_COUNT = np.arange(1.0, MAX_ORDER + 2)[:, None]
_MOMENTS = 1 / _COUNT
_AROUND = np.array([[1], [0], [-1], [-2]])


def _error_constants() -> np.ndarray:
    """Return those of the implicit formulas with equal steps.

    By order k and then for k + 1, k, k - 1, k - 2, as `_AROUND` has them.
    """
    moments = 1 / np.arange(1.0, MAX_ORDER + 3)[:, None]
    g = np.concatenate(basis_integrals(moments, 1 / np.arange(1.0, MAX_ORDER + 2)))
    constants = np.abs(np.diff(g, prepend=0.0))
    return constants[np.maximum(np.arange(MAX_ORDER + 1) + _AROUND, 0)]


_ERROR_CONSTANTS = _error_constants()  # (4, order)


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
    first_error = 0.01
    even_steps = False  # the past is worth most where lengths stay as they are

    def __init__(self, field, options, order: int | None = None):
        super().__init__(field, options)
        self.fixed_order = order

    def start(self, lanes):
        n = len(lanes.y)
        self._phi = lanes.k.new_zeros(MAX_ORDER + 2, *lanes.k.shape)
        self._phi[0] = lanes.k
        self._order = np.ones(n, np.int64)
        self._known = np.zeros(n, np.int64)  # differences that the past is enough for
        self._lengths = np.ones((MAX_ORDER + 1, n))  # of past steps, the latest first
        self._equal = np.zeros(n, np.int64)  # how many of the latest are equal
        self._starting = np.ones(n, bool)  # up with order and step, until it hurts
        self._failures = np.zeros(n, np.int64)  # in a row
        self._allocate()

    def _allocate(self) -> None:
        """Get memory for the differences at the end of the step."""
        self._next_phi = torch.zeros_like(self._phi)
        self._rows = [list(x.unbind(0)) for x in (self._phi, self._next_phi)]

    def attempt(self, t, t1, h, y, k):
        self._h, self._length = h, np.abs(t1 - t)
        self._weigh(t1 - t, self._length, y)
        time = to_device(t1, y)[:, None] if self.field.uses_time else None
        state = self._predict(y)
        slope = self.field.evaluate(time, state)
        self._difference = slope - self._rows[1][0]
        self._y1 = y1 = torch.addcmul(state, self._corrector, self._difference)
        self._estimate(y, y1)
        if (self._accept & (self._length > 0)).any():
            second = self.field.evaluate(time, y1)
            # where only the predicted state has a slope, this one serves
            finite = torch.isfinite(second).all(1, keepdim=True)
            slope, first = torch.where(finite, second, slope), slope
            self._difference = slope - self._rows[1][0]
            self._change = (slope - first).mul_(self._corrector)
        self._slope = slope
        return y1, slope

    def _weigh(self, step: np.ndarray, length: np.ndarray, like: Tensor) -> None:
        """Compute the coefficients of every lane's step and bring them to the device.

        Sums for the states and the slopes run over all orders that some lane has: those
        of lower order get weights of zero.
        """
        order, n = self._order, len(length)
        self._top = top = int(order.max())
        # a lane that stays where it is must not divide by zero
        length = np.where(length > 0, length, 1.0)
        beta, g, sigma = np.ones((3, top + 2, n))
        before = self._lengths[: top + 1].cumsum(0)  # psi(n)
        self._psi = after = np.empty_like(before)  # psi(n+1)
        after[0] = length
        with np.errstate(all="ignore"):
            np.add(before[:-1], length, out=after[1:])
            np.cumprod(after / before, axis=0, out=beta[1:])
            eta = length / after
            for j, row in enumerate(basis_integrals(_MOMENTS[: top + 1], eta)):
                g[j] = row
            # what makes them the differences of equal steps
            np.cumprod(eta * _COUNT[: top + 1], axis=0, out=sigma[1:])
            slopes = np.where(_COUNT[:top] <= order, beta[:top], 0.0)
            states = slopes * g[:top] * step

        # row and lane as one index, for the orders k + 1, k, k - 1, k - 2
        lane = np.arange(n)
        place = np.maximum((order + _AROUND) * n + lane, lane)
        g_k, g_before = g.take(place[1:3])
        self._error_weight = np.abs(g_k - g_before)
        self._error_weights = _ERROR_CONSTANTS[:, order] * sigma.take(place)
        last = np.stack([-beta.take(place[1]), g_k * step])
        weights = to_device(np.concatenate([slopes, states, last]), like)
        rows = list(weights[:, :, None].unbind(0))
        self._slope_weights, self._state_weights = rows[:top], rows[top:-2]
        self._last_weight, self._corrector = rows[-2:]
        self._place = to_device(place, like)

    def _predict(self, y: Tensor) -> Tensor:
        """Extrapolate the state; prepare the differences at the end of the step.

        All but the new slope is added to them, also for order k + 1. One operation an
        order, as sums along an axis round differently in batches of different sizes.
        """
        phi, e = self._rows
        top, state = self._top, y
        self._next_phi[top : top + 2] = 0
        for j in reversed(range(top)):
            torch.addcmul(e[j + 1], self._slope_weights[j], phi[j], out=e[j])
            state = torch.addcmul(state, self._state_weights[j], phi[j])
        last = self._phi.flatten(0, 1).index_select(0, self._place[1])
        last *= self._last_weight
        self._next_phi.flatten(0, 1).index_copy_(0, self._place[0], last)
        return state

    def _estimate(self, y: Tensor, y1: Tensor) -> None:
        """Estimate the errors of the orders k + 1, k, k - 1 and k - 2."""
        options, length = self.options, self._length
        errors = self._next_phi.flatten(0, 1).index_select(0, self._place.flatten())
        errors = errors.view(4, *y.shape).add_(self._difference)
        with np.errstate(all="ignore"):
            norms = length * scaled_norms(
                errors, y, y1, options.rtol, options.atol, options.norm
            )
            norms = np.where(np.isnan(norms), np.inf, norms)
            self._errors = norms * self._error_weights
            self._ratio = norms[1] * self._error_weight
        self._accept = self._ratio <= 1
        if options.force_min_step:
            self._accept |= length <= options.min_step

    def judge(self, y, y1):
        return self._ratio, self._accept

    def accept(self, moved):
        if not moved.any():
            return
        end, d = self._top + 2, self._difference
        if moved.all():
            self._next_phi[:end] += d
            self._phi, self._next_phi = self._next_phi, self._phi
            self._rows.reverse()
        else:
            # Not in place: slopes that are not finite must get into neither memory, as
            # rows beyond a lane's order are read too, with a weight of zero.
            mask = torch.from_numpy(moved).to(d.device)[:, None]
            phi, e = self._phi[:end], self._next_phi[:end]
            torch.where(mask, e + d, phi, out=phi)
        same = np.abs(self._length - self._lengths[0]) <= 1e-6 * self._length
        self._equal = np.where(moved, np.where(same, self._equal, 0) + 1, self._equal)
        lengths = np.concatenate([self._length[None], self._lengths[:-1]])
        self._lengths = np.where(moved, lengths, self._lengths)

    def propose(self, lanes, length, ratio, moved):
        rejected, k = ~moved, self._order
        order, starting = self._choose_order(moved)
        raised, lowered = order > k, order < k
        higher, error, lower, _ = self._errors
        error = np.where(raised & ~starting, higher, np.where(lowered, lower, error))
        with np.errstate(all="ignore"):
            # A step that is this much longer would have half the tolerance as its
            # error. The order that a starting lane goes to has no estimate yet.
            room = np.maximum(2 * error, 1e-100) ** (-1 / (order + 1 - starting))
            first = np.clip(0.7 / np.sqrt(ratio), 1e-3, 0.5)
        # few changes: estimates are most reliable where steps are equal
        factor = np.where(room >= 1, 1.0, np.minimum(np.maximum(room, 0.5), 0.9))
        factor[room >= 2] = 2.0
        factor = np.where(starting, np.minimum(np.maximum(room, 1.0), 10.0), factor)
        factor[rejected] = 0.5
        # at order one the estimate says how short the step has to be
        factor = np.where(rejected & (k == 1), first, factor)

        self._known = np.where(
            moved, np.minimum(self._known + 1, MAX_ORDER), self._known
        )
        self._failures = np.where(moved, 0, self._failures + 1)
        lost = self._failures >= PATIENCE
        self._starting = starting | lost | (rejected & self._starting & (k == 1))
        self._known[lost] = 0
        order[lost] = 1
        if self.fixed_order is not None:
            order = np.minimum(self.fixed_order, self._known + 1)
        self._order = order
        return length * factor

    def _choose_order(self, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the next order, by at most one off, and who is still starting.

        Errors have to fall with the order: lanes go where theirs is least, down rather
        than up, and up only after as many equal steps as it takes to tell.
        """
        higher, error, lower, lowest = self._errors
        k = self._order
        with np.errstate(invalid="ignore"):  # order zero has no lower error
            down = np.maximum(k * lower, (k - 1) * lowest) <= (k + 1) * error
        down = np.where(k > 2, down, (k == 2) & (lower <= 0.5 * error))
        starting = self._starting & moved & ~down & (k < MAX_ORDER)
        sure = moved & (self._known >= k) & (self._equal > k) & ~starting
        down |= sure & (k > 1) & (lower <= np.minimum(error, higher))
        up = sure & (k < MAX_ORDER) & (higher < np.where(k > 1, error, 0.5 * error))
        return k + ((up & ~down) | starting) - down, starting

    def dense(self, lanes, theta):
        # back from the end, as it is there that the differences are known
        top, device = self._top, theta.device
        length = np.where(self._length > 0, self._length, 1.0)
        length = torch.from_numpy(length).to(device)[lanes]
        order = torch.from_numpy(self._order).to(device)[lanes]
        psi = torch.from_numpy(self._psi[:top]).to(device)[:, lanes]
        moments = torch.from_numpy(_MOMENTS[: top + 1]).to(device)
        place = theta.to(torch.float64) - 1
        above = torch.cat([torch.zeros_like(psi[:1]), psi[:-1]])
        back = place * length
        integrals = basis_integrals(moments, back / psi, (back + above) / psi)
        d, total = self._difference[lanes], 0.0
        for j, (g, e) in enumerate(zip(integrals, self._rows[1], strict=False)):
            g = torch.where(j <= order, g, 0.0).to(theta.dtype)[:, None]
            total = total + g * (e[lanes] + d)
        x = (place.to(theta.dtype) * self._h[lanes, 0])[:, None]
        value = torch.addcmul(self._y1[lanes], x, total)
        # This polynomial starts at the state that a second correction would have asked
        # for; a cubic makes up for it and leaves the slopes at both ends as they are.
        cubic = (place**2 * (3 + 2 * place)).to(theta.dtype)[:, None]
        return torch.addcmul(value, cubic, self._change[lanes])

    def select(self, index):
        self._phi = self._phi[:, torch.from_numpy(index).to(self._phi.device)]
        self._allocate()
        self._order, self._known = self._order[index], self._known[index]
        self._starting, self._failures = self._starting[index], self._failures[index]
        self._lengths, self._equal = self._lengths[:, index], self._equal[index]

    def restart(self, jumped, k):
        mask = torch.from_numpy(jumped).to(k.device)[:, None]
        self._phi[0] = torch.where(mask, k, self._phi[0])
        self._order = np.where(jumped, 1, self._order)
        self._known = np.where(jumped, 0, self._known)
        self._failures = np.where(jumped, 0, self._failures)
        self._starting |= jumped

    def evaluations(self, trace):
        count = 2 * trace.n_steps - trace.n_rejected
        return count if trace.n_jumps is None else count + trace.n_jumps
