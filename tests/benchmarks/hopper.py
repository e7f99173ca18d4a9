"""Forecasts of hoppers: a latent ODE on the protocol of Rubanova et al. (2019).

1000 trajectories of 200 states of 14 numbers, 800 for training and 200 for testing, as
``(x - min) / max`` of each column. Extrapolation: of the first part of a test
trajectory 10, 20, 30 or 50 % of the points are given, the second half is to be
forecast; the first part is the first half, as in their paper, or the first third, as in
their code. Interpolation: the same share of the points of the first half is given, all
of them are to be found. The figure is the mean squared error, times 100; theirs is that
of their best model, on 10,000 trajectories.

    python tests/benchmarks/hopper.py --data hopper_train.npz [--seeds 0] [--epochs 200]
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from sknode._network import SolverSettings
from sknode._series.network import LatentODENetwork
from sknode._series.panel import Panel
from sknode._series.posterior import posterior, predict_mean, refinement_helps
from sknode._series.training import Trainer
from sknode._training import History, Recipe

N_TRAIN, HALF = 800, 100
EXACT = SolverSettings("dopri5", 1e-5, 1e-5, 10_000, "discrete", None)
SHARES = (0.1, 0.2, 0.3, 0.5)
PAPER = {
    "extrapolation, half": (1.441, 1.400, 1.175, 1.258),
    "interpolation": (0.360, 0.295, 0.300, 0.285),
}


def make_panel(time, values, given):
    """Return a panel of the given points (n_series, n_times) of trajectories."""
    offsets = np.concatenate([[0], np.cumsum(given.sum(1))])
    times = np.broadcast_to(time, given.shape)[given]
    return Panel(offsets, times, values[given], np.zeros((len(times), 0)))


def fit(values, times, seed, epochs):
    """Return a trained network, and whether refinement helps it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LatentODENetwork(values.shape[2], 0, 24, (128,), "silu", 64, (64,))
    recipe = Recipe(
        max_iter=epochs,
        batch_size=50,
        learning_rate=2e-2,
        alpha=0.0,
        tol=0.0,
        n_iter_no_change=epochs,
        gradient_bound=None,
        optimizer="muon",
        decays=True,
    )
    settings = SolverSettings("dopri5", 1e-3, 1e-3, 10_000, "discrete", None)
    generator = torch.Generator().manual_seed(seed)
    trainer = Trainer(network, settings, recipe, generator, History())
    panel = make_panel(times, values, np.ones(values.shape[:2], bool))
    trainer.fit(panel)
    return network.double(), refinement_helps(network, panel, EXACT, generator)


def predict(network, refine, times, values, given, asked):
    """Return the means (n_series, n_times, n_channels) of the points asked for."""
    q = posterior(network, make_panel(times, values, given), EXACT, refine=refine)
    query = make_panel(times, np.full_like(values, np.nan), asked)
    mean, _ = predict_mean(network, q, query, EXACT)
    return mean.reshape(len(values), -1, values.shape[2])


def interpolate(times, values, given):
    """Return the points of the first half by straight lines between the given ones."""
    return np.stack(
        [
            [np.interp(times[:HALF], times[g], x[g]) for x in series.T]
            for series, g in zip(values, given, strict=True)
        ]
    ).swapaxes(1, 2)


def choose(n_series, n_times, first, share, rng):
    """Choose a share of the first points of each series."""
    given = np.zeros((n_series, n_times), bool)
    order = rng.uniform(size=(n_series, first)).argsort(1)
    given[:, :first] = order < round(share * first)
    return given


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    X = np.load(args.data)["X"].astype(np.float64)
    X = (X - X.min((0, 1))) / X.max((0, 1))
    n, n_times, _ = X.shape
    times = np.arange(n_times) / n_times
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        order = rng.permutation(n)
        train, test = X[order[:N_TRAIN]], X[order[N_TRAIN:]]
        mean, scale = train.mean((0, 1)), train.std((0, 1))
        values = (test - mean) / scale
        started = time.process_time()
        model = fit((train - mean) / scale, times, seed, args.epochs)
        seconds = time.process_time() - started
        early = np.arange(n_times) < HALF
        errors = {
            name: []
            for name in (
                "extrapolation, half",
                "extrapolation, third",
                "interpolation",
                "linear interpolation",
            )
        }
        for share in SHARES:
            asked = np.broadcast_to(~early, values.shape[:2])
            for name, first in (("half", HALF), ("third", n_times // 3)):
                given = choose(len(test), n_times, first, share, rng)
                found = predict(*model, times, values, given, asked)
                error = (found - values[:, HALF:]) * scale
                errors[f"extrapolation, {name}"].append((error**2).mean())
            given = choose(len(test), n_times, HALF, share, rng)
            found = predict(*model, times, values, given, ~asked)
            lines = interpolate(times, values, given)
            for name, x in (("", found), ("linear ", lines)):
                error = (x - values[:, :HALF]) * scale
                errors[f"{name}interpolation"].append((error**2).mean())
        print(f"seed {seed}, {seconds:.0f} CPU s, refined: {model[1]}")
        print(f"{'':24s}" + "".join(f"{share:8.0%}" for share in SHARES))
        for name, figures in errors.items():
            print(f"{name:24s}" + "".join(f"{100 * x:8.3f}" for x in figures))
            if name in PAPER:
                print(f"{'  paper':24s}" + "".join(f"{x:8.3f}" for x in PAPER[name]))


if __name__ == "__main__":
    main()
