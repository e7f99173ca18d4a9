"""Fused kernels: a whole solve of a multilayer perceptron in one call, on the CPU.

A small network spends its time on dispatch, not on arithmetic. The kernels, in C++,
take tiles of samples through all their steps while everything about them stays in the
cache. They are an optional part of the package: what they compute, the loop in
`integrate` computes too, which also serves everything that they do not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sknode.ode.integrate import Options, Trace
from sknode.ode.runge_kutta import count_evaluations
from sknode.ode.tableaus import Tableau
from sknode.ode.vector_field import BoundField, Perceptron

try:
    from sknode.ode.kernels import _native
except ImportError:  # built without a compiler
    _native = None

__all__ = ["available", "instruction_sets", "reference", "reverse", "serves", "solve"]

# As in the enumeration of problem.h.
ACTIVATIONS = {
    name: code
    for code, name in enumerate(("sigmoid", "tanh", "softplus", "silu", "elu", "relu"))
}

# Products of samples and parameters below which a second thread costs more than it
# brings.
THREAD_WORK = 100_000

# Set to 0, the environment variable switches the kernels off.
_choice: ContextVar[str | None] = ContextVar(
    "sknode_kernels",
    default=None if os.environ.get("SKNODE_KERNELS", "1") != "0" else "reference",
)


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that can be used here, the fastest first.

    Returns
    -------
    tuple of str
        Empty if the package was built without its kernels.
    """
    return tuple(_sets())


@cache
def _sets() -> dict[str, int]:
    if _native is None:
        return {}
    sets = enumerate(_native.instruction_sets())
    return {name: index for index, (name, usable) in sets if usable}


def available() -> bool:
    """Return whether the package was built with its kernels."""
    return _native is not None


@contextlib.contextmanager
def use(instruction_set: str) -> Iterator[None]:
    """Use the kernels for an instruction set, in a ``with`` statement.

    Parameters
    ----------
    instruction_set : str
        One of `instruction_sets`, or "reference" for none of them.
    """
    if instruction_set not in ("reference", *_sets()):
        raise ValueError(
            "instruction_set must be 'reference' or one of "
            f"{', '.join(map(repr, _sets())) or 'none, as there are no kernels'}. "
            f"Got {instruction_set!r} instead."
        )
    token = _choice.set(instruction_set)
    try:
        yield
    finally:
        _choice.reset(token)


def reference() -> contextlib.AbstractContextManager[None]:
    """Solve without the kernels, in a ``with`` statement.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import MLPField
    >>> from sknode.ode import solve_ode
    >>> from sknode.ode.kernels import reference
    >>> field, y0 = MLPField(2, (16,)), torch.ones(3, 2)
    >>> fused = solve_ode(field, y0, torch.tensor([0.0, 1.0]))
    >>> with reference():
    ...     plain = solve_ode(field, y0, torch.tensor([0.0, 1.0]))
    >>> torch.allclose(fused.y, plain.y)
    True
    """
    return use("reference")


def serves(field: BoundField, y0: Tensor, times: Tensor, options: Options) -> bool:
    """Return whether the kernels solve this, gradients included.

    They do not give gradients to the output times.
    """
    network = getattr(field, "network", None)
    if (
        network is None
        or not options.plain
        or _choice.get() == "reference"
        or _native is None
    ):
        return False
    if y0.device.type != "cpu" or y0.dtype != network.dtype:
        return False
    return not (times.requires_grad and torch.is_grad_enabled())


