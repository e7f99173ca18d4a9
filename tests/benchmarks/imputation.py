"""Imputation of irregular series beside what people use now.

Of each table 10 % of the observed cells are hidden: at random ("points"), or in blocks
of neighbouring times of one channel of one series ("blocks": 26 weeks of CO2, 12 hours
of tsNH4, 7 days of airquality, 6 months of tsAirgap, 3 years of pbcseq, 6 hours of
PhysioNet; a cell more or less to hit the share). tsNH4 and tsAirgap are also scored on
the gaps they come with ("own"). Figures are mean absolute errors of hidden cells, after
every channel was scaled to zero mean and unit variance, averaged over seeds.

interpolation   linear in time within a series, the nearest value beyond its ends, the
                mean of the channel where a series has none
last            the last value, the next one at the start
knn, iterative  KNNImputer (5 neighbours, by distance) and IterativeImputer on the
                channels, the time since the start, and sine and cosine of the day or
                the year where the data come from a calendar with that period
gp              GaussianProcessRegressor: trend, period, short range and noise; only for
                tables of one series, a channel at a time, on at most 1500 rows; knows
                the period of the calendar
process         the linear process of sknode on warped channels; is told no period
imputer         LatentODEImputer with its defaults: a latent ODE and the process where
                that helps; is told no period

    python tests/benchmarks/imputation.py --data data --seeds 0 1
"""

import argparse
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    RBF,
    ConstantKernel,
    ExpSineSquared,
    Matern,
    WhiteKernel,
)
from sklearn.impute import IterativeImputer, KNNImputer

from sknode import LatentODEImputer
from sknode._series.covariance import fit_warped_process
from sknode._series.panel import Panel

DAY, YEAR = 1.0, 365.25


@dataclass
class Table:
    """Series with what is known of them; ``time`` in days."""

    offsets: np.ndarray
    time: np.ndarray
    values: np.ndarray
    block: float
    periods: tuple = ()
    own: np.ndarray | None = None


def _single(path, column, values, block, periods, own=None):
    frame = pd.read_csv(path, parse_dates=[column])
    days = (frame[column] - frame[column].iloc[0]) / pd.Timedelta("1D")
    hidden = None if own is None else frame[own].isna().to_numpy()
    table = frame[values].to_numpy(float)
    ends = np.array([0, len(frame)])
    return Table(ends, days.to_numpy(), table, block, periods, hidden)


def _pbcseq(path):
    frame = pd.read_csv(path).sort_values(["id", "day"], kind="stable")
    names = ["ascites", "hepato", "spiders", "edema", "bili", "chol", "albumin"]
    names += ["alk.phos", "ast", "platelet", "protime", "stage"]
    first = np.unique(frame["id"], return_index=True)[1]
    ends = np.append(first, len(frame))
    days = frame["day"].to_numpy(float)
    return Table(ends, days, frame[names].to_numpy(float), 3 * YEAR)


def _physionet(path, n_patients):
    with np.load(path) as file:
        record, hours, values = file["record"], file["time"], file["values"]
    first = np.unique(record, return_index=True)[1]
    ends = np.append(first, len(record))[: n_patients + 1]
    last = ends[-1]
    return Table(ends, hours[:last] / 24, values[:last].astype(float), 6 / 24)


def load(name, folder, n_patients):
    """Return a table by name."""
    if name == "co2":
        return _single(folder / "co2_weekly.csv", "date", ["co2"], 26 * 7.0, (YEAR,))
    if name == "airquality":
        names = ["Ozone", "Solar.R", "Wind", "Temp"]
        return _single(folder / "airquality.csv", "date", names, 7.0, ())
    if name == "nh4":
        names = "time", ["nh4_complete"]
        return _single(folder / "tsNH4.csv", *names, 0.5, (DAY,), ["nh4"])
    if name == "airgap":
        names = "month", ["passengers_complete"]
        own = ["passengers"]
        return _single(folder / "tsAirgap.csv", *names, 6 * 30.5, (YEAR,), own)
    if name == "pbcseq":
        return _pbcseq(folder / "pbcseq.csv")
    return _physionet(folder / "physionet2012_a.npz", n_patients)


TABLES = ["co2", "airquality", "nh4", "airgap", "pbcseq", "physionet"]


def hide(table, pattern, rng):
    """Return which observed cells to hide."""
    seen = ~np.isnan(table.values)
    if pattern == "own":
        return table.own & seen
    if pattern == "points":
        return seen & (rng.random(seen.shape) < 0.1)
    hidden = np.zeros_like(seen)
    for first, last in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        for channel in range(seen.shape[1]):
            rows = first + np.flatnonzero(seen[first:last, channel])
            # One cell of ten, rounded at random.
            left = int(0.1 * len(rows) + rng.random())
            while left > 0 and len(rows):
                start = table.time[rng.choice(rows)]
                inside = table.time[rows] - start
                inside = rows[(inside >= 0) & (inside < table.block)][:left]
                hidden[inside, channel] = True
                rows = np.setdiff1d(rows, inside)
                left -= len(inside)
    return hidden


def interpolation(table, values):
    """Linear in time."""
    return _by_series(table, values, np.interp)


def last(table, values):
    """The last value."""

    def step(query, time, value):
        index = np.searchsorted(time, query, side="right") - 1
        return value[np.maximum(index, 0)]

    return _by_series(table, values, step)


def _by_series(table, values, rule):
    filled = np.tile(np.nanmean(values, axis=0), (len(values), 1))
    for first, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        time = table.time[first:end]
        for channel in range(values.shape[1]):
            column = values[first:end, channel]
            seen = ~np.isnan(column)
            if seen.any():
                filled[first:end, channel] = rule(time, time[seen], column[seen])
    return filled


