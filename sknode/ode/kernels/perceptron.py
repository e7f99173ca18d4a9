"""The fused perceptron: a small network at many rows in one call, and its gradients.

It decodes the latent states of series (`sknode._series.decoder` has the same in torch).
Hidden units stay in the cache; for gradients they are evaluated once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sknode.ode import kernels
from sknode.ode.vector_field import Perceptron

__all__ = ["evaluate", "reverse", "serves"]

# Products of rows and weights below which a second thread costs more than it brings.
THREAD_WORK = 1_000_000


def serves(network: Perceptron, x: Tensor) -> bool:
    """Return whether the kernels evaluate the network at these rows, with gradients."""
    if kernels.switched_off() or x.dtype not in (torch.float32, torch.float64):
        return False
    return _is_plain(network, x) and kernels.there_are_some()


def _is_plain(network: Perceptron, x: Tensor) -> bool:
    """Return whether all is in the memory that the kernels will take it to be in."""
    if network.uses_time or x.ndim != 2 or not x.numel():
        return False
    tensors, n_in = [(x, x.shape)], x.shape[1]
    for weight, bias in network.layers:
        n_out = len(weight) if weight.ndim else 0
        if not n_out:
            return False
        tensors.append((weight, (n_out, n_in)))
        if bias is not None:
            tensors.append((bias, (n_out,)))
        n_in = n_out
    return kernels.are_plain(tensors, x.dtype)


def evaluate(network: Perceptron, x: Tensor) -> Tensor:
    """Evaluate a network.

    Parameters
    ----------
    network : Perceptron
        Its layers; it does not use time.
    x : Tensor of shape (n, n_inputs)
        The rows.

    Returns
    -------
    Tensor of shape (n, n_outputs)
        The outputs, each a function of its own row to the bit.
    """
    out = x.new_empty(len(x), len(network.layers[-1][0]))
    _call(kernels._native.evaluate, network, x, out)
    return out


def reverse(
    network: Perceptron, x: Tensor, grad: Tensor, with_rows: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return cotangents of the rows, if they are asked for, and of the parameters.

    Parameters
    ----------
    network, x
        What was given to `evaluate`.
    grad : Tensor of shape (n, n_outputs)
        Cotangents of the outputs.
    with_rows : bool
        Whether to return those of the rows.
    """
    # changing the memory under a tensor escapes torch's own notice
    outputs = len(x), len(network.layers[-1][0])
    if not _is_plain(network, x) or grad.shape != outputs:
        raise RuntimeError("The shape of an argument has changed since the forward.")
    grad = kernels._plain(grad)
    grad_x = x.new_empty(x.shape) if with_rows else None
    found = kernels._make_gradients(kernels._shapes(network.layers), grad)
    function = kernels._native.evaluate_back
    addresses = grad.data_ptr(), grad_x.data_ptr() if with_rows else 0
    _call(function, network, x, None, *addresses, kernels._addresses(found))
    parameters = [p for pair in found for p in pair if p is not None]
    return grad_x, parameters


def _call(function, network, x, out, *further) -> None:
    layers, x = kernels._plain_layers(network), kernels._plain(x)
    work = len(x) * sum(w.numel() for w, _ in layers)
    function(
        kernels._sets()[kernels.chosen()],
        x.dtype == torch.float64,
        kernels._model(network, layers, x.shape[1]),
        len(x),
        x.data_ptr(),
        0 if out is None else out.data_ptr(),
        torch.get_num_threads() if work >= THREAD_WORK else 1,
        *further,
    )
