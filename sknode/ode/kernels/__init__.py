"""Fused kernels: a whole solve of a small network in one call, on the CPU.

They serve multilayer perceptrons, and flows of densities: a perceptron with gates of
time and its divergence, alone or added to the flow of a Gaussian mixture. A small
network spends its time on dispatch, not on arithmetic. The kernels, in C++, take tiles
of samples through all their steps while everything about them stays in the cache. They
are an optional part of the package: what they compute, the loop in `integrate` computes
too, which also serves everything that they do not.

`recurrent` and `perceptron` have what is no solve: what latent ODEs encode series
with, and what they decode them with.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sknode.ode.options import Options
from sknode.ode.tableaus import Tableau
from sknode.ode.trace import Trace
from sknode.ode.vector_field import BoundField, DensityNetwork, Perceptron

why_not = "they were not built, for want of a compiler"
try:
    import sknode.ode.kernels._native as _native
except ImportError as error:
    _native = None
    if not isinstance(error, ModuleNotFoundError):  # built, but not for this system
        why_not = str(error)

# In a child, which fork may have made, torch's threads may be gone.
if _native is not None and multiprocessing.parent_process() is None:
    _native.share_threads(True)

__all__ = [
    "Recorded",
    "available",
    "chosen",
    "gradients",
    "instruction_sets",
    "recorded_bytes",
    "reference",
    "reverse",
    "serves",
    "solve",
    "use",
]

logger = logging.getLogger("sknode")

Network = Perceptron | DensityNetwork

# As in the enumeration of problem.h.
ACTIVATIONS = {
    name: code
    for code, name in enumerate(("sigmoid", "tanh", "softplus", "silu", "elu", "relu"))
}

# Kinds of tensors that are nothing but their values.
PLAIN = (nn.Parameter, Tensor)

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


def chosen() -> str:
    """Return the instruction set in use here: the fastest, unless there was a choice.

    Returns
    -------
    str
        One of `instruction_sets`, or "reference" if torch does all of the work.

    Examples
    --------
    >>> from sknode.ode import kernels
    >>> with kernels.reference():
    ...     kernels.chosen()
    'reference'
    """
    choice = _choice.get()
    return next(iter(_sets()), "reference") if choice is None else choice


@contextlib.contextmanager
def use(instruction_set: str) -> Iterator[None]:
    """Use the kernels for an instruction set, in a ``with`` statement.

    Parameters
    ----------
    instruction_set : str
        One of `instruction_sets`, or "reference" for none of them.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        If the processor does not have it.

    Examples
    --------
    >>> from sknode.ode import kernels
    >>> for name in kernels.instruction_sets():
    ...     with kernels.use(name):
    ...         assert kernels.chosen() == name
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

    Returns
    -------
    contextlib.AbstractContextManager
        Within it, torch does all of the work.

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


def gradients(field: BoundField) -> tuple[str, ...]:
    """Return which gradients the kernels have for a field that they serve."""
    if isinstance(getattr(field, "network", None), DensityNetwork):
        return ("discrete",)
    return ("discrete", "continuous")


def serves(field: BoundField, y0: Tensor, times: Tensor) -> bool:
    """Return whether the kernels solve this, gradients included.

    They do not give gradients to the output times.
    """
    network = getattr(field, "network", None)
    if network is None or switched_off():
        return False
    if times.requires_grad and torch.is_grad_enabled():
        return False
    if not (y0.is_cpu and are_plain(network.tensors(y0.shape[1]), y0.dtype)):
        return False
    return there_are_some()


def switched_off() -> bool:
    """Return whether torch is to do all of the work."""
    return _choice.get() == "reference"


def are_plain(
    tensors: Iterable[tuple[Tensor, tuple[int, ...]]], dtype: torch.dtype
) -> bool:
    """Return whether all is in the memory that the kernels will take it to be in.

    What is not (a layer moved to another device or dtype, or given another shape)
    torch can handle or refuse.
    """
    strided = torch.strided
    for tensor, shape in tensors:
        if type(tensor) not in PLAIN or tensor.dtype is not dtype:
            return False
        if tensor.shape != shape or not tensor.is_cpu or tensor.layout is not strided:
            return False
    return True


