"""Forecasts of noisy spirals: a latent ODE, recurrent networks, and how far one can go.

The experiment of Chen et al. (2018), section 5.1, on `sknode.datasets.make_spirals`
with noise 0.3: 1000 series in pieces of 100 points, of which 30, 50 or 100 are
observed. 800 series, with the 100 points after the piece, are for training; of the
other 200 the observed points of the piece are given, and the 100 points after it are to
be forecast. The figure is the root mean square error of a coordinate, against the curve
without noise. The paper has 0.1642, 0.1502 and 0.1346, and 0.3937, 0.3202 and 0.1813
with its recurrent network.

The recurrent networks read the observed points one after the other and predict the
next one, with a Gaussian likelihood; beyond the last observed point they read what they
predicted. With time gaps they also read how long it is to the next point. The oracle
knows both curves and fits direction and start.

    python tests/benchmarks/spirals.py [--observed 30 50 100] [--seeds 0 1 2] [--no-rnn]
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sknode._network import SolverSettings
from sknode._series.network import LatentODENetwork
from sknode._series.panel import Panel
from sknode._series.posterior import posterior, predict_mean, refinement_helps
from sknode._series.training import Trainer
from sknode._training import History, Recipe
from sknode.datasets import make_spirals
from sknode.datasets.series import (
    CURVE_POINTS,
    CURVE_TURNS,
    FIRST_START,
    LAST_START,
    _spiral,
)

N_SERIES, N_TRAIN, N_TIMES = 1000, 800, 100
PAPER = {30: (0.1642, 0.3937), 50: (0.1502, 0.3202), 100: (0.1346, 0.1813)}
COORDINATES, TRUTH = ["x1", "x2"], ["x1_true", "x2_true"]


def make_panel(frame, mean, scale, span):
    """Return a panel of standardised series, in units of their span."""
    counts = frame.groupby("series").size()
    offsets = np.concatenate([[0], np.cumsum(counts)])
    values = (frame[COORDINATES].to_numpy() - mean) / scale
    empty = np.zeros((len(frame), 0))
    return Panel(offsets, frame["time"].to_numpy() / span, values, empty)


def latent_ode(train, given, future, seed, epochs):
    """Return the forecasts of a latent ODE for the rows to forecast."""
    values = train[COORDINATES].to_numpy()
    scaling = values.mean(0), values.std(0), train["time"].max()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LatentODENetwork(2, 0, 8, (32,), "silu", 32, (32,))
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
    panel = make_panel(train, *scaling)
    trainer.fit(panel)
    network.double()
    exact = SolverSettings("dopri5", 1e-6, 1e-6, 10_000, "discrete", None)
    refine = refinement_helps(network, panel, exact, generator)
    q = posterior(network, make_panel(given, *scaling), exact, refine=refine)
    mean, _ = predict_mean(network, q, make_panel(future, *scaling), exact)
    return mean * scaling[1] + scaling[0]


class Recurrent(nn.Module):
    """Predict the next point from those before, and from the gap to it on request."""

    def __init__(self, with_gaps, hidden=25):
        super().__init__()
        self.with_gaps = with_gaps
        self.rnn = nn.RNN(2 + with_gaps, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, 2)
        self.log_noise = nn.Parameter(torch.zeros(2))

    def forward(self, points, gaps, state=None):
        inputs = torch.cat([points, gaps[..., None]], -1) if self.with_gaps else points
        hidden, state = self.rnn(inputs, state)
        return self.readout(hidden), state

    def forecast(self, points, gaps, future_gaps):
        """Return what follows, point by point."""
        found, state = [], None
        # the last gap is that to the first point of the future
        for gap in [gaps, *future_gaps.T[1:, :, None]]:
            step, state = self(points, gap, state)
            points = step[:, -1:]
            found.append(points)
        return torch.cat(found, 1)


def recurrent(train, given, future, seed, with_gaps, n_updates=3000):
    """Return the forecasts of a recurrent network."""
    values = train[COORDINATES].to_numpy()
    mean, scale, span = values.mean(0), values.std(0), train["time"].max() / 100

    def tensors(frame):
        n = frame["series"].nunique()
        x = ((frame[COORDINATES].to_numpy() - mean) / scale).reshape(n, -1, 2)
        t = frame["time"].to_numpy().reshape(n, -1) / span
        return torch.from_numpy(x).float(), torch.from_numpy(t).float()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Recurrent(with_gaps)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)
    x, t = tensors(train)
    for _ in range(n_updates):
        rows = torch.randint(len(x), (50,), generator=generator)
        points, gaps = x[rows], t[rows].diff()
        predicted, _ = network(points[:, :-1], gaps)
        error = (points[:, 1:] - predicted) / network.log_noise.exp()
        loss = (0.5 * error**2 + network.log_noise).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    (points, before), (_, after) = tensors(given), tensors(future)
    steps = torch.cat([before, after], 1).diff()
    n = before.shape[1]
    with torch.no_grad():
        found = network.forecast(points, steps[:, :n], steps[:, n - 1 :])
    return found.double().numpy().reshape(-1, 2) * scale + mean


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
    parser.add_argument("--no-rnn", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(f"observed seed  {'model':20s}{'RMSE':>8s}{'paper':>8s}{'CPU s':>7s}")
    for n_observed in args.observed:
        own, theirs = PAPER[n_observed]
        models = {"latent ODE": (latent_ode, (args.epochs,), own)}
        if not args.no_rnn:
            models["RNN"] = recurrent, (False,), theirs
            models["RNN with time gaps"] = recurrent, (True,), np.nan
        models["oracle"] = oracle, (), np.nan
        for seed in args.seeds:
            data = make_data(n_observed, seed)
            for name, (forecast, further, paper) in models.items():
                started = time.process_time()
                mean = forecast(*data, seed, *further)
                seconds = time.process_time() - started
                rmse = np.sqrt(((mean - data[-1][TRUTH].to_numpy()) ** 2).mean())
                line = f"{n_observed:8d}{seed:5d}  {name:20s}{rmse:8.4f}{paper:8.4f}"
                print(f"{line}{seconds:7.0f}", flush=True)


def make_data(n_observed, seed):
    """Return series for training, and of the others the given and the later rows."""
    spirals = make_spirals(
        N_SERIES,
        n_times=N_TIMES,
        n_future=N_TIMES,
        n_observed=n_observed,
        noise=0.3,
        random_state=seed,
    )
    test = spirals[spirals["series"] >= N_TRAIN]
    future = test["future"]
    return spirals[spirals["series"] < N_TRAIN], test[~future], test[future]


if __name__ == "__main__":
    main()
