"""How wide intervals have to be, by how far the next observation is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sknode._series.panel import Panel

__all__ = ["Inflation", "distances", "typical_steps"]

# Share of the hidden cells that an interval is to cover, and its reach in standard
# deviations.
COVERAGE, Z_COVERAGE = 0.9, 1.6448536269514722
# Standard deviations are corrected by at most these factors.
RANGE = 0.5, 3.0
# Distances, in steps of a channel, at which factors are learned; those between are by
# linear interpolation in the logarithm. Each is learned from what is nearer to it than
# to the others.
NODES = np.array([1.0, 4.0, 16.0])
# Hidden cells of a channel, or of a distance, that count as much as all together do.
PRIOR_CELLS = 50


@dataclass(frozen=True)
class Inflation:
    """What standard deviations are multiplied with.

    Attributes
    ----------
    step : ndarray of shape (n_channels,)
        Typical time between observations of a channel.
    factors : ndarray of shape (n_nodes, n_channels)
        The factors at the nodes.
    """

    step: np.ndarray
    factors: np.ndarray

    @classmethod
    def none(cls, n_channels: int) -> Inflation:
        """Return one that changes nothing."""
        return cls(np.ones(n_channels), np.ones((len(NODES), n_channels)))

    @classmethod
    def learn(cls, step, deviation, distance, channel) -> Inflation:
        """Learn from hidden cells.

        Parameters
        ----------
        step : ndarray of shape (n_channels,)
            As the attribute.
        deviation : ndarray of shape (n_cells,)
            Distances from the centres, in standard deviations.
        distance : ndarray of shape (n_cells,)
            Distances in time from the nearest observation of the channel.
        channel : ndarray of shape (n_cells,), int
            The channels.
        """

        def log_factor(cells, above, prior):
            """Return what deviations, divided by factors so far, lack on some cells."""
            own = prior
            if len(cells):
                lack = np.quantile(deviation[cells] / above, COVERAGE) / Z_COVERAGE
                own = np.log(np.clip(lack, *RANGE))
            return (len(cells) * own + PRIOR_CELLS * prior) / (len(cells) + PRIOR_CELLS)

        everything = np.arange(len(deviation))
        place = _log_steps(distance, step[channel])
        node = np.abs(np.log(NODES)[:, None] - place).argmin(0)
        overall = log_factor(everything, 1.0, 0.0)
        by_node = np.array(
            [log_factor(everything[node == k], 1.0, overall) for k in range(len(NODES))]
        )
        logs = np.empty((len(NODES), len(step)))
        for c in range(len(step)):
            # what is particular about a channel is so at every distance
            cells = everything[channel == c]
            logs[:, c] = by_node + log_factor(cells, np.exp(by_node[node[cells]]), 0.0)
        return cls(step, np.clip(np.exp(logs), *RANGE))

    def at(self, context: Panel, query: Panel) -> np.ndarray:
        """Return the factors (n_rows, n_channels) for the cells of a query."""
        place = _log_steps(distances(context, query), self.step)
        columns = zip(place.T, np.log(self.factors.T), strict=True)
        return np.exp(
            np.stack([np.interp(x, np.log(NODES), y) for x, y in columns], axis=1)
        )


def _log_steps(distance, step):
    """Return logarithms of distances in steps, between those of the outer nodes."""
    return np.log(np.clip(distance / step, NODES[0], NODES[-1]))


def typical_steps(panel: Panel) -> np.ndarray:
    """Return the median time between observations of each channel, (n_channels,)."""
    series = panel.series_of_rows()
    steps = np.ones(panel.values.shape[1])
    for c, seen in enumerate(panel.observed.T):
        gaps = np.diff(panel.time[seen])[np.diff(series[seen]) == 0]
        gaps = gaps[gaps > 0]
        if len(gaps):
            steps[c] = np.median(gaps)
    return steps


def distances(context: Panel, query: Panel) -> np.ndarray:
    """Return how far in time the nearest observation of a channel is, for the cells of
    a query (n_rows, n_channels); infinity if the series has none.
    """
    asked = query.series_of_rows()
    series = context.series_of_rows()
    result = np.full((len(asked), context.values.shape[1]), np.inf)
    # series one after the other on one line, to search all of them at once
    times = np.concatenate([context.time, query.time])
    low = times.min(initial=0.0)
    span = max(times.max(initial=0.0) - low, 1e-300)
    place = series + 0.5 * (context.time - low) / span
    wanted = asked + 0.5 * (query.time - low) / span
    for c, seen in enumerate(context.observed.T):
        mine, time = series[seen], context.time[seen]
        if not len(mine):
            continue
        after = np.searchsorted(place[seen], wanted)
        for index in (after - 1, after):
            at = np.clip(index, 0, len(mine) - 1)
            gap = np.abs(time[at] - query.time)
            result[:, c] = np.fmin(
                result[:, c], np.where(mine[at] == asked, gap, np.inf)
            )
    return result