def there_are_some() -> bool:
    """Return whether there are kernels; where they are missed, say so once."""
    if _native is None:
        _say_that_there_are_none()
    return _native is not None


@cache
def _say_that_there_are_none() -> None:
    logger.info(
        "sknode works without its compiled kernels (%s): torch solves small networks, "
        "more slowly. See sknode.show_versions().",
        why_not,
    )


class Recorded(NamedTuple):
    """The steps of a solve, as `reverse` wants them."""

    steps: object
    times: Tensor  # read again by the reverse
    shapes: list[tuple[torch.Size, torch.Size | None]]  # of the weights and biases


def recorded_bytes(recorded: Recorded) -> int:
    """Return the memory that recorded steps take, in bytes.

    A step takes that of its state, two times and an index; a sample takes six numbers.
    Steps are kept in pages of eight; samples go through tiles of 128 bytes, each with
    as many steps as its busiest lane.
    """
    return _native.recorded_bytes(recorded.steps)


def solve(
    network: Network,
    y0: Tensor,
    times: np.ndarray,
    options: Options,
    record: bool,
) -> Trace:
    """Integrate as `integrate` does.

    Parameters
    ----------
    network : Perceptron or DensityNetwork
        The vector field.
    y0 : Tensor of shape (batch, n)
        Initial states, on the CPU.
    times : ndarray of shape (n_times,) or (batch, n_times)
        Output times, ascending or descending.
    options : Options
        Method and control.
    record : bool
        Whether to keep the steps for `reverse`.

    Returns
    -------
    Trace
        Its ``records`` are `Recorded`.
    """
    batch, n_times = y0.shape[0], times.shape[-1]
    y0 = _plain(y0)
    y = torch.empty(batch, n_times, y0.shape[1], dtype=y0.dtype)
    call = _Call(network, y, times, options)
    steps = _native.solve(*call.arguments(y0, record))
    recorded = Recorded(steps, call.times, _shapes(call.layers)) if record else None
    return call.trace(recorded)


class _Call:
    """What the kernels are given, kept alive, and what they leave behind."""

    def __init__(self, network: Network, y: Tensor, times, options: Options):
        self.network, self.y, self.options = network, y, options
        self.times = torch.from_numpy(np.ascontiguousarray(times))
        # status, steps: attempted, accepted, rejected, evaluations; next output time
        self.counts = np.zeros((6, y.shape[0]), np.int64)
        self.t_reached = np.zeros(y.shape[0])
        self.layers = _plain_layers(network)
        self.flow, self.mixture = None, ()
        if isinstance(network, DensityNetwork):
            self.mixture = [_plain(x) for x in network.mixture or ()]
            n = len(self.mixture[0]) if self.mixture else 0
            addresses = [x.data_ptr() for x in self.mixture] or [0] * 4
            self.flow = (network.n_frequencies, n, *addresses)

    def arguments(self, y0: Tensor | None, record: bool) -> tuple:
        """Return what the solves forwards and backwards have in common."""
        network, y, times = self.network, self.y, self.times
        batch, n_times, dim = y.shape
        several = _worth_threads(network, batch)
        return (
            _sets()[chosen()],
            y.dtype == torch.float64,
            _model(network, self.layers, dim, self.flow),
            _tableau(self.options.tableau),
            _control(self.options),
            batch,
            n_times,
            n_times if times.ndim == 2 else 0,
            times.data_ptr(),
            0 if y0 is None else y0.data_ptr(),
            y.data_ptr(),
            torch.from_numpy(self.counts).data_ptr(),
            torch.from_numpy(self.t_reached).data_ptr(),
            record,
            torch.get_num_threads() if several else 1,
            several,
        )

    def trace(self, records: Recorded | None) -> Trace:
        """Return what happened."""
        status, n_steps, _, n_rejected, _, next_output = counts = self.counts
        return Trace(
            y=self.y,
            status=status,
            n_steps=n_steps,
            n_rejected=n_rejected,
            next_output=next_output,
            t_reached=self.t_reached,
            records=records,
            statistics=counts[:5],
        )


