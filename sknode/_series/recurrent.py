"""A gated recurrent unit with its own reverse sweep: small ones cost dispatch only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sknode.ode import kernels
from sknode.ode.kernels import recurrent as kernel
from sknode.ode.once_differentiable import once_differentiable

__all__ = ["last_state"]


def last_state(cell: nn.GRUCell, inputs: Tensor, lengths: Tensor) -> Tensor:
    """Return the states of a GRU that has read series from their last row to the first.

    It starts from zero. On the CPU a fused kernel serves, unless the inputs need a
    gradient. Else torch does, in less than half of the time of `torch.nn.GRU` for small
    ones: the products with the inputs and those for the gradients of weights are taken
    once for all steps, and a reverse step is three operations.

    Parameters
    ----------
    cell : torch.nn.GRUCell
        The weights.
    inputs : Tensor of shape (batch, length, n_inputs)
        The rows of the series, in their own order.
    lengths : Tensor of shape (batch,), int64
        How many of these there are; the others are padding.

    Returns
    -------
    Tensor of shape (batch, hidden_size)
    """
    parameters = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    if kernel.serves(parameters, inputs, lengths):
        if torch.is_grad_enabled() and any(x.requires_grad for x in parameters):
            return _FusedLastState.apply(inputs, lengths, *parameters)
        return kernel.read(parameters, inputs, lengths, record=False).last
    position = torch.arange(inputs.shape[1], device=lengths.device)
    real = (position < lengths[:, None]).t().flip(0)
    # padding goes before the series, and whatever is there must not matter
    inputs = inputs.transpose(0, 1).flip(0).masked_fill(~real[..., None], 0)
    projected = nn.functional.linear(inputs, cell.weight_ih, cell.bias_ih)
    return _LastState.apply(projected, real, cell.weight_hh, cell.bias_hh)


class _FusedLastState(torch.autograd.Function):
    """The same by the kernels."""

    @staticmethod
    def forward(ctx, inputs, lengths, *parameters):
        ctx.instruction_set = kernels.chosen()
        last, states = kernel.read(parameters, inputs, lengths, record=True)
        ctx.save_for_backward(inputs, lengths, states, *parameters)
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, lengths, states, *parameters = ctx.saved_tensors
        with kernels.use(ctx.instruction_set):
            found = kernel.reverse(parameters, inputs, lengths, states, grad)
        return None, None, *found


class _LastState(torch.autograd.Function):
    """The recurrence, in the notation of torch: reset r, update z, new n.

    The first axis is that of rows, in order of reading.
    """

    @staticmethod
    def forward(ctx, projected, real, weight, bias):
        length, batch, width = projected.shape
        size = width // 3
        if not bool(real.all()):
            # an update gate that is one to the bit keeps the state
            projected = projected.clone()
            projected[..., size : 2 * size].masked_fill_(~real[..., None], torch.inf)
        states = projected.new_zeros(length + 1, batch, size)
        gates = torch.empty_like(projected)  # r, z, n
        hidden = torch.empty_like(projected)
        transposed = weight.t()
        for given, h, h_next, own, gate in zip(
            projected, states[:-1], states[1:], hidden, gates, strict=True
        ):
            torch.addmm(bias, h, transposed, out=own)
            rz, n = gate[:, : 2 * size], gate[:, 2 * size :]
            torch.add(given[:, : 2 * size], own[:, : 2 * size], out=rz).sigmoid_()
            torch.addcmul(
                given[:, 2 * size :], rz[:, :size], own[:, 2 * size :], out=n
            ).tanh_()
            # (1 - z) n + z h, exact at z = 1 and h = 0
            z = rz[:, size:]
            torch.mul(z, h, out=h_next).addcmul_(1 - z, n)
        ctx.save_for_backward(states, gates, hidden[..., 2 * size :], weight)
        return states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, gates, hidden_n, weight = ctx.saved_tensors
        r, z, n = gates.chunk(3, -1)
        to_n = (1 - z) * (1 - n * n)
        # what a gradient of a state is multiplied by for those of what enters r, z, n
        factors = torch.stack(
            [
                to_n * hidden_n * r * (1 - r),
                (states[:-1] - n) * z * (1 - z),
                to_n * r,
            ],
            dim=-2,
        )
        deltas = torch.empty_like(factors)
        after = torch.empty_like(n)  # gradients of the states after each step
        flat = deltas.flatten(-2)
        after[-1] = grad
        for t in range(len(n) - 1, -1, -1):
            torch.mul(after[t][:, None], factors[t], out=deltas[t])
            if t:
                torch.addmm(after[t] * z[t], flat[t], weight, out=after[t - 1])
        grad_weight = flat.flatten(0, 1).t() @ states[:-1].flatten(0, 1)
        grad_bias = flat.sum((0, 1))
        # from here on it is the gradient of what was projected, which r does not scale
        torch.mul(after, to_n, out=deltas[..., 2, :])
        return flat, None, grad_weight, grad_bias
