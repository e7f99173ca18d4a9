"""The torch module behind `CNFDensity`: a mixture's own flow, and what it lacks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sknode._network import make_field
from sknode.fields import (
    ClassMixtureField,
    ConcatSquashField,
    DivergenceField,
    EnergyField,
    GivenField,
    JointMixtureField,
    LogDensityField,
    MixtureField,
    PlanarField,
)
from sknode.ode.march import march
from sknode.ode.vector_field import DensityNetwork

__all__ = [
    "DYNAMICS",
    "DensityFlow",
    "FlowWithEnergy",
    "finish_loss",
    "flow_matching_loss",
    "make_finish_grid",
    "make_grid",
]

DYNAMICS = ("mlp", "planar")
# Strength of the penalty on what steps get wrong, in the likelihood of the finish.
# Steep units exploit the error of steps soon if it is much less.
STEP_PENALTY = 5.0


class DensityFlow(nn.Module):
    r"""Flow from N(0, I) at t = 0 by way of t = 1 to whitened data at t = 2.

    Until t = 1 the velocity is ``v + r``: that of a Gaussian mixture, whose path has a
    density ``q_t`` in closed form, and a learned residual. Along the flow

    ``d/dt (log p_t - log q_t) = -(div r + r . grad log q_t)``,

    and both densities are N(0, I) at t = 0, so that only this difference has to be
    integrated: without residual the density at t = 1 is exact, with a small one nearly.
    From then on another learned field, the finish, goes on. As the density that it
    starts from is a closed form, or nearly, it can be trained by the likelihood at
    little cost.

    Parameters
    ----------
    dim : int
        Size of the state.
    n_components : int
        Components of the mixture.
    residual, finish : bool
        Whether there are these two. Without finish the data are at t = 1.
    dynamics : {"mlp", "planar"}
        Kind of the learned fields.
    hidden_layer_sizes : tuple of int
        Their layers; the sum of them is the number of planar units.
    activation : str
        Their activation.
    condition : {None, "classes", "values"}
        What densities depend on, if anything: `given` has then to be called first.
    condition_dim : int
        Number of classes or of values.
    vector_field : callable, optional
        Makes other learned fields, from the shape of a state.
    """

    def __init__(
        self,
        dim,
        n_components,
        residual,
        finish,
        dynamics,
        hidden_layer_sizes,
        activation,
        condition=None,
        condition_dim=0,
        vector_field=None,
    ):
        super().__init__()
        self.dim, self.condition, self.condition_dim = dim, condition, condition_dim
        size = dim + condition_dim * (condition == "values")
        classes = (condition_dim,) * (condition == "classes")
        self.mixture = self._make_mixture(
            torch.ones(n_components, *classes),
            torch.zeros(n_components, size),
            torch.eye(size).expand(n_components, -1, -1),
        )
        settings = {"zero_init": True, "condition_dim": condition_dim}

        def field():
            if vector_field is not None:
                return DivergenceField(StartingAtZero(make_field(vector_field, (dim,))))
            if dynamics == "planar":
                return PlanarField(dim, sum(hidden_layer_sizes), **settings)
            return ConcatSquashField(dim, hidden_layer_sizes, activation, **settings)

        self.residual = field() if residual else None
        self.finish = LogDensityField(field()) if finish else None

    def _make_mixture(self, weights, means, covariances):
        if self.condition == "classes":
            return ClassMixtureField(weights, means, covariances)
        if self.condition == "values":
            return JointMixtureField(self.dim, weights, means, covariances)
        return MixtureField(weights, means, covariances)

    def set_mixture(self, model) -> None:
        """Take over a fitted mixture."""
        arrays = (model.weights, model.means, model.covariances)
        like = self.mixture.axes
        field = self._make_mixture(*(torch.from_numpy(x) for x in arrays))
        self.mixture = field.to(like.device, like.dtype)

    def given(self, condition: Tensor) -> DensityFlow:
        """Return the flow of rows with conditions (n, condition_dim).

        It shares the weights, and holds a condition for every row: solve with
        ``row_wise=False``. Without conditions it is this flow itself.
        """
        if not self.condition_dim:
            return self
        flow, parts = copy.copy(self), {"mixture": self.mixture.given(condition)}
        parts["residual"] = parts["finish"] = None
        if self.residual is not None:
            parts["residual"] = GivenField(self.residual, condition)
        if self.finish is not None:
            field = GivenField(self.finish.field, condition)
            parts["finish"] = LogDensityField(field)
        flow._modules = parts
        return flow

    def estimated(self, probes: Tensor) -> DensityFlow:
        """Return the flow with divergences of learned fields estimated by probes.

        It shares the weights. See `sknode.fields.DivergenceField`.
        """
        flow, parts = copy.copy(self), dict(self._modules)
        if self.residual is not None:
            parts["residual"] = DivergenceField(self.residual, probes)
        if self.finish is not None:
            field = DivergenceField(self.finish.field, probes)
            parts["finish"] = LogDensityField(field)
        flow._modules = parts
        return flow

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the slopes (n, dim) before t = 1."""
        slope = self.mixture(t, y)
        return slope if self.residual is None else slope + self.residual(t, y)

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """Return the slopes of y and ``log p_t - log q_t`` before t = 1."""
        y = state[:, : self.dim]
        slope, score = self.mixture.with_score(t, y)
        r, divergence = self.residual.with_divergence(t, y)
        change = -(divergence + (r * score).sum(1))
        return torch.cat([slope + r, change[:, None]], 1)

    def density_network(self) -> DensityNetwork | None:
        """Return what a kernel has to know of `forward`, or None if there is none."""
        if not isinstance(self.residual, ConcatSquashField):
            return None
        m = self.mixture
        return self.residual.make_density_network(
            (m.log_weights, m.centres, m.variances, m.axes)
        )

    def log_mixture(self, y: Tensor) -> Tensor:
        """Return the log-density (n,) of the mixture."""
        return self.mixture.log_density(y.new_ones(()), y)

    def log_density_on(
        self, x: Tensor, grid: list[float], finish_grid: list[float]
    ) -> Tensor:
        """Return the log-density (n,) by steps back from the data to t = 0."""
        change = 0.0
        if self.finish is not None:
            x, change = self.undo_finish(x, finish_grid)
        mixture = self.log_mixture(x)
        if self.residual is not None:
            state = march(self, nn.functional.pad(x, (0, 1)), grid)
            change = change + state[:, -1]
        return mixture - change

    def undo_finish(self, x: Tensor, grid: list[float]) -> tuple[Tensor, Tensor]:
        """Return rows at t = 1 and how much log-density they lose from there on."""
        state = march(self.finish, nn.functional.pad(x, (0, 1)), grid)
        return state[:, :-1], state[:, -1]