def reverse(
    network: Network, trace: Trace, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the cotangents of the initial states and of the parameters.

    Parameters
    ----------
    network : Perceptron or DensityNetwork
        The vector field of the solve.
    trace : Trace
        What `solve` returned.
    grad : Tensor of shape (batch, n_times, n)
        Cotangents of the states at the output times.
    """
    recorded, grad = trace.records, _plain(grad)
    grad_y0 = grad.new_empty(grad.shape[0], grad.shape[2])
    # the shapes that the kernels know: those of the parameters may be others by now
    found = _make_gradients(recorded.shapes, grad)
    _native.reverse(
        recorded.steps,
        grad.data_ptr(),
        grad_y0.data_ptr(),
        _addresses(found),
        torch.get_num_threads() if _worth_threads(network, len(grad)) else 1,
    )
    return grad_y0, [x for pair in found for x in pair if x is not None]


def adjoint(
    network: Perceptron,
    y: Tensor,
    times: np.ndarray,
    options: Options,
    grad: Tensor,
    last: np.ndarray,
    scale: np.ndarray,
) -> tuple[Trace, Tensor, list[Tensor]]:
    """Solve states and cotangents backwards, as `sknode.ode.continuous` does.

    Parameters
    ----------
    network : Perceptron
        The vector field.
    y : Tensor of shape (batch, n_times, n)
        States at the output times.
    times : ndarray of shape (n_times,) or (batch, n_times)
        Output times, ascending or descending.
    options : Options
        Method and control of the solve backwards.
    grad : Tensor of shape (batch, n_times, n)
        Cotangents of the states.
    last : ndarray of shape (batch,)
        Times that were reached.
    scale : ndarray of shape (batch,)
        Scale of each sample's cotangents, zero for those that stay.

    Returns
    -------
    trace : Trace
        Statuses and numbers of steps.
    grad_y : Tensor of shape (batch, n)
        Cotangents of the states at the first time, less those of outputs there;
        undefined for samples that stay.
    parameters : list of Tensor
        Gradients of the parameters.
    """
    call = _Call(network, _plain(y), times, options)
    grad = _plain(grad)
    grad_y = grad.new_zeros(grad.shape[0], grad.shape[2])
    found = _make_gradients(_shapes(call.layers), grad)
    last, scale = (np.ascontiguousarray(x, np.float64) for x in (last, scale))
    _native.adjoint(
        *call.arguments(None, False),
        grad.data_ptr(),
        last.ctypes.data,
        scale.ctypes.data,
        grad_y.data_ptr(),
        _addresses(found),
    )
    return (
        call.trace(None),
        grad_y,
        [x for pair in found for x in pair if x is not None],
    )


def _make_gradients(shapes, like: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Make memory for the gradients of weights and biases."""
    return [
        (like.new_empty(w), None if b is None else like.new_empty(b)) for w, b in shapes
    ]


def _addresses(layers) -> tuple:
    return tuple((w.data_ptr(), 0 if b is None else b.data_ptr()) for w, b in layers)


def _plain(x: Tensor) -> Tensor:
    """Return the values as they have to lie in memory: in order, signs included."""
    if x.is_contiguous() and not x.is_neg():
        return x
    return x.detach().contiguous().resolve_neg()


def _plain_layers(network: Network) -> list[tuple[Tensor, Tensor | None]]:
    """Return the layers as they have to lie in memory; keep them while it is read."""
    return [(_plain(w), None if b is None else _plain(b)) for w, b in network.layers]


def _model(network: Network, layers, dim: int, flow: tuple | None = None) -> tuple:
    """Return a network as the compiled module reads it."""
    return (
        ACTIVATIONS[network.activation],
        network.uses_time,
        dim,
        flow,
        *(
            (w.data_ptr(), 0 if b is None else b.data_ptr(), *w.shape)
            for w, b in layers
        ),
    )


def _shapes(layers) -> list[tuple[torch.Size, torch.Size | None]]:
    """Return the shapes of weights and biases."""
    return [(w.shape, None if b is None else b.shape) for w, b in layers]


def _worth_threads(network: Network, batch: int) -> bool:
    """Return whether there is work for as many threads as torch uses."""
    size = sum(w.numel() for w, _ in network.layers)
    return batch * size >= THREAD_WORK


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
        min(options.max_steps, 2**62),
        b"" if options.grid is None else np.asarray(options.grid, "f8").tobytes(),
    )
