"""The model of series: a latent ODE, what its residuals follow, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sknode._series.panel import Panel
from sknode._series.state_space import LinearProcess
from sknode._series.windows import Windows

__all__ = ["SeriesModel"]


@dataclass(frozen=True)
class SeriesModel:
    """``y(t) = decode(z(t)) + r(t) + noise``, in scaled units.

    ``z`` is the latent ODE and ``r`` a linear process, given ``z`` known in closed
    form; either may be missing.

    Attributes
    ----------
    process : LinearProcess or None
        What ``r`` and the noise follow; without it there is noise alone.
    noise : ndarray of shape (n_channels,)
        Variance of the noise where there is no process.
    inflation : ndarray of shape (n_channels,)
        What standard deviations are multiplied with.
    rows_each : int or None
        Rows of a window that the network sees at a time.
    anchored : bool
        Whether the time of a series starts at its first observation.
    """

    process: LinearProcess | None
    noise: np.ndarray
    inflation: np.ndarray
    rows_each: int | None
    anchored: bool

    def paths(self, mean, context: Panel, query: Panel):
        """Return paths of the network (n_draws, n_rows, n_channels), or zeros.

        For the rows of the context and for those of the query, by the same draws of
        the latent states.
        """
        if mean is None:
            return [np.zeros((1, *x.values.shape)) for x in (context, query)]
        windows = Windows.cut(context, self.rows_each, self.anchored)
        pieces, _ = windows.panel(context)
        states = mean.posterior(pieces)
        results = []
        for panel in (context, query):
            asked, rows = windows.assign(panel)
            paths = mean.paths(states, asked)
            result = np.empty_like(paths)
            result[:, rows] = paths
            results.append(result)
        return results

    def predict(self, mean, context: Panel, query: Panel):
        """Return the predictive mean and standard deviation (n_rows, n_channels)."""
        at_context, at_query = self.paths(mean, context, query)
        n_draws = len(at_query)
        if self.process is None:
            path, variance = at_query, self.noise
        else:
            # the process is conditioned on what each draw leaves
            stacked = _stack(context, context.values - at_context)
            follow, variance = self.process.posterior(stacked, _stack(query, at_query))
            shape = at_query.shape
            path = at_query + follow.reshape(shape)
            # that of the process does not depend on the values
            variance = variance.reshape(shape)[0] + self.process.noise_variance
        if n_draws > 1:
            variance = variance + path.var(0)
        variance = np.broadcast_to(variance, path.shape[1:])
        return path.mean(0), np.sqrt(variance) * self.inflation

    def sample(self, mean, context: Panel, query: Panel, n_draws, rng):
        """Return paths (n_draws, n_rows, n_channels), coherent in time, with noise."""
        at_context, at_query = self.paths(mean, context, query)
        drawn = rng.integers(len(at_query), size=n_draws)
        paths = np.empty((n_draws, *query.values.shape))
        if self.process is None:
            paths[:] = at_query[drawn]
            noise = self.noise
        else:
            noise = self.process.noise_variance
            for d in np.unique(drawn):
                rows = np.flatnonzero(drawn == d)
                rest = replace(context, values=context.values - at_context[d])
                follow = self.process.sample(rest, query, len(rows), rng)
                paths[rows] = at_query[d] + follow
        paths += rng.normal(size=paths.shape) * np.sqrt(noise)
        centre = self.predict(mean, context, query)[0]
        return centre + (paths - centre) * self.inflation


def _stack(panel: Panel, values) -> Panel:
    """Return a panel in which every series comes once for every draw of the values."""
    n_draws, n = len(values), len(panel.time)
    shifts = n * np.arange(n_draws)[:, None]
    return Panel(
        np.append((panel.offsets[:-1] + shifts).ravel(), n_draws * n),
        np.tile(panel.time, n_draws),
        values.reshape(n_draws * n, values.shape[2]),
        np.tile(panel.covariates, (n_draws, 1)),
    )
