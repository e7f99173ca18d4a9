"""Forecasts of hoppers: a latent ODE on the protocol of Rubanova et al. (2019).

1000 trajectories of 200 states of 14 numbers, 800 for training and 200 for testing, as
``(x - min) / max`` of each column. Extrapolation: of the first half of a test
trajectory 10, 20, 30 or 50 % of the points are given, the second half is to be
forecast. Interpolation: the same share of the points of a random window of 100 is
given, all of them are to be found. The figure is the mean squared error, times 100;
theirs is that of their best model, trained on more trajectories (10,000 in all).

    python tests/benchmarks/hopper.py --data hopper_train.npz [--seeds 0] [--epochs 100]
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning

from sknode import LatentODERegressor

N_TRAIN, HALF = 800, 100
SHARES = (0.1, 0.2, 0.3, 0.5)
PAPER = {
    "extrapolation": (1.441, 1.400, 1.175, 1.258),
    "interpolation": (0.360, 0.295, 0.300, 0.285),
}
WHERE = ["series", "time"]


def make_frame(values, rows):
    """Return the points of trajectories (n_series, n_times) that are asked for."""
    series, step = np.nonzero(rows)
    frame = pd.DataFrame(values[series, step]).rename(columns="x{}".format)
    frame.insert(0, "series", series)
    frame.insert(1, "time", step / values.shape[1])
    return frame


def fit(values, seed, epochs):
    """Return a regressor that has seen whole trajectories."""
    frame = make_frame(values, np.ones(values.shape[:2], bool))
    model = LatentODERegressor(
        latent_dim=24,
        hidden_layer_sizes=(128,),
        rnn_hidden_size=64,
        decoder_hidden_layer_sizes=(64,),
        series="series",
        batch_size=50,
        max_iter=epochs,
        n_iter_no_change=epochs,
        random_state=seed,
    )
    return model.fit(frame[WHERE], frame.drop(columns=WHERE))


def error(model, values, given, asked):
    """Return the mean squared error of the points asked for, times 100."""
    seen, query = make_frame(values, given), make_frame(values, asked)
    for frame in (seen, query):
        frame["series"] += N_TRAIN
    model = model.condition(seen[WHERE], seen.drop(columns=WHERE))
    found = model.predict(query[WHERE])
    return 100 * ((found - query.drop(columns=WHERE).to_numpy()) ** 2).mean()


def interpolation_error(values, given, asked):
    """Return the same of straight lines between the given points."""
    found = np.zeros_like(values)
    steps = np.arange(values.shape[1])
    for series, seen, lines in zip(values, given, found, strict=True):
        for x, line in zip(series.T, lines.T, strict=True):
            line[:] = np.interp(steps, steps[seen], x[seen])
    return 100 * ((found - values)[asked] ** 2).mean()


def choose(shape, first, share, rng):
    """Return windows of `HALF` points from `first` (n_series,) on, and a share of their
    points, both (n_series, n_times).
    """
    inside = np.arange(shape[1]) - np.broadcast_to(first, shape[:1])[:, None]
    asked = (inside >= 0) & (inside < HALF)
    order = np.where(asked, rng.uniform(size=shape), 2.0).argsort(1).argsort(1)
    return asked, order < round(share * HALF)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.filterwarnings("ignore", ".* is better than LatentODE")
    X = np.load(args.data)["X"].astype(np.float64)
    X = (X - X.min((0, 1))) / X.max((0, 1))
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(X))
        started = time.process_time()
        model = fit(X[order[:N_TRAIN]], seed, args.epochs)
        seconds = time.process_time() - started
        test = X[order[N_TRAIN:]]
        shape = test.shape[:2]
        errors = {"extrapolation": [], "interpolation": [], "straight lines": []}
        for share in SHARES:
            asked, given = choose(shape, 0, share, rng)
            errors["extrapolation"].append(error(model, test, given, ~asked))
            first = rng.integers(shape[1] - HALF + 1, size=len(test))
            asked, given = choose(shape, first, share, rng)
            errors["interpolation"].append(error(model, test, given, asked))
            lines = interpolation_error(test, given, asked)
            errors["straight lines"].append(lines)
        print(f"seed {seed}, {seconds:.0f} CPU s")
        print(f"{'':16s}" + "".join(f"{share:8.0%}" for share in SHARES))
        for name, figures in errors.items():
            print(f"{name:16s}" + "".join(f"{x:8.3f}" for x in figures))
            if name in PAPER:
                print(f"{'  paper':16s}" + "".join(f"{x:8.3f}" for x in PAPER[name]))


if __name__ == "__main__":
    main()
