"""What is believed of the latent states of series, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sknode._network import SolverSettings
from sknode._series.network import LatentODENetwork, Posterior, Series
from sknode._series.panel import Panel
from sknode._series.training import draw_masks
from sknode.ode import SolverError

__all__ = [
    "Laplace",
    "normal_points",
    "paths_at_rows",
    "posterior",
    "refinement_helps",
    "states_at_rows",
]

# Steps of the refinement, what its Jacobians are differences over, and how accurately
# it solves at most.
N_STEPS, DIFFERENCE, LEAST_TOLERANCE = 20, 1e-4, 1e-6
# Damping that it starts with, and what that is multiplied with after a step that went
# down as foreseen, at least, or did not go down.
DAMPING, LESS, MORE = 0.1, 0.2, 5.0
# A series is done when a step would gain less than so many nats.
LEAST_GAIN = 1e-3
# States and values that are solved for at a time.
MOST_NUMBERS = 10_000_000
# Series by which it is judged, and draws of their states.
JUDGES, JUDGE_DRAWS = 100, 8


@dataclass(frozen=True)
class Laplace:
    """What is believed about the latent states of series: Gaussians at the modes.

    Paths for draws of it are those of the network made linear at the mode: where little
    is known the covariance reaches further than the network is about linear, and draws
    of states far out would lead astray [1]_.

    References
    ----------
    .. [1] Immer, Korzepa & Bauer, "Improving predictions of Bayesian neural nets via
       local linearization", AISTATS 2021.

    Attributes
    ----------
    start : Tensor of shape (n_series,), float64
        The times of the states.
    mean : Tensor of shape (n_series, latent_dim)
        The modes.
    factor : Tensor of shape (n_series, latent_dim, latent_dim)
        Factors ``F`` of the covariances ``F F^T``.
    """

    start: Tensor
    mean: Tensor
    factor: Tensor

    def states(self, noise: Tensor) -> Tensor:
        """Return draws, as `Posterior.states`."""
        return self.mean + (noise[..., None, :] * self.factor).sum(-1)


def normal_points(n_draws: int, dim: int, seed: int, like: Tensor) -> Tensor:
    """Return standard normal noise (n_draws, 1, dim), well spread, the same for all
    series. Points come with their negatives; their number is even.
    """
    n = n_draws // 2
    sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    u = sobol.draw(n, dtype=torch.float64)
    # the ends would be infinite
    eps = 0.5 / max(n, 2) ** 2
    points = torch.special.ndtri(u.clamp(eps, 1 - eps)).to(like)[:, None]
    return torch.cat([points, -points])


@torch.no_grad()
def posterior(
    network: LatentODENetwork,
    panel: Panel,
    settings: SolverSettings,
    *,
    refine: bool = True,
) -> Posterior | Laplace:
    """Return what is believed of the latent states of series.

    That is the encoder's answer, or, refined, the mode of the exact posterior that is
    found from there by the method of Levenberg and Marquardt, with the covariance of
    Laplace's approximation.

    Parameters
    ----------
    network : LatentODENetwork
        In double precision if a series' result shall not depend on the others.
    panel : Panel
        Observations.
    settings : SolverSettings
        How to solve.
    refine : bool
        Whether to refine.
    """
    series = Series.of(panel, network.log_noise)
    return _posterior(network, series, settings, refine)


@torch.no_grad()
def refinement_helps(
    network: LatentODENetwork,
    panel: Panel,
    settings: SolverSettings,
    generator: torch.Generator,
) -> bool:
    """Return whether hidden values are predicted better from refined states.

    Where the model fits, the encoder's answer is worth refining: forecasts of spirals
    from 30 points came from 0.18 to 0.11. Where it does not, refined states follow the
    noise of what is seen and lead astray, or cannot be solved from.

    Parameters
    ----------
    network : LatentODENetwork
        Trained.
    panel : Panel
        Series to judge by; some of them, drawn, are enough.
    settings : SolverSettings
        How to solve.
    generator : torch.Generator
        Draws the series and what is hidden of them.
    """
    series = Series.of(panel, network.log_noise)
    rows = torch.randperm(len(series), generator=generator)[:JUDGES]
    series = series[rows.sort().values.to(series.lengths.device)]
    keep = draw_masks(series, generator)
    seen, hidden = series.hide(keep), series.seen & ~keep
    noise = normal_points(JUDGE_DRAWS, network.latent_dim, 0, series.values)

    def error(refine):
        q = _posterior(network, seen, settings, refine)
        means = _paths(network, q, series, settings, noise).mean(0)
        return (means - series.values)[hidden].abs().sum()

    try:
        return bool(error(True) < error(False))
    except SolverError:
        return False


def _posterior(network, series, settings, refine):
    series = series.drop_empty_rows()
    q = network.encode(series)
    if not refine or not len(series):
        return q
    settings = replace(
        settings,
        rtol=max(settings.rtol, LEAST_TOLERANCE),
        atol=max(settings.atol, LEAST_TOLERANCE),
    )
    # as many at a time as their Jacobians leave memory for
    longest, dim = series.time.shape[1], network.latent_dim
    size = longest * (dim + 1) * max(dim, series.values.shape[2])
    rows = torch.arange(len(series), device=series.lengths.device)
    parts = [
        _find_modes(network, q[part], series[part], settings)
        for part in rows.split(max(1, MOST_NUMBERS // size))
    ]
    return Laplace(
        q.start,
        torch.cat([part.mean for part in parts]),
        torch.cat([part.factor for part in parts]),
    )


def _find_modes(network, q, series, settings) -> Laplace:
    """Go down from the encoder's answer to where the exact posterior is largest."""
    z, trial = q.mean.clone(), q.mean
    n, dim = z.shape
    loss, gradient = torch.full_like(z[:, 0], torch.inf), torch.zeros_like(z)
    # until a series has been solved it is believed what the prior says
    precision = torch.eye(dim).to(z).repeat(n, 1, 1)
    damping = torch.full_like(z[:, 0], DAMPING)
    going, foreseen = torch.arange(n, device=z.device), torch.ones_like(damping)
    for step in range(N_STEPS + 1):
        losses, slopes, errors = _linearise(
            network, trial, q.start[going], series[going], settings
        )
        gains = loss[going] - losses
        down = gains > 0  # not where it is NaN
        at = going[down]
        z[at], loss[at] = trial[down], losses[down]
        some = slopes[down]
        gradient[at] = (some @ errors[down][..., None])[..., 0] + z[at]
        precision[at] = some @ some.mT + torch.eye(dim).to(z)
        # a step that gains little says nothing of longer ones
        going_on = ~down | (gains > LEAST_GAIN) | (damping[going] > DAMPING)
        # Nielsen's rule: steps that gain half of what was foreseen are long enough
        surplus = (2 * gains / foreseen - 1).clamp(-1, 1)
        damping[going] *= torch.where(down, (1 - surplus**3).clamp_min(LESS), MORE)
        going = going[going_on]
        if step == N_STEPS or not len(going):
            break
        weight = damping[going, None] * precision[going].diagonal(dim1=1, dim2=2)
        damped = precision[going] + torch.diag_embed(weight)
        change = -torch.linalg.solve(damped, gradient[going])
        trial = z[going] + change
        foreseen = 0.5 * (change * (weight * change - gradient[going])).sum(1)
    # with P = L L^T it is F = L^-T
    factor = torch.linalg.inv(torch.linalg.cholesky(precision)).mT
    return Laplace(q.start, z, factor.contiguous())


