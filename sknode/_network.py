"""The torch modules behind the ODE-Net estimators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sknode.fields import ConvField, EnergyField, MLPField
from sknode.fields.activations import get_activation
from sknode.fields.conv import group_norm
from sknode.ode import Solution, SolverError
from sknode.ode.solve import solve

__all__ = ["ImageNetwork", "Network", "SolverSettings", "TabularNetwork"]

# What makes a row depend on its neighbours, or a slope on chance.
UNSUITABLE = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
)


# Where the flow starts and ends; nobody writes to it.
INTERVAL = torch.tensor([0.0, 1.0], dtype=torch.float64)

# Below so many inputs the units of a vector field start steeper.
FEW_INPUTS = 8


@dataclass(frozen=True)
class SolverSettings:
    """The solver parameters of an estimator at the time of a call."""

    method: str
    rtol: float
    atol: float
    max_steps: int
    gradient: str
    step_size: float | None
    row_wise: bool = True  # not where the field holds a tensor with an entry per row

    def tighten(self, factor: float, dtype: torch.dtype) -> SolverSettings:
        """Return those of a solve with tolerances divided by a factor, as far as the
        precision goes.
        """
        least = min(self.rtol, 4 * torch.finfo(dtype).eps)
        rtol = max(self.rtol / factor, least)
        return replace(self, rtol=rtol, atol=self.atol / factor)

    def refine(self) -> SolverSettings:
        """Return those of a solve with about a hundredth of the error, or half the
        steps where they are constant.
        """
        least = 4 * torch.finfo(torch.float64).eps
        return replace(
            self,
            rtol=max(self.rtol / 100, least),
            atol=self.atol / 100,
            max_steps=10 * self.max_steps,
            step_size=self.step_size and self.step_size / 2,
        )

    def solve(self, field, y0: Tensor, t: Tensor) -> Solution:
        """Solve without warning about failed samples: the caller looks at them."""
        return solve(
            field,
            y0,
            t,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            gradient=self.gradient,
            step_size=self.step_size,
            row_wise=self.row_wise,
        )


class Network(nn.Module):
    """Standardise, map into the state space, flow from t = 0 to 1, map out.

    A subclass builds ``input_map``, from standardised features to states, and
    ``output_map``, and calls `set_field`.
    """

    field: nn.Module
    state_shape: tuple[int, ...]

    def set_field(self, default: Callable[[], nn.Module], vector_field) -> None:
        """Make the vector field: a default, or by the caller's factory."""
        if vector_field is None:
            self.field = default()
        else:
            self.field = make_field(vector_field, self.state_shape)

    def initial_state(self, x: Tensor, standardised: bool = False) -> Tensor:
        """Return the states at t = 0 of (n, n_features) rows: in the units of X, or
        standardised already, more precisely than the weights allow.
        """
        raise NotImplementedError

    def flow(
        self,
        x: Tensor,
        solver: SolverSettings,
        t: Tensor | None = None,
        standardised: bool = False,
    ) -> Solution:
        """Solve for (n, n_features) rows; return the `Solution`."""
        start = self.initial_state(x, standardised)
        return solver.solve(self.field, start, INTERVAL if t is None else t)

    def forward(
        self, x: Tensor, solver: SolverSettings, standardised: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return outputs (n, n_outputs) and function evaluations (n,).

        Raises
        ------
        SolverError
            If a sample did not get to t = 1.
        """
        solution = _check(self.flow(x, solver, standardised=standardised))
        return self.output_map(solution.y[:, -1]), solution.stats["n_f_evals"]

    def forward_with_energy(
        self,
        x: Tensor,
        solver: SolverSettings,
        probe: Tensor | None,
        standardised: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return also what the flow spent, kinetic energy and Jacobian, (n,) each.

        See `sknode.fields.EnergyField`.
        """
        field = EnergyField(self.field, self.state_shape, probe)
        start = field.start(self.initial_state(x, standardised))
        solution = _check(solver.solve(field, start, INTERVAL))
        y, kinetic, jacobian = field.split(solution.y[:, -1])
        return self.output_map(y), solution.stats["n_f_evals"], kinetic, jacobian


class TabularNetwork(Network):
    """The network for rows of features.

    Parameters
    ----------
    n_features, n_outputs : int
        Sizes of input and output.
    hidden_layer_sizes : tuple of int
        Hidden layers of the vector field.
    activation : str
        Activation of the vector field.
    augment_dim : int
        State dimensions beyond the features, zero at t = 0.
    vector_field : callable, optional
        Makes another vector field from the shape of the state.
    """

    def __init__(
        self,
        n_features,
        n_outputs,
        hidden_layer_sizes,
        activation,
        augment_dim,
        vector_field=None,
    ):
        super().__init__()
        self.augment_dim = augment_dim
        state = n_features + augment_dim
        self.state_shape = (state,)
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.input_map = nn.Linear(n_features, n_features)
        self.set_field(
            lambda: _start(MLPField(state, hidden_layer_sizes, activation, True)),
            vector_field,
        )
        self.output_map = nn.Linear(state, n_outputs)
        with torch.no_grad():
            # start from the features themselves
            self.input_map.weight.copy_(torch.eye(n_features))
            self.input_map.bias.zero_()
            # and at the mean of the targets, or equal probabilities: chance then has
            # no part in what is never learned
            self.output_map.weight.zero_()
            self.output_map.bias.zero_()

    def initial_state(self, x: Tensor, standardised: bool = False) -> Tensor:
        """Return the states at t = 0 of (n, n_features) rows."""
        state = self.input_map(x if standardised else (x - self.mean) / self.scale)
        if self.augment_dim == 0:
            return state  # to pad by nothing would be a copy
        return nn.functional.pad(state, (0, self.augment_dim))


class ImageNetwork(Network):
    """The network for images, after that for MNIST of Chen et al. (2018).

    Convolutions that halve the image until it is small, an ODE of convolutions, the
    mean over the image and a linear map.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width.
    n_outputs : int
        Size of the output.
    n_channels : int
        Channels of the convolutions and of the state.
    n_downsamplings : int
        How often the image is halved before the ODE.
    hidden_layer_sizes : tuple of int
        Hidden channels of the vector field.
    activation : str
        Activation everywhere.
    augment_dim : int
        Channels of the state beyond ``n_channels``, zero at t = 0.
    vector_field : callable, optional
        Makes another vector field from the shape of the state.
    """

    def __init__(
        self,
        image_shape,
        n_outputs,
        n_channels,
        n_downsamplings,
        hidden_layer_sizes,
        activation,
        augment_dim,
        vector_field=None,
    ):
        super().__init__()
        self.image_shape, self.augment_dim = tuple(image_shape), augment_dim
        n_colours, *size = self.image_shape
        self.register_buffer("mean", torch.zeros(n_colours, 1, 1))
        self.register_buffer("scale", torch.ones(n_colours, 1, 1))
        # the first convolution sees every pixel: halving in it costs accuracy
        layers = [nn.Conv2d(n_colours, n_channels, 3, padding=1)]
        for _ in range(n_downsamplings):
            layers += [
                group_norm(n_channels),
                Activation(activation),
                nn.Conv2d(n_channels, n_channels, 3, stride=2, padding=1),
            ]
            size = [-(-n // 2) for n in size]
        self.input_map = nn.Sequential(*layers)
        channels = n_channels + augment_dim
        self.state_shape = (channels, *size)
        self.set_field(
            lambda: ConvField(channels, hidden_layer_sizes, activation), vector_field
        )
        self.output_map = nn.Sequential(
            group_norm(channels),
            Activation(activation),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, n_outputs),
        )

    def initial_state(self, x: Tensor, standardised: bool = False) -> Tensor:
        """Return the states at t = 0 of (n, n_features) rows."""
        images = x.unflatten(1, self.image_shape)
        if not standardised:
            images = (images - self.mean) / self.scale
        state = self.input_map(images)
        return nn.functional.pad(state, (0, 0, 0, 0, 0, self.augment_dim))


class Activation(nn.Module):
    """An activation by its name."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return get_activation(self.name).function(x)

    def extra_repr(self) -> str:
        """Name it."""
        return self.name


def make_field(vector_field: Callable, state_shape: tuple[int, ...]) -> nn.Module:
    """Call a factory and try out what it made.

    Raises
    ------
    TypeError, ValueError
        If that is no vector field for states of this shape, with rows of their own.
    """
    if isinstance(vector_field, nn.Module):
        raise TypeError(
            "vector_field must be a factory, called with the shape of a state to make "
            f"a torch.nn.Module. Got a module ({type(vector_field).__name__}) instead: "
            "pass its class, or a function that makes it."
        )
    try:
        field = vector_field(state_shape)
    except TypeError as error:
        raise TypeError(
            "vector_field is called with the shape of a state as its only argument, "
            f"{state_shape}. That failed: {error}"
        ) from error
    if not isinstance(field, nn.Module):
        raise TypeError(
            "vector_field must return a torch.nn.Module. "
            f"Got {type(field).__name__} instead."
        )
    for module in field.modules():
        averages = getattr(module, "track_running_stats", False)
        if averages or isinstance(module, UNSUITABLE):
            raise ValueError(
                f"vector_field made a module with {type(module).__name__}, which makes "
                "a prediction depend on other rows or on chance. Use GroupNorm or "
                "LayerNorm, and alpha for regularisation."
            )
    field = field.float()
    t = torch.zeros(16, *(1 for _ in state_shape))
    y = torch.linspace(-1, 1, 16 * math.prod(state_shape)).view(16, *state_shape)
    try:
        with torch.no_grad():
            slope, alone = field(t, y), field(t[:8], y[:8])
    except Exception as error:
        raise ValueError(
            "The module that vector_field made fails for times of shape "
            f"{tuple(t.shape)} and states of shape {tuple(y.shape)}: {error}"
        ) from error
    if not isinstance(slope, Tensor) or slope.shape != y.shape:
        got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
        raise ValueError(
            "The module that vector_field made must return slopes in the shape of the "
            f"states, {tuple(y.shape)}. Got {got} instead."
        )
    if not torch.allclose(slope[:8], alone, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            "The module that vector_field made gives a row a slope that depends on "
            "other rows or on chance."
        )
    return field


def _start(field: MLPField) -> MLPField:
    """Let the hidden units of a field start with unit variance, or more for few inputs.

    Uniform with variance 1 / fan_in, three times torch's own, as LeCun et al.,
    "Efficient BackProp" (1998): else the hidden units start out all but linear. With
    less than `FEW_INPUTS` even these are too smooth for the curved boundaries of few
    features, and training may stop at a straight one.
    """
    first = field.layers[0]
    gain = math.sqrt(3.0) * max(1.0, FEW_INPUTS / first.in_features)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(gain)
    return field


def _check(solution: Solution) -> Solution:
    if not solution.success:
        raise SolverError(solution.failure_report())
    return solution
