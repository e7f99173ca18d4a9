"""How the parameters of a linear process are learned.

The covariance of a :class:`~sknode._series.state_space.LinearProcess` is a sum of
closed forms, so its parameters are learned as those of a Gaussian process: from windows
of a hundred or so cells of the table, whose marginal likelihoods are added up. Half of
the windows are stretches of neighbouring rows, half are scattered over longer spans,
which is where slow parts and periods show.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from sknode._blas import one_thread
from sknode._optimizers import Adam
from sknode._series.cycles import find_cycle
from sknode._series.likelihood import Block, Windows, log_likelihood
from sknode._series.state_space import LinearProcess
from sknode._series.warp import Warp, find_bounds, find_levels

__all__ = ["fit_process", "fit_warped_process"]

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


class _Model:
    """Warp, mean and covariance of the channels.

    The covariance is a sum of blocks, each a covariance of the channels, low rank plus
    diagonal, times a correlation in time.

    Attributes
    ----------
    parameters : Tensor of shape (n_parameters,)
        All of them; ``log_own`` and so on are parts of it.
    """

    def __init__(self, n_channels, blocks, warped, generator):
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
        start = {
            "log_own": 0.5 * share.log()[:, None].repeat(1, n_channels),
            "mixing": 0.3 * share.sqrt()[:, None, None] * mixing,
            "log_rate": torch.tensor([-math.log(b.scale) for b in blocks], **make),
            "shift": torch.zeros(n, **make),
            "log_noise": torch.full((n_channels,), -1.5, **make),
            "mean": torch.zeros(n_channels, **make),
            "power_": torch.zeros(2, n_channels, **make),
        }
        self.shapes = {name: value.shape for name, value in start.items()}
        self.parameters = torch.cat([value.flatten() for value in start.values()])
        for name, part in self.parts(self.parameters).items():
            setattr(self, name, part)
        # a cycle more or less over a span is a large change of its frequency
        self.frequency = torch.tensor([b.frequency for b in blocks], **make)
        turns = [b.frequency * b.scale / (2 * math.pi) for b in blocks]
        self.width = torch.tensor([0.2 / t if t else 0.0 for t in turns], **make)
        self.channels = torch.tril_indices(n_channels, n_channels)

    def parts(self, flat):
        """Return views of a vector like that of the parameters, by their names."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), flat.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

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
        return power.numpy()

    def tuning(self):
        """Return factors of frequencies."""
        return (self.width * self.shift).exp()

    def extend(self, other):
        """Take over what another model with fewer blocks has learned."""
        n = len(other.blocks)
        for name in ("log_own", "mixing", "log_rate", "shift"):
            getattr(self, name)[:n] = getattr(other, name)
        for name in ("log_noise", "mean", "power_"):
            getattr(self, name)[:] = getattr(other, name)

    def levels(self):
        """Return covariances of pairs of channels, (n_blocks, n_pairs)."""
        level = self.mixing @ self.mixing.mT
        level.diagonal(dim1=1, dim2=2).add_((2 * self.log_own).exp())
        return level[:, *self.channels]

    def warp(self, windows):
        """Return warped values without their mean, log-slopes, and what these two
        change by with the power of the warp; all zero as padding.
        """
        channel, value = windows.channel.clamp(min=0), windows.value
        slope = by_power = log = torch.zeros_like(value)
        if self.warped:
            power = torch.where(value < 0, *self.power[:, channel])
            log = value.abs().log1p()
            rise = torch.expm1(power * log)
            by_power = value.sign() * (log * (rise + 1) - rise / power) / power
            value = value.sign() * rise / power
            slope = (power - 1) * log
        # values of padding are 0, and stay it
        value = value - self.mean[channel] * (windows.channel >= 0)
        return value, slope, by_power, log

    def penalty(self):
        """Return minus the log prior of the parameters, in nats, and its gradient.

        Channels have parts of similar size, so that rare ones learn from the others.
        """
        own, mixing, power = self.log_own, self.mixing, self.power
        unlike = own - own.mean(1, keepdim=True)
        noise = (self.log_noise + 1.5) / 2
        size = 0.5 * (unlike**2).sum() + 0.5 * (mixing**2).sum()
        size = size + 0.005 * (own**2).sum() + 0.5 * (noise**2).sum()
        gradient = torch.zeros_like(self.parameters)
        parts = self.parts(gradient)
        parts["log_own"].add_(unlike).add_(own, alpha=0.01)
        parts["mixing"].add_(mixing)
        parts["log_noise"].add_(noise, alpha=0.5)
        parts["power_"].add_(2 * (power - 1) * power * (2 - power))
        return size + 2 * ((power - 1) ** 2).sum(), gradient

    def process(self, centre, scale):
        """Return the learned process, in units of ``scale`` around ``centre``."""
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


