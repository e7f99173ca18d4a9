"""What anybody can do without a model: interpolate, repeat the last value, average."""

from __future__ import annotations

import numpy as np

from sknode._series.panel import Panel

__all__ = ["BASELINES"]


def _interpolate(time, values, at):
    """Interpolate linearly in time; beyond the ends, the nearest value."""
    return np.interp(at, time, values)


def _last_value(time, values, at):
    """Return the last value before; before the first, that one."""
    return values[np.maximum(np.searchsorted(time, at, side="left") - 1, 0)]


def _mean(time, values, at):
    """Return the mean of the series."""
    return np.full(len(at), values.mean())


def _apply(method, context: Panel, query: Panel) -> np.ndarray:
    """Return predictions (m, n_channels) for the rows of a query.

    Where a series has no value of a channel they are the mean over all series.
    """
    observed = np.isfinite(context.values)
    count = observed.sum(0)
    overall = np.where(observed, context.values, 0.0).sum(0) / np.maximum(count, 1)
    result = np.tile(overall, (len(query.time), 1))
    for i in range(query.n_series):
        rows = slice(context.offsets[i], context.offsets[i + 1])
        asked = slice(query.offsets[i], query.offsets[i + 1])
        if asked.start == asked.stop:
            continue
        time, values, here = context.time[rows], context.values[rows], observed[rows]
        for c in np.flatnonzero(here.any(0)):
            known = here[:, c]
            result[asked, c] = method(time[known], values[known, c], query.time[asked])
    return result


BASELINES = {
    "linear interpolation": lambda context, query: _apply(_interpolate, context, query),
    "last value": lambda context, query: _apply(_last_value, context, query),
    "series mean": lambda context, query: _apply(_mean, context, query),
}
