"""What turns latent states into values: a perceptron with its own reverse sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from sknode.fields.activations import get_activation
from sknode.ode import kernels
from sknode.ode.kernels import perceptron as kernel
from sknode.ode.once_differentiable import once_differentiable
from sknode.ode.vector_field import Perceptron

__all__ = ["evaluate"]


def evaluate(network: Perceptron, x: Tensor) -> Tensor:
    """Evaluate a perceptron without time at rows.

    On the CPU a fused kernel serves; else torch does.

    Parameters
    ----------
    network : Perceptron
        The layers.
    x : Tensor of shape (n, n_inputs)
        The rows.

    Returns
    -------
    Tensor of shape (n, n_outputs)
    """
    if kernel.serves(network, x):
        parameters = network.parameters
        if torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parameters)):
            return _Fused.apply(network, x, *parameters)
        return kernel.evaluate(network, x)
    function = get_activation(network.activation).function
    # Units first: products of some units with many rows, and those for gradients, are
    # several times as fast so.
    h = x.t().contiguous()
    for i, (weight, bias) in enumerate(network.layers):
        h = function(h) if i else h
        h = weight @ h if bias is None else torch.addmm(bias[:, None], weight, h)
    return h.t().contiguous()


class _Fused(torch.autograd.Function):
    """The same by the kernels."""

    @staticmethod
    def forward(ctx, network, x, *parameters):
        ctx.activation = network.activation
        ctx.with_bias = [bias is not None for _, bias in network.layers]
        ctx.instruction_set = kernels.chosen()
        ctx.save_for_backward(x, *parameters)
        return kernel.evaluate(network, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        parameters = iter(parameters)
        layers = [
            (next(parameters), next(parameters) if with_bias else None)
            for with_bias in ctx.with_bias
        ]
        network = Perceptron(layers, ctx.activation, uses_time=False)
        with kernels.use(ctx.instruction_set):
            grad_x, found = kernel.reverse(network, x, grad, ctx.needs_input_grad[1])
        return None, grad_x, *found
