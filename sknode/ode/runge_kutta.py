"""Explicit Runge-Kutta methods: one step of many lanes at once, and what is inside it.

Stages are kept as ``h * slope`` in a buffer of shape (stages, lanes, n): a stage is
then one fused multiply-add over the flattened lanes, and so are error and dense output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import just_inside, real_dtype
from sknode.ode.stepper import Stepper
from sknode.ode.tableaus import Tableau, TableauTensors

if TYPE_CHECKING:
    from sknode.ode.tape import LiveTape

__all__ = [
    "ExplicitStepper",
    "StageBuffer",
    "StageTimes",
    "combine",
    "dense_values",
    "outputs_cotangents",
    "powers",
    "taped_outputs",
    "taped_stages",
]


class ExplicitStepper(Stepper):
    """An explicit Runge-Kutta method at work."""

    def __init__(self, field, options):
        super().__init__(field, options)
        self.tableau: Tableau = options.tableau
        self.error_order = self.tableau.error_order
        self.tape: LiveTape | None = None
        self._buffer: StageBuffer | None = None

    def attempt(self, t, t1, h, y, k):
        buffer = self._buffer
        if buffer is None or buffer.lanes != y.shape[0]:
            reuse = self.field.reusable
            buffer = self._buffer = StageBuffer(self.tableau.n_stages, y, reuse)
        inside = self.options.open_steps
        self._times = StageTimes(self.field, self.tableau, t, t1, y, inside)
        self._h, self._y, self._extended = h, y, None
        return self._step(h, y, k, buffer)

    def _step(self, h: Tensor, y: Tensor, k1: Tensor, buffer: StageBuffer):
        """Fill the buffer with the scaled slopes of all stages."""
        tableau, times = self.tableau, self._times
        a, last = tableau.tensors(y.dtype, y.device).a, tableau.n_stages - 1
        rows, flat = buffer.rows, y.view(-1)
        torch.mul(k1, h, out=rows[0])
        if self._taping:
            return self.tape.step(times, h, flat, buffer)
        for i in range(1, last):
            slope = self.field.evaluate(times[i], buffer.combine(flat, i, a[i]))
            torch.mul(slope, h, out=rows[i])
        # the state at the end is kept: it needs memory of its own
        y1 = torch.addmv(flat, buffer.columns[last], a[last]).view(y.shape)
        slope = self.field.evaluate(times[last], y1)
        torch.mul(slope, h, out=rows[last])
        return y1, slope

    def errors(self):
        columns, y = self._buffer.columns[-1], self._y
        weights = self.tableau.tensors(y.dtype, y.device).error
        return [torch.mv(columns, w).view_as(y) for w in weights]

    @property
    def _taping(self) -> bool:
        return self.tape is not None and self.tape.running

    def accept(self, moved):
        if self._taping:
            self.tape.accept(moved)

    def select(self, index):
        if self._taping:
            self.tape.select(index)

    def dense(self, lanes, theta):
        if self._taping:
            self.tape.look(lanes, theta)
        if self._extended is None:
            self._extended = self._extend()
        return dense_values(self.tableau, self._y, self._extended, lanes, theta)

    def _extend(self) -> Tensor:
        """Return the stages with those that only the dense output needs."""
        tableau, y = self.tableau, self._y
        n, extended = tableau.n_stages, tableau.n_stages_extended
        if extended == n:
            return self._buffer.values
        larger = StageBuffer(extended, y, reuse=False)
        larger.values[:n] = self._buffer.values
        a = tableau.tensors(y.dtype, y.device).a
        for i in range(n, extended):
            stage = larger.combine(y.view(-1), i, a[i])
            slope = self.field.evaluate(self._times[i], stage)
            torch.mul(slope, self._h, out=larger.rows[i])
        return larger.values

    def replay(self, field, t, t1, h, y, inside):
        tableau, open_steps = self.tableau, self.options.open_steps
        coefficients = tableau.tensors(y.dtype, y.device)
        n, last = tableau.n_stages_extended, tableau.n_stages - 1
        if open_steps:
            ends = t.detach().cpu().numpy(), t1.detach().cpu().numpy()
            exact = StageTimes(field, tableau, *ends, y, inside=True)
        times = []
        for i, c in enumerate(coefficients.c[: n if inside else last]):
            time = (t1 if c == 1.0 else t + c * (t1 - t)).to(h.dtype)[:, None]
            times.append(exact[i] + (time - time.detach()) if open_steps else time)
        k = taped_stages(field, tableau, times, h, y)

        def dense(lanes, theta):
            return taped_outputs(coefficients, y, k, lanes, theta)

        return combine(y, k[:last], tableau.rows[last]), dense

    def evaluations(self, trace):
        tableau = self.tableau
        count = trace.n_steps * (tableau.n_stages - 1)
        if tableau.n_stages_extended > tableau.n_stages:
            count += trace.n_dense * (tableau.n_stages_extended - tableau.n_stages)
        return count if trace.n_jumps is None else count + trace.n_jumps


class StageBuffer:
    """Memory for the stages of a step, with the views that are needed made once.

    Attributes
    ----------
    values : Tensor of shape (stages, lanes, n)
        The memory.
    rows : list of Tensor of shape (lanes, n)
        Stage by stage.
    flat : list of Tensor of shape (lanes * n,)
        The same as vectors.
    columns : list of Tensor of shape (lanes * n, i)
        The first i stages as the columns of a matrix.
    """

    def __init__(self, n_stages: int, like: Tensor, reuse: bool = True):
        self.lanes = like.shape[0]
        self.values = like.new_empty(n_stages, *like.shape)
        self.rows = list(self.values.unbind(0))
        self.flat = list(self.values.view(n_stages, -1).unbind(0))
        matrix = self.values.view(n_stages, -1).t()
        self.columns = [matrix[:, :i] for i in range(n_stages + 1)]
        # A callable may keep the states that it is given: only fields that promise
        # not to are given the same memory again.
        self._state = torch.empty_like(like) if reuse else None
        self._state_flat = self._state.view(-1) if reuse else None

    def combine(self, flat: Tensor, stage: int, weights: Tensor) -> Tensor:
        """Return the state of a stage, ``y + sum_i weights_i stage_i``.

        It is overwritten by the next call if memory is used again.
        """
        columns = self.columns[stage]
        if self._state is None:
            return torch.addmv(flat, columns, weights).view(self.values.shape[1:])
        torch.addmv(flat, columns, weights, out=self._state_flat)
        return self._state


class StageTimes:
    """Times of the stages of a step, as the vector field wants them.

    Parameters
    ----------
    field : BoundField
        The vector field; nothing is computed if it does not use time.
    tableau : Tableau
        Its nodes.
    t, t1 : ndarray of shape (lanes,)
        Start and end of the step.
    like : Tensor
        For dtype and device.
    inside : bool
        Whether the ends of the step are replaced by the times next to them in it.
    """

    def __init__(
        self,
        field,
        tableau: Tableau,
        t: np.ndarray,
        t1: np.ndarray,
        like: Tensor,
        inside: bool = False,
    ):
        self._values = None
        if not field.uses_time:
            return
        c = tableau.c[:, None]
        times = t + c * (t1 - t)
        # exactly the ends, and never beyond them
        times = np.maximum(np.minimum(times, np.maximum(t, t1)), np.minimum(t, t1))
        times = np.where(c == 1.0, t1, times)
        if inside:
            first, last = just_inside(t, t1, like.dtype), just_inside(t1, t, like.dtype)
            times = np.clip(times, np.minimum(first, last), np.maximum(first, last))
        dtype = real_dtype(like.dtype)
        tensor = torch.from_numpy(times).to(like.device, dtype, non_blocking=True)
        self._values = tensor[:, :, None].unbind(0)

    def __getitem__(self, stage: int) -> Tensor | None:
        return None if self._values is None else self._values[stage]


def powers(theta: Tensor, degree: int) -> Tensor:
    """Return the powers 0 to degree of (m,) places, of shape (m, degree + 1)."""
    exponents = torch.arange(degree + 1, dtype=theta.dtype, device=theta.device)
    return theta[:, None] ** exponents


def dense_values(
    tableau: Tableau, y: Tensor, k: Tensor, lanes: Tensor, theta: Tensor
) -> Tensor:
    """Evaluate the dense output of some lanes at some places of their steps.

    Parameters
    ----------
    tableau : Tableau
        The method.
    y : Tensor of shape (lanes, n)
        States at the start of the steps.
    k : Tensor of shape (stages_extended, lanes, n)
        Scaled slopes.
    lanes, theta : Tensor of shape (m,)
        Which lane, and where in [0, 1] of its step.

    Returns
    -------
    Tensor of shape (m, n)
    """
    p = tableau.tensors(y.dtype, y.device).dense  # (stages, degree)
    degree = p.shape[1]
    # one product a coefficient, then Horner's rule: unlike one large product, these
    # round the same way however many lanes there are
    flat = k.view(k.shape[0], -1).t()
    polynomial = torch.stack([torch.mv(flat, p[:, i]) for i in range(degree)])
    # lanes first, so that gathering a lane reads one contiguous block
    polynomial = polynomial.view(degree, *y.shape).transpose(0, 1)
    x = theta[:, None]
    if y.shape[0] == 1:
        coefficients, start = polynomial, y
    else:
        coefficients, start = polynomial.contiguous()[lanes], y[lanes]
    value = coefficients[:, -1]
    for i in reversed(range(degree - 1)):
        value = torch.addcmul(coefficients[:, i], value, x)
    return torch.addcmul(start, value, x)


def taped_stages(
    field,
    tableau: Tableau,
    times,
    h: Tensor,
    y: Tensor,
    first: Tensor | None = None,
) -> list[Tensor]:
    """Return the scaled slopes of a step at these stage times; one may be known."""
    k = [] if first is None else [first * h]
    for time, weights in zip(times[len(k) :], tableau.rows[len(k) :], strict=False):
        k.append(field.evaluate(time, combine(y, k, weights)) * h)
    return k


def combine(y: Tensor, k: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Return ``y + sum_i weights_i k_i``: on a tape, one by one is the quickest."""
    for slope, weight in zip(k, weights, strict=True):
        if weight:
            y = torch.add(y, slope, alpha=weight)
    return y


