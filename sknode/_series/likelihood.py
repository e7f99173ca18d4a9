"""Marginal likelihoods of windows of cells, and their gradients in closed form.

The cells of a window are jointly Gaussian, and their covariance is a sum of blocks,
each a covariance of the channels times a correlation in time. That is a function of two
channels and of a lag. It is evaluated once for each lag that occurs and looked up for
each pair of cells; the gradient goes the same way back, summed over the pairs that had
looked up the same number. Of regular series there are few different lags, and many
blocks then cost hardly more than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs

__all__ = ["Block", "Windows", "log_likelihood"]

LOG_2PI = math.log(2 * math.pi)
# Decays are cut off at exp(-40), before numbers get subnormal, slow.
CUT_OFF = 40.0
# Lags of all windows are compared if they may become so many times fewer by it.
FEWER = 2
# They are then rounded to multiples of a unit; the shortest are at least so many.
COARSE = 1e6
# Correlations kept at a time, about what fits into a cache.
CHUNK = 2**17


@dataclass(frozen=True)
class Block:
    """A part of the covariance: its kind, time scale, and where it is a cycle.

    Harmonics of a cycle follow each other, and share the time scale and the period of
    the first, whose place ``first`` is.
    """

    kind: str
    scale: float
    frequency: float = 0.0
    harmonic: int = 1
    first: int = -1


class _Correlations:
    """Correlations in time of blocks, and how they change.

    Parameters
    ----------
    blocks : list of Block
    rate, frequency : Tensor of shape (n_blocks,)
        Of a cycle those of its first block count.
    lag : Tensor of shape (n_lags,)

    Attributes
    ----------
    value : Tensor of shape (n_blocks, n_lags)
    falls, turns : list of (slice, Tensor, Tensor)
        Blocks that share a rate, or a frequency, and two factors, (n, n_lags) and
        (n_lags,). Their product is minus the derivatives of the values to the logarithm
        of the rate; or of the frequency, of the j-th harmonic divided by j.
    """

    def __init__(self, blocks, rate, frequency, lag):
        self.value = lag.new_empty(len(blocks), len(lag))
        self.falls, self.turns = [], []
        for k, block in enumerate(blocks):
            if block.kind == "constant":
                self.value[k] = 1.0
            elif block.harmonic == 1:
                decay = (rate[k] * lag).clamp_(max=CUT_OFF)
                n = 1
                if block.kind == "cycle":
                    n = sum(other.first == k for other in blocks)
                part = slice(k, k + n)
                value = self.value[part]
                fall = torch.exp(-decay, out=value[0])[None]
                if block.kind == "matern":
                    fall = decay * fall
                    value += fall
                elif block.kind == "cycle":
                    angle, fall = frequency[k] * lag, value
                    self.turns.append((part, _add_waves(value, angle), angle))
                self.falls.append((part, fall, decay))

    def gradients(self, level, contract):
        """Return gradients to logarithms of rates and frequencies, each (n_blocks,).

        Parameters
        ----------
        level : Tensor of shape (n_blocks, n_pairs)
            Covariances of pairs of channels.
        contract : callable
            ``Windows.contract`` with the gradient to covariances of cells.
        """
        by_rate, by_frequency = level.new_zeros(2, len(level))
        for part, fall, decay in self.falls:
            by_rate[part.start] = -(level[part] * contract(fall, decay)).sum()
        for part, sine, angle in self.turns:
            slope = (level[part] * contract(sine, angle)).sum(1)
            by_frequency[part.start] = -(slope * torch.arange(1, 1 + len(slope))).sum()
        return by_rate, by_frequency


def _add_waves(value, angle):
    """Make a cycle of a decay, and return the same with sines in place of cosines.

    Parameters
    ----------
    value : Tensor of shape (n_harmonics, n_lags)
        Of which the first is the decay, and the others are written.
    angle : Tensor of shape (n_lags,)
    """
    sine, double = torch.empty_like(value), 2 * angle.cos()
    decay = value[0].clone()
    torch.mul(angle.sin(), decay, out=sine[0])
    value[0].mul_(double).mul_(0.5)
    # each harmonic follows from the two before
    for j in range(1, len(value)):
        torch.mul(double, value[j - 1], out=value[j])
        torch.mul(double, sine[j - 1], out=sine[j])
        value[j].sub_(value[j - 2] if j > 1 else decay)
        if j > 1:
            sine[j].sub_(sine[j - 2])
    return sine


@dataclass(frozen=True)
class Windows:
    """Cells in windows, sorted by time, padded at the end, and their covariances.

    Attributes
    ----------
    channel : Tensor of shape (n_windows, n_cells)
        -1 as padding.
    value : Tensor of shape (n_windows, n_cells)
    lag : Tensor of shape (n_windows, n_lags) or (1, n_lags)
        Lags that occur in each window; or in any of them, where these are few.
    place : Tensor of shape (n_windows, n_cells, n_cells)
        Where the covariance of two cells is found: for lag ``r`` and pair ``p`` of
        channels at ``r * n_pairs + p``; or at ``r``, if there is ``pair``.
    pair : Tensor of shape (n_windows, n_lags) or None
        Where most pairs of channels occur with few of the lags, each lag is of one pair
        of cells, and this is that of their channels.
    """

    channel: torch.Tensor
    value: torch.Tensor
    lag: torch.Tensor
    place: torch.Tensor
    pair: torch.Tensor | None = None

    @classmethod
    def prepare(cls, time, channel, value, n_channels, batch):
        """Find out which lags occur.

        Parameters
        ----------
        time, channel, value : ndarray of shape (n_windows, n_cells)
            Every window has a cell at least.
        n_channels, batch : int
            Channels there are, and how many windows are looked at together.
        """
        (n_windows, n_cells), seen = time.shape, channel >= 0
        n_pairs = n_channels * (n_channels + 1) // 2
        last = np.where(seen, time, -np.inf).max(1, keepdims=True)
        time = np.where(seen, time, last)
        pairs = [_pairs(one) for one in np.maximum(channel, 0)]
        # the times of a window are numbered
        number = np.zeros(time.shape, np.int64)
        number[:, 1:] = np.cumsum(np.diff(time) > 0, axis=1)
        times = np.repeat(last, number.max() + 1, axis=1)
        np.put_along_axis(times, number, time, axis=1)
        lag, which = _distinct(_differences(times), n_cells**2 // n_pairs, batch)
        if n_pairs * lag.size > n_windows * n_cells**2:
            lag, place = _differences(time), _pairs(np.arange(n_cells))
            place = np.repeat(place[None], n_windows, axis=0)
            lower = np.tri(n_cells, dtype=bool)
            parts = lag, place, np.stack([one[lower] for one in pairs])
        else:
            place = np.empty((n_windows, n_cells, n_cells), np.int64)
            for k, one in enumerate(pairs):
                place[k] = which[k][_pairs(number[k])] * n_pairs + one
            parts = lag, place
        return cls(*map(torch.as_tensor, (channel, value, *parts)))

    def __getitem__(self, index):
        """Return some of the windows."""
        lag = self.lag if len(self.lag) == 1 else self.lag[index]
        pair = None if self.pair is None else self.pair[index]
        parts = self.channel[index], self.value[index], lag, self.place[index]
        return Windows(*parts, pair)

    def __len__(self):
        return len(self.value)

    @property
    def n_cells(self):
        """How many cells there are in all windows."""
        return int((self.channel >= 0).sum())

    def chunks(self, n_blocks):
        """Yield slices of windows that are looked at together."""
        size = len(self)
        if len(self.lag) > 1:
            size = max(1, CHUNK // (n_blocks * self.lag.shape[1]))
        for first in range(0, len(self), size):
            yield slice(first, first + size)

    def places(self, n_entries):
        """Return where covariances are found among all these windows have, flat."""
        if len(self.lag) == 1:
            return self.place.flatten()
        first = torch.arange(len(self)) * (n_entries // len(self))
        return (self.place + first[:, None, None]).flatten()

    def covariances(self, level, correlation):
        """Return covariances of cells, without noise.

        Parameters
        ----------
        level : Tensor of shape (n_blocks, n_pairs)
            Covariances of pairs of channels.
        correlation : Tensor of shape (n_blocks, lag.numel())

        Returns
        -------
        covariance : Tensor of shape (n_windows, n_cells, n_cells)
        """
        if self.pair is None:
            entries = correlation.T @ level
        else:
            entries = (level[:, self.pair.flatten()] * correlation).sum(0)
        places = self.places(entries.numel())
        return entries.flatten().index_select(0, places).view(self.place.shape)

    def contract(self, gradient, n_pairs):
        """Return a function that sums products with a gradient over pairs of cells.

        Parameters
        ----------
        gradient : Tensor of shape (n_windows, n_cells, n_cells)
            To covariances.
        n_pairs : int
            Pairs of channels.

        Returns
        -------
        contract : callable
            Of ``factor``, (n, lag.numel()), and ``weight``, (lag.numel(),) or None, as
            (n, n_pairs): the gradient times the two of the lag, summed over pairs of
            cells with these channels.
        """
        n_entries = self.lag.numel() * (n_pairs if self.pair is None else 1)
        entries = gradient.new_zeros(n_entries)
        entries.scatter_add_(0, self.places(n_entries), gradient.flatten())
        if self.pair is None:
            entries = entries.view(-1, n_pairs)

        def contract(factor, weight=None):
            one = entries
            if weight is not None:
                one = entries * (weight[:, None] if self.pair is None else weight)
            if self.pair is None:
                return factor @ one
            total = factor.new_zeros(len(factor), n_pairs)
            return total.index_add_(1, self.pair.flatten(), factor * one)

        return contract


def _pairs(number):
    """Return (n, n) numbers of unordered pairs of n numbers."""
    high = np.maximum(number[:, None], number)
    return high * (high + 1) // 2 + np.minimum(number[:, None], number)


def _differences(time):
    """Return differences of times, of (n, m) as (n, m * (m + 1) / 2)."""
    later, earlier = np.tril_indices(time.shape[1])
    return time[:, later] - time[:, earlier]


def _distinct(lag, most, batch):
    """Return lags that occur in windows, and which of them each is.

    They are those of all windows, in one row, if there are few: at most one for
    `FEWER` that a batch of windows has, counting ``most`` a window. Lags that differ by
    no more than rounding are then one. Otherwise each window has its own.
    """
    own = lag, np.broadcast_to(np.arange(lag.shape[1]), lag.shape)
    unit = 64 * np.finfo(float).eps * lag.max()
    if lag.min(where=lag > 0, initial=np.inf) < COARSE * unit:
        return own
    unit = unit or 1.0  # all lags are zero
    some = np.rint(lag[:4] / unit)
    if len(np.unique(some)) > some.size // FEWER:
        return own
    steps = np.rint(lag / unit).astype(np.int64)
    distinct = np.unique(steps)
    if len(distinct) > min(batch, len(lag)) * min(lag.shape[1], most) // FEWER:
        return own
    return distinct[None] * unit, np.searchsorted(distinct, steps)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the sum of log-likelihoods, to what is named.

    Attributes
    ----------
    value, noise : Tensor of shape (n_windows, n_cells)
        0 as padding.
    level : Tensor of shape (n_blocks, n_pairs)
    log_rate, log_frequency : Tensor of shape (n_blocks,)
        0 for harmonics but the first.
    """

    value: torch.Tensor
    noise: torch.Tensor
    level: torch.Tensor
    log_rate: torch.Tensor
    log_frequency: torch.Tensor


