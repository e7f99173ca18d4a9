"""A multilayer perceptron as vector field, with closed-form derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sknode.fields.activations import Activation, get_activation

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
            nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True)
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
        for one, two in zip(linears[:-1], linears[1:], strict=True):
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

    def closed_form(self, state: torch.Size) -> MLPClosedForm | None:
        """Return the field for a solve, or None where only autograd is right."""
        changed = type(self).forward is not MLPField.forward
        hooked = any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
            for m in self.modules()
        )
        plain = all(type(layer).forward is nn.Linear.forward for layer in self.layers)
        if changed or hooked or not plain or tuple(state) != (self.dim,):
            return None
        return MLPClosedForm(self)


class MLPClosedForm:
    """An `MLPField` with its weights laid out for one solve; see `BoundField`.

    The constants of the activation are folded into the weights. Layer ``l`` maps the
    kernel values ``s`` of the layer before to ``z = s @ weights[l].T + biases[l]``.
    """

    row_wise = True

    def __init__(self, field: MLPField):
        self.activation: Activation = get_activation(field.activation)
        self.uses_time = field.time_dependent
        self.parameters = [
            p for layer in field.layers for p in (layer.weight, layer.bias)
        ]
        self.parameters = [p for p in self.parameters if p is not None]
        self._has_bias = [layer.bias is not None for layer in field.layers]
        with torch.no_grad():
            self._fold(field)
        self._scratch = [_Buffer() for _ in self.weights]
        self._n_stages = 0

    def _fold(self, field: MLPField) -> None:
        act, last = self.activation, len(field.layers) - 1
        self.weights, self.biases, self.time_weight = [], [], None
        for i, layer in enumerate(field.layers):
            weight, bias = layer.weight, layer.bias
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
        self.dtype = self.weights[0].dtype

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
        s, act = None, self.activation
        for i, bias in enumerate(self.biases[:-1]):
            out = self._scratch[i].get(len(y), len(bias), y)
            if i == 0:
                z = self._first(t, y, out)
            else:
                z = torch.addmm(bias, s, self.transposed[i], out=out)
            s = act.kernel(z, z)
        return torch.addmm(self.biases[-1], s, self.transposed[-1])

    def begin_reverse(self):
        """Start a reverse sweep."""
        self._gradients = [torch.zeros_like(w) for w in self.weights]
        self._bias_gradients = [torch.zeros_like(b) for b in self.biases]
        self._time_gradient = torch.zeros_like(self.biases[0])
        n = len(self.weights)
        # per layer and stage: its input, what the activation's derivative needs, and
        # the cotangent of its output before the activation
        self._inputs = [_Buffer() for _ in range(n)]
        self._arguments = [_Buffer() for _ in range(n - 1)]
        self._cotangents = [_Buffer() for _ in range(n)]
        self._times: list[Tensor] = []

    def linearize(self, stage, t, y):
        """Return the slopes; keep the activations of this stage."""
        self._check(y)
        rows, act = len(y), self.activation
        if stage == 0:
            self._times = []
        self._n_stages = stage + 1
        self._inputs[0].stage(stage, rows, y.shape[1], y).copy_(y)
        if t is not None:
            self._times.append(t.expand(rows, 1) if t.ndim else t.reshape(1, 1))
        s = y
        for i, bias in enumerate(self.biases[:-1]):
            out = self._inputs[i + 1].stage(stage, rows, len(bias), y)
            z = out
            if act.keeps_input:
                z = self._arguments[i].stage(stage, rows, len(bias), y)
            if i == 0:
                z = self._first(t, y, z)
            else:
                z = torch.addmm(bias, s, self.transposed[i], out=z)
            s = act.kernel(z, out)
        return torch.addmm(self.biases[-1], s, self.transposed[-1])

    def pullback(self, stage, cotangent, time):
        """Return the cotangents of y and, on request, of t."""
        rows, act, last = len(cotangent), self.activation, len(self.weights) - 1
        delta = self._cotangents[last].stage(stage, rows, cotangent.shape[1], cotangent)
        delta.copy_(cotangent)
        for i in range(last, 0, -1):
            width = self.weights[i].shape[1]
            out = self._cotangents[i - 1].stage(stage, rows, width, cotangent)
            grad = torch.mm(delta, self.weights[i], out=out)
            kept = self._arguments[i - 1] if act.keeps_input else self._inputs[i]
            delta = act.reverse(grad, kept.stage(stage, rows, width, cotangent))
        grad_t = None
        if time and self.uses_time:
            grad_t = torch.mv(delta, self.time_weight)
            grad_t = grad_t if self._times[stage].numel() == rows else grad_t.sum()
        return torch.mm(delta, self.weights[0]), grad_t

    def flush(self):
        """Add up the parameter gradients of all stages, one product a layer."""
        n = self._n_stages
        for i, total in enumerate(self._gradients):
            delta, s = self._cotangents[i].stages(n), self._inputs[i].stages(n)
            total.addmm_(delta.t(), s)
            self._bias_gradients[i] += delta.sum(0)
        if self.uses_time:
            delta = self._cotangents[0].stages(n).view(n, -1, len(self.biases[0]))
            for one, t in zip(delta, self._times, strict=True):
                self._time_gradient += (one * t).sum(0)

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
            if self._has_bias[i]:
                result.append(bias)
        return result


class _Buffer:
    """Memory that grows to what is asked of it and is used again."""

    N_STAGES = 16  # the longest step, dopri8 with its dense output

    def __init__(self):
        self._flat: Tensor | None = None
        self._shape = (0, 0)

    def get(self, rows: int, width: int, like: Tensor, stages: int = 1) -> Tensor:
        """Return memory of shape (stages * rows, width)."""
        size = stages * rows * width
        if self._flat is None or self._flat.numel() < size:
            self._flat = torch.empty(size, dtype=like.dtype, device=like.device)
        self._shape = (rows, width)
        return self._flat[:size].view(stages * rows, width)

    def stage(self, stage: int, rows: int, width: int, like: Tensor) -> Tensor:
        """Return the memory of one stage, of shape (rows, width)."""
        if self._flat is None or self._flat.numel() < self.N_STAGES * rows * width:
            self.get(rows, width, like, self.N_STAGES)
        self._shape = (rows, width)
        start = stage * rows * width
        return self._flat[start : start + rows * width].view(rows, width)

    def stages(self, n: int) -> Tensor:
        """Return the first n stages as one (n * rows, width) matrix."""
        rows, width = self._shape
        return self._flat[: n * rows * width].view(n * rows, width)
