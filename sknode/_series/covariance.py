"""How the parameters of a linear process are learned.

The covariance of a :class:`~sknode._series.state_space.LinearProcess` is a sum of
closed forms, so its parameters are learned as those of a Gaussian process: from windows
of a hundred or so cells of the table, whose marginal likelihoods are added up. Half of
the windows are stretches of neighbouring rows, half are scattered over longer spans,
which is where slow parts and periods show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from sknode._series.cycles import find_cycle
from sknode._series.state_space import LinearProcess
from sknode._series.warp import Warp, find_bounds, find_levels

__all__ = ["fit_process", "fit_warped_process"]

LOG_2PI = math.log(2 * math.pi)
# Standard deviation of the noise at least, in robust standard deviations.
FLOOR = 1e-3
# Channels may have this many factors in common.
RANK = 4
# Up to this many channels every block has a process for each of them that is smooth.
FEW = 8
# Periods that stand out but do not pay do not end the search at once.
MOST_CYCLES, MOST_HARMONICS, MOST_TRIES = 2, 6, 2
# Parts of a block with less variance than this are left out of the process.
NEGLIGIBLE = 1e-6
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class _Block:
    """A part of the covariance: its kind, time scale, and where it is a cycle.

    Harmonics of a cycle share the time scale and the period of the first.
    """

    kind: str
    scale: float
    frequency: float = 0.0
    harmonic: int = 1
    first: int = -1


@dataclass(frozen=True)
class _Windows:
    """Cells in windows, padded; ``channel`` is -1 where there is none."""

    time: torch.Tensor
    channel: torch.Tensor
    value: torch.Tensor

    def __getitem__(self, index):
        return _Windows(self.time[index], self.channel[index], self.value[index])

    @property
    def n_cells(self):
        return int((self.channel >= 0).sum())


class _Model(torch.nn.Module):
    """Warp, mean and covariance of the channels.

    The covariance is a sum of blocks, each a covariance of the channels, low rank plus
    diagonal, times a correlation in time.
    """

    def __init__(self, n_channels, blocks, warped, generator):
        super().__init__()
        self.blocks, self.warped = blocks, warped
        n, rank = len(blocks), min(RANK, n_channels - 1)
        make = {"dtype": torch.float64}
        # A cycle starts with much of the variance: from little it does not get away
        # from where the other blocks explain it.
        share = torch.tensor(
            [
                0.2 / b.harmonic if b.kind == "cycle" else 1 / len(blocks)
                for b in blocks
            ],
            **make,
        )
        mixing = torch.randn(n, n_channels, rank, generator=generator, **make)
        rates = [-math.log(block.scale) for block in blocks]
        parameter = torch.nn.Parameter
        self.log_own = parameter(0.5 * share.log()[:, None].repeat(1, n_channels))
        self.mixing = parameter(0.3 * share.sqrt()[:, None, None] * mixing)
        self.log_rate = parameter(torch.tensor(rates, **make))
        self.shift = parameter(torch.zeros(n, **make))
        self.log_noise = parameter(torch.full((n_channels,), -1.5, **make))
        self.mean = parameter(torch.zeros(n_channels, **make))
        self.power_ = parameter(torch.zeros(2, n_channels, **make))

    @property
    def power(self):
        """Powers of the warp, between 0 and 2."""
        return 2 * torch.sigmoid(self.power_)

    @property
    def n_cycles(self):
        """Number of periods."""
        return len({block.first for block in self.blocks if block.kind == "cycle"})

    def powers(self):
        """Return the powers of the warp as an array, ones without a warp."""
        power = self.power if self.warped else torch.ones_like(self.power_)
        return power.detach().numpy()

    def tuning(self):
        """Return factors of frequencies; a cycle more or less over a span is large."""
        width = torch.tensor(
            [
                0.2 * 2 * math.pi / (b.frequency * b.scale) if b.frequency else 0.0
                for b in self.blocks
            ],
            dtype=torch.float64,
        )
        return (width * self.shift).exp()

    def extend(self, other):
        """Take over what another model with fewer blocks has learned."""
        n = len(other.blocks)
        with torch.no_grad():
            for name in ("log_own", "mixing", "log_rate", "shift"):
                getattr(self, name)[:n] = getattr(other, name)
            for name in ("log_noise", "mean", "power_"):
                getattr(self, name)[:] = getattr(other, name)

    def warp(self, windows):
        """Return warped values without their mean, and log-slopes, zero as padding."""
        channel = windows.channel.clamp(min=0)
        value, slope = windows.value, torch.zeros_like(windows.value)
        if self.warped:
            power = torch.where(value < 0, *self.power[:, channel])
            log = value.abs().log1p()
            value = value.sign() * torch.expm1(power * log) / power
            slope = (power - 1) * log
        seen = windows.channel >= 0
        value = torch.where(seen, value - self.mean[channel], 0.0)
        return value, torch.where(seen, slope, 0.0)

    def covariance(self, windows):
        """Return (n_windows, n_cells, n_cells) covariances of cells.

        Padding has those of independent cells with variance 1, without a gradient.
        """
        time = windows.time
        lag = (time[:, :, None] - time[:, None, :]).abs()
        # what channel a cell is of, as a vector; products with it are faster than to
        # pick entries, there and back
        place = F.one_hot(windows.channel + 1, len(self.mean) + 1)[..., 1:].to(time)
        levels = self.mixing @ self.mixing.mT + torch.diag_embed(
            (2 * self.log_own).exp()
        )
        total, waves = 0.0, {}
        for k, block in enumerate(self.blocks):
            level = place @ levels[k] @ place.mT
            if block.kind == "ou":
                total = total + level * _decay(self.log_rate[k].exp(), lag).exp()
            elif block.kind == "matern":
                decay = _decay(self.log_rate[k].exp(), lag)
                total = total + level * ((1 - decay) * decay.exp())
            elif block.kind == "cycle":
                frequency = block.frequency * self.tuning()[block.first]
                angle = time * (frequency * block.harmonic)
                wave = torch.stack([angle.cos(), angle.sin()], -1)
                wave = level * (wave @ wave.mT)
                waves[block.first] = waves.get(block.first, 0.0) + wave
            else:
                total = total + level
        for first, wave in waves.items():
            total = total + wave * _decay(self.log_rate[first].exp(), lag).exp()
        noise = place @ ((2 * self.log_noise).exp() + FLOOR**2)
        return total + torch.diag_embed(noise + (windows.channel < 0).to(noise))

    def penalty(self):
        """Return minus the log prior of the parameters, in nats.

        Channels have parts of similar size, so that rare ones learn from the others.
        """
        own = self.log_own
        size = 0.5 * ((own - own.mean(1, keepdim=True)) ** 2).sum()
        size = size + 0.5 * (self.mixing**2).sum() + 0.005 * (own**2).sum()
        noise = 0.5 * ((self.log_noise + 1.5) / 2) ** 2
        return size + noise.sum() + 2 * ((self.power - 1) ** 2).sum()

    def process(self, centre, scale):
        """Return the learned process, in units of ``scale`` around ``centre``."""
        with torch.no_grad():
            rate, tuning = self.log_rate.exp().numpy(), self.tuning().numpy()
            own = (2 * self.log_own).exp().numpy()
            mixing, mean = self.mixing.numpy(), self.mean.numpy()
            noise = (2 * self.log_noise).exp().numpy() + FLOOR**2
        parts = []
        for k, block in enumerate(self.blocks):
            size, vectors = np.linalg.eigh(mixing[k] @ mixing[k].T + np.diag(own[k]))
            keep = size > NEGLIGIBLE
            loadings = scale[:, None] * vectors[:, keep] * np.sqrt(size[keep])
            if block.kind == "constant":
                parts.append(("ou", loadings, 0.0, 0.0))
            elif block.kind == "cycle":
                frequency = block.harmonic * block.frequency * tuning[block.first]
                parts.append(("cycle", loadings, rate[block.first], frequency))
            else:
                parts.append((block.kind, loadings, rate[k], 0.0))
        return LinearProcess.from_blocks(centre + scale * mean, noise * scale**2, parts)


def _decay(rate, lag):
    """Return the exponent of a decay, cut off where numbers get subnormal, slow."""
    return (-rate * lag).clamp(min=-40.0)


def _log_likelihood(model, windows):
    """Return the marginal log-likelihoods of windows, (n_windows,).

    Their gradients to covariance and values, half of ``a a' - inv(K)`` and ``-a`` for
    ``a = inv(K) y``, are known, so nothing goes back through the factorisation.
    """
    K = model.covariance(windows)
    value, slope = model.warp(windows)
    seen = windows.channel >= 0
    with torch.no_grad():
        root = torch.linalg.cholesky(K)
        inverse = torch.cholesky_inverse(root)
        weight = (inverse @ value[..., None])[..., 0]
        exact = -0.5 * (weight * value).sum(-1) - 0.5 * LOG_2PI * seen.to(K).sum(-1)
        exact -= root.diagonal(dim1=1, dim2=2).log().sum(-1)
        gradient = 0.5 * (weight[:, :, None] * weight[:, None, :] - inverse)
    linear = (gradient * K).sum((1, 2)) - (weight * value).sum(-1)
    return linear + (exact - linear).detach() + slope.sum(-1)


def _learn(model, windows, n_steps, batch, learning_rate, generator):
    """Maximise the penalised likelihood by Adam."""
    optimizer = torch.optim.Adam(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, n_steps, eta_min=learning_rate / 50
    )
    for _ in range(n_steps):
        index = torch.randperm(len(windows.time), generator=generator)[:batch]
        part = windows[index]
        loss = model.penalty() / windows.n_cells
        loss = loss - _log_likelihood(model, part).sum() / part.n_cells
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _evaluate(model, windows, batch):
    """Return the log-likelihood of all windows less the penalty."""
    with torch.no_grad():
        total = -float(model.penalty())
        for first in range(0, len(windows.time), batch):
            part = windows[first : first + batch]
            total += float(_log_likelihood(model, part).sum())
    return total


def _draw_windows(panel, values, size, most, rng):
    """Return windows of cells of a panel.

    A series that fits into a window is one; of a longer one half of the windows are
    stretches, half are whole rows drawn from spans of any length up to all.
    """
    rows, channels = np.nonzero(~np.isnan(values))
    if not len(rows):
        raise ValueError("the panel has no observed value")
    start = np.searchsorted(rows, panel.offsets)
    n_cells = np.diff(start)
    n_windows = np.where(n_cells > size, 2 * (n_cells // size + 1), n_cells > 0)
    series = np.repeat(np.arange(len(n_cells)), n_windows)
    number = np.arange(len(series)) - np.searchsorted(series, series)
    pieces = []
    for k in rng.permutation(len(series))[:most]:
        cells = np.arange(start[series[k]], start[series[k] + 1])
        share = 0.0
        if number[k] % 2:
            share = min(1.25 * rng.uniform(), 1.0)
        span = round(min(size, len(cells)) * max(len(cells) / size, 1.0) ** share)
        first = rng.integers(len(cells) - span + 1)
        cells = cells[first : first + span]
        if span > size:
            _, row, count = np.unique(
                rows[cells], return_inverse=True, return_counts=True
            )
            order = rng.permutation(len(count))
            chosen = order[: np.searchsorted(np.cumsum(count[order]), size, "right")]
            cells = cells[np.isin(row, chosen)]
        pieces.append(cells)
    longest = max(len(cells) for cells in pieces)
    time = np.zeros((len(pieces), longest))
    channel = np.full((len(pieces), longest), -1)
    value = np.zeros((len(pieces), longest))
    for k, cells in enumerate(pieces):
        place = k, slice(len(cells))
        time[place] = panel.time[rows[cells]]
        channel[place] = channels[cells]
        value[place] = values[rows[cells], channels[cells]]
    return _Windows(*map(torch.as_tensor, (time, channel, value)))


def _robust_scale(values):
    """Return medians and interquartile ranges, as of a Gaussian, of channels."""
    centre, scale = np.zeros(values.shape[1]), np.ones(values.shape[1])
    for channel, column in enumerate(values.T):
        column = column[~np.isnan(column)]
        if len(column):
            low, centre[channel], high = np.quantile(column, [0.25, 0.5, 0.75])
            scale[channel] = (high - low) / 1.349 or column.std() or 1.0
    return centre, scale


def _time_scales(panel):
    """Return a typical step and the typical span of a series."""
    gaps = np.diff(panel.time)
    series = np.repeat(np.arange(len(panel.offsets) - 1), np.diff(panel.offsets))
    gaps = gaps[(np.diff(series) == 0) & (gaps > 0)]
    step = float(np.median(gaps)) if len(gaps) else 1.0
    filled = np.flatnonzero(np.diff(panel.offsets))
    spans = (
        panel.time[panel.offsets[filled + 1] - 1] - panel.time[panel.offsets[filled]]
    )
    span = float(np.median(spans[spans > 0])) if (spans > 0).any() else step
    return step, max(span, step)


def _start_blocks(n_channels, step, span):
    """Return the blocks of a process without cycles."""
    middle = math.sqrt(step * span)
    if n_channels > FEW:
        scales = [span, middle, 2 * step]
        return [_Block("constant", 1.0)] + [_Block("ou", scale) for scale in scales]
    return [
        _Block("constant", 1.0),
        _Block("matern", span / 3),
        _Block("matern", middle),
        _Block("ou", middle),
        _Block("ou", 2 * step),
    ]


def _cycle_blocks(period, step, span, first, most):
    """Return the blocks of harmonics of a period, as far as rows can tell."""
    n = int(min(most, max(1, period / (2 * step))))
    frequency = 2 * math.pi / period
    return [_Block("cycle", span, frequency, j + 1, first) for j in range(n)]


def fit_process(panel, *, rng, window=128, n_windows=160, n_steps=150, batch=16):
    """Learn a linear process from a panel.

    Parameters
    ----------
    panel : Panel
        Values roughly in standard deviations of their channels.
    rng : numpy.random.Generator
        Draws windows and starting values.
    window : int
        Cells of a window at most.
    n_windows : int
        Windows at most; a panel of many series is learned from some of them.
    n_steps, batch : int
        Steps of Adam, and windows in each.

    Returns
    -------
    process : LinearProcess
    """
    return _fit(panel, rng, False, window, n_windows, n_steps, batch)[1]


def fit_warped_process(panel, *, rng, window=128, n_windows=160, n_steps=150, batch=16):
    """Learn a warp of the channels and a linear process of the warped panel.

    Parameters are as for ``fit_process``.

    Returns
    -------
    warp : Warp
    process : LinearProcess
        For ``warp.forward(warp.limit(panel.values))``.
    """
    return _fit(panel, rng, True, window, n_windows, n_steps, batch)


def _fit(panel, rng, warped, window, n_windows, n_steps, batch):
    """Learn a process without cycles, then add cycles as long as they pay."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    centre, scale = _robust_scale(panel.values)
    bounds = find_bounds(panel.values, centre, scale)
    values = (np.clip(panel.values, *bounds) - centre) / scale
    step, span = _time_scales(panel)
    n_channels = values.shape[1]
    zero, one = np.zeros(n_channels), np.ones(n_channels)
    windows = _draw_windows(panel, values, window, n_windows, rng)

    def learn(model):
        _learn(model, windows, n_steps, batch, LEARNING_RATE, generator)
        return _evaluate(model, windows, batch)

    model = _Model(n_channels, _start_blocks(n_channels, step, span), warped, generator)
    best = learn(model)
    most = MOST_HARMONICS if n_channels <= FEW else 2
    refused = []
    while len(refused) < MOST_TRIES and model.n_cycles < MOST_CYCLES:
        warp = Warp(zero, one, model.powers(), (bounds - centre) / scale)
        seen = replace(panel, values=warp.forward(values))
        weight = -model.process(zero, one).log_density_and_gradient(seen)[1]
        period = find_cycle(panel, weight, step, rng, refused)
        if period is None:
            break
        cycle = _cycle_blocks(period, step, span, len(model.blocks), most)
        larger = _Model(n_channels, model.blocks + cycle, warped, generator)
        larger.extend(model)
        score = learn(larger)
        # Schwarz's criterion.
        n_new = len(cycle) * n_channels + 2
        if score < best + n_new * 0.5 * math.log(windows.n_cells):
            refused.append(period)
            continue
        model, best = larger, score
    if not warped:
        return None, model.process(centre, scale)
    warp = Warp(centre, scale, model.powers(), bounds, find_levels(panel.values))
    return warp, model.process(zero, one)
