"""One explicit Runge-Kutta step of many lanes at once, and its dense output.

The buffer ``k`` has shape (stages, lanes, n) and holds ``h * slope``: a stage is then one
fused multiply-add over the flattened lanes, and so are the error and the dense output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sknode.ode.tableaus import Tableau

__all__ = ["combine", "dense_values", "extend", "stage_time", "step"]


def combine(y: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Return ``y + sum_i weights_i k_i`` as a new (lanes, n) tensor."""
    n = len(weights)
    return torch.addmv(y.view(-1), k[:n].view(n, -1).t(), weights).view_as(y)


def stage_time(t: Tensor, t1: Tensor, c: float) -> Tensor:
    """Return the time of a stage; a node of one is the end of the step exactly."""
    if c == 1.0:
        return t1
    return t if c == 0.0 else torch.lerp(t, t1, c)


def step(field, tableau: Tableau, t, t1, h: Tensor, y: Tensor, k1: Tensor, k: Tensor):
    """Take one step.

    Parameters
    ----------
    field : FieldView
        The vector field.
    t, t1 : Tensor of shape (lanes,) or None
        Start and end of the step; None if the field does not use time.
    h : Tensor of shape (lanes, 1)
        Signed step in the state's dtype.
    y, k1 : Tensor of shape (lanes, n)
        State and slope at the start.
    k : Tensor of shape (stages, lanes, n)
        Buffer, filled with the scaled slopes of all stages.

    Returns
    -------
    y1, slope : Tensor of shape (lanes, n)
        State and slope at the end of the step.
    """
    coefficients = tableau.tensors(y.dtype, y.device)
    torch.mul(k1, h, out=k[0])
    slope, stage = k1, y
    for i in range(1, tableau.n_stages):
        stage = combine(y, k, coefficients.a[i])
        time = None if t is None else stage_time(t, t1, coefficients.c[i])
        slope = field.evaluate(time, stage)
        torch.mul(slope, h, out=k[i])
    return stage, slope


def extend(field, tableau: Tableau, t, t1, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
    """Return k with the stages that only the dense output needs."""
    if tableau.n_stages_extended == tableau.n_stages:
        return k
    coefficients = tableau.tensors(y.dtype, y.device)
    k = torch.cat([k, k.new_empty(tableau.n_stages_extended - len(k), *y.shape)])
    for i in range(tableau.n_stages, tableau.n_stages_extended):
        stage = combine(y, k, coefficients.a[i])
        time = None if t is None else stage_time(t, t1, coefficients.c[i])
        torch.mul(field.evaluate(time, stage), h, out=k[i])
    return k


def powers(theta: Tensor, degree: int) -> Tensor:
    """Return ``theta^0 ... theta^degree`` as the columns of an (n, degree + 1) tensor."""
    exponents = torch.arange(degree + 1, dtype=theta.dtype, device=theta.device)
    return theta[:, None] ** exponents


def dense_values(
    tableau: Tableau, y: Tensor, k: Tensor, lanes: Tensor, theta: Tensor
) -> Tensor:
    """Evaluate the dense output of some lanes at some places of their steps.

    Parameters
    ----------
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
