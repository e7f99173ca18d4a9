"""A monotone change of the units of each channel towards normality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Warp", "find_bounds", "find_levels"]


@dataclass(frozen=True)
class Warp:
    """Powers of values over their centre, one for each side.

    ``z = sign(y) * ((1 + abs(y)) ** p - 1) / p`` for ``y = (value - centre) / scale``,
    the logarithm for p = 0: the two sides of I. Yeo & R. Johnson, "A new family of
    power transformations to improve normality or symmetry" (2000), each with its own
    power, so that skewness and heavy tails both can be taken out.

    Attributes
    ----------
    centre, scale : ndarray of shape (n_channels,)
    power : ndarray of shape (2, n_channels)
        Below the centre and above it; 1 changes nothing.
    bounds : ndarray of shape (2, n_channels)
        Values beyond are not believed, see ``limit``.
    levels : tuple of n_channels ndarrays
        The values of a channel that takes few, sorted; empty for others.
    """

    centre: np.ndarray
    scale: np.ndarray
    power: np.ndarray
    bounds: np.ndarray
    levels: tuple = ()

    def limit(self, values):
        """Return values with those beyond the bounds moved onto them.

        For observations that a process is conditioned on: one nonsense value would
        otherwise spoil its neighbours in time, and all channels.
        """
        return np.clip(values, *self.bounds)

    def forward(self, values):
        """Return warped values, (..., n_channels)."""
        y = (values - self.centre) / self.scale
        power = np.where(y < 0, *self.power)
        log = np.log1p(np.abs(y))
        small = np.abs(power) < 1e-8
        power = np.where(small, 1.0, power)
        return np.sign(y) * np.where(small, log, np.expm1(power * log) / power)

    def inverse(self, warped):
        """Return values from warped ones; medians and quantiles stay what they are."""
        power = np.where(warped < 0, *self.power)
        small = np.abs(power) < 1e-8
        power = np.where(small, 1.0, power)
        size = np.abs(warped)
        with np.errstate(over="ignore"):  # infinity where a path went beyond bounds
            y = np.expm1(np.where(small, size, np.log1p(power * size) / power))
        return self.centre + self.scale * np.sign(warped) * y

    def snap(self, values):
        """Return values moved to the nearest level of their channel, if it has some.

        Nearest in warped units, so that the snapped median of a Gaussian there is the
        median of what its draws are snapped to.
        """
        snapped = np.array(values, float)
        warped = self.forward(snapped)
        for channel, levels in enumerate(self.levels):
            if len(levels):
                table = np.tile(self.centre, (len(levels), 1))
                table[:, channel] = levels
                ladder = self.forward(table)[:, channel]
                z = warped[..., channel]
                nearest = levels[np.searchsorted((ladder[1:] + ladder[:-1]) / 2, z)]
                snapped[..., channel] = np.where(np.isnan(z), z, nearest)
        return snapped

    def log_slope(self, values):
        """Return the logarithm of the derivative of ``forward``."""
        y = (values - self.centre) / self.scale
        power = np.where(y < 0, *self.power)
        return (power - 1) * np.log1p(np.abs(y)) - np.log(self.scale)


def find_bounds(values, centre, scale, share=0.02, times=4.0, least=8.0):
    """Return what values of channels have to be within to be believed.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_channels)
    centre, scale : ndarray of shape (n_channels,)
        Robust ones.
    share, times : float
        Bounds are so many times as far from the centre as the quantiles of that share,
        so that heavy tails have wide ones.
    least : float
        And at least so many scales from the centre.

    Returns
    -------
    bounds : ndarray of shape (2, n_channels)
    """
    reach = np.tile(least * scale, (2, 1))
    for channel, column in enumerate(values.T):
        column = column[~np.isnan(column)]
        if len(column):
            tails = np.abs(np.quantile(column, [share, 1 - share]) - centre[channel])
            reach[:, channel] = np.maximum(reach[:, channel], times * tails)
    return centre + np.array([[-1.0], [1.0]]) * reach


def find_levels(values, most=20, repeats=10):
    """Return the values of channels that take few, each seen many times on average.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_channels)
    most : int
        Levels of a channel at most.
    repeats : int
        Observations per level at least.

    Returns
    -------
    levels : tuple of n_channels ndarrays
    """
    found = []
    for column in values.T:
        column = column[~np.isnan(column)]
        levels = np.unique(column)
        few = len(levels) <= min(most, len(column) / repeats)
        found.append(levels if few else levels[:0])
    return tuple(found)
