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

__all__ = ["Block", "Correlations", "Windows", "gaussian"]

LOG_2PI = math.log(2 * math.pi)
# Decays are cut off at exp(-40), before numbers get subnormal, slow.
CUT_OFF = 40.0
# Lags of all windows are compared if they may become so many times fewer by it.
FEWER = 2


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


class Correlations:
    """Correlations in time of blocks, and their derivatives.

    Parameters
    ----------
    blocks : list of Block
    rate, frequency : Tensor of shape (n_blocks,)
        Of a cycle those of its first block count.
    lag : Tensor of shape (n_lags,)

    Attributes
    ----------
    value : Tensor of shape (n_blocks, n_lags)
    by_rate, by_frequency : Tensor of shape (n_blocks, n_lags)
        Derivatives of the values to the logarithms of rate and frequency.
    """

    def __init__(self, blocks, rate, frequency, lag):
        self.blocks = blocks
        self.value = lag.new_ones(len(blocks), len(lag))
        self.by_rate = torch.zeros_like(self.value)
        self.by_frequency = torch.zeros_like(self.value)
        for k, block in enumerate(blocks):
            if block.kind == "cycle":
                if block.harmonic == 1:
                    n = sum(other.first == k for other in blocks)
                    self._cycle(slice(k, k + n), rate[k] * lag, frequency[k] * lag)
            elif block.kind != "constant":
                decay = (rate[k] * lag).clamp_(max=CUT_OFF)
                value = torch.exp(-decay, out=self.value[k])
                slope = torch.mul(decay, value, out=self.by_rate[k])
                if block.kind == "matern":
                    value += slope
                    slope *= decay
                slope.neg_()

    def _cycle(self, part, decay, angle):
        """Fill in the harmonics of a cycle: each follows from the two before."""
        decay.clamp_(max=CUT_OFF)
        value, slope = self.value[part], self.by_frequency[part]
        double = 2 * angle.cos()
        cosine, sine = (-decay).exp(), 0.0
        cosines, sines = (cosine, cosine * double / 2), (sine, cosine * angle.sin())
        for j in range(len(value)):
            value[j] = cosines[1]
            torch.mul(sines[1], angle, out=slope[j]).mul_(-(j + 1))
            cosines = cosines[1], double * cosines[1] - cosines[0]
            sines = sines[1], double * sines[1] - sines[0]
        torch.mul(value, -decay, out=self.by_rate[part])

    def gradients(self, gradient):
        """Return gradients to logarithms of rates and frequencies, each (n_blocks,)."""
        by_rate = torch.linalg.vecdot(self.by_rate, gradient)
        by_frequency = torch.linalg.vecdot(self.by_frequency, gradient)
        for k, block in enumerate(self.blocks):
            if block.kind == "cycle" and block.harmonic > 1:
                for part in (by_rate, by_frequency):
                    part[block.first] += part[k]
                    part[k] = 0.0
        return by_rate, by_frequency


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
        n_channels, batch : int
            Channels there are, and how many windows are looked at together.
        """
        (n_windows, n_cells), seen = time.shape, channel >= 0
        n_pairs = n_channels * (n_channels + 1) // 2
        last = np.where(seen, time, -np.inf).max(1, keepdims=True)
        time = np.where(seen, time, last)
        # the times of a window are numbered
        number = np.zeros(time.shape, np.int64)
        number[:, 1:] = np.cumsum(np.diff(time) > 0, axis=1)
        times = np.repeat(last, number.max() + 1, axis=1)
        np.put_along_axis(times, number, time, axis=1)
        lag, place = _differences(times), _pairs(number)
        pair = _pairs(np.maximum(channel, 0))
        most = min(batch, n_windows) * min(lag.shape[1], n_cells**2 // n_pairs)
        few = _distinct(lag, most // FEWER, np.abs(time).max())
        parts = channel, value
        if few is not None:
            lag, which = few
            place = which[np.arange(n_windows)[:, None, None], place]
            parts = *parts, lag[None], place * n_pairs + pair
        elif n_pairs * lag.shape[1] <= n_cells**2:
            parts = *parts, lag, place * n_pairs + pair
        else:
            place = np.repeat(_pairs(np.arange(n_cells)[None]), n_windows, axis=0)
            i, j = np.tril_indices(n_cells)
            parts = *parts, _differences(time), place, pair[:, i, j]
        return cls(*map(torch.as_tensor, parts))

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

    def gradients(self, level, correlation, gradient):
        """Return gradients to levels and correlations from that to covariances."""
        n_entries = correlation.shape[1] * (level.shape[1] if self.pair is None else 1)
        entries = gradient.new_zeros(n_entries)
        entries.scatter_add_(0, self.places(n_entries), gradient.flatten())
        if self.pair is None:
            entries = entries.view(-1, level.shape[1])
            return correlation @ entries, level @ entries.T
        pair = self.pair.flatten()
        by_level = torch.zeros_like(level)
        by_level.index_add_(1, pair, correlation * entries)
        return by_level, level[:, pair] * entries


def _pairs(number):
    """Return numbers of unordered pairs of numbers, of (n, m) as (n, m, m)."""
    one, other = number[:, :, None], number[:, None, :]
    high = np.maximum(one, other)
    return high * (high + 1) // 2 + np.minimum(one, other)


def _differences(time):
    """Return differences of times, of (n, m) as (n, m * (m + 1) / 2)."""
    later, earlier = np.tril_indices(time.shape[1])
    return time[:, later] - time[:, earlier]


def _distinct(lag, most, latest):
    """Return distinct lags, and which of them each is; None if there are too many.

    Lags that differ by no more than rounding of the times, up to ``latest``, are one.
    """
    unit = 64 * np.finfo(float).eps * latest or 1.0
    some = np.rint(lag[:4] / unit)
    if len(np.unique(some)) > some.size // FEWER:
        return None
    steps = np.rint(lag / unit).astype(np.int64)
    distinct = np.unique(steps)
    if len(distinct) > most:
        return None
    return distinct * unit, np.searchsorted(distinct, steps)


def gaussian(covariance, value, count, with_gradient=True):
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
        log_det[k] = np.log(root.diagonal()).sum()
        if failed or not np.isfinite(log_det[k]):
            raise torch.linalg.LinAlgError("a covariance is not positive definite")
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
