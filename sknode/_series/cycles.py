"""Periods of series, found in what a linear process does not explain.

If ``w`` is the inverse covariance of the observations times their values, the gradient
of the likelihood to the variance of a new cycle is half of
``abs(sum(w * exp(i f t)))**2`` minus its expectation: the score test of C. R. Rao. The
expectation varies slowly with the frequency, so a cycle is a peak over its
neighbourhood.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import median_filter
from scipy.stats import gamma

__all__ = ["find_cycle"]

# Grid points per typical step in time, and the most of them.
FINE, MOST = 4, 2**18
# A period is seen at least this often in the longest series.
REPEATS = 3
# With fewer repeats than this a neighbourhood is as wide as a peak and hides it: a peak
# is then tried that is so many times as high as what is typical of the rest.
FEW_REPEATS, STANDS_OUT = 9, 4.0
# How far a multiple of a period stands out if it is there.
PEAK = 6.0
# Frequencies that differ by less than this share are one.
NEAR = 0.02
# Multiples of a frequency that may belong to it.
HARMONICS = 6


def find_cycle(panel, weigh, step, rng, refused=(), most_series=64, level=1e-3):
    """Find the most prominent period.

    Parameters
    ----------
    panel : Panel
    weigh : callable
        Returns the inverse covariance times the values, 0 where nothing was observed,
        of some of the series: those that are looked at.
    step : float
        A typical step in time.
    rng : numpy.random.Generator
        Chooses series if there are many.
    refused : sequence of float
        Periods that are not to be found, nor parts of them.
    most_series : int
    level : float
        The probability to find a period where there is none, unless it is seen only a
        few times: such a one is a guess.

    Returns
    -------
    period : float or None
    """
    power, n_parts, frequency = _periodogram(panel, weigh, step, rng, most_series)
    if power is None:
        return None
    typical = gamma.median(n_parts) / n_parts
    # Neighbourhoods have the same width on the logarithmic axis.
    log_grid = np.geomspace(frequency[0], frequency[-1], 4 * len(frequency))
    at = np.searchsorted(frequency, log_grid).clip(max=len(frequency) - 1)
    octave = int(np.log(1.6) / np.log(log_grid[1] / log_grid[0])) | 1
    smooth = median_filter(power[at], octave, mode="nearest")
    background = np.interp(frequency, log_grid, smooth) / typical
    ratio = power / np.maximum(background, 1e-300)
    for period in refused:
        for multiple in range(1, HARMONICS + 1):
            ratio[np.abs(frequency * period / multiple - 1) < NEAR] = 0.0
    best = int(np.argmax(ratio))
    n_free = len(frequency) / 2
    if ratio[best] >= gamma.isf(level / n_free, n_parts) / n_parts:
        return 1 / _fundamental(ratio, frequency, best)
    return _find_slow_cycle(power, frequency, refused)


def _find_slow_cycle(power, frequency, refused):
    """Return the most prominent of the periods that are seen only a few times."""
    few = frequency < FEW_REPEATS / REPEATS * frequency[0]
    power, frequency = power[few], frequency[few]
    peaks = np.flatnonzero((power[1:-1] > power[:-2]) & (power[1:-1] >= power[2:])) + 1
    tried = [np.abs(frequency * period - 1) < NEAR for period in refused]
    peaks = [k for k in peaks if not any(near[k] for near in tried)]
    if not peaks:
        return None
    best = max(peaks, key=power.__getitem__)
    # the width of a peak is that of one repeat
    rest = np.abs(frequency - frequency[best]) > frequency[0] / REPEATS
    if not rest.any() or power[best] < STANDS_OUT * np.median(power[rest]):
        return None
    return 1 / frequency[best]


def _periodogram(panel, weigh, step, rng, most_series):
    """Return summed power, of how many series and channels, and frequencies."""
    counts = np.diff(panel.offsets)
    spans = np.zeros(len(counts))
    long = np.flatnonzero(counts)
    spans[long] = panel.time[panel.offsets[long + 1] - 1]
    spans[long] -= panel.time[panel.offsets[long]]
    span = spans.max()
    chosen = np.flatnonzero((spans > span / 2) & (counts >= 16))
    if not len(chosen):
        return None, 0, None
    panel = panel.take(rng.permutation(chosen)[:most_series])
    weight = weigh(panel)
    size = int(min(MOST, 2 ** np.ceil(np.log2(2 * FINE * span / step + 1))))
    grid = max(step / FINE, 2 * span / (size - 1))
    power, n_parts = 0.0, 0
    for series in range(panel.n_series):
        rows = slice(panel.offsets[series], panel.offsets[series + 1])
        place = np.rint((panel.time[rows] - panel.time[rows.start]) / grid)
        for column in weight[rows].T:
            if np.count_nonzero(column) < 16:
                continue
            signal = np.bincount(place.astype(int), column, size)
            spectrum = np.abs(np.fft.rfft(signal)) ** 2
            power = power + spectrum / spectrum.mean()
            n_parts += 1
    if not n_parts:
        return None, 0, None
    frequency = np.arange(size // 2 + 1) / (size * grid)
    inside = (frequency >= REPEATS / span) & (frequency <= 0.25 / step)
    if inside.sum() < 16:
        return None, 0, None
    return power[inside] / n_parts, n_parts, frequency[inside]


def _fundamental(ratio, frequency, best):
    """Return the frequency whose multiples include the best one and other peaks."""
    most, chosen = 0.0, frequency[best]
    for divisor in (1, 2, 3, 4):
        base = frequency[best] / divisor
        if base < frequency[0]:
            break
        multiples = base * np.arange(1, HARMONICS + 1)
        near = np.searchsorted(frequency, multiples[multiples <= frequency[-1]])
        near = (near[:, None] + np.arange(-2, 2)).clip(0, len(ratio) - 1)
        peaks = ratio[near].max(1)
        peaks = np.where(peaks > PEAK, peaks, 0.0)
        # A divisor too large has the same peaks among more multiples.
        score = peaks.sum() * (peaks > 0).mean()
        if score > most:
            most, chosen = score, base
    return chosen
