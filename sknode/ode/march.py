"""The 3/8 rule on a given grid of times, the same for all rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sknode.ode import kernels
from sknode.ode.control import make_controller
from sknode.ode.gradients import Run, discrete_adjoint
from sknode.ode.methods import get_method
from sknode.ode.options import Options
from sknode.ode.vector_field import bind

__all__ = ["march"]


def march(field: nn.Module, y0: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate on a grid, without control of errors.

    This is for training, where a solve is short and the same for all rows: there is
    nothing to look at afterwards. A kernel serves fields that have one; others are
    evaluated by torch, with autograd as the gradient.

    Parameters
    ----------
    field : Module
        The vector field, row by row; its times are scalars.
    y0 : Tensor of shape (batch, n)
        States at the first time.
    grid : sequence of float
        Ascending or descending times at which steps end, the first one included.

    Returns
    -------
    Tensor of shape (batch, n)
        States at the last time; not finite if they became so on the way.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import LogDensityField, PlanarField
    >>> from sknode.ode.march import march
    >>> field = LogDensityField(PlanarField(2, 8))
    >>> march(field, torch.zeros(5, 3), [1.0, 0.6, 0.0]).shape
    torch.Size([5, 3])
    """
    fused = _by_kernel(field, y0, grid)
    if fused is not None:
        return fused
    tableau = get_method("rk4").tableau
    for start, end in itertools.pairwise(grid):
        state, slopes = y0, []
        for c, row in zip(tableau.c[:-1], tableau.a[1:], strict=True):
            t = y0.new_tensor(end if c == 1.0 else start + c * (end - start))
            slopes.append((end - start) * field(t, state))
            state = y0 + sum(a * k for a, k in zip(row, slopes, strict=False) if a)
        y0 = state
    return y0


def _by_kernel(field, y0: Tensor, grid: Sequence[float]) -> Tensor | None:
    """Integrate by a kernel, if there is one for the field."""
    bound = bind(field, len(y0), y0.shape[1:], shared=False)
    times = torch.tensor([grid[0], grid[-1]], dtype=torch.float64)
    if not len(y0) or not kernels.serves(bound, y0, times):
        return None
    method = get_method("rk4")
    options = Options(
        tableau=method.tableau,
        rtol=0.0,
        atol=0.0,
        max_steps=len(grid),
        controller=make_controller("PI"),
        step_size=math.inf,
        grid=tuple(grid),
        make_stepper=method.make_stepper,
    )
    bound.parameters = bound.network.parameters
    run = Run(bound, lambda: bound, times.numpy(), options, fused=True)
    needs_grad = any(x.requires_grad for x in (y0, *bound.parameters))
    if torch.is_grad_enabled() and needs_grad:
        y = discrete_adjoint(run, y0, times)
    else:
        y = run.forward(y0.detach(), record=False)
    failed = torch.from_numpy(run.trace.status != 0)
    return y[:, -1].masked_fill(failed[:, None], math.nan) if failed.any() else y[:, -1]
