"""The model of series: a latent ODE, what its residuals follow, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sknode._series.calibration import Inflation
from sknode._series.panel import Panel
from sknode._series.scaling import Scaling
from sknode._series.state_space import LinearProcess
from sknode._series.warp import Warp
from sknode._series.windows import Windows

__all__ = [
    "AFTER",
    "BEFORE",
    "BETWEEN",
    "Predictive",
    "Regime",
    "SeriesModel",
    "SwitchedModel",
    "mixture",
    "places",
]

BEFORE, BETWEEN, AFTER = -1, 0, 1


@dataclass(frozen=True)
class SeriesModel:
    """``warp(y(t)) = decode(z(t)) + r(t) + noise``, in scaled units.

    ``z`` is the latent ODE and ``r`` a linear process, given ``z`` known in closed
    form; either may be missing. Panels hold values before the warp.

    Attributes
    ----------
    warp : Warp or None
        The change of units in which channels are about normal.
    process : LinearProcess or None
        What ``r`` and the noise follow; without it there is noise alone.
    noise : ndarray of shape (n_channels,)
        Variance of the noise where there is no process.
    inflation : Inflation
        What standard deviations are multiplied with.
    rows_each : int or None
        Rows of a window that the network sees at a time.
    anchored : bool
        Whether the time of a series starts at its first observation.
    """

    warp: Warp | None
    process: LinearProcess | None
    noise: np.ndarray
    inflation: Inflation
    rows_each: int | None
    anchored: bool

    def forward(self, panel: Panel) -> Panel:
        """Return a panel with warped values, nonsense ones limited."""
        if self.warp is None:
            return panel
        values = self.warp.forward(self.warp.limit(panel.values))
        return replace(panel, values=values)

    def given(self, context: Panel) -> Panel:
        """Return the rows of a context with an observation, with warped values."""
        return self.forward(context.select(context.observed.any(1)))

    def inverse(self, values):
        """Return values from warped ones."""
        return values if self.warp is None else self.warp.inverse(values)

    def point(self, values):
        """Return the values that warped centres stand for: of channels with few values
        one of these.
        """
        if self.warp is None:
            return values
        return self.warp.snap(self.warp.inverse(values))

    def paths(self, mean, context: Panel, query: Panel):
        """Return paths of the network (n_draws, n_rows, n_channels), or zeros.

        For the rows of a context of warped values and for those of the query, by the
        same draws of the latent states.
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

    def _solved(self, mean, context, query):
        """Return what is known, in warped values, and the paths there and at a query:
        without observations that a path does not reach.
        """
        context = self.given(context)
        at_context, at_query = self.paths(mean, context, query)
        reached = np.isfinite(at_context).all(axis=(0, 2))
        if not reached.all():
            context, at_context = context.select(reached), at_context[:, reached]
        return context, at_context, at_query

    def latent(self, mean, context: Panel, query: Panel):
        """Return the latent states of the network (n_rows, latent_dim)."""
        context = self.given(context)
        windows = Windows.cut(context, self.rows_each, self.anchored)
        states = mean.posterior(windows.panel(context)[0])
        asked, rows = windows.assign(query)
        found = mean.latent(states, asked)
        result = np.empty_like(found)
        result[rows] = found
        return result

    def predict(self, mean, context: Panel, query: Panel):
        """Return predictive means and standard deviations (n_rows, n_channels), of
        warped values.
        """
        some = np.flatnonzero(query.lengths)  # the rows of the query stay the same
        if not len(some):
            return np.empty(query.values.shape), np.empty(query.values.shape)
        if len(some) < query.n_series:
            context, query = context.take(some), query.take(some)
        context, at_context, at_query = self._solved(mean, context, query)
        n_draws = len(at_query)
        if self.process is None:
            path, variance = at_query, self.noise
        else:
            # the process is conditioned on what each draw leaves
            rest = context.values - at_context
            follow, variance = self.process.posteriors(context, rest, query)
            path = at_query + follow
            variance = variance + self.process.noise_variance
        if n_draws > 1:
            variance = variance + path.var(0)
        variance = np.broadcast_to(variance, path.shape[1:])
        return path.mean(0), np.sqrt(variance) * self.inflation.at(context, query)

    def sample(self, mean, context: Panel, query: Panel, n_draws, rng):
        """Return paths (n_draws, n_rows, n_channels), coherent in time, with noise."""
        centre = self.predict(mean, context, query)[0]
        context, at_context, at_query = self._solved(mean, context, query)
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
        wider = (paths - centre) * self.inflation.at(context, query)
        return self.inverse(centre + wider)


@dataclass(frozen=True)
class Regime:
    """A model as it is used for some of the rows.

    Attributes
    ----------
    model : SeriesModel
        The model.
    network : bool
        Whether it uses the network.
    recent : tuple of float
        Of how much of the time up to the last observation the model is told: a latent
        state far from the end has to flow a long way to it, and what goes wrong on the
        way is not made good. With several of them the prediction is their mixture: what
        goes wrong differs, and is smaller on average.
    """

    model: SeriesModel
    network: bool = False
    recent: tuple[float, ...] = (math.inf,)

    def parts(self) -> list[Regime]:
        """Return what this is a mixture of."""
        return [replace(self, recent=(span,)) for span in self.recent]

    def predict(self, mean, context: Panel, query: Panel):
        """Return predictive means and standard deviations, as `SeriesModel.predict`."""
        mean = mean if self.network else None
        return mixture(
            [self.model.predict(mean, told, query) for told in self._told(context)]
        )

    def sample(self, mean, context: Panel, query: Panel, n_draws, rng):
        """Return paths, as `SeriesModel.sample`."""
        mean = mean if self.network else None
        turn = np.arange(n_draws) % len(self.recent)
        paths = np.empty((n_draws, *query.values.shape))
        for k, told in enumerate(self._told(context)):
            n = np.count_nonzero(turn == k)
            if n:
                paths[turn == k] = self.model.sample(mean, told, query, n, rng)
        return paths

    def _told(self, context):
        """Yield what of a context the model is told."""
        _, last = ends_of_observations(context)
        end = last[context.series_of_rows()]
        for span in self.recent:
            late = context.time >= end - span
            yield context if math.isinf(span) else context.select(late)


