"""One explicit Runge-Kutta step of many lanes at once, and its dense output.

Stages are kept as ``h * slope`` in a buffer of shape (stages, lanes, n): a stage is then
one fused multiply-add over the flattened lanes, and so are error and dense output.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sknode.ode.tableaus import Tableau

__all__ = ["StageBuffer", "StageTimes", "dense_values", "extend", "powers", "step"]


class StageBuffer:
    """Memory for the stages of a step, with the views that are needed made once.

    Attributes
    ----------
    values : Tensor of shape (stages, lanes, n)
        The memory.
    rows : list of Tensor of shape (lanes, n)
        Stage by stage.
    columns : list of Tensor of shape (lanes * n, i)
        The first i stages as the columns of a matrix.
    """

    def __init__(self, n_stages: int, like: Tensor, reuse: bool = True):
        self.lanes = len(like)
        self.values = like.new_empty(n_stages, *like.shape)
        self.rows = list(self.values.unbind(0))
        flat = self.values.view(n_stages, -1).t()
        self.columns = [flat[:, :i] for i in range(n_stages + 1)]
        # A callable may keep the states that it is given: only fields that promise
        # not to are given the same memory again.
        self._stage = torch.empty_like(like).view(-1) if reuse else None

    def combine(self, y: Tensor, weights: Tensor, fresh: bool = False) -> Tensor:
        """Return ``y + sum_i weights_i stage_i``, overwritten by the next call."""
        columns = self.columns[len(weights)]
        if fresh or self._stage is None:
            return torch.addmv(y.view(-1), columns, weights).view_as(y)
        return torch.addmv(y.view(-1), columns, weights, out=self._stage).view_as(y)


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
    """

    def __init__(self, field, tableau: Tableau, t: np.ndarray, t1: np.ndarray, like):
        self._values = None
        if not field.uses_time:
            return
        c = tableau.c[:, None]
        times = t + c * (t1 - t)
        # exactly the ends, and never beyond them
        times = np.clip(times, np.minimum(t, t1), np.maximum(t, t1))
        times = np.where(c == 1.0, t1, times)
        tensor = torch.from_numpy(times).to(like.device, like.dtype, non_blocking=True)
        self._values = tensor[:, :, None].unbind(0)

    def __getitem__(self, stage: int) -> Tensor | None:
        return None if self._values is None else self._values[stage]


def step(field, tableau: Tableau, times, h: Tensor, y: Tensor, k1: Tensor, buffer):
    """Take one step.

    Parameters
    ----------
    field : BoundField
        The vector field.
    tableau : Tableau
        The method.
    times : StageTimes
        Times of the stages.
    h : Tensor of shape (lanes, 1)
        Signed step in the state's dtype.
    y, k1 : Tensor of shape (lanes, n)
        State and slope at the start.
    buffer : StageBuffer
        Filled with the scaled slopes of all stages.

    Returns
    -------
    y1, slope : Tensor of shape (lanes, n)
        State and slope at the end of the step.
    """
    a, last = tableau.tensors(y.dtype, y.device).a, tableau.n_stages - 1
    torch.mul(k1, h, out=buffer.rows[0])
    stage, slope = y, k1
    for i in range(1, last + 1):
        stage = buffer.combine(y, a[i], fresh=i == last)
        slope = field.evaluate(times[i], stage)
        torch.mul(slope, h, out=buffer.rows[i])
    return stage, slope


def extend(field, tableau: Tableau, times, h: Tensor, y: Tensor, buffer) -> Tensor:
    """Return the stages with those that only the dense output needs."""
    n, extended = tableau.n_stages, tableau.n_stages_extended
    if extended == n:
        return buffer.values
    larger = StageBuffer(extended, y, reuse=False)
    larger.values[:n] = buffer.values
    a = tableau.tensors(y.dtype, y.device).a
    for i in range(n, extended):
        slope = field.evaluate(times[i], larger.combine(y, a[i]))
        torch.mul(slope, h, out=larger.rows[i])
    return larger.values


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
    x = powers(theta, p.shape[1])  # (m, degree + 1)
    polynomial = torch.cat([y[None], (p.t() @ k.view(len(k), -1)).view(-1, *y.shape)])
    if len(y) == 1:
        return x @ polynomial[:, 0]
    # lanes first, so that gathering a lane reads one contiguous block
    gathered = polynomial.transpose(0, 1).contiguous()[lanes]  # (m, degree + 1, n)
    return (x[:, :, None] * gathered).sum(1)