def _log_likelihood(model, windows, with_gradient=True):
    """Return the marginal log-likelihoods of windows, (n_windows,), and the gradient of
    their sum to the parameters, (n_parameters,), or None.
    """
    channel = windows.channel.clamp(min=0)
    noise = (2 * model.log_noise).exp()
    value, slope, by_power, log = model.warp(windows)
    total, by = log_likelihood(
        windows,
        value,
        noise[channel] + FLOOR**2,
        model.blocks,
        model.levels(),
        model.log_rate.exp(),
        model.frequency * model.tuning(),
        with_gradient,
    )
    total = total + slope.sum(1)
    if by is None:
        return total, None
    gradient = torch.zeros_like(model.parameters)
    parts, channel = model.parts(gradient), channel.flatten()
    parts["log_noise"].index_add_(0, channel, by.noise.flatten()).mul_(2 * noise)
    parts["mean"].index_add_(0, channel, by.value.flatten(), alpha=-1)
    if model.warped:
        side = channel + len(noise) * (windows.value >= 0).flatten()
        by_power = (log + by.value * by_power).flatten()
        parts["power_"].view(-1).index_add_(0, side, by_power)
        parts["power_"].mul_(model.power * (1 - model.power / 2))
    parts["log_rate"].copy_(by.log_rate)
    parts["shift"].copy_(by.log_frequency * model.width)
    level = gradient.new_zeros(len(model.blocks), len(noise), len(noise))
    level[:, *model.channels] = by.level
    own = level.diagonal(dim1=1, dim2=2)
    parts["log_own"].copy_(2 * own * (2 * model.log_own).exp())
    parts["mixing"].copy_((level + level.mT) @ model.mixing)
    return total, gradient


def _learn(model, windows, n_steps, batch, learning_rate, generator):
    """Maximise the penalised likelihood by Adam."""
    optimizer = Adam([{"params": [model.parameters]}], learning_rate, (0.9, 0.98))
    (group,), n_cells = optimizer.param_groups, windows.n_cells
    for step in range(n_steps):
        # along a cosine, down to a fiftieth
        wave = (1 + math.cos(math.pi * step / n_steps)) / 2
        group["lr"] = learning_rate * (wave + (1 - wave) / 50)
        index = torch.randperm(len(windows), generator=generator)[:batch]
        part = windows[index]
        gradient = _log_likelihood(model, part)[1]
        penalty = model.penalty()[1]
        model.parameters.grad = penalty / n_cells - gradient / part.n_cells
        optimizer.step()


def _evaluate(model, windows, batch):
    """Return the log-likelihood of all windows less the penalty."""
    total = -float(model.penalty()[0])
    for first in range(0, len(windows), batch):
        part = windows[first : first + batch]
        total += float(_log_likelihood(model, part, with_gradient=False)[0].sum())
    return total


def _draw_windows(panel, values, size, most, batch, rng):
    """Return windows of cells of a panel, which are looked at in batches.

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
            n = np.searchsorted(np.cumsum(count[order]), size, "right")
            cells = cells[np.isin(row, order[: max(1, n)])]
            if not n:  # a part of a row that is too long for a window
                cells = np.sort(rng.permutation(cells)[:size])
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
    return Windows.prepare(time, channel, value, values.shape[1], batch)


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
        return [Block("constant", 1.0)] + [Block("ou", scale) for scale in scales]
    return [
        Block("constant", 1.0),
        Block("matern", span / 3),
        Block("matern", middle),
        Block("ou", middle),
        Block("ou", 2 * step),
    ]


def _cycle_blocks(period, step, span, first, most):
    """Return the blocks of harmonics of a period, as far as rows can tell."""
    n = int(min(most, max(1, period / (2 * step))))
    frequency = 2 * math.pi / period
    return [Block("cycle", span, frequency, j + 1, first) for j in range(n)]


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


def _weigh(warp, process, panel):
    """Return the inverse covariance of a panel times its values."""
    seen = replace(panel, values=warp.forward(panel.values))
    return -process.log_density_and_gradient(seen)[1]


@one_thread
def _fit(panel, rng, warped, window, n_windows, n_steps, batch):
    """Learn a process without cycles, then add cycles as long as they pay."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    centre, scale = _robust_scale(panel.values)
    bounds = find_bounds(panel.values, centre, scale)
    values = (np.clip(panel.values, *bounds) - centre) / scale
    scaled = replace(panel, values=values)
    step, span = _time_scales(panel)
    n_channels = values.shape[1]
    zero, one = np.zeros(n_channels), np.ones(n_channels)
    windows = _draw_windows(panel, values, window, n_windows, batch, rng)

    def learn(model):
        _learn(model, windows, n_steps, batch, LEARNING_RATE, generator)
        return _evaluate(model, windows, batch)

    model = _Model(n_channels, _start_blocks(n_channels, step, span), warped, generator)
    best = learn(model)
    most = MOST_HARMONICS if n_channels <= FEW else 2
    refused = []
    while len(refused) < MOST_TRIES and model.n_cycles < MOST_CYCLES:
        warp = Warp(zero, one, model.powers(), (bounds - centre) / scale)
        weigh = partial(_weigh, warp, model.process(zero, one))
        period = find_cycle(scaled, weigh, step, rng, refused)
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