def log_likelihood(
    windows, value, noise, blocks, level, rate, frequency, with_gradients=True
):
    """Return the marginal log-likelihoods of windows, and gradients of their sum.

    Half of ``a a' - inv(K)`` and ``-a``, for ``a = inv(K) y``, are the gradients to
    covariances and values.

    Parameters
    ----------
    windows : Windows
        Tell where cells are.
    value, noise : Tensor of shape (n_windows, n_cells)
        Values in place of theirs, 0 as padding, and variances of noise.
    blocks : list of Block
    level : Tensor of shape (n_blocks, n_pairs)
        Covariances of channels ``i`` and ``j``, not above ``i``, at
        ``i * (i + 1) / 2 + j``.
    rate, frequency : Tensor of shape (n_blocks,)
    with_gradients : bool

    Returns
    -------
    log_density : Tensor of shape (n_windows,)
    gradients : Gradients or None
    """
    count = (windows.channel >= 0).sum(1).tolist()
    log_density = value.new_empty(len(value))
    found = Gradients(*map(torch.zeros_like, (value, noise, level, rate, frequency)))
    for some in windows.chunks(len(blocks)):
        part = windows[some]
        correlation = _Correlations(blocks, rate, frequency, part.lag.flatten())
        covariance = part.covariances(level, correlation.value)
        covariance.diagonal(dim1=1, dim2=2).add_(noise[some])
        log_density[some], weight, gradient = _gaussian(
            covariance, value[some], count[some], with_gradients
        )
        if not with_gradients:
            continue
        contract = part.contract(gradient, level.shape[1])
        by_rate, by_frequency = correlation.gradients(level, contract)
        found.value[some] = -weight
        found.noise[some] = gradient.diagonal(dim1=1, dim2=2)
        found.level.add_(contract(correlation.value))
        found.log_rate.add_(by_rate)
        found.log_frequency.add_(by_frequency)
    return log_density, found if with_gradients else None