@dataclass(frozen=True)
class SwitchedModel:
    """One model between the observations of a series, others before and after them.

    Where values are dense a process that passes near them is hard to beat; ahead of the
    last one a latent ODE may know what a process does not. What came before the first
    one it does not know: systems that lose energy cannot be solved backwards for long.
    All pass near the observations at the ends.

    Attributes
    ----------
    before, inside, outside : Regime
        The models, with the same warp.
    """

    before: Regime
    inside: Regime
    outside: Regime

    @property
    def warp(self):
        """The change of units of both."""
        return self.inside.model.warp

    def inverse(self, values):
        """Return values from warped ones."""
        return self.inside.model.inverse(values)

    def point(self, values):
        """Return the values that warped centres stand for."""
        return self.inside.model.point(values)

    def latent(self, mean, context: Panel, query: Panel):
        """Return the latent states of the network (n_rows, latent_dim)."""
        return self.inside.model.latent(mean, context, query)

    def predict(self, mean, context: Panel, query: Panel):
        """Return predictive means and standard deviations, as `SeriesModel.predict`."""
        std = np.empty(query.values.shape)
        centre = np.empty_like(std)
        for regime, rows in self._regimes(context, query):
            found = regime.predict(mean, context, query.select(rows))
            centre[rows], std[rows] = found
        return centre, std

    def sample(self, mean, context: Panel, query: Panel, n_draws, rng):
        """Return paths, as `SeriesModel.sample`."""
        paths = np.empty((n_draws, *query.values.shape))
        for regime, rows in self._regimes(context, query):
            asked = query.select(rows)
            paths[:, rows] = regime.sample(mean, context, asked, n_draws, rng)
        return paths

    def _regimes(self, context, query):
        """Yield what answers, and which rows of the query it is asked."""
        place = places(context, query)
        regimes = (BEFORE, self.before), (BETWEEN, self.inside), (AFTER, self.outside)
        for here, regime in regimes:
            rows = place == here
            if rows.any():
                yield regime, rows


def mixture(moments):
    """Return the mean and standard deviation of a mixture in equal parts, given lists
    of those of the parts.
    """
    if len(moments) == 1:
        return moments[0]
    centre, std = map(np.stack, zip(*moments, strict=True))
    return centre.mean(0), np.sqrt((std**2).mean(0) + centre.var(0))


def ends_of_observations(context: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Return the times of the first and the last observation of series; of a series
    without any, plus and minus infinity.
    """
    some = context.observed.any(axis=1)
    series = context.series_of_rows()[some]
    first = np.full(context.n_series, np.inf)
    last = np.full(context.n_series, -np.inf)
    np.minimum.at(first, series, context.time[some])
    np.maximum.at(last, series, context.time[some])
    return first, last


def places(context: Panel, query: Panel) -> np.ndarray:
    """Return whether rows of a query (n_rows,) are before what is observed, between
    observations, or after them: `BEFORE`, `BETWEEN` or `AFTER`.

    All rows of a series of which nothing is observed are before it.
    """
    first, last = ends_of_observations(context)
    asked = query.series_of_rows()
    place = np.where(query.time > last[asked], AFTER, BETWEEN)
    return np.where(query.time < first[asked], BEFORE, place)


@dataclass(frozen=True)
class Predictive:
    """What is predicted of rows: independent normal distributions of warped values.

    Attributes
    ----------
    mean, std : ndarray of shape (n_rows, n_channels)
        Their moments.
    inputs : ndarray of shape (n_rows, n_covariates)
        Scaled covariates.
    model : SeriesModel or SwitchedModel
        Has the warp.
    scaling : Scaling
        Has the units of y.
    """

    mean: np.ndarray
    std: np.ndarray
    inputs: np.ndarray
    model: SeriesModel | SwitchedModel
    scaling: Scaling

    def at(self, z):
        """Return values at so many standard deviations from the centre."""
        scaled = self.model.inverse(self.mean + z * self.std)
        return self.scaling.inverse(scaled, self.inputs)

    def point(self):
        """Return one value for every cell."""
        return self.scaling.inverse(self.model.point(self.mean), self.inputs)

    def spread(self):
        """Return half of the distance between one standard deviation on either side,
        the standard deviation where there is no warp.
        """
        return (self.at(1.0) - self.at(-1.0)) / 2

    def log_density(self, y, inputs):
        """Return the log-density of values (n_rows, n_channels) in the units of y."""
        scaled, _ = self.scaling.forward(y, inputs)
        slope = -np.log(self.scaling.scale)
        if self.model.warp is not None:
            slope = slope + self.model.warp.log_slope(scaled)
            scaled = self.model.warp.forward(scaled)
        z = (scaled - self.mean) / self.std
        return slope - 0.5 * (z**2 + np.log(2 * np.pi)) - np.log(self.std)