def _features(table):
    """Return time since the start of a series and the calendar."""
    lengths = np.diff(table.offsets)
    since = table.time - np.repeat(table.time[table.offsets[:-1]], lengths)
    columns = [(since - since.mean()) / since.std()]
    for period in table.periods:
        angle = 2 * np.pi * table.time / period
        columns += [np.sin(angle), np.cos(angle)]
    return np.stack(columns, axis=1)


def knn(table, values):
    """KNNImputer with time; neighbours among at most 10,000 rows."""
    both = np.hstack([values, _features(table)])
    donors = np.random.default_rng(0).permutation(len(both))[:10000]
    imputer = KNNImputer(weights="distance", keep_empty_features=True)
    return imputer.fit(both[donors]).transform(both)[:, : values.shape[1]]


def iterative(table, values):
    """IterativeImputer with time."""
    both = np.hstack([values, _features(table)])
    imputer = IterativeImputer(random_state=0, keep_empty_features=True)
    return imputer.fit_transform(both)[:, : values.shape[1]]


def gp(table, values):
    """GaussianProcessRegressor, a channel at a time."""
    if len(table.offsets) > 2:
        return None
    span = table.time[-1] - table.time[0]
    step = np.median(np.diff(table.time))
    filled = np.empty_like(values)
    for channel, column in enumerate(values.T):
        seen = np.flatnonzero(~np.isnan(column))
        if len(seen) > 1500:
            seen = np.sort(np.random.default_rng(0).permutation(seen)[:1500])
        kernel = ConstantKernel(1.0) * RBF(span / 4, (span / 100, 10 * span))
        short = ConstantKernel(0.1) * Matern(5 * step, (step / 5, span), nu=1.5)
        kernel = kernel + short + WhiteKernel(0.01, (1e-6, 1.0))
        for period in table.periods:
            wave = ExpSineSquared(1.0, period, periodicity_bounds="fixed")
            kernel = kernel + ConstantKernel(0.1) * wave * RBF(
                span, (period, 1e2 * span)
            )
        model = GaussianProcessRegressor(kernel, normalize_y=True)
        model.fit(table.time[seen, None], column[seen])
        filled[:, channel] = model.predict(table.time[:, None])
    return filled


def process(table, values):
    """The linear process; also return 90 % intervals."""
    panel = Panel(table.offsets, table.time, values, np.empty((len(values), 0)))
    warp, model = fit_warped_process(panel, rng=np.random.default_rng(0))
    panel = replace(panel, values=warp.forward(warp.limit(values)))
    mean, variance = model.posterior(panel, panel)
    reach = 1.645 * np.sqrt(variance + model.noise_variance)
    ends = mean, mean - reach, mean + reach
    return tuple(warp.snap(warp.inverse(end)) for end in ends)


def imputer(table, values):
    """LatentODEImputer; also return 90 % intervals."""
    series = np.repeat(np.arange(len(table.offsets) - 1), np.diff(table.offsets))
    index = pd.MultiIndex.from_arrays([series, table.time], names=["series", "day"])
    frame = pd.DataFrame(values, index).rename(columns="x{}".format)
    filled, std = LatentODEImputer(random_state=0).fit(frame).impute(frame, True)
    reach = 1.645 * std.to_numpy()
    return filled.to_numpy(), filled.to_numpy() - reach, filled.to_numpy() + reach


METHODS = [interpolation, last, knn, iterative, gp, process, imputer]


def trial(table, pattern, seed, methods):
    """Return {method: (error, coverage of 90 % intervals or NaN, CPU seconds)}."""
    centre = np.nanmean(table.values, axis=0)
    scale = np.nanstd(table.values, axis=0)
    truth = (table.values - centre) / np.where(scale > 0, scale, 1.0)
    hidden = hide(table, pattern, np.random.default_rng(seed))
    values = np.where(hidden, np.nan, truth)
    result = {}
    for method in methods:
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.filterwarnings("ignore", ".* is better than LatentODE")
            filled = method(table, values)
        seconds = time.process_time() - start
        coverage = np.nan
        if filled is None:
            continue
        if isinstance(filled, tuple):
            filled, low, high = filled
            coverage = ((low <= truth) & (truth <= high))[hidden].mean()
        error = np.abs(filled - truth)[hidden].mean()
        result[method.__name__] = error, coverage, seconds
    return result


def main():
    """Print a line for each table and pattern."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    names = [method.__name__ for method in METHODS]
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    arguments = parser.parse_args()
    methods = [method for method in METHODS if method.__name__ in arguments.methods]
    print(f"{'':18}" + "".join(f"{name:>14}" for name in arguments.methods))
    for name in arguments.tables:
        try:
            table = load(name, arguments.data, arguments.patients)
        except FileNotFoundError as error:
            print(f"{name:18}SKIPPED: {error}")
            continue
        patterns = ["points", "blocks"] + ["own"] * (table.own is not None)
        for pattern in patterns:
            seeds = arguments.seeds[:1] if pattern == "own" else arguments.seeds
            trials = [trial(table, pattern, seed, methods) for seed in seeds]
            mean = {
                key: np.mean([one[key] for one in trials], axis=0) for key in trials[0]
            }
            for column, label in enumerate(["", "  coverage", "  CPU s"]):
                cells = [
                    f"{mean[key][column]:14.3f}" if key in mean else f"{'':14}"
                    for key in arguments.methods
                ]
                print(f"{(label or name + ' ' + pattern):18}" + "".join(cells))


if __name__ == "__main__":
    main()
