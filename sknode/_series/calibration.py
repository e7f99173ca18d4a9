"""How wide intervals have to be, by how far the next observation is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sknode._series.panel import Panel

__all__ = ["Cells", "Inflation", "distances", "typical_steps"]

# Share of the hidden cells that an interval is to cover, and its reach in standard
# deviations.
COVERAGE, Z_COVERAGE = 0.9, 1.6448536269514722
# Standard deviations are corrected by at most these factors: hardly made smaller, as
# much of what tells so was learned from.
RANGE = 0.95, 3.0
# Distances, in steps of a channel, at which factors are learned; those between are by
# linear interpolation in the logarithm. Each is learned from what is nearer to it than
# to the others.
NODES = np.array([1.0, 4.0, 16.0])
# Hidden cells of a channel, or of a distance, that count as much as all together do,
# and cells that count as much as what is expected from the parameters.
PRIOR_CELLS, FEW_CELLS = 50, 10


@dataclass(frozen=True)
class Cells:
    """Hidden cells.

    Attributes
    ----------
    deviation : ndarray of shape (n_cells,)
        Distances from the centres, in standard deviations.
    distance : ndarray of shape (n_cells,)
        Distances in time from the nearest observation of the channel.
    channel : ndarray of shape (n_cells,), int
        The channels.
    """

    deviation: np.ndarray
    distance: np.ndarray
    channel: np.ndarray

    @classmethod
    def of(cls, deviation, cells, context: Panel, query: Panel) -> Cells:
        """Return those of the rows of a query (n_rows, n_channels)."""
        distance = distances(context, query)
        return cls(deviation[cells], distance[cells], np.nonzero(cells)[1])

    @classmethod
    def join(cls, parts) -> Cells:
        """Return all of several."""
        names = "deviation", "distance", "channel"
        return cls(*(np.concatenate([getattr(x, k) for x in parts]) for k in names))

    def nodes(self, step):
        """Return the node that is nearest to each cell."""
        place = _log_steps(self.distance, step[self.channel])
        return np.abs(np.log(NODES)[:, None] - place).argmin(0)


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
    def learn(cls, step, profile: Cells, judged: Cells) -> Inflation:
        """Learn from hidden cells.

        Parameters
        ----------
        step : ndarray of shape (n_channels,)
            As the attribute.
        profile : Cells
            What tells how much more it takes far than near: many cells, that the
            parameters of the model may have been learned from.
        judged : Cells
            What tells how much it takes: cells that were hidden from the model.
        """
        nodes = np.arange(len(NODES))
        node = profile.nodes(step)
        overall = _log_factor(profile.deviation, 0.0)
        by_node = np.array(
            [_log_factor(profile.deviation[node == k], overall) for k in nodes]
        )
        lack = judged.deviation / np.exp(by_node[judged.nodes(step)])
        by_node += _log_factor(lack, 0.0, FEW_CELLS)
        lack = judged.deviation / np.exp(by_node[judged.nodes(step)])
        # what is particular about a channel is so at every distance
        by_channel = np.array(
            [_log_factor(lack[judged.channel == c], 0.0) for c in range(len(step))]
        )
        factors = np.exp(by_node[:, None] + by_channel)
        return cls(step, np.clip(factors, *RANGE))

    def at(self, context: Panel, query: Panel) -> np.ndarray:
        """Return the factors (n_rows, n_channels) for the cells of a query."""
        place = _log_steps(distances(context, query), self.step)
        columns = zip(place.T, np.log(self.factors.T), strict=True)
        return np.exp(
            np.stack([np.interp(x, np.log(NODES), y) for x, y in columns], axis=1)
        )


def _log_factor(deviation, prior, n_prior=PRIOR_CELLS):
    """Return the logarithm of what gives intervals their coverage, as far as cells can
    tell.
    """
    n, own = len(deviation), prior
    if n:
        lack = np.quantile(deviation, COVERAGE) / Z_COVERAGE
        own = np.log(np.clip(lack, 1 / RANGE[1], RANGE[1]))
    return (n * own + n_prior * prior) / (n + n_prior)


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
