"""A time-conditioned perceptron whose divergence is a closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from sknode.fields.activations import get_activation, value_and_slope
from sknode.ode.vector_field import DensityNetwork

__all__ = ["ConcatSquashField", "time_features"]

BLOCK = 16


class ConcatSquashField(nn.Module):
    r"""Vector field by a perceptron with gates and biases that depend on time.

    Every hidden layer is ``s(W h * gate(t) + bias(t))``, the last one
    ``W h + bias(t)``. Gates and biases are linear in Fourier features of time and, on
    request, in a condition: the "concat-squash" layers of FFJORD [1]_, with a closed
    form of the divergence in addition.

    Parameters
    ----------
    dim : int
        Size of the state.
    hidden_layer_sizes : sequence of int, default=(64, 64)
        Sizes of the hidden layers, at least one.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="tanh"
        Activation ``s`` of the hidden layers.
    n_frequencies : int, default=3
        Number of frequencies of time, ``cos(k pi t)`` and ``sin(k pi t)``.
    condition_dim : int, default=0
        Size of a condition, a vector a row on which gates and biases depend too.
    zero_init : bool, default=False
        Whether the slopes start as zero, so that the field can be added to another one
        without changing it.

    Notes
    -----
    With one and two hidden layers the divergence costs no product with the Jacobian:
    for ``f = W3 s(W2 s(W1 y * g1 + b1) * g2 + b2) + b3`` it is
    ``((s2' * g2) @ K * (s1' * g1)).sum(-1)`` with ``K = W2 * (W1 @ W3).T``, which
    depends neither on the state nor on time. Deeper fields propagate the derivatives by
    all components of the state, which costs as much as ``dim`` evaluations.

    References
    ----------
    .. [1] Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, "FFJORD: Free-form
       Continuous Dynamics for Scalable Reversible Generative Models", ICLR 2019.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import ConcatSquashField
    >>> field = ConcatSquashField(2, (16, 16))
    >>> slope, divergence = field.with_divergence(torch.tensor(0.5), torch.zeros(5, 2))
    >>> slope.shape, divergence.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int,
        hidden_layer_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        n_frequencies: int = 3,
        condition_dim: int = 0,
        zero_init: bool = False,
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
        for name, size in (
            ("n_frequencies", n_frequencies),
            ("condition_dim", condition_dim),
        ):
            if not isinstance(size, Integral) or size < 0:
                raise ValueError(f"{name} must be an integer >= 0. Got {size!r}.")
        get_activation(activation)
        self.dim, self.activation = dim, activation
        self.n_frequencies, self.condition_dim = n_frequencies, condition_dim
        self.widths = sizes
        self.layers = nn.ModuleList(
            nn.Linear(n, m, bias=False) for n, m in itertools.pairwise((dim, *sizes))
        )
        self.last = nn.Linear(sizes[-1], dim, bias=False)
        # a gate and a bias for every hidden unit, a bias for every slope
        n_inputs = 1 + 2 * n_frequencies + condition_dim
        n_outputs = 2 * sum(sizes) + dim
        # Products of matrices treat the last columns, short of a full block, in ways
        # that depend on the number of rows. Full blocks make a row's slope independent
        # of how many others there are, to the bit; the outputs beyond are not used.
        self.modulation = nn.Linear(n_inputs, -(-n_outputs // BLOCK) * BLOCK)
        self._initialise(zero_init)

    @torch.no_grad()
    def _initialise(self, zero_init: bool):
        """Start with hidden units of unit gain and gates that are open at all times."""
        for layer in (*self.layers, self.last):
            bound = math.sqrt(3.0 / layer.in_features)
            layer.weight.uniform_(-bound, bound)
        self.modulation.weight.mul_(0.1)
        bias = self.modulation.bias
        bias.uniform_(-1.0, 1.0)
        n_hidden = sum(self.widths)
        bias[:n_hidden] = 1.0
        if zero_init:
            self.last.weight.zero_()
            self.modulation.weight[2 * n_hidden :] = 0.0
            bias[2 * n_hidden :] = 0.0

    @torch.no_grad()
    def place_units(
        self, rows: Tensor, slope: float, generator: torch.Generator | None = None
    ) -> None:
        """Let the units of the first layer begin where there are data.

        Each becomes a step along one component of the state, in turn, through a row
        drawn at random. Networks whose units are flat over the data find edges and gaps
        of a density slowly, and those in random directions overfit sooner.

        Parameters
        ----------
        rows : Tensor of shape (n, dim)
            Data.
        slope : float
            Typical steepness of the steps, with sigmoid-like activations.
        generator : torch.Generator, optional
            Draws rows, directions and slopes, on the CPU.
        """
        n_units, n_hidden = self.widths[0], sum(self.widths)
        like = self.layers[0].weight
        component = torch.arange(n_units) % self.dim
        row = torch.randint(len(rows), (n_units,), generator=generator)
        sign = 2.0 * torch.randint(2, (n_units,), generator=generator) - 1.0
        steep = slope * (0.5 + torch.rand(n_units, generator=generator)) * sign
        centre = rows[row.to(rows.device), component.to(rows.device)].to(like)
        like.zero_()
        like[torch.arange(n_units), component] = steep.to(like)
        self.modulation.bias[n_hidden : n_hidden + n_units] = -steep.to(like) * centre

    def extra_repr(self) -> str:
        """Describe the field in its repr."""
        return f"activation={self.activation!r}, n_frequencies={self.n_frequencies}"

    def _modulate(self, t: Tensor, y: Tensor, condition: Tensor | None):
        """Return gates and biases of the hidden layers and the bias of the last."""
        features = time_features(torch.as_tensor(t).to(y), self.n_frequencies)
        if (condition is not None) != bool(self.condition_dim):
            raise ValueError(
                f"condition must have shape (n, {self.condition_dim})."
                if self.condition_dim
                else "condition must be None for a field with condition_dim=0."
            )
        if condition is not None:
            features = features.expand(len(y), -1)
            features = torch.cat([features, condition], -1)
        modulation = self.modulation(features)
        # one split, whose gradient is one concatenation
        sizes = *self.widths, *self.widths, self.dim
        unused = modulation.shape[-1] - sum(sizes)
        *parts, last, _ = modulation.split((*sizes, unused), -1)
        n = len(self.widths)
        return parts[:n], parts[n:], last

    def forward(self, t: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Evaluate the field.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1).
        y : Tensor of shape (n, dim)
            States.
        condition : Tensor of shape (n, condition_dim), optional
            What the field depends on beside time and state.

        Returns
        -------
        Tensor of shape (n, dim)
            Slopes.
        """
        gates, biases, last = self._modulate(t, y, condition)
        function = get_activation(self.activation).function
        for layer, gate, bias in zip(self.layers, gates, biases, strict=True):
            y = function(torch.addcmul(bias, layer(y), gate))
        return self.last(y) + last

    def with_divergence(
        self, t: Tensor, y: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the field and its divergence.

        Parameters
        ----------
        t, y, condition : Tensor
            As in ``forward``.

        Returns
        -------
        slope : Tensor of shape (n, dim)
            Slopes.
        divergence : Tensor of shape (n,)
            Traces of their Jacobians, exact.
        """
        gates, biases, last = self._modulate(t, y, condition)
        slopes = []
        for layer, gate, bias in zip(self.layers, gates, biases, strict=True):
            z = torch.addcmul(bias, layer(y), gate)
            y, slope = value_and_slope(self.activation, z)
            slopes.append(slope * gate)
        return self.last(y) + last, self._trace(slopes)

    def make_density_network(
        self, mixture: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ) -> DensityNetwork | None:
        """Return what a kernel has to know of the field and its divergence.

        Parameters
        ----------
        mixture : tuple of Tensor, optional
            Log-weights, centres, variances and axes of a `MixtureField` that the field
            is added to.

        Returns
        -------
        DensityNetwork or None
            None if there is no kernel for the field: it is deeper, has a condition, or
            is of another class.
        """
        n_hidden = len(self.widths)
        if type(self) is not ConcatSquashField or self.condition_dim or n_hidden > 2:
            return None
        weights = [layer.weight for layer in (*self.layers, self.last)]
        weights.append(self._kernel())
        n_outputs = 2 * sum(self.widths) + self.dim
        modulation = (
            self.modulation.weight[:n_outputs],
            self.modulation.bias[:n_outputs],
        )
        layers = [*((weight, None) for weight in weights), modulation]
        return DensityNetwork(layers, self.activation, self.n_frequencies, mixture)

    def _kernel(self) -> Tensor:
        """Return the matrix of the divergence of one or two hidden layers."""
        first, last = self.layers[0].weight, self.last.weight
        if len(self.widths) == 1:
            return (first * last.T).sum(1)[None]
        return self.layers[1].weight * (first @ last).T

    def _trace(self, slopes: list[Tensor]) -> Tensor:
        """Return the divergence from the derivatives of the hidden layers."""
        if len(slopes) == 1:
            return slopes[0] @ self._kernel()[0]
        if len(slopes) == 2:
            return ((slopes[1] @ self._kernel()) * slopes[0]).sum(-1)
        first, last = self.layers[0].weight, self.last.weight
        tangents = first.T * slopes[0][:, None, :]  # (n, dim, width)
        for layer, slope in zip(self.layers[1:], slopes[1:], strict=True):
            tangents = layer(tangents) * slope[:, None, :]
        return (tangents * last).sum((-2, -1))


def time_features(t: Tensor, n_frequencies: int) -> Tensor:
    """Return time and its Fourier features, of shape (1 or n, 1 + 2 n_frequencies)."""
    t = t.reshape(-1, 1)
    if not n_frequencies:
        return t
    k = torch.arange(1, n_frequencies + 1, dtype=t.dtype, device=t.device)
    angles = math.pi * t * k
    return torch.cat([t, angles.cos(), angles.sin()], 1)
