"""The latent ODE: a recurrent encoder, a latent flow and a decoder."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sknode._network import SolverSettings
from sknode._series import decoder
from sknode._series.panel import Panel
from sknode._series.recurrent import last_state
from sknode.fields import MLPField
from sknode.ode import SolverError, Status
from sknode.ode.vector_field import Perceptron

__all__ = ["LatentODENetwork", "Posterior", "Series"]

# Least standard deviations, of a latent state and of noise on standardised values.
SCALE_FLOOR, NOISE_FLOOR = 1e-3, 1e-3
# Noise that training starts from, and about the scale of posteriors: wide ones would
# hide from the field what it is to follow.
FIRST_NOISE, FIRST_SCALE = 0.3, 0.05
# Time in which the latent state flows while that of a typical series is 1.
CLOCK = 8.0


@dataclass(frozen=True)
class Series:
    """Ragged series as padded tensors.

    Attributes
    ----------
    time : Tensor of shape (n_series, length), float64
        Times; the last one is repeated as padding.
    values : Tensor of shape (n_series, length, n_channels)
        Values, zero where there is none.
    seen : Tensor of shape (n_series, length, n_channels), bool
        Whether there is one.
    covariates : Tensor of shape (n_series, length, n_covariates)
        What is known at any time.
    lengths : Tensor of shape (n_series,), int64
        Rows that are no padding.
    dense : bool
        Whether it is known that each of these has a value.
    """

    time: Tensor
    values: Tensor
    seen: Tensor
    covariates: Tensor
    lengths: Tensor
    dense: bool = False

    @classmethod
    def of(cls, panel: Panel, like: Tensor) -> Series:
        """Make them of a panel, in the precision and on the device of a tensor."""
        lengths = np.diff(panel.offsets)
        longest = max(1, int(lengths.max(initial=0)))
        index = np.minimum(np.arange(longest), np.maximum(lengths - 1, 0)[:, None])
        index = index + panel.offsets[:-1, None]
        real = np.arange(longest) < lengths[:, None]
        if not len(panel.time):  # series without a row: nothing to take rows of
            shape = (len(lengths), longest)
            arrays = (
                np.zeros(shape),
                np.full((*shape, panel.values.shape[1]), np.nan),
                np.zeros((*shape, panel.covariates.shape[1])),
            )
        else:
            index = np.minimum(index, len(panel.time) - 1)
            arrays = (panel.time[index], panel.values[index], panel.covariates[index])
        time, values, covariates = arrays
        seen = ~np.isnan(values) & real[..., None]
        device = like.device
        return cls(
            torch.from_numpy(time).to(device, torch.float64),
            torch.from_numpy(np.where(seen, values, 0.0)).to(like),
            torch.from_numpy(seen).to(device),
            torch.from_numpy(covariates).to(like),
            torch.from_numpy(lengths.astype(np.int64)).to(device),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> Series:
        """Return some series, with no more padding than they need."""
        lengths = self.lengths[rows]
        end = max(1, int(lengths.max())) if len(lengths) else 1
        return Series(
            self.time[rows, :end],
            self.values[rows, :end],
            self.seen[rows, :end],
            self.covariates[rows, :end],
            lengths,
            self.dense,
        )

    def part(self, begin: Tensor, end: Tensor) -> Series:
        """Return what they have between shares (n_series, 1) of their time."""
        first, last = self.time[:, :1], self.time[:, -1:]
        span = last - first
        inside = (self.time >= first + begin * span) & (self.time <= first + end * span)
        return self._take(self._some() & inside)

    def times_from(self, start: Tensor) -> Tensor:
        """Return the times to solve for from a start (n_series,): for a series without
        rows, which is padded with times of others, the start itself.
        """
        return torch.where(self.lengths[:, None] > 0, self.time, start[:, None])

    def first_rows(self) -> Tensor:
        """Return which rows (n_series, length) are the first with a value."""
        some = self._some()
        return some & (some.cumsum(1) == 1)

    def _some(self) -> Tensor:
        """Return which rows (n_series, length) have a value."""
        # much faster than `any` over few channels
        return functools.reduce(torch.logical_or, self.seen.unbind(-1))

    def hide(self, keep: Tensor) -> Series:
        """Return them with only those values for which ``keep`` is true."""
        seen = self.seen & keep
        # faster than to select, and all values are finite
        return replace(self, values=self.values * seen, seen=seen, dense=False)

    def drop_empty_rows(self) -> Series:
        """Return them without the rows in which nothing is seen."""
        return self if self.dense else self._take(self._some())

    def _take(self, rows: Tensor) -> Series:
        """Return them with some of the rows that have a value, (n_series, length)."""
        n, length, n_channels = self.seen.shape
        rank = rows.cumsum(1)  # from 1 on
        lengths = rank[:, -1].contiguous()
        end = max(1, int(lengths.max())) if n else 1
        if torch.equal(lengths, self.lengths):  # all there are
            arrays = self.time, self.values, self.seen, self.covariates
            return Series(*(x[:, :end] for x in arrays), lengths, True)
        position = torch.arange(length, device=rows.device)
        # each goes to the place of its rank, the others to place 0, which is left out
        order = rank.new_zeros(n, length + 1)
        order.scatter_(1, rank * rows, position.expand(n, -1))
        # after the last one it is repeated
        last = (lengths - 1).clamp_min(0)[:, None]
        index = order[:, 1:].gather(1, torch.minimum(position[:end], last))
        flat = (index + length * torch.arange(n, device=rows.device)[:, None]).flatten()

        def take(x):
            return x.flatten(0, 1).index_select(0, flat).view(n, end, x.shape[-1])

        # cell by cell: masks that are the same along the last axis are slow
        cell = torch.arange(end * n_channels, device=rows.device)
        real = (cell < (lengths * n_channels)[:, None]).view(n, end, n_channels)
        return Series(
            self.time.gather(1, index),
            take(self.values) * real,
            take(self.seen) & real,
            take(self.covariates),
            lengths,
            True,
        )


@dataclass(frozen=True)
class Posterior:
    """What is believed about the latent states of series: diagonal Gaussians.

    Attributes
    ----------
    start : Tensor of shape (n_series,), float64
        The times of the states.
    mean, scale : Tensor of shape (n_series, latent_dim)
        Means and standard deviations.
    """

    start: Tensor
    mean: Tensor
    scale: Tensor

    def kl(self) -> Tensor:
        """Return the divergence from a standard normal, (n_series, latent_dim)."""
        return 0.5 * (self.mean**2 + self.scale**2 - 1) - self.scale.log()

    def states(self, noise: Tensor) -> Tensor:
        """Return draws (n_draws, n_series, latent_dim) for standard normal noise of
        this shape, or of one that broadcasts to it.
        """
        return self.mean + self.scale * noise

    def detach(self) -> Posterior:
        """Return it as constants."""
        return Posterior(self.start, self.mean.detach(), self.scale.detach())

    def __getitem__(self, rows) -> Posterior:
        return Posterior(self.start[rows], self.mean[rows], self.scale[rows])


class LatentODENetwork(nn.Module):
    """Encode a series, let its latent state flow, decode it at any time.

    Parameters
    ----------
    n_channels, n_covariates : int
        Columns of a series.
    latent_dim : int
        Size of the latent state.
    hidden_layer_sizes : sequence of int
        Hidden layers of the vector field.
    activation : str
        Activation of the vector field and of the decoder.
    rnn_hidden_size : int
        Size of the encoder's state.
    decoder_hidden_layer_sizes : sequence of int
        Hidden layers of the decoder.

    References
    ----------
    Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential Equations",
    NeurIPS 2018, section 5.
    """

    def __init__(
        self,
        n_channels: int,
        n_covariates: int,
        latent_dim: int,
        hidden_layer_sizes: Sequence[int],
        activation: str,
        rnn_hidden_size: int,
        decoder_hidden_layer_sizes: Sequence[int],
    ):
        super().__init__()
        self.latent_dim, self.activation = latent_dim, activation
        # values, which of them are seen, gap to the row after, time since the start
        n_inputs = 2 * n_channels + n_covariates + 2
        self.encoder = nn.GRUCell(n_inputs, rnn_hidden_size)
        self.posterior_map = nn.Linear(rnn_hidden_size, 2 * latent_dim)
        self.field = MLPField(latent_dim, hidden_layer_sizes, activation)
        sizes = (latent_dim + n_covariates, *decoder_hidden_layer_sizes, n_channels)
        self.decoder = nn.ModuleList(
            nn.Linear(a, b) for a, b in itertools.pairwise(sizes)
        )
        with torch.no_grad():
            self.posterior_map.bias[latent_dim:] += math.log(FIRST_SCALE)
        self.log_noise = nn.Parameter(torch.full((n_channels,), math.log(FIRST_NOISE)))

    @property
    def noise(self) -> Tensor:
        """Standard deviation of the noise of each channel."""
        return self.log_noise.exp().clamp_min(NOISE_FLOOR)

    def encode(self, series: Series) -> Posterior:
        """Return the posterior of each series, at the time of its first value.

        A series without any has the prior, at the time of its first row.
        """
        series = series.drop_empty_rows()
        start, lengths = series.time[:, 0], series.lengths
        hidden = last_state(self.encoder, self._encoder_inputs(series), lengths)
        mean, raw = self.posterior_map(hidden).chunk(2, -1)
        scale = F.softplus(raw) + SCALE_FLOOR
        known = (lengths > 0)[:, None]
        return Posterior(
            start,
            torch.where(known, mean, torch.zeros_like(mean)),
            torch.where(known, scale, torch.ones_like(scale)),
        )

    @staticmethod
    def _encoder_inputs(series: Series) -> Tensor:
        """Return what the encoder reads of every row, (n_series, length, n_inputs)."""
        n, length, c = series.values.shape
        time = CLOCK * series.time
        # filled part by part: the parts differ in precision
        inputs = series.values.new_zeros(
            n, length, 2 * c + series.covariates.shape[-1] + 2
        )
        inputs[..., :c] = series.values
        inputs[..., c : 2 * c] = series.seen
        inputs[..., 2 * c : -2] = series.covariates
        inputs[:, :-1, -2] = time.diff(dim=1)
        inputs[..., -1] = time - time[:, :1]
        return inputs

    def flow(
        self,
        states: Tensor,
        start: Tensor,
        time: Tensor,
        solver: SolverSettings,
        strict: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return the latent states at the times of the series.

        Parameters
        ----------
        states : Tensor of shape (n_draws, n_series, latent_dim)
            Draws of the latent states at ``start``.
        start : Tensor of shape (n_series,)
            Their times.
        time : Tensor of shape (n_series, length)
            Non-decreasing times, before or after the start.
        solver : SolverSettings
            How to solve.
        strict : bool
            Whether a solve that fails is an error; if not, the states that it does not
            reach are NaN.

        Returns
        -------
        z : Tensor of shape (n_draws, n_series, length, latent_dim)
            The latent states.
        n_f_evals : Tensor of shape (n_series,)
            Evaluations of the vector field, on average over the draws.

        Raises
        ------
        SolverError
            If a solve fails and ``strict``.
        """
        first = start[:, None]
        ahead = time >= first
        z, n_f_evals = self._solve(states, start, time.clamp_min(first), solver, strict)
        if not bool(ahead.all()):
            past = time.clamp_max(first).flip(1)
            before, further = self._solve(states, start, past, solver, strict)
            z = torch.where(ahead[..., None], z, before.flip(2))
            n_f_evals = n_f_evals + further
        return z, n_f_evals

    def _solve(self, states, start, time, solver, strict):
        n_draws, n_series, _ = states.shape
        grid = CLOCK * torch.cat([start[:, None], time], 1).repeat(n_draws, 1)
        solution = solver.solve(self.field, states.flatten(0, 1), grid)
        z = solution.y[:, 1:]
        if not solution.success:
            if strict:
                raise SolverError(solution.failure_report())
            failed = (solution.status != Status.SUCCESS)[:, None]
            reached = (solution.t_reached - grid[:, 0]).abs()[:, None]
            lost = failed & ((grid[:, 1:] - grid[:, :1]).abs() > reached)
            z = z.masked_fill(lost[..., None], torch.nan)
        shape = n_draws, n_series
        return (
            z.unflatten(0, shape),
            solution.stats["n_f_evals"].view(shape).double().mean(0),
        )

    def decode(self, z: Tensor, covariates: Tensor) -> Tensor:
        """Return the means of the channels (..., n_channels) for latent states."""
        rows = z
        if covariates.shape[-1]:
            covariates = covariates.expand(*z.shape[:-1], covariates.shape[-1])
            rows = torch.cat([z, covariates], -1)
        layers = [(layer.weight, layer.bias) for layer in self.decoder]
        network = Perceptron(layers, self.activation, uses_time=False)
        means = decoder.evaluate(network, rows.flatten(0, -2))
        return means.unflatten(0, z.shape[:-1])

    def forward(
        self,
        states: Tensor,
        start: Tensor,
        series: Series,
        solver: SolverSettings,
        strict: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return the means at the rows of the series for draws of their states.

        They have shape (n_draws, n_series, length, n_channels); see `flow`.
        """
        time = series.times_from(start)
        z, n_f_evals = self.flow(states, start, time, solver, strict)
        return self.decode(z, series.covariates), n_f_evals

    def log_likelihood(self, means: Tensor, series: Series) -> Tensor:
        """Return that of the values that are seen, summed over each series.

        The shape is that of the means (..., n_series, length, n_channels) without the
        last two.
        """
        error = torch.where(series.seen, series.values - means, 0.0)
        squares = error.square().sum(-2) / self.noise**2
        entropy = self.noise.log() + 0.5 * math.log(2 * math.pi)
        return -(0.5 * squares + series.seen.sum(-2) * entropy).sum(-1)
