"""The fused recurrence: a gated recurrent unit over whole series in one call.

It is what the encoder of latent ODEs spends its time on (`sknode._series.recurrent`
has the same in torch). Like the solves, it takes tiles of series through all their rows
while states and weights stay in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sknode.ode import kernels

__all__ = ["Read", "read", "reverse", "serves"]

# Products of rows and weights below which a second thread costs more than it brings.
THREAD_WORK = 5_000_000
# Bytes that the numbers of a tile of series take: LANES of network.h.
TILE_BYTES = 128

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]


class Read(NamedTuple):
    """Series that were read: the states after their first rows, (batch, size), and
    those before every row, tile by tile, as `reverse` wants them.
    """

    last: Tensor
    states: Tensor | None


def serves(parameters: Parameters, inputs: Tensor, lengths: Tensor) -> bool:
    """Return whether the kernels do this, gradients of the parameters included.

    They do not give gradients to the inputs.
    """
    if kernels.switched_off():
        return False
    if inputs.requires_grad and torch.is_grad_enabled():
        return False
    return _plain_unit(parameters, inputs, lengths) and kernels.there_are_some()


def _plain_unit(parameters, inputs, lengths) -> bool:
    """Return whether all is in the memory that the kernels will take it to be in."""
    if inputs.dtype not in (torch.float32, torch.float64) or not inputs.numel():
        return False
    weight = parameters[1]
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return False
    size = weight.shape[1]
    shapes = (3 * size, inputs.shape[2]), (3 * size, size), (3 * size,), (3 * size,)
    given = (*zip(parameters, shapes, strict=True), (inputs, inputs.shape))
    return kernels.are_plain(given, inputs.dtype) and kernels.are_plain(
        [(lengths, inputs.shape[:1])], torch.int64
    )


def read(parameters: Parameters, inputs: Tensor, lengths: Tensor, record: bool) -> Read:
    """Read series backwards, from states of zero.

    Parameters
    ----------
    parameters : tuple of Tensor
        Weights of inputs and of states, and their biases, as `torch.nn.GRUCell` has
        them.
    inputs : Tensor of shape (batch, length, n_inputs)
        The rows.
    lengths : Tensor of shape (batch,), int64
        How many of them are real; those after them are not looked at.
    record : bool
        Whether to keep the states for `reverse`.
    """
    states = inputs.new_empty(_kept(parameters, inputs)) if record else None
    last = inputs.new_empty(len(inputs), parameters[1].shape[1])
    _call(kernels._native.recur, parameters, inputs, lengths, states, last)
    return Read(last, states)


def reverse(
    parameters: Parameters,
    inputs: Tensor,
    lengths: Tensor,
    states: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """Return the gradients of the parameters.

    Parameters
    ----------
    parameters, inputs, lengths
        What was given to `read`.
    states : Tensor
        What it kept.
    grad : Tensor of shape (batch, size)
        Cotangents of the last states.
    """
    # changing the memory under a tensor escapes torch's own notice
    fits = _plain_unit(parameters, inputs, lengths)
    fits = fits and states.shape == _kept(parameters, inputs)
    if not fits or grad.shape != (len(inputs), parameters[1].shape[1]):
        raise RuntimeError("The shape of an argument has changed since the forward.")
    states = kernels._plain(states)
    if states.data_ptr() % 64:  # hooks of saved tensors may have moved them
        states = states.clone()
    grad = kernels._plain(grad)
    found = [grad.new_empty(x.shape) for x in parameters]
    addresses = grad.data_ptr(), *(x.data_ptr() for x in found)
    function = kernels._native.recur_back
    _call(function, parameters, inputs, lengths, states, None, *addresses)
    return found


def _kept(parameters: Parameters, inputs: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of the states that are kept."""
    batch, length, _ = inputs.shape
    lanes = TILE_BYTES // inputs.element_size()
    return -(-batch // lanes), length, parameters[1].shape[1], lanes


def _call(function, parameters, inputs, lengths, states, last, *addresses) -> None:
    parameters = [kernels._plain(x) for x in parameters]
    inputs, lengths = kernels._plain(inputs), kernels._plain(lengths)
    n_weights = sum(x.numel() for x in parameters)
    work = n_weights * inputs.shape[0] * inputs.shape[1]
    function(
        kernels._sets()[kernels.chosen()],
        inputs.dtype == torch.float64,
        *(x.data_ptr() for x in parameters),
        inputs.shape[2],
        parameters[1].shape[1],
        *inputs.shape[:2],
        inputs.data_ptr(),
        lengths.data_ptr(),
        0 if states is None else states.data_ptr(),
        0 if last is None else last.data_ptr(),
        torch.get_num_threads() if work >= THREAD_WORK else 1,
        *addresses,
    )