def solve(
    network: Perceptron,
    y0: Tensor,
    times: np.ndarray,
    options: Options,
    record: bool,
) -> Trace:
    """Integrate as `integrate` does.

    Parameters
    ----------
    network : Perceptron
        The vector field.
    y0 : Tensor of shape (batch, n)
        Initial states, contiguous, on the CPU.
    times : ndarray of shape (n_times,) or (batch, n_times)
        Output times, ascending or descending.
    options : Options
        Method and control.
    record : bool
        Whether to keep the steps for `reverse`.

    Returns
    -------
    Trace
        Its ``records`` are the recording that `reverse` wants.
    """
    batch, n_times = len(y0), times.shape[-1]
    times = np.ascontiguousarray(times)
    y = torch.empty(batch, n_times, y0.shape[1], dtype=y0.dtype)
    counts, t_reached = np.empty((5, batch), np.int64), np.empty(batch)
    layers = [(w.detach().contiguous(), b) for w, b in network.layers]
    choice = _choice.get()
    recording = _native.solve(
        0 if choice is None else _sets()[choice],
        y0.dtype == torch.float64,
        (
            ACTIVATIONS[network.activation],
            network.uses_time,
            y0.shape[1],
            *(
                (w.data_ptr(), 0 if b is None else b.data_ptr(), *w.shape)
                for w, b in layers
            ),
        ),
        _tableau(options.tableau),
        _control(options),
        batch,
        n_times,
        n_times if times.ndim == 2 else 0,
        times.ctypes.data,
        y0.data_ptr(),
        y.data_ptr(),
        counts.ctypes.data,
        t_reached.ctypes.data,
        record,
        _threads(network, batch),
    )
    status, n_steps, n_rejected, n_dense, next_output = counts
    trace = Trace(
        y=y,
        status=status,
        n_steps=n_steps,
        n_rejected=n_rejected,
        n_dense=n_dense,
        next_output=next_output,
        t_reached=t_reached,
        moving=np.broadcast_to(times[..., -1] != times[..., 0], batch),
        # the recording reads the times again
        records=(recording, times) if record else None,
    )
    trace.n_evaluations = count_evaluations(options.tableau, trace)
    return trace


def reverse(
    network: Perceptron, trace: Trace, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the cotangents of the initial states and of the parameters.

    Parameters
    ----------
    network : Perceptron
        The vector field of the solve.
    trace : Trace
        What `solve` returned.
    grad : Tensor of shape (batch, n_times, n)
        Cotangents of the states at the output times.
    """
    recording, _ = trace.records
    grad = grad.contiguous()
    grad_y0 = torch.empty(grad.shape[0], grad.shape[2], dtype=grad.dtype)
    found = [
        (
            torch.empty(w.shape, dtype=w.dtype),
            None if b is None else torch.empty_like(b),
        )
        for w, b in network.layers
    ]
    _native.reverse(
        recording,
        grad.data_ptr(),
        grad_y0.data_ptr(),
        tuple((w.data_ptr(), 0 if b is None else b.data_ptr()) for w, b in found),
        _threads(network, len(grad)),
    )
    return grad_y0, [x for pair in found for x in pair if x is not None]


def _threads(network: Perceptron, batch: int) -> int:
    """Return how many threads to use, at most as many as torch does."""
    size = sum(w.numel() for w, _ in network.layers)
    return torch.get_num_threads() if batch * size >= THREAD_WORK else 1


@cache
def _tableau(tableau: Tableau) -> tuple:
    error = np.zeros((0, tableau.n_stages)) if tableau.error is None else tableau.error
    arrays = (tableau.a, tableau.c, error, tableau.dense)
    return (
        tableau.n_stages,
        tableau.n_stages_extended,
        tableau.dense.shape[1],
        len(error),
        *(np.ascontiguousarray(x, np.float64).tobytes() for x in arrays),
    )


def _control(options: Options) -> tuple:
    controller = options.controller
    return (
        options.rtol,
        options.atol,
        options.first_step or 0.0,
        options.min_step,
        options.step_size or 0.0,
        float(options.tableau.error_order or 1),
        controller.pcoeff,
        controller.icoeff,
        controller.dcoeff,
        controller.safety,
        controller.factor_min,
        controller.factor_max,
        controller.n_history,
        options.max_steps,
    )
