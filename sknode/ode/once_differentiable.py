"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["once_differentiable"]


def once_differentiable(backward):
    """Let ``backward`` of an autograd function be differentiated once only.

    Unlike torch's own decorator, this one does not let second derivatives be zero
    where the cotangents are constants, those of a sum for example: with
    ``create_graph=True`` what it returns needs a gradient, and has none.
    """

    @functools.wraps(backward)
    def once(ctx, *cotangents):
        with torch.no_grad():
            found = backward(ctx, *cotangents)
        if not torch.is_grad_enabled():
            return found
        found = found if isinstance(found, tuple) else (found,)
        tensors = [x for x in found if isinstance(x, Tensor)]
        # what it depends on, and something that is always there
        sources = *cotangents, *ctx.saved_tensors, torch.zeros((), requires_grad=True)
        refusing = iter(_Refusal.apply(len(tensors), *tensors, *sources))
        return tuple(next(refusing) if isinstance(x, Tensor) else x for x in found)

    return once


class _Refusal(torch.autograd.Function):
    """The first tensors as they are, without a gradient."""

    @staticmethod
    def forward(ctx, n, *tensors):
        return tuple(x.detach() for x in tensors[:n])

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(
            "This gradient cannot be differentiated again: the backward pass of a "
            "solve is once_differentiable. solve_ode has gradient='backprop' for that."
        )