def taped_outputs(
    coefficients: TableauTensors, y: Tensor, k, lanes: Tensor, theta: Tensor
) -> Tensor:
    """Return states inside a step, differentiable also by their place in it."""
    degree = coefficients.dense.shape[1]
    x = torch.stack([theta ** (i + 1) for i in range(degree)], 1)
    weights = x.to(y.dtype) @ coefficients.dense.t()
    return y[lanes] + torch.einsum("ms,smn->mn", weights, torch.stack(k)[:, lanes])


def outputs_cotangents(
    coefficients: TableauTensors, like: Tensor, lanes: Tensor, theta: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cotangents of a step's start and of its scaled slopes.

    Parameters
    ----------
    coefficients : TableauTensors
        The method.
    like : Tensor of shape (lanes, n)
        States at the start.
    lanes, theta : Tensor of shape (m,)
        Which lane, and where in its step.
    g : Tensor of shape (m, n)
        Cotangents of the states there.

    Returns
    -------
    start : Tensor of shape (lanes, n)
    slopes : Tensor of shape (stages, lanes, n)
    """
    x = powers(theta, coefficients.dense.shape[1]).to(g.dtype)
    if len(like) == 1:
        moments = (x.t() @ g)[:, None]
    else:
        moments = g.new_zeros(len(like), x.shape[1], g.shape[1])
        moments.index_add_(0, lanes, x[:, :, None] * g[:, None, :])
        moments = moments.transpose(0, 1)
    slopes = coefficients.dense @ moments[1:].flatten(1)
    return moments[0], slopes.view(-1, *like.shape)
