"""How a latent ODE is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sknode._network import SolverSettings
from sknode._optimizers import make_optimizer
from sknode._series.network import LatentODENetwork, Posterior, Series
from sknode._series.panel import Panel
from sknode._training import Average, History, Recipe, train
from sknode.ode import SolverError

__all__ = ["Trainer", "draw_masks"]

# Share of the updates in which the weight of the divergence from the prior rises to 1.
WARM_UP = 0.25
# Share of the time of a series that training starts with, and share of the updates
# after which it is all of it: a path that is wrong late is learned late.
HORIZON, GROWTH = 0.2, 0.4
# Share of the series that begin later in an update, at a time within so much of theirs:
# the more starts, the more there is to learn from a path.
LATE, LATEST = 0.7, 0.9
# Share of the updates in which the noise is held at what it starts from: noise that is
# learned while predictions are bad grows until nothing is left to learn from them.
HELD = 0.4
# Nats of a latent dimension, on average over a batch, that cost nothing.
FREE_NATS = 0.05
# What the moving average of the weights keeps in an update.
DECAY = 0.99
# Shares of points that are hidden, of the time in a hidden block, of the time that is
# left before a hidden end.
POINTS, BLOCK, HEAD = (0.1, 0.7), (0.1, 0.5), (0.2, 0.9)
# Share of the series whose parts are drawn from the network itself.
DREAMS = 0.5


def draw_masks(series: Series, generator: torch.Generator) -> Tensor:
    """Draw what an encoder may see, (n_series, length, n_channels), bool.

    Every series loses its end, a block, or nothing as a whole, and then points or
    cells at random, or none. The first row is kept: its time is that of the latent
    state.
    """
    n, length, n_channels = series.seen.shape
    device = series.time.device

    def draw(*shape, dtype=torch.float64):
        return torch.rand(shape, generator=generator, dtype=dtype).to(device)

    def uniform(low, high):
        return low + (high - low) * draw(n, 1)

    def choose():
        return torch.randint(3, (n, 1), generator=generator).to(device)

    begin, end = series.time[:, :1], series.time[:, -1:]
    share = (series.time - begin) / (end - begin).clamp_min(1e-300)
    kind = choose()
    width = uniform(*BLOCK)
    first = uniform(0, 1) * (1 - width)
    head = uniform(*HEAD).masked_fill_(kind != 0, torch.inf)
    block = (share >= first) & (share <= (first + width).masked_fill_(kind != 1, -1.0))
    # of a row all channels, by what is drawn for the first, or each by itself
    kind, hidden = choose(), uniform(*POINTS).float()
    cells = draw(n, length, n_channels, dtype=torch.float32)
    rows = cells[..., 0] >= hidden.masked_fill(kind != 0, 0.0)
    keep = (share <= head) & ~block & rows
    # A cell is hidden if what is drawn for it is less than the limit of its row: few
    # passes over all cells.
    limit = torch.maximum(hidden.masked_fill(kind != 1, 0.0), (~keep).float())
    limit *= ~series.first_rows()
    return cells >= limit[..., None]


@dataclass
class Trainer:
    """Trains a network on a panel by the evidence lower bound.

    The bound is that of whole series. That the encoder can do with a part of a series,
    to fill gaps and to forecast, is learned beside it: the posterior from the part is
    drawn towards that from the whole, by the divergence that asks it to cover what is
    possible. For some of the series the part is drawn anew from the network, so that
    the encoder does not learn the noise of the few there are by heart [1]_.

    References
    ----------
    .. [1] Cranmer, Brehmer & Louppe, "The frontier of simulation-based inference",
       PNAS 117 (2020): the posterior from simulated data, here from latent states that
       the training series have.

    Attributes
    ----------
    network : LatentODENetwork
        What is trained, in place.
    settings : SolverSettings
        How to solve.
    recipe : Recipe
        The learning parameters.
    generator : torch.Generator
        Draws batches, masks and latent states, on the CPU.
    history : History
        Gets an entry an epoch.
    kl_weight : float
        Weight of the divergence from the prior, at last.
    """

    network: LatentODENetwork
    settings: SolverSettings
    recipe: Recipe
    generator: torch.Generator
    history: History
    kl_weight: float = 1.0

    def fit(self, panel: Panel, held_out: Panel | None = None, on_epoch=None) -> int:
        """Train; return the number of epochs.

        Parameters
        ----------
        panel : Panel
            Scaled times, standardised values.
        held_out : Panel, optional
            Further series; training then ends when these are predicted no better.
        on_epoch : callable, optional
            Called with the epoch; returns True to stop.
        """
        network, like = self.network, self.network.log_noise
        series = Series.of(panel, like)
        n_cells = max(1.0, float(series.seen.sum()) / len(series))
        n_batches = math.ceil(len(series) / self.recipe.batch_size)
        n_updates, total = 0, n_batches * self.recipe.max_iter
        settling = math.ceil(max(GROWTH, WARM_UP) * self.recipe.max_iter)
        average = Average(network, DECAY)

        def objective(rows):
            nonlocal n_updates
            progress = n_updates / total
            n_updates += 1
            network.log_noise.requires_grad_(progress >= HELD)
            horizon = HORIZON + (1 - HORIZON) * progress / GROWTH
            weight = self.kl_weight * min(1.0, progress / WARM_UP)
            part = self._part(series[rows], horizon)
            return self._loss(part, weight, n_cells)

        validate = None
        if held_out is not None:
            validate = self._make_score(Series.of(held_out, like), average)
        return train(
            network,
            (torch.arange(len(series), device=like.device),),
            torch.ones(len(series), device=like.device),
            objective,
            make_optimizer(network, self.recipe.optimizer, self.recipe.learning_rate),
            replace(self.recipe, settling=settling),
            self.generator,
            self.history,
            validate=validate,
            average=average,
            **({} if on_epoch is None else {"on_epoch": on_epoch}),
        )

    def _part(self, series, horizon):
        """Return what series have up to a horizon, from their start or a later time."""
        if horizon >= 1:
            horizon = 2.0  # whatever rounding makes of the end
        late, share = torch.rand(
            (2, len(series), 1), generator=self.generator, dtype=torch.float64
        ).to(series.time)
        begin = torch.where(late < LATE, LATEST * share, torch.zeros_like(share))
        return series.part(begin, begin + horizon)

    def _loss(self, series: Series, kl_weight: float, n_cells: float):
        """Return minus the lower bound for each series and what its parts lack, over
        the mean number of cells, and the function evaluations.
        """
        network = self.network
        q = network.encode(series)
        states = q.states(self._normal(q.mean))[None]
        means, n_f_evals = network(states, q.start, series, self.settings)
        fit = network.log_likelihood(means, series)[0]
        # below the free nats there is no gradient, and no reward for going lower
        divergence = q.kl().mean(0).clamp_min(FREE_NATS).sum()
        lack = self._lack(series, q.detach(), states[0].detach(), means[0].detach())
        return (kl_weight * divergence - fit + lack) / n_cells, n_f_evals

    def _lack(self, series: Series, whole: Posterior, states, means):
        """Return what posteriors from parts lack of those from the whole, (n_series,).

        With values that are drawn from the network for ``states`` these are what there
        is to be found.
        """
        dreamt = torch.rand(len(series), 1, generator=self.generator) < DREAMS
        dreamt = dreamt.to(means.device)
        dream = means + self.network.noise.detach() * self._normal(means)
        values = torch.where(dreamt[..., None], dream, series.values)
        keep = draw_masks(series, self.generator)
        part = self.network.encode(replace(series, values=values).hide(keep))
        target = Posterior(
            whole.start,
            torch.where(dreamt, states, whole.mean),
            torch.where(dreamt, torch.zeros_like(states), whole.scale),
        )
        # up to the entropy of the target
        error = target.scale**2 + (target.mean - part.mean) ** 2
        return (0.5 * error / part.scale**2 + part.scale.log()).sum(1)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def _make_score(self, series: Series, average: Average):
        """Return a function that scores the averaged network on held-out series.

        That is their evidence lower bound, whole: what the encoder makes of parts is no
        measure of the model, as predictions may refine it. The noise is drawn once, so
        that epochs compare.
        """
        shape = len(series), self.network.latent_dim
        noise = torch.randn(shape, generator=self.generator).to(series.values)
        n_cells = max(1, int(series.seen.sum()))

        @torch.no_grad()
        def score():
            network = average.module
            q = network.encode(series)
            states = q.states(noise)[None]
            try:
                means, _ = network(states, q.start, series, self.settings)
            except SolverError as error:
                raise SolverError(
                    f"{self.recipe.name}: the solver failed on held-out series in "
                    f"epoch {len(self.history.loss) + 1} of the training. {error} If "
                    "the training diverges, lower learning_rate_init or raise alpha, "
                    "else raise max_steps, rtol or atol."
                ) from error
            fit = network.log_likelihood(means, series).sum()
            return float(fit - q.kl().sum()) / n_cells

        return score
