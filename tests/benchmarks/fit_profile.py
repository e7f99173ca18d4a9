"""Where the time of a fit goes, with the kernels and without.

One fit of each estimator, in parts that do not overlap: solves, their reverse sweeps,
the encoder of series, what densities and series start from (mixtures, linear
processes), scores of held-out data, what judges and corrects the model of series, steps
of the optimizer, and the rest: networks around the flow, losses, batches
and bookkeeping. One thread; medians of several fits, with the kernels and without in
turn.

    python tests/benchmarks/fit_profile.py [--only digits moons spirals] [--repeats 3]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
import warnings

import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from sknode import (
    CNFDensity,
    LatentODERegressor,
    ODENetClassifier,
    _density_training,
    _latent_base,
    _network,
    _odenet_base,
    _optimizers,
    _training,
    density,
)
from sknode._series import fitting, network, recurrent
from sknode._series import training as series_training
from sknode.datasets import make_density, make_spirals
from sknode.ode import gradients, kernels

# Functions whose time is a part; inside of one nothing else is counted.
PARTS = {
    "solves": [(_network.SolverSettings, "solve")],
    "reverse sweeps": [(gradients._DiscreteAdjoint, "backward")],
    "encoder": [
        (network, "last_state"),
        (recurrent._LastState, "backward"),
        (recurrent._FusedLastState, "backward"),
    ],
    "starts": [
        (density, "choose_start"),
        (fitting, "fit_warped_process"),
        (fitting, "fit_process"),
    ],
    "held-out scores": [],  # of `train`, see there
    "judging": [(fitting, "_judge"), (_latent_base, "refinement_helps")],
    "optimizer": [
        (_optimizers._Optimizer, "step"),
        (_training.Clip, "__call__"),
        (_training.Average, "update"),
    ],
}
TRAINERS = _odenet_base, _density_training, series_training


class Stopwatch:
    """Adds up the time of functions, while it is the outermost of them that runs."""

    def __init__(self):
        self.seconds, self.running = dict.fromkeys(PARTS, 0.0), False

    def timed(self, part, function):
        """Return a function that is counted as a part."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if self.running:
                return function(*args, **kwargs)
            self.running, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.running = False
                self.seconds[part] += time.perf_counter() - started

        return wrapper

    def timed_trainer(self, train):
        """Return `train` with its scores of held-out data counted."""

        def wrapper(*args, validate=None, **kwargs):
            if validate is not None:
                validate = self.timed("held-out scores", validate)
            return train(*args, validate=validate, **kwargs)

        return wrapper

    @contextlib.contextmanager
    def watch(self):
        """Count for a while."""
        before = []

        def replace(owner, name, function):
            before.append((owner, name, vars(owner)[name]))
            static = isinstance(vars(owner)[name], staticmethod)
            setattr(owner, name, staticmethod(function) if static else function)

        for part, functions in PARTS.items():
            for owner, name in functions:
                replace(owner, name, self.timed(part, getattr(owner, name)))
        for module in TRAINERS:
            replace(module, "train", self.timed_trainer(module.train))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def digits():
    """Fit a classifier of images, at its defaults."""
    X, y = load_digits(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    ODENetClassifier(random_state=0).fit(X, y)


def moons():
    """Fit a density, some epochs."""
    X, _ = make_density("moons", 2000, random_state=0)
    CNFDensity(max_iter=20, random_state=0).fit(X)


def spirals():
    """Fit a latent ODE to 200 series, some epochs."""
    frame = make_spirals(200, random_state=0)
    where = ["series", "time"]
    model = LatentODERegressor(series="series", max_iter=30, random_state=0)
    model.fit(frame[where], frame[["x1", "x2"]])


FITS = {"digits": digits, "moons": moons, "spirals": spirals}


def measure(fit, reference):
    """Return the seconds of a fit and of its parts."""
    stopwatch = Stopwatch()
    context = kernels.reference() if reference else contextlib.nullcontext()
    with context, stopwatch.watch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        fit()
        seconds = time.perf_counter() - started
    rest = seconds - sum(stopwatch.seconds.values())
    return {**stopwatch.seconds, "rest": rest, "whole fit": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FITS, default=list(FITS))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = {}
    for name in args.only:
        found = {reference: [] for reference in (True, False)}
        measure(FITS[name], False)  # what is made once is none of a fit
        for _ in range(args.repeats):
            for reference, fits in found.items():
                fits.append(measure(FITS[name], reference))
        for reference, fits in found.items():
            label = f"{name}, torch" if reference else "kernels"
            columns[label + " " * len(columns)] = {
                part: statistics.median(fit[part] for fit in fits) for part in fits[0]
            }
    print(f"{'seconds':16s}" + "".join(f"{label.strip():>16s}" for label in columns))
    for part in next(iter(columns.values())):
        row = "".join(f"{column[part]:16.2f}" for column in columns.values())
        print(f"{part:16s}{row}")


if __name__ == "__main__":
    main()
