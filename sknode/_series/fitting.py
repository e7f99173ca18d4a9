"""From a panel to a model: candidates are fitted and judged on cells they never saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from sknode._series.baselines import BASELINES
from sknode._series.calibration import (
    Z_COVERAGE,
    Cells,
    Inflation,
    typical_steps,
)
from sknode._series.covariance import fit_process, fit_warped_process
from sknode._series.hidden import KINDS, hide_cells, hide_ends
from sknode._series.model import (
    AFTER,
    BEFORE,
    BETWEEN,
    Regime,
    SeriesModel,
    SwitchedModel,
    mixture,
    places,
)
from sknode._series.panel import Panel
from sknode._series.windows import Windows, window_rows
from sknode.ode import SolverError

__all__ = ["Fitted", "fit_series"]

# With fewer observed cells nothing is hidden, and with fewer rows there is no network.
LEAST_CELLS, LEAST_ROWS = 40, 40
# To correct intervals more cells are hidden, from the model as it is: this share of
# them, as often as it takes to get so many, but not more often than that, in at most so
# many series.
HIDDEN_SHARE, MANY_CELLS, MOST_ROUNDS, ROUND_SERIES = 0.15, 2000, 4, 100
# Series whose residuals are learned from, and by which candidates are judged, at most.
MOST_SERIES = 300
# A network is better than the process alone if its errors are smaller by so many
# standard errors; not ahead, where few cells can tell, and a process goes back to a
# mean.
CONFIDENCE = {BEFORE: 0.0, BETWEEN: 2.0, AFTER: 0.0}
# Ahead of the observations a network may do better if it is told only those within so
# much time, the span of a typical series being 1, or on average over these and all.
RECENT = 0.5, 0.25, 0.125, 0.0625

# What to do where only a network is left and it cannot be solved.
ADVICE = (
    "The latent ODE cannot be solved up to all times of X: raise max_steps, rtol or "
    "atol, lower learning_rate_init, or look for times far from the others."
)


@dataclass
class Fitted:
    """What `fit_series` found.

    Attributes
    ----------
    model : SeriesModel or SwitchedModel
        The model.
    mean : object or None
        The network with its settings; None where no held-out cells are better with it.
    scores : dict of str to dict of str to float
        Mean absolute errors on the hidden cells, in scaled units: of the model and of
        the baselines, by kind of cell. Empty if none were hidden.
    beaten_by : list of (str, str)
        Baselines that are better than the model beyond chance, and the kind of cell.
    coverage : float or None
        Share of the hidden cells in the intervals before they were corrected.
    """

    model: SeriesModel | SwitchedModel
    mean: object | None
    scores: dict = field(default_factory=dict)
    beaten_by: list = field(default_factory=list)
    coverage: float | None = None


def fit_series(
    panel: Panel,
    residual: bool,
    train: Callable[[Panel], object] | None,
    fraction: float,
    rng: np.random.Generator,
) -> Fitted:
    """Fit the candidates, choose one, and correct its intervals.

    Parameters
    ----------
    panel : Panel
        Scaled observations.
    residual : bool
        Whether a linear process follows what the network leaves.
    train : callable
        ``train(pieces)`` trains a network on a panel of windows and returns a
        `NeuralMean`.
    fraction : float
        Share of the observed cells that are hidden to judge; 0 keeps the network
        without judging.
    rng : Generator
        Draws the cells and the starts.
    """
    observed = np.isfinite(panel.values)
    if observed.sum() < LEAST_CELLS:
        fraction = 0.0
    kinds = np.zeros(observed.shape, np.uint8)
    if fraction:
        kinds = hide_cells(panel, fraction, rng)
        if not kinds.any():  # of short series nothing can be hidden
            fraction = 0.0
    kept = panel.hide(kinds > 0)
    anchored = is_anchored(kept)
    rows_each = window_rows(kept) if anchored else None
    candidates, warp, warped = [], None, kept
    if residual:
        warp, process = fit_warped_process(kept, rng=rng)
        model = _model(kept, warp, process, None, rows_each, anchored)
        candidates.append((model, None))
        warped = model.forward(kept)
    if (observed.any(1).sum() >= LEAST_ROWS) or not residual:
        windows = Windows.cut(warped, rows_each, anchored)
        mean = train(windows.panel(warped)[0])
        settings = rows_each, anchored
        try:
            candidates.append(_complete(warped, warp, mean, residual, settings, rng))
        except SolverError as error:
            if not candidates:
                raise SolverError(f"{error} {ADVICE}") from error
    if not fraction:
        model, mean = candidates[-1]
        return Fitted(model, mean)
    try:
        return _judge(panel, kinds, candidates, rng)
    except SolverError as error:
        raise SolverError(f"{error} {ADVICE}") from error


def is_anchored(panel: Panel) -> bool:
    """Return whether the time of a series has to start at its first observation.

    Where all series start at about the same time it is the same for all: the time of
    day, or since an admission, may then matter.
    """
    filled = panel.lengths > 0
    if filled.sum() < 2:
        return True
    first = panel.time[panel.offsets[:-1][filled]]
    last = panel.time[panel.offsets[1:][filled] - 1]
    if window_rows(panel) is not None:
        return True
    return bool(first.std() > 0.5 * np.median(last - first))


def _complete(warped, warp, mean, residual, settings, rng):
    """Add to a network what its residuals follow."""
    ones = np.ones(warped.values.shape[1])
    model = _model(warped, None, None, ones, *settings)
    some = _some_series(warped, rng)
    some = some.select(some.observed.any(1))
    rest = some.values - model.paths(mean, some, some)[0].mean(0)
    if residual:
        process = fit_process(replace(some, values=rest), rng=rng)
        return _model(warped, warp, process, None, *settings), mean
    count = np.maximum(np.isfinite(rest).sum(0), 1)
    noise = np.nansum(rest**2, axis=0) / count
    return _model(warped, None, None, np.maximum(noise, 1e-6), *settings), mean


def _some_series(panel, rng):
    """Return a panel of as many series as it takes to learn from or to judge by."""
    if panel.n_series <= MOST_SERIES:
        return panel
    chosen = rng.choice(panel.n_series, MOST_SERIES, replace=False)
    return panel.take(np.sort(chosen))


def _model(panel, warp, process, noise, rows_each, anchored):
    n_channels = panel.values.shape[1]
    noise = np.zeros(n_channels) if noise is None else noise
    inflation = Inflation.none(n_channels)
    return SeriesModel(warp, process, noise, inflation, rows_each, anchored)


def _judge(panel, kinds, candidates, rng) -> Fitted:
    """Choose the better candidate on hidden cells and correct its intervals.

    One between observations and one after them, if these are not the same.
    """
    with_hidden = np.unique(panel.series_of_rows()[(kinds > 0).any(1)])
    if len(with_hidden) > MOST_SERIES:
        with_hidden = np.sort(rng.choice(with_hidden, MOST_SERIES, replace=False))
    kinds = kinds[panel.rows_of(with_hidden)]
    panel = panel.take(with_hidden)
    kept = panel.hide(kinds > 0)
    rows = (kinds > 0).any(1)
    query = kept.select(rows)
    truth, kinds = panel.values[rows], kinds[rows]
    error, deviation = np.full(truth.shape, np.nan), np.full(truth.shape, np.nan)
    where, chosen = places(kept, query), {}
    for place, options in _options(candidates).items():
        here = where == place
        cells, asked = kinds[here] > 0, query.select(here)
        regime, mean, *found = _choose(
            options, kept, asked, truth[here], cells, CONFIDENCE[place]
        )
        error[here], deviation[here] = found
        judged = Cells.of(found[1], cells, kept, asked)
        regime = _correct(regime, mean, kept, place, judged, rng)
        chosen[place] = regime, mean, cells.any()
    # what only one of the two was judged on, the other one takes over
    for one, other in ((BETWEEN, AFTER), (AFTER, BETWEEN)):
        if not chosen[one][2]:
            regime, *rest = chosen[other]
            # but the recent observations alone do not tell of what is between others
            chosen[one] = replace(regime, recent=(math.inf,)), *rest
    scores, beaten_by = _compare(error, kept, query, truth, kinds)
    coverage = float((deviation[kinds > 0] < Z_COVERAGE).mean())
    regimes, means, _ = zip(*map(chosen.get, (BEFORE, BETWEEN, AFTER)), strict=True)
    mean = next((m for m in means if m is not None), None)
    return Fitted(SwitchedModel(*regimes), mean, scores, beaten_by, coverage)


def _compare(error, kept, query, truth, kinds):
    """Return mean errors of the model and of baselines by kind of hidden cell, and the
    baselines, with the kind, that are better.
    """
    scores, beaten_by = {"model": _by_kind(error, kinds)}, []
    for name, baseline in BASELINES.items():
        theirs = np.abs(baseline(kept, query) - truth)
        scores[name] = _by_kind(theirs, kinds)
        for kind, code in KINDS.items():
            here = kinds == code
            if _clearly_less(theirs[here], error[here]):
                beaten_by.append((name, kind))
    return scores, beaten_by


def _options(candidates):
    """Return what is to be chosen from before, between and after observations: lists of
    regimes with their networks.
    """
    plain = [(Regime(model, mean is not None), mean) for model, mean in candidates]
    model, mean = candidates[-1]
    recent = []
    if mean is not None:
        spans = [(span,) for span in RECENT] + [(math.inf, *RECENT)]
        recent = [(Regime(model, True, span), mean) for span in spans]
    return {BEFORE: plain[:1], BETWEEN: plain, AFTER: plain + recent}


def _choose(options, kept, query, truth, cells, confidence):
    """Return the best regime, its network, and its errors and deviations in standard
    deviations, (n_rows, n_channels) both.

    The first option is replaced only by the best of the others, and only by one that is
    better beyond chance.
    """
    tried, known = [], {}

    def predict(regime, mean):
        found = []
        for part in regime.parts():
            key = id(part.model), part.network, part.recent
            if key not in known:
                known[key] = part.predict(mean, kept, query)
            found.append(known[key])
        return mixture(found)

    for regime, mean in options:
        try:
            centre, std = predict(regime, mean)
        except SolverError:
            # of no use, whatever it is elsewhere
            if not tried:
                raise
            tried.append((None, None, np.full(truth.shape, 1e10)))
            continue
        tried.append((centre, std, np.abs(regime.model.point(centre) - truth)))
    best = 0
    if len(options) > 1 and cells.any():
        other = min(range(1, len(tried)), key=lambda k: tried[k][2][cells].mean())
        if _is_better(tried[other][2], tried[0][2], cells, confidence):
            best = other
    centre, std, error = tried[best]
    return *options[best], error, _deviation(options[best][0], centre, std, truth)


def _deviation(regime, centre, std, truth):
    """Return how far from the centre values are, in standard deviations."""
    warp = regime.model.warp
    warped = truth if warp is None else warp.forward(truth)
    return np.abs(warped - centre) / std


def _correct(regime, mean, kept, place, judged, rng):
    """Return the regime with corrected intervals.

    Parameters
    ----------
    regime, mean : Regime, object
        The model as it is used, and its network.
    kept : Panel
        What it has learned from.
    place : {BEFORE, BETWEEN, AFTER}
        Where it is used. What came before is as uncertain as what comes after.
    judged : Cells
        What it was judged on.
    rng : Generator
        Draws what is hidden from it in addition.
    """
    parts = [judged]
    if kept.n_series > ROUND_SERIES:
        chosen = rng.choice(kept.n_series, ROUND_SERIES, replace=False)
        kept = kept.take(np.sort(chosen))
    step = typical_steps(kept)
    wanted = MANY_CELLS / max(1.0, HIDDEN_SHARE * kept.observed.sum())
    for _ in range(int(np.clip(np.ceil(wanted), 1, MOST_ROUNDS))):
        if place != BETWEEN:
            mask, far = hide_ends(kept, rng)
        else:
            mask = hide_cells(kept, HIDDEN_SHARE, rng) > 0
            far = np.zeros_like(mask)
        context = kept.hide(mask)
        cells = mask & kept.observed & ~far
        rows = cells.any(1) & (places(context, kept) == abs(place))
        if not rows.any():
            continue
        query, cells = kept.select(rows), cells[rows]
        try:
            centre, std = regime.predict(mean, context, query)
        except SolverError:
            continue  # what cannot be predicted has no interval to correct
        deviation = _deviation(regime, centre, std, query.values)
        parts.append(Cells.of(deviation, cells, context, query))
    inflation = Inflation.learn(step, Cells.join(parts), judged)
    return replace(regime, model=replace(regime.model, inflation=inflation))


def _by_kind(error, kinds):
    """Return the mean error over each kind of cell that there is, and over all."""
    means = {
        kind: float(error[kinds == code].mean())
        for kind, code in KINDS.items()
        if (kinds == code).any()
    }
    return means | {"all": float(error[kinds > 0].mean())}


def _is_better(one, other, cells, confidence):
    """Return whether errors on some cells are smaller, by more than chance."""
    gain = (other - one)[cells]
    n = len(gain)
    return n > 1 and gain.mean() > confidence * gain.std() / np.sqrt(n)


def _clearly_less(one, other):
    """Return whether errors are smaller beyond chance."""
    gain = other - one
    n = len(gain)
    return n > 10 and gain.mean() > 2 * gain.std() / np.sqrt(n)