class StartingAtZero(nn.Module):
    """A field times a number that starts as zero and is learned."""

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field, self.gain = field, nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate at times (a scalar or (n, 1)) and states (n, dim)."""
        # fields of one's own are promised a time a row
        return self.gain * self.field(t.expand(len(y), 1), y)


class FlowWithEnergy(nn.Module):
    """A flow before t = 1 that also integrates what its velocity spends.

    Parameters
    ----------
    flow : DensityFlow
        The flow, with a residual.
    probe : Tensor of shape (dim,), optional
        Random signs, for the norm of the Jacobian: see `sknode.fields.EnergyField`.
    """

    def __init__(self, flow: DensityFlow, probe: Tensor | None):
        super().__init__()
        self.flow, self.velocity = flow, Velocity(flow)
        self.energy = EnergyField(self.velocity, (flow.dim,), probe)
        self.n_integrals = 1 if probe is None else 2

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """Return the slopes of y, of ``log p_t - log q_t`` and of the integrals."""
        size = self.flow.dim + 1
        y, integrals = state[:, : size - 1], state[:, size:]
        spent = self.energy(t, torch.cat([y, integrals], 1))[:, size - 1 :]
        return torch.cat([self.flow(t, state[:, :size]), spent], 1)


class Velocity(nn.Module):
    """The velocity of a flow before t = 1, as a field."""

    def __init__(self, flow: DensityFlow):
        super().__init__()
        self.flow = flow

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate at times (a scalar or (n, 1)) and states (n, dim)."""
        return self.flow.velocity(t, y)


def make_grid(n_steps: int, generator: torch.Generator | None = None) -> list[float]:
    """Return times from 1 to 0, closer to each other near 1.

    There the path of a narrow component turns fastest. With a generator the steps are
    of random length: a field that is trained on them cannot learn to exploit the error
    of any.
    """
    return [1 - s * s for s in _make_cuts(n_steps, generator)]


def make_finish_grid(
    n_steps: int, generator: torch.Generator | None = None
) -> list[float]:
    """Return times from 2 to 1, evenly or, with a generator, of random length."""
    return [2 - s for s in _make_cuts(n_steps, generator)]


def _make_cuts(n_steps, generator):
    widths = torch.ones(n_steps, dtype=torch.float64)
    if generator is not None:
        widths = 0.5 + torch.rand(n_steps, generator=generator, dtype=torch.float64)
    return [0.0, *(torch.cumsum(widths, 0) / widths.sum())[:-1].tolist(), 1.0]


def flow_matching_loss(
    flow: DensityFlow,
    x1: Tensor,
    condition: Tensor,
    n_draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the losses (n,) of the residual on the linear path to rows.

    ``|r(t, x_t) - (x1 - x0 - v(t, x_t))|^2``, over several times and noises a row:
    the times are stratified and every noise comes with its opposite, which takes
    variance out of the gradient [1]_.

    References
    ----------
    .. [1] Lipman, Chen, Ben-Hamu, Nickel & Le, "Flow Matching for Generative
       Modeling", ICLR 2023.
    """
    n, dim = x1.shape
    half = -(-n_draws // 2)
    strata = torch.arange(half)[:, None] + torch.rand(half, n, generator=generator)
    t = (strata / half).repeat(2, 1).reshape(-1, 1).to(x1)
    noise = torch.randn(half, n, dim, generator=generator)
    x0 = torch.cat([noise, -noise]).reshape(-1, dim).to(x1)
    x1 = x1.repeat(2 * half, 1)
    flow = flow.given(condition.repeat(2 * half, 1))
    y = torch.lerp(x0, x1, t)
    with torch.no_grad():
        target = x1 - x0 - flow.mixture(t, y)
    squares = (flow.residual(t, y) - target).square().sum(1)
    return squares.view(2 * half, n).mean(0)


def finish_loss(
    flow: DensityFlow, x: Tensor, n_steps: int, generator: torch.Generator
) -> Tensor:
    """Return minus the log-densities (n,) for a flow of mixture and finish.

    Added is the square of what every other time alone would get differently: without
    it the likelihood rewards a field for the errors of the steps. It is a
    regularisation by the solver's own error estimate [1]_, and small for a field that
    the steps resolve.

    References
    ----------
    .. [1] Pal, Ma, Shah & Rackauckas, "Opening the Blackbox: Accelerating Neural
       Differential Equations by Regularizing Internal Solver Heuristics", ICML 2021.
    """
    grid = make_finish_grid(n_steps, generator)
    y, change = flow.undo_finish(x, grid)
    coarse_y, coarse_change = flow.undo_finish(x, grid[::2])
    error = (coarse_y - y).square().sum(1) + (coarse_change - change).square()
    return change - flow.log_mixture(y) + STEP_PENALTY * error
