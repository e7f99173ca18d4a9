"""Forecasts of noisy spirals over several seeds, and how far one can go.

The experiment of `examples/spirals.py`, which has the models: 800 series for training,
200 of which 30, 50 or 100 points are given and the 100 points after these are to be
forecast. The figure is the root mean square error of a coordinate, against the curve
without noise. The oracle knows both curves and fits direction and start.

    python tests/benchmarks/spirals.py [--observed 30 50 100] [--seeds 0 1 2] [--no-rnn]
"""

from __future__ import annotations

import argparse
import runpy
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from sknode.datasets.series import (
    CURVE_POINTS,
    CURVE_TURNS,
    FIRST_START,
    LAST_START,
    _spiral,
)

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "spirals.py"))
COORDINATES, TRUTH = EXAMPLE["COORDINATES"], EXAMPLE["TRUTH"]
N_SERIES = 1000


def latent_ode(train, given, future, seed, epochs):
    """Return the forecasts of `LatentODERegressor`."""
    return EXAMPLE["latent_ode"](train, given, future, seed, epochs)[1]


def recurrent(train, given, future, seed, with_gaps, n_updates):
    """Return the forecasts of a recurrent network."""
    return EXAMPLE["recurrent"](train, given, future, seed, with_gaps, n_updates)[0]


def oracle(train, given, future, seed):
    """Return how the curve goes on that is nearest to what is given."""
    step = 2 * np.pi * CURVE_TURNS / (CURVE_POINTS - 1)
    starts = step * np.arange(FIRST_START, LAST_START + 1, 0.1)
    found = []
    for (_, seen), (_, later) in zip(
        given.groupby("series"), future.groupby("series"), strict=True
    ):
        times, points = seen["time"].to_numpy(), seen[COORDINATES].to_numpy()
        errors = np.stack(
            [
                ((_spiral(starts[:, None] + times, k) - points) ** 2).sum((1, 2))
                for k in (False, True)
            ]
        )
        k, start = np.unravel_index(errors.argmin(), errors.shape)
        found.append(_spiral(starts[start] + later["time"].to_numpy(), k))
    return np.concatenate(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--observed", type=int, nargs="+", default=[30, 50, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--no-rnn", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(f"observed seed  {'model':20s}{'RMSE':>8s}{'paper':>8s}{'CPU s':>7s}")
    for n_observed in args.observed:
        own, theirs = EXAMPLE["PAPER"][n_observed]
        models = {"latent ODE": (latent_ode, (args.epochs,), own)}
        if not args.no_rnn:
            models["RNN"] = recurrent, (False, args.updates), theirs
            models["RNN with time gaps"] = recurrent, (True, args.updates), np.nan
        models["oracle"] = oracle, (), np.nan
        for seed in args.seeds:
            data = EXAMPLE["make_data"](n_observed, N_SERIES, seed)
            for name, (forecast, further, paper) in models.items():
                started = time.process_time()
                mean = forecast(*data, seed, *further)
                seconds = time.process_time() - started
                rmse = np.sqrt(((mean - data[-1][TRUTH].to_numpy()) ** 2).mean())
                line = f"{n_observed:8d}{seed:5d}  {name:20s}{rmse:8.4f}{paper:8.4f}"
                print(f"{line}{seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
