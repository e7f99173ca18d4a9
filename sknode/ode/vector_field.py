"""The right-hand side as the solver sees it.

The solver works on a state of shape (lanes, n) and asks a vector field for three
things: slopes; slopes that remember how to be reversed; and the reverse, a vector-
Jacobian product. `BoundField` is that interface. A module that knows closed forms
implements it itself and hands it out through a method ``closed_form()``; everything
else is served by `AutogradField`. If there is a kernel for such a module, its method
``density_network()`` says what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = [
    "AutogradField",
    "BoundField",
    "DensityNetwork",
    "FieldView",
    "FirstSlope",
    "Perceptron",
    "bind",
    "has_hooks",
]


@dataclass(frozen=True)
class Perceptron:
    """A multilayer perceptron by its layers: what a fused kernel needs to know.

    Attributes
    ----------
    layers : list of (weight, bias)
        Weights of shape (out, in); a bias may be None. If the field uses time, it is
        the last input of the first layer.
    activation : str
        Activation of the hidden layers, as in `sknode.fields.ACTIVATIONS`.
    uses_time : bool
        Whether time is an input.
    """

    layers: list[tuple[Tensor, Tensor | None]]
    activation: str
    uses_time: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.layers[0][0].dtype

    @property
    def parameters(self) -> list[Tensor]:
        """All weights and biases."""
        return [x for layer in self.layers for x in layer if x is not None]

    def tensors(self, dim: int) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """List all tensors with the shapes by which they fit states of size ``dim``."""
        n_in = dim + self.uses_time
        for i, (weight, bias) in enumerate(self.layers):
            n_out = dim if i == len(self.layers) - 1 else weight.shape[0]
            yield weight, (n_out, n_in)
            if bias is not None:
                yield bias, (n_out,)
            n_in = n_out


@dataclass(frozen=True)
class DensityNetwork:
    """A flow with what it does to a log-density, by its layers, for a fused kernel.

    The state is y and the change of the log-density: see `LogDensityField` and
    `ConcatSquashField` of `sknode.fields`.

    Attributes
    ----------
    layers : list of (weight, bias)
        One or two hidden layers, the last one, the kernel of the divergence and the
        modulation, which alone has a bias: gates, biases of hidden units, slopes.
    activation : str
        Activation of the hidden layers.
    n_frequencies : int
        Number of frequencies of time.
    mixture : tuple of Tensor or None
        Log-weights, centres, variances and axes of a `MixtureField` whose velocity is
        added; the log-density is then relative to that of its path.
    """

    layers: list[tuple[Tensor, Tensor | None]]
    activation: str
    n_frequencies: int
    mixture: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    uses_time: ClassVar[bool] = True

    @property
    def parameters(self) -> list[Tensor]:
        """All weights and biases, and the kernel that is made of the former."""
        return [x for layer in self.layers for x in layer if x is not None]

    def tensors(self, dim: int) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """List all tensors with the shapes by which they fit states of size ``dim``."""
        size = dim - 1
        *hidden, (last, _), (kernel, _), (weight, bias) = self.layers
        widths = [len(w) for w, _ in hidden]
        for (w, _), n_in, n_out in zip(hidden, (size, *widths), widths, strict=False):
            yield w, (n_out, n_in)
        yield last, (size, widths[-1])
        yield kernel, (widths[1] if len(widths) == 2 else 1, widths[0])
        n_out = 2 * sum(widths) + size
        yield weight, (n_out, 1 + 2 * self.n_frequencies)
        yield bias, (n_out,)
        if self.mixture is not None:
            n = len(self.mixture[0])
            shapes = (n,), (n, size), (n, size), (size, n * size)
            yield from zip(self.mixture, shapes, strict=True)


class BoundField(Protocol):
    """A vector field with its parameters, for the duration of one solve.

    Times ``t`` have the states' shape with ones after the first dimension, or none at
    all under shared control; they are None if ``uses_time`` is false.
    """

    row_wise: bool
    """Whether a row's slope depends on this row alone, so that rows may leave."""
    reusable: bool
    """Whether states that it was given may be overwritten."""
    uses_time: bool
    """Whether t matters."""
    parameters: Sequence[Tensor]
    """The tensors that gradients flow to."""
    probed: bool
    """Whether ``parameters`` are only known after a call of ``discover(t, y)``, which
    also returns the slopes."""
    network: Perceptron | DensityNetwork | None
    """What the field is, if there may be a kernel for it."""

    def prepare(self) -> None:
        """Get ready for evaluations; called once, before the first one."""

    def evaluate(self, t: Tensor | None, y: Tensor) -> Tensor:
        """Return the slopes, in a tensor that is never written again."""

    def jacobian(self, t: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the derivatives by state and by time, for implicit methods.

        They have shapes (lanes, n, n), with the slope's components first, and
        (lanes, n), None if time does not matter. Where autograd is enabled they can be
        differentiated.
        """

    def begin_reverse(self) -> None:
        """Start a reverse sweep: forget accumulated gradients."""

    def linearize(self, stage: int, t: Tensor | None, y: Tensor) -> Tensor:
        """Return the slopes and remember what the reverse of this stage needs."""

    def pullback(
        self, stage: int, cotangent: Tensor, time: bool, out: Tensor
    ) -> Tensor | None:
        """Write the cotangent of y to ``out``; on request return that of t.

        The latter has shape (rows,), or () under shared control.
        """

    def flush(self, states: Tensor, cotangents: Tensor) -> None:
        """Finish a reverse step: all its stages have been pulled back.

        The states and cotangents of the stages, stage first, are handed in once more,
        so that parameter gradients can be added up for all of them together.
        """

    def pullback_state(self, stage: int, cotangent: Tensor, out: Tensor) -> None:
        """Write the cotangent of y to ``out``; keep the stage for ``accumulate``."""

    def accumulate(
        self,
        stages: Sequence[int],
        states: Tensor,
        cotangents: Tensor,
        weights: Tensor,
    ) -> None:
        """Add weighted parameter gradients of stages that ``pullback_state`` kept.

        States and cotangents are those that they had, (n_stages, rows, n), all stages
        in order; weights have shape (n_stages, rows, 1) and are zero for stages other
        than the ones listed.
        """

    def parameter_gradients(self) -> list[Tensor | None]:
        """Return the accumulated gradients, in the order of ``parameters``."""


@dataclass
class FirstSlope:
    """A first evaluation on autograd's tape.

    Attributes
    ----------
    y, slope : Tensor
        States, a leaf, and slopes, in the user's layout.
    saved : dict of int to int
        The bytes that autograd keeps for the reverse, by where they are.
    """

    y: Tensor
    slope: Tensor
    saved: dict[int, int]


def _place(tensor: Tensor) -> int:
    """Return where the memory of a tensor is."""
    return tensor.untyped_storage().data_ptr()


class AutogradField:
    """Any callable ``f(t, y)``, reversed by torch's autograd.

    Parameters
    ----------
    f : callable
        Module or function.
    row_wise : bool, default=False
        Whether rows may be taken apart: f may hold tensors with an entry per sample.
    jacobian : callable, optional
        A closed form of the derivatives, ``jacobian(t, y)``, row by row.
    """

    reusable = False  # f may keep the states that it is given
    uses_time = True
    probed = True
    network = None

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        row_wise: bool = False,
        jacobian: Callable | None = None,
    ):
        self.f, self.row_wise = f, row_wise
        self.jacobian = jacobian or self._jacobian
        self._batched = True
        self._first: FirstSlope | None = None
        self.parameters: tuple[Tensor, ...] = ()
        self._stages: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._gradients: list[Tensor | None] = []

    def prepare(self):
        """Nothing needs to be prepared."""

    def discover(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate once with gradients, to learn which tensors f depends on.

        Beside a module's parameters these are the tensors that a function has captured;
        missing them would silently lose their gradient.
        """
        value = self._evaluate_first(t.detach(), y.detach())
        found = {id(p): p for p in _leaves(value)}
        if self._first is not None:
            found.pop(id(self._first.y), None)
        if isinstance(self.f, torch.nn.Module):
            found |= {id(p): p for p in self.f.parameters() if p.requires_grad}
        self.parameters = tuple(found.values())
        if self._first is not None:
            for p in self.parameters:  # they are there anyway
                self._first.saved.pop(_place(p), None)
        return value.detach()

    def _evaluate_first(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate on autograd's tape; keep what a reverse needs, and its size."""
        saved = {}

        def count(tensor):
            saved[_place(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            leaf = y.clone().requires_grad_()
            with torch.enable_grad(), saved_tensors_hooks(count, lambda x: x):
                value = self.evaluate(t, leaf)
        except RuntimeError:
            # There are fields in which nothing can be counted (those of torch.func),
            # and some that write into their states. Any other error comes again.
            with torch.enable_grad():
                return self.evaluate(t, y)
        self._first = FirstSlope(leaf, value, saved)
        return value

    def take_first(self) -> FirstSlope | None:
        """Return the evaluation by ``discover``, if it can be reversed; forget it."""
        first, self._first = self._first, None
        return first

    def evaluate(self, t, y):
        return check_slope(self.f(t, y), y)

    def _jacobian(self, t, y):
        """Return the derivatives by a vector-Jacobian product for every component.

        A time for every row says that rows are lanes; a single one that the whole
        batch is one lane.
        """
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            t, y = (
                x if differentiable and x.requires_grad else x.detach().requires_grad_()
                for x in (t, y)
            )
            value = check_slope(self.f(t, y), y)
            rows = value.flatten(1) if t.ndim else value.reshape(1, -1)
            lanes, n = rows.shape
            if not rows.requires_grad:  # f is constant
                return y.new_zeros(lanes, n, n), y.new_zeros(lanes, n)
            by_state, by_time = self._pull_units(rows, (y, t), differentiable)
        by_state = by_state.reshape(n, lanes, n).transpose(0, 1)
        return by_state, by_time.reshape(n, lanes).T

    def _pull_units(self, rows: Tensor, inputs, differentiable: bool):
        """Pull back the unit vectors; their number comes first in the results."""
        lanes, n = rows.shape
        units = torch.eye(n, dtype=rows.dtype, device=rows.device)
        units = units[:, None, :].expand(n, lanes, n)
        pull = partial(
            torch.autograd.grad,
            rows,
            inputs,
            retain_graph=True,
            create_graph=differentiable,
            allow_unused=True,
        )
        if self._batched:
            try:
                grads = pull(units, is_grads_batched=True)
            except RuntimeError:
                # f does something that has no rule for batches: from now on one by
                # one, with the same result
                self._batched = False
        if not self._batched:
            columns = zip(*map(pull, units), strict=True)
            grads = [None if x[0] is None else torch.stack(x) for x in columns]
        return [
            x.new_zeros(n, *x.shape) if grad is None else grad
            for x, grad in zip(inputs, grads, strict=True)
        ]

    def check_captured(self, values: Sequence[Tensor], inputs: Sequence[Tensor]):
        """Raise if values depend on tensors that the first evaluation did not show.

        Their gradients would be lost without a word.
        """
        if isinstance(self.f, torch.nn.Module):
            return  # all of its parameters are known
        known = {id(x) for x in (*self.parameters, *inputs)}
        if any(id(x) not in known for value in values for x in _leaves(value)):
            raise ValueError(
                "f depends on a tensor that requires a gradient but took no part in "
                "its first evaluation (in another branch of f?). Make it a parameter "
                "of f, a torch.nn.Module."
            )

    def linearize(self, stage, t, y):
        with torch.enable_grad():
            # y is memory of the solver's, which is written again before the pullback
            t = t.detach().requires_grad_()
            y = y.detach().clone().requires_grad_()
            value = self.evaluate(t, y)
        self.check_captured([value], [t, y])
        self._stages[stage] = (t, y, value)
        return value.detach()

    def pullback(self, stage, cotangent, time, out):
        t, y, value = self._stages.pop(stage)
        inputs = [y, *([t] if time else []), *self.parameters]
        if value.requires_grad:
            # captured tensors may have a history that all stages share: keep it
            grads = torch.autograd.grad(
                value, inputs, cotangent, retain_graph=True, allow_unused=True
            )
        else:
            grads = [None] * len(inputs)
        out.copy_(torch.zeros_like(y) if grads[0] is None else grads[0])
        grad_t = None
        if time:
            grad_t = torch.zeros_like(t) if grads[1] is None else grads[1]
            grad_t = grad_t.flatten() if grad_t.ndim else grad_t
        self.add_gradients(grads[1 + time :])
        return grad_t

    def add_gradients(self, grads):
        """Add to the gradients of the parameters; None adds nothing."""
        for i, grad in enumerate(grads):
            if grad is not None:
                total = self._gradients[i]
                self._gradients[i] = grad if total is None else total + grad

    def pullback_state(self, stage, cotangent, out):
        _, y, value = self._stages[stage]
        grad = None
        if value.requires_grad:
            (grad,) = torch.autograd.grad(
                value, y, cotangent, retain_graph=True, allow_unused=True
            )
        out.copy_(torch.zeros_like(y) if grad is None else grad)

    def accumulate(self, stages, states, cotangents, weights):
        kept = [(self._stages[i][2], cotangents[i] * weights[i]) for i in stages]
        kept = [(value, c) for value, c in kept if value.requires_grad]
        if not kept or not self.parameters:
            return
        values, cotangents = zip(*kept, strict=True)
        self.add_gradients(
            torch.autograd.grad(
                values,
                self.parameters,
                cotangents,
                retain_graph=True,
                allow_unused=True,
            )
        )

    def begin_reverse(self):
        self._gradients = [None] * len(self.parameters)

    def flush(self, states, cotangents):
        self._stages.clear()

    def parameter_gradients(self):
        return list(self._gradients)


def _leaves(value: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a value was computed from."""
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    leaves, seen, stack = [], set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


def check_slope(value, y: Tensor) -> Tensor:
    """Raise if f returned something else than a slope of y."""
    if not isinstance(value, Tensor):
        raise TypeError(f"f must return a tensor. Got {type(value).__name__} instead.")
    if value.shape != y.shape:
        raise ValueError(
            "f must return the slope in the shape of y, "
            f"{tuple(y.shape)}. Got {tuple(value.shape)} instead."
        )
    if value.dtype != y.dtype:
        raise TypeError(
            f"f must return the dtype of y, {y.dtype}. Got {value.dtype} instead."
        )
    return value


class FieldView:
    """A bound field behind the solver's layout of (lanes, n) states.

    Under shared control there is one lane, the whole batch, and time is a scalar.
    """

    def __init__(self, field: BoundField, batch: int, state: torch.Size, shared: bool):
        self.field = field
        self.row_wise = field.row_wise and not shared
        self.reusable = field.reusable
        self.uses_time = field.uses_time
        self.parameters = field.parameters
        self.probed = field.probed
        self.network = None  # kernels want rows of their own
        self.prepare = field.prepare
        self.begin_reverse = field.begin_reverse
        self.parameter_gradients = field.parameter_gradients
        self._shape = (batch if shared else -1, *state)
        self._time_shape = () if shared else (-1, *(1 for _ in state))

    def _inputs(self, t, y):
        return None if t is None else t.view(self._time_shape), y.view(self._shape)

    def evaluate(self, t, y):
        """Return the slopes."""
        return self.field.evaluate(*self._inputs(t, y)).reshape(y.shape)

    def jacobian(self, t, y):
        """Return the derivatives by state and time, those of all rows where coupled."""
        by_state, by_time = self.field.jacobian(*self._inputs(t, y))
        if len(by_state) != len(y):
            # rows that do not depend on each other, in one lane
            by_state = torch.block_diag(*by_state)[None]
            by_time = None if by_time is None else by_time.reshape(1, -1)
        return by_state, by_time

    def discover(self, t, y):
        """Return the slopes; learn the parameters of a field that has to be probed."""
        value = self.field.discover(*self._inputs(t, y)).reshape(y.shape)
        self.parameters = self.field.parameters
        return value

    def take_first(self):
        """Return the evaluation by ``discover``, if it can be reversed; forget it."""
        return self.field.take_first()

    def linearize(self, stage, t, y):
        """Return the slopes and remember the stage."""
        return self.field.linearize(stage, *self._inputs(t, y)).reshape(y.shape)

    def pullback(self, stage, cotangent, time, out):
        """Write the cotangent of the state to out; return that of time on request."""
        shape = self._shape
        grad_t = self.field.pullback(
            stage, cotangent.view(shape), time, out.view(shape)
        )
        return None if grad_t is None else grad_t.reshape(-1)

    def check_captured(self, values, inputs):
        """Raise if a field that has to be probed depends on unknown tensors."""
        self.field.check_captured(values, inputs)

    def add_gradients(self, grads):
        """Add to the gradients of the parameters of a field that has to be probed."""
        self.field.add_gradients(grads)

    def flush(self, states, cotangents):
        """Finish a reverse step."""
        n, shape = len(states), self._shape
        self.field.flush(states.view(n, *shape), cotangents.view(n, *shape))

    def pullback_state(self, stage, cotangent, out):
        """Write the cotangent of the state to out; keep the stage."""
        shape = self._shape
        self.field.pullback_state(stage, cotangent.view(shape), out.view(shape))

    def accumulate(self, stages, states, cotangents, weights):
        """Add weighted parameter gradients of stages."""
        n, shape = len(states), self._shape
        self.field.accumulate(
            stages,
            states.view(n, *shape),
            cotangents.view(n, *shape),
            weights.view(n, -1, *(1 for _ in shape[1:])),
        )


def has_hooks(module: torch.nn.Module) -> bool:
    """Return whether someone wants to be called with a module or a part of it."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return True
    # not by `modules`, which takes care of modules that occur twice
    for part in module._modules.values():
        if part is not None and has_hooks(part):
            return True
    return False


def bind(
    f,
    batch: int,
    state: torch.Size,
    shared: bool,
    closed_form: bool = True,
    row_wise: bool = False,
) -> BoundField:
    """Wrap f for a solve: by its closed form if it has one that applies."""
    if isinstance(f, AutogradField):
        return f  # in the solver's layout already
    field = f.closed_form(state) if hasattr(f, "closed_form") else None
    flat = not shared and len(state) == 1
    if field is None:
        field = AutogradField(f, row_wise)
        if flat and closed_form and hasattr(f, "density_network") and not has_hooks(f):
            field.network = f.density_network()
    elif not closed_form:
        # everything by differentiable operations
        field = AutogradField(f, row_wise, getattr(f, "jacobian", None))
    # the user's layout may be the solver's
    return field if flat else FieldView(field, batch, state, shared)