def _linearise(network, z, start, series, settings):
    """Return minus the log posterior (n_series,) but for a constant, NaN where the
    solve fails, and the errors of values (n_series, n_cells), in units of their noise,
    with their slopes (n_series, latent_dim, n_cells).
    """
    steps = DIFFERENCE * torch.eye(z.shape[1]).to(z)
    # the state and its neighbours in one solve
    states = torch.cat([z[None], z + steps[:, None]])
    means, _ = network(states, start, series, settings, strict=False)
    failed = ~means.isfinite().flatten(2).all(2).all(0)
    errors = (means - series.values) / network.noise
    errors = torch.where(series.seen, errors, torch.zeros_like(errors)).flatten(2)
    slopes = ((errors[1:] - errors[0]) / DIFFERENCE).transpose(0, 1)
    losses = 0.5 * (errors[0].square().sum(1) + z.square().sum(1))
    return losses.masked_fill(failed, torch.nan), slopes, errors[0]


@torch.no_grad()
def paths_at_rows(
    network: LatentODENetwork,
    q: Posterior | Laplace,
    query: Panel,
    settings: SolverSettings,
    noise: Tensor,
    strict: bool = True,
) -> Tensor:
    """Return the means of the channels at the rows of a panel for draws of the states.

    They have shape (n_draws, n_rows, n_channels); see `Posterior.states` for the noise
    and `LatentODENetwork.flow` for solves that fail.
    """
    series = Series.of(query, q.mean)
    return _rows(_paths(network, q, series, settings, noise, strict), series)


@torch.no_grad()
def states_at_rows(
    network: LatentODENetwork,
    q: Posterior | Laplace,
    query: Panel,
    settings: SolverSettings,
    strict: bool = True,
) -> Tensor:
    """Return where the centres of latent states have flowed to at the rows of a panel,
    (n_rows, latent_dim).
    """
    series = Series.of(query, q.mean)
    time = series.times_from(q.start)
    z, _ = network.flow(q.mean[None], q.start, time, settings, strict)
    return _rows(z, series)[0]


def _rows(padded, series):
    """Return what is no padding of (n_draws, n_series, length, ...)."""
    position = torch.arange(series.time.shape[1], device=series.lengths.device)
    return padded[:, position < series.lengths[:, None]].cpu().double()


def _paths(network, q, series, settings, noise, strict=True):
    """Return the means of the channels (n_draws, n_series, length, n_channels)."""
    if not isinstance(q, Laplace):
        return network(q.states(noise), q.start, series, settings, strict)[0]
    near = DIFFERENCE * torch.cat([torch.zeros_like(noise[:1]), noise])
    paths, _ = network(q.states(near), q.start, series, settings, strict)
    return paths[0] + (paths[1:] - paths[0]) / DIFFERENCE
