"""An epoch of a latent ODE on spirals, beside that of torchdiffeq's example.

1000 spirals of 100 points at the same times, 25 units in the recurrent encoder, 4
latent dimensions, two layers of 20 units in the vector field and one in the decoder,
all series in one batch, one update an epoch. The peer is the model and the training of
`examples/latent_ode.py` of torchdiffeq, written anew: a recurrent network step by step,
`odeint` at its default tolerances (1e-7 and 1e-9), the evidence lower bound, Adam at a
constant rate. It is trained at the tolerance of ours, too. Solves take more evaluations
once the field has learned something, so that all are trained, by turns of an epoch, and
seconds are medians of a stage.

Ours is the training of `LatentODERegressor`, on whole series. It does more for an
update: the encoder is gated, and also sees series in part. It standardises the values,
lets the divergence from the prior and the noise come in by and by, and ends with epochs
in which the learning rate falls: from two thirds of the epochs on.

The second table has the seconds of training until what the models make of the noisy
points has a root mean square error against the curves without noise; its star marks the
least error of the example.

    python tests/benchmarks/latent_epoch.py [--epochs 500] [--threads 1] [--reference]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from time import perf_counter as clock

import numpy as np
import torch
from torch import nn
from torchdiffeq import odeint

from sknode._network import SolverSettings
from sknode._series import training
from sknode._series.network import LatentODENetwork, Series
from sknode._series.panel import Panel
from sknode._training import History, Recipe
from sknode.datasets import make_spirals
from sknode.ode import kernels

RNN, LATENT, HIDDEN, NOISE = 25, 4, 20, 0.3
RATE = 0.01
N_SERIES, LENGTH = 1000, 100
# Epochs from one look at the errors to the next, and the errors of the second table.
LOOK, LEVELS = 5, (1.0, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


class Example(nn.Module):
    """The latent ODE of the example."""

    def __init__(self, tolerances):
        super().__init__()
        self.tolerances = tolerances
        self.to_hidden = nn.Linear(2 + RNN, RNN)
        self.to_posterior = nn.Linear(RNN, 2 * LATENT)
        self.field = nn.Sequential(
            nn.Linear(LATENT, HIDDEN),
            nn.ELU(inplace=True),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ELU(inplace=True),
            nn.Linear(HIDDEN, LATENT),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, 2)
        )
        self.n_evaluations = 0

    def slope(self, t, z):
        """Return the slope of latent states."""
        self.n_evaluations += 1
        return self.field(z)

    def encode(self, values):
        """Return means and log-variances of the posterior of series (n, length, 2)."""
        hidden = values.new_zeros(len(values), RNN)
        for row in values.unbind(1)[::-1]:
            hidden = torch.tanh(self.to_hidden(torch.cat([row, hidden], 1)))
            posterior = self.to_posterior(hidden)  # at every row, as there
        return posterior.chunk(2, -1)

    def paths(self, states, time):
        """Return the means of the points, (n, length, 2)."""
        z = odeint(self.slope, states, time, **self.tolerances)
        return self.decoder(z.transpose(0, 1))

    def loss(self, values, time):
        """Return minus the evidence lower bound."""
        mean, log_var = self.encode(values)
        states = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        error = (self.paths(states, time) - values) / NOISE
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
        return (0.5 * error.square().sum((1, 2)) + kl).mean()

    @torch.no_grad()
    def smooth(self, values, time):
        """Return what the model makes of points."""
        return self.paths(self.encode(values)[0], time)


class Training:
    """The training of the example."""

    def __init__(self, values, time, **tolerances):
        torch.manual_seed(0)
        self.model = Example(tolerances)
        self.values, self.time = values, time
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.seconds, self.evaluations = [], []

    def train(self):
        """Train for an epoch."""
        started, self.model.n_evaluations = clock(), 0
        self.optimizer.zero_grad()
        self.model.loss(self.values, self.time).backward()
        self.optimizer.step()
        self.seconds.append(clock() - started)
        self.evaluations.append(self.model.n_evaluations)

    def smooth(self):
        """Return what the model makes of the points."""
        return self.model.smooth(self.values, self.time)


class Ours:
    """Our training on the same series, from their start to their end."""

    def __init__(self, values, time):
        training.HORIZON, training.LATE = 1.0, 0.0
        self.mean, self.scale = values.mean(), values.std()
        scaled = ((values - self.mean) / self.scale).double().flatten(0, 1).numpy()
        codes = np.repeat(np.arange(N_SERIES), LENGTH)
        share = np.tile((time / time[-1]).numpy(), N_SERIES)
        self.panel, _ = Panel.from_rows(codes, share, scaled)
        torch.manual_seed(0)
        sizes = LATENT, (HIDDEN, HIDDEN), "silu", RNN, (HIDDEN,)
        self.network = LatentODENetwork(2, 0, *sizes)
        self.settings = SolverSettings(
            "dopri5", 1e-3, 1e-3, max_steps=10_000, gradient="discrete", step_size=None
        )
        self.history = History()

    def fit(self, epochs, after_epoch):
        """Train for some epochs and call a function after each."""
        recipe = Recipe(
            max_iter=epochs,
            batch_size=N_SERIES,
            learning_rate=RATE,
            alpha=0.0,
            tol=0.0,
            n_iter_no_change=epochs,
            gradient_bound=None,
            warns=False,
        )
        generator = torch.Generator().manual_seed(0)
        trainer = training.Trainer(
            self.network, self.settings, recipe, generator, self.history
        )
        trainer.fit(self.panel, on_epoch=after_epoch)

    @torch.no_grad()
    def smooth(self):
        """Return what the model makes of the points."""
        series = Series.of(self.panel, self.network.log_noise)
        q = self.network.encode(series)
        means, _ = self.network(q.mean[None], q.start, series, self.settings)
        return means[0] * self.scale + self.mean


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", action="store_true", help="without the kernels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    frame = make_spirals(N_SERIES, n_times=LENGTH, noise=NOISE, random_state=0)
    shape = N_SERIES, LENGTH, 2
    values, truth = (
        torch.tensor(frame[columns].to_numpy().reshape(shape)).float()
        for columns in (["x1", "x2"], ["x1_true", "x2_true"])
    )
    time = torch.tensor(frame["time"].to_numpy()[:LENGTH]).float()
    ours = Ours(values, time)
    peers = [Training(values, time), Training(values, time, rtol=1e-3, atol=1e-3)]
    errors = []

    def train_peers(epoch):
        for peer in peers:
            peer.train()
        if epoch % LOOK == LOOK - 1:
            smooth = ours.smooth(), *(peer.smooth() for peer in peers)
            errors.append([float((x - truth).square().mean().sqrt()) for x in smooth])
        return False

    with kernels.reference() if args.reference else contextlib.nullcontext():
        ours.fit(args.epochs, train_peers)
    seconds = [ours.history.seconds, *(peer.seconds for peer in peers)]
    evaluations = [ours.history.nfe, *(peer.evaluations for peer in peers)]
    print_epochs(seconds, evaluations, args.epochs)
    print_errors(seconds, errors)


def print_epochs(seconds, evaluations, epochs):
    """Print medians of stages."""
    names = "sknode", "example", "at 1e-3"
    print(f"{'epochs':>12s}", *(f"{name + ', s':>12s}" for name in names), end="")
    print(f"{'ratios':>14s}{'evaluations':>20s}")
    cuts = sorted({0, *(round(x * epochs) for x in (0.2, 0.5, 1.0))})
    for first, end in itertools.pairwise(cuts):
        spent = [statistics.median(x[first:end]) for x in seconds]
        nfe = [statistics.median(x[first:end]) for x in evaluations]
        print(f"{f'{first + 1} to {end}':>12s}", *(f"{x:12.4f}" for x in spent), end="")
        ratios = "".join(f"{x / spent[0]:7.1f}" for x in spent[1:])
        print(ratios + "".join(f"{x:7.0f}" for x in nfe))


def print_errors(seconds, errors):
    """Print the seconds until errors are reached."""
    print(f"\n{'error':>12s}")
    best = min((row[1] for row in errors), default=LEVELS[0])
    for level in sorted({*LEVELS, best}, reverse=True):
        spent = [
            time_until(level, [row[i] for row in errors], history)
            for i, history in enumerate(seconds)
        ]
        label = f"{level:.2f}{'*' if level == best else ' '}"
        print(f"{label:>12s}", *(f"{x:12.1f}" for x in spent), end="")
        print("".join(f"{x / spent[0]:7.1f}" for x in spent[1:]))


def time_until(level, errors, seconds):
    """Return the seconds of training until an error is reached, or NaN."""
    below = (i for i, error in enumerate(errors) if error <= level)
    first = next(below, None)
    return float("nan") if first is None else sum(seconds[: LOOK * (first + 1)])


if __name__ == "__main__":
    main()
