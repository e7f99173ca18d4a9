"""An epoch of a latent ODE on spirals, beside the same model through torchdiffeq.

1000 spirals of 100 points at the same times, the sizes of the paper: 25 units in the
recurrent encoder, 4 latent dimensions, 20 units in the vector field and the decoder,
all series in one batch, one update an epoch. The peer is what torchdiffeq's example
trains: a recurrent network step by step, `odeint` at its default tolerances or at those
of training here (1e-3), the evidence lower bound, Adam. Ours does more for an update:
the encoder also sees every series in part. Seconds are medians; by turns of three
epochs.

    python tests/benchmarks/latent_epoch.py [--turns 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter as clock

import numpy as np
import torch
from torch import nn
from torchdiffeq import odeint

from sknode._network import SolverSettings
from sknode._series import training
from sknode._series.network import LatentODENetwork
from sknode._series.panel import Panel
from sknode._training import History, Recipe
from sknode.datasets import make_spirals
from sknode.ode import kernels

RNN, LATENT, HIDDEN, NOISE = 25, 4, 20, 0.3
RATE = 0.01
TOGETHER = 3  # epochs of a turn


class Peer(nn.Module):
    """The latent ODE of the paper, for series with the same times."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.RNNCell(2, RNN)
        self.posterior_map = nn.Linear(RNN, 2 * LATENT)
        self.field = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)
        )

    def loss(self, values, time, **tolerances):
        """Return minus the evidence lower bound of series (n, length, 2)."""
        hidden = None
        for row in values.unbind(1)[::-1]:
            hidden = self.encoder(row, hidden)
        mean, log_var = self.posterior_map(hidden).chunk(2, -1)
        state = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        z = odeint(lambda t, z: self.field(z), state, time, **tolerances)
        error = (self.decoder(z).transpose(0, 1) - values) / NOISE
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
        return (0.5 * error.square().sum((1, 2)) + kl).mean()


def make_peer(values, time, **tolerances):
    """Return a function that trains for some epochs and returns the seconds of each."""
    torch.manual_seed(0)
    model = Peer()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def epochs():
        seconds = []
        for _ in range(TOGETHER):
            started = clock()
            optimizer.zero_grad()
            model.loss(values, time, **tolerances).backward()
            optimizer.step()
            seconds.append(clock() - started)
        return seconds

    return epochs


def make_ours(values, time):
    """Return the same for ours, from the start of series to their end."""
    training.HORIZON, training.LATE = 1.0, 0.0
    n, length, _ = values.shape
    codes, times = np.repeat(np.arange(n), length), np.tile(time.numpy(), n)
    panel, _ = Panel.from_rows(codes, times, values.flatten(0, 1).double().numpy())
    torch.manual_seed(0)
    network = LatentODENetwork(2, 0, LATENT, (HIDDEN,), "silu", RNN, (HIDDEN,))
    recipe = Recipe(
        max_iter=TOGETHER,
        batch_size=n,
        learning_rate=RATE,
        alpha=0.0,
        tol=0.0,
        n_iter_no_change=1,
        gradient_bound=None,
        warns=False,
    )
    settings = SolverSettings(
        "dopri5", 1e-3, 1e-3, max_steps=10_000, gradient="discrete", step_size=None
    )
    generator = torch.Generator().manual_seed(0)

    def epochs():
        history = History()
        training.Trainer(network, settings, recipe, generator, history).fit(panel)
        return history.seconds

    return epochs


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    frame = make_spirals(1000, noise=NOISE, random_state=0)
    shape = 1000, 100
    values = torch.tensor(frame[["x1", "x2"]].to_numpy().reshape(*shape, 2))
    values = (values - values.mean()).float() / values.std().float()
    time_ = torch.tensor(frame["time"].to_numpy().reshape(shape)[0])
    time_ = time_ / time_[-1]

    peer_time = 8.0 * time_  # the clock of our latent states, too
    ours = make_ours(values, time_)

    def without_kernels():
        with kernels.reference():
            return ours()

    contestants = {
        "sknode": ours,
        "sknode, without kernels": without_kernels,
        "torchdiffeq, as the example": make_peer(values, peer_time),
        "torchdiffeq, 1e-3": make_peer(values, peer_time, rtol=1e-3, atol=1e-3),
    }
    seconds = {name: [] for name in contestants}
    for turn in range(args.turns + 1):
        for name, epochs in contestants.items():
            spent = epochs()
            if turn:
                seconds[name] += spent
    medians = {name: statistics.median(x) for name, x in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["sknode"]
        print(f"{name:30s}{median:8.3f} s an epoch{ratio:8.1f} times ours")


if __name__ == "__main__":
    main()