def _gaussian(covariance, value, count, with_gradient=True):
    """Return log-densities of windows, and their gradients.

    Parameters
    ----------
    covariance : Tensor of shape (n_windows, n_cells, n_cells)
        Is overwritten.
    value : Tensor of shape (n_windows, n_cells)
        0 as padding.
    count : list of int
        Cells of each window; those after them are padding.
    with_gradient : bool

    Returns
    -------
    log_density : Tensor of shape (n_windows,)
    weight : Tensor of shape (n_windows, n_cells)
        Inverse covariance times value: minus the gradient to it.
    gradient : Tensor of shape (n_windows, n_cells, n_cells) or None
        To the covariance of two cells, once for each two.
    """
    log_density = torch.empty(len(value), dtype=value.dtype)
    weight = torch.zeros_like(value)
    inverse, log_det = covariance.numpy(), log_density.numpy()
    for k, n in enumerate(count):
        # the lower triangle of the transpose, which is what LAPACK sees
        part = inverse[k, :n, :n].T
        root, failed = dpotrf(part, lower=1, clean=0, overwrite_a=1)
        # NaN is no failure to all of them
        if failed or not np.isfinite(root.diagonal()).all():
            raise torch.linalg.LinAlgError("a covariance is not positive definite")
        log_det[k] = np.log(root.diagonal()).sum()
        weight[k, :n] = torch.as_tensor(dpotrs(root, value[k, :n].numpy(), lower=1)[0])
        if with_gradient:
            root = dpotri(root, lower=1, overwrite_c=1)[0]
            if n < len(inverse[k]):
                inverse[k, n:] = inverse[k, :, n:] = 0.0
                part[:] = root
    size = torch.as_tensor(count, dtype=value.dtype)
    log_density.neg_().sub_(0.5 * (weight * value).sum(1) + 0.5 * LOG_2PI * size)
    if not with_gradient:
        return log_density, weight, None
    gradient = torch.mul(weight[:, :, None], weight[:, None, :]).sub_(covariance)
    # half of it, twice for two different cells
    once = torch.ones(gradient.shape[1:], dtype=value.dtype).triu()
    return log_density, weight, gradient.mul_(once.sub_(once.diag().diag() / 2))
