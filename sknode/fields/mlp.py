"""A multilayer perceptron as vector field, with closed-form derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sknode.fields.activations import Activation, get_activation
from sknode.ode.vector_field import Perceptron, has_hooks

__all__ = ["MLPField"]


class MLPField(nn.Module):
    """Vector field ``f(t, y)`` given by a multilayer perceptron.

    Parameters
    ----------
    dim : int
        Size of the state.
    hidden_layer_sizes : sequence of int
        Sizes of the hidden layers, at least one.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="tanh"
        Activation of the hidden layers. Smooth ones suit adaptive solvers.
    time_dependent : bool, default=False
        Whether time is a further input.

    Attributes
    ----------
    layers : torch.nn.ModuleList of torch.nn.Linear
        The layers. With time as input, the first has a last column for it.

    See Also
    --------
    sknode.ode.solve_ode : Solves it without building an autograd graph.

    Notes
    -----
    The solver does not call ``forward`` but a closed form of it and of its
    vector-Jacobian product: two matrix products a layer, into buffers that are used
    again. A subclass with another ``forward``, or a module with hooks, is solved by
    autograd instead, with the same results.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import MLPField
    >>> field = MLPField(2, (16, 16))
    >>> field(torch.tensor(0.0), torch.zeros(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        hidden_layer_sizes: Sequence[int],
        activation: str = "tanh",
        time_dependent: bool = False,
    ):
        super().__init__()
        sizes = tuple(hidden_layer_sizes)
        for size in (dim, *sizes):
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    "dim and hidden_layer_sizes must be positive integers. "
                    f"Got {dim!r} and {sizes!r} instead."
                )
        if not sizes:
            raise ValueError("hidden_layer_sizes must have at least one layer.")
        get_activation(activation)
        self.dim = dim
        self.activation = activation
        self.time_dependent = bool(time_dependent)
        widths = (dim + self.time_dependent, *sizes, dim)
        self.layers = nn.ModuleList(
            nn.Linear(n, m) for n, m in itertools.pairwise(widths)
        )

    @classmethod
    def from_linears(
        cls, linears: Sequence[nn.Linear], activation: str = "tanh"
    ) -> MLPField:
        """Make a field from existing layers, which it shares.

        Parameters
        ----------
        linears : sequence of torch.nn.Linear
            At least two layers that lead from the state back to the state. If the first
            has one input more than the last has outputs, the last input is time.
        activation : str, default="tanh"
            Activation between them.

        Returns
        -------
        MLPField
        """
        linears = list(linears)
        if len(linears) < 2 or not all(isinstance(x, nn.Linear) for x in linears):
            raise ValueError("linears must be at least two torch.nn.Linear layers.")
        for one, two in itertools.pairwise(linears):
            if one.out_features != two.in_features:
                raise ValueError(
                    f"linears do not fit together: {one.out_features} outputs meet "
                    f"{two.in_features} inputs."
                )
        dim = linears[-1].out_features
        extra = linears[0].in_features - dim
        if extra not in (0, 1):
            raise ValueError(
                "the first of linears must take the state that the last one returns "
                f"({dim} values), with or without time. "
                f"It takes {linears[0].in_features}."
            )
        field = cls.__new__(cls)
        nn.Module.__init__(field)
        get_activation(activation)
        field.dim, field.activation = dim, activation
        field.time_dependent = bool(extra)
        field.layers = nn.ModuleList(linears)
        return field

    def extra_repr(self) -> str:
        """Describe the field in its repr."""
        return (
            f"dim={self.dim}, activation={self.activation!r}, "
            f"time_dependent={self.time_dependent}"
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the field.

        Parameters
        ----------
        t : Tensor
            Times, to broadcast against ``y``: a scalar or of shape (..., 1).
        y : Tensor of shape (..., dim)
            States.

        Returns
        -------
        Tensor of shape (..., dim)
            Slopes.
        """
        function = get_activation(self.activation).function
        first, *inner = self.layers
        if self.time_dependent:
            weight = first.weight
            z = F.linear(y, weight[:, :-1], first.bias) + t * weight[:, -1]
        else:
            z = first(y)
        for layer in inner:
            z = layer(function(z))
        return z

    def jacobian(self, t: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the derivatives of the field by state and by time.

        Parameters
        ----------
        t : Tensor of shape (n_rows, 1) or ()
            Times; not looked at unless the field depends on time.
        y : Tensor of shape (n_rows, dim)
            States.

        Returns
        -------
        by_state : Tensor of shape (n_rows, dim, dim)
            ``by_state[:, i, j]`` is the derivative of slope ``i`` by state ``j``.
        by_time : Tensor of shape (n_rows, dim) or None
            Derivative by time, None if the field does not depend on it.

        Notes
        -----
        The product of the weights and of the activations' derivatives, layer by layer.
        Differentiable.
        """
        function = get_activation(self.activation).function
        first, *inner = self.layers
        z = F.linear(y, first.weight[:, : self.dim], first.bias)
        if self.time_dependent:
            z = z + t * first.weight[:, -1]
        # the derivatives by every input, one after the other: (n_rows, inputs, width)
        tangents = first.weight.T
        for layer in inner:
            value, slope = _value_and_slope(function, z)
            tangents = F.linear(tangents * slope[:, None, :], layer.weight)
            if layer is not inner[-1]:
                z = F.linear(value, layer.weight, layer.bias)
        by_time = tangents[:, -1] if self.time_dependent else None
        return tangents[:, : self.dim].transpose(1, 2), by_time

    def closed_form(self, state: torch.Size) -> MLPClosedForm | None:
        """Return the field for a solve.

        Parameters
        ----------
        state : torch.Size
            Shape of a state.

        Returns
        -------
        MLPClosedForm or None
            The field; None where only autograd is right.
        """
        changed = type(self).forward is not MLPField.forward
        if changed or has_hooks(self) or tuple(state) != (self.dim,):
            return None
        layers = []
        for layer in self.layers._modules.values():
            if type(layer).forward is not nn.Linear.forward:
                return None
            layers.append(_weights(layer))
        return MLPClosedForm(self, layers)


def _weights(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer."""
    own = layer._parameters
    try:
        return own["weight"], own["bias"]  # several times as fast as attributes
    except KeyError:
        return layer.weight, layer.bias  # computed: see torch.nn.utils.parametrize


def _value_and_slope(function, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return an elementwise function and its derivative, differentiable like z."""
    with torch.enable_grad():
        x = z if z.requires_grad else z.detach().requires_grad_()
        value = function(x)
        (slope,) = torch.autograd.grad(
            value, x, torch.ones_like(x), create_graph=z.requires_grad
        )
    return (value if z.requires_grad else value.detach()), slope


class MLPClosedForm:
    """An `MLPField` with its weights laid out for one solve; see `BoundField`.

    The constants of the activation are folded into the weights. Layer ``l`` maps the
    kernel values ``s`` of the layer before to ``z = s @ weights[l].T + biases[l]``.
    """

    row_wise = reusable = True
    probed = False

    def __init__(self, field: MLPField, layers: list[tuple[Tensor, Tensor | None]]):
        self.field = field
        self.activation: Activation = get_activation(field.activation)
        self.uses_time = field.time_dependent
        self.network = Perceptron(layers, field.activation, self.uses_time)
        self.parameters = self.network.parameters
        self.dtype = self.network.dtype
        self._scratch: dict[int, list[Tensor]] = {}
        self._kept: dict[int, _Stages] = {}

    @torch.no_grad()
    def prepare(self):
        """Fold the constants of the activation into the weights."""
        layers = self.network.layers
        act, last = self.activation, len(layers) - 1
        self.weights, self.biases, self.time_weight = [], [], None
        for i, (weight, bias) in enumerate(layers):
            if i == 0 and self.uses_time:
                self.time_weight = weight[:, -1] * act.slope
                weight = weight[:, :-1]
            if bias is None:
                bias = weight.new_zeros(len(weight))
            if i > 0 and act.shift:
                bias = bias + act.shift * weight.sum(1)
            factor = (act.scale if i > 0 else 1.0) * (act.slope if i < last else 1.0)
            weight = weight * factor if factor != 1.0 else weight.detach()
            if i < last and act.slope != 1.0:
                bias = bias * act.slope
            self.weights.append(weight)
            self.biases.append(bias)
        self.transposed = [w.t() for w in self.weights]

    def _check(self, y: Tensor) -> None:
        if y.dtype != self.dtype:
            raise TypeError(
                f"y0 is {y.dtype}, but the parameters of the field are {self.dtype}. "
                "Convert one to the other."
            )

    def _first(self, t, y: Tensor, out: Tensor) -> Tensor:
        z = torch.addmm(self.biases[0], y, self.transposed[0], out=out)
        return z if t is None else z.addcmul_(t, self.time_weight)

    def evaluate(self, t, y):
        """Return the slopes."""
        self._check(y)
        memory = self._scratch.get(y.shape[0])
        if memory is None:
            memory = self._scratch[y.shape[0]] = [
                (bias, weight, y.new_empty(y.shape[0], bias.shape[0]))
                for bias, weight in zip(self.biases, self.transposed, strict=True)
            ][:-1]
        s, kernel = y, self.activation.kernel
        for bias, weight, z in memory:
            torch.addmm(bias, s, weight, out=z)
            if s is y and t is not None:
                z.addcmul_(t, self.time_weight)
            s = kernel(z, z)
        return torch.addmm(self.biases[-1], s, self.transposed[-1])

    def jacobian(self, t, y):
        """Return the derivatives by state and time."""
        return self.field.jacobian(t, y)

    def begin_reverse(self):
        """Start a reverse sweep."""
        self._gradients = [torch.zeros_like(w) for w in self.weights]
        self._bias_gradients = [torch.zeros_like(b) for b in self.biases]
        self._time_gradient = torch.zeros_like(self.biases[0])
        self._times: dict[int, Tensor] = {}

    def _memory(self, stage: int, y: Tensor) -> _Stages:
        """Return the memory for what stages keep, enough for this one."""
        memory = self._kept.get(y.shape[0])
        if memory is None or len(memory.values) <= stage:
            # a plain step has 6 or 7 stages in all methods but one
            n = 7 if stage < 7 else 16
            widths = [len(bias) for bias in self.biases[:-1]]
            memory = _Stages(n, y, widths, self.activation.keeps_input, memory)
            self._kept[y.shape[0]] = memory
        return memory

    def linearize(self, stage, t, y):
        """Return the slopes; keep the activations of this stage."""
        self._check(y)
        memory = self._memory(stage, y)
        if t is not None:
            self._times[stage] = t
        s, kernel = y, self.activation.kernel
        values, arguments = memory.values[stage], memory.arguments[stage]
        for i, (z, value) in enumerate(zip(arguments, values, strict=True)):
            if i == 0:
                self._first(t, y, z)
            else:
                torch.addmm(self.biases[i], s, self.transposed[i], out=z)
            s = kernel(z, value)
        return torch.addmm(self.biases[-1], s, self.transposed[-1])

    def pullback(self, stage, cotangent, time, out):
        """Write the cotangent of y; return that of t on request."""
        memory, reverse = self._kept[cotangent.shape[0]], self.activation.reverse
        kept = memory.arguments if self.activation.keeps_input else memory.values
        delta = cotangent
        for i in range(len(self.weights) - 1, 0, -1):
            target = memory.cotangents[stage][i - 1]
            torch.mm(delta, self.weights[i], out=target)
            delta = reverse(target, kept[stage][i - 1])
        torch.mm(delta, self.weights[0], out=out)
        if not (time and self.uses_time):
            return None
        grad_t = torch.mv(delta, self.time_weight)
        return grad_t if self._times[stage].ndim else grad_t.sum()

    def pullback_state(self, stage, cotangent, out):
        """Write the cotangent of y; what is needed further is kept anyway."""
        self.pullback(stage, cotangent, False, out)

    def flush(self, states, cotangents):
        """Add up the parameter gradients of all stages."""
        n, rows = states.shape[:2]
        self._add(states, [*self._deltas(n, rows), cotangents])

    def accumulate(self, stages, states, cotangents, weights):
        """Add up weighted parameter gradients: they are linear in the cotangents."""
        n, rows = states.shape[:2]
        deltas = (*self._deltas(n, rows), cotangents)
        self._add(states, [delta * weights for delta in deltas])

    def _deltas(self, n: int, rows: int) -> list[Tensor]:
        return [v[:n] for v in self._kept[rows].all_cotangents]

    def _add(self, states: Tensor, deltas: list[Tensor]) -> None:
        """Add the gradients of the first stages, one product a layer."""
        n, rows = states.shape[:2]
        inputs = [states, *(v[:n] for v in self._kept[rows].all_values)]
        for i, (delta, s) in enumerate(zip(deltas, inputs, strict=True)):
            delta = delta.flatten(0, 1)
            self._gradients[i].addmm_(delta.t(), s.flatten(0, 1))
            self._bias_gradients[i] += delta.sum(0)
        if self.uses_time:
            for stage in range(n):
                self._time_gradient += (deltas[0][stage] * self._times[stage]).sum(0)

    def parameter_gradients(self):
        """Return the gradients, unfolded to those of the layers."""
        act, last, result = self.activation, len(self.weights) - 1, []
        for i, grad in enumerate(self._gradients):
            outer = act.slope if i < last else 1.0
            bias = self._bias_gradients[i] * outer
            grad = grad * (outer * (act.scale if i > 0 else 1.0))
            if i > 0 and act.shift:
                grad = grad.add_(bias[:, None], alpha=act.shift)
            if i == 0 and self.uses_time:
                grad = torch.cat([grad, (self._time_gradient * outer)[:, None]], 1)
            result.append(grad)
            if self.network.layers[i][1] is not None:
                result.append(bias)
        return result


class _Stages:
    """What the stages of a step keep for their reverse, for one number of rows.

    ``values[stage][layer]`` are the kernel values of a hidden layer, ``arguments``
    those before the kernel (the same memory unless the derivative needs them),
    ``cotangents`` the cotangents before the kernel.
    """

    def __init__(self, n: int, like: Tensor, widths, keeps_input: bool, smaller=None):
        def make():
            return [like.new_empty(n, len(like), width) for width in widths]

        def by_stage(memory):
            return list(zip(*(m.unbind(0) for m in memory), strict=True))

        self.all_values, self.all_cotangents = make(), make()
        self.all_arguments = make() if keeps_input else self.all_values
        if smaller is not None:
            old = len(smaller.values)
            names = ("all_values", "all_cotangents", "all_arguments")
            for name in names:
                pairs = zip(getattr(self, name), getattr(smaller, name), strict=True)
                for new, past in pairs:
                    new[:old] = past
        self.values = by_stage(self.all_values)
        self.cotangents = by_stage(self.all_cotangents)
        self.arguments = by_stage(self.all_arguments)
