"""The gradient of a latent-ODE-like problem, beside torchdiffeq's.

1000 samples of 4 states through a tanh field with two hidden layers of 20, observed at
100 irregular times, dopri5, float32. The error is that of the parameters' gradient
against the discrete adjoint in float64 at 1e-11, relative to its largest entry. All
solvers run in one process, in turns; a figure is the median of the rounds.

    python tests/benchmarks/latent_gradient.py [--rounds 11] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
import torchdiffeq
from torch import nn

from sknode.fields import MLPField
from sknode.ode import solve_ode
from sknode.ode.kernels import reference

BATCH, DIM, HIDDEN, N_TIMES = 1000, 4, 20, 100
TOLERANCE = 1e-5


def make_problem(dtype):
    """Return a field, the same one as a plain module, states, times and targets."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(DIM, (HIDDEN, HIDDEN))
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(3)
    field = field.to(dtype)
    one, two, three = field.layers
    net = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), three)
    y0 = torch.randn(BATCH, DIM, generator=generator)
    t = torch.rand(N_TIMES - 2, generator=generator, dtype=torch.float64).sort()[0]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    t = torch.cat([ends[:1], t, ends[1:]])
    targets = torch.randn(BATCH, N_TIMES, DIM, generator=generator)
    return field, net, y0.to(dtype), t.to(dtype), targets.to(dtype)


class Plain(nn.Module):
    """The field as a user of the other package writes it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, y):
        return self.net(y)


def gradient(solve, field, y0, targets):
    """Return the gradient of the squared distance to the targets."""
    field.zero_grad(set_to_none=True)
    loss = ((solve(y0) - targets) ** 2).mean(0).sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in field.parameters()])


def contestants(field, net, t):
    """Return name -> function that solves and returns (batch, n_times, dim)."""
    plain = Plain(net)

    def ours(gradient, f=field, tolerance=TOLERANCE, **settings):
        def solve(y0):
            return solve_ode(
                f, y0, t, rtol=tolerance, atol=tolerance, gradient=gradient, **settings
            ).y

        return solve

    def theirs(function):
        def solve(y0):
            return function(
                plain, y0, t, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE
            ).transpose(0, 1)

        return solve

    def without_kernels(solve):
        def wrapped(*args):
            with reference():
                return gradient(solve, *args)

        return wrapped

    solvers = {
        "torchdiffeq, adjoint": theirs(torchdiffeq.odeint_adjoint),
        "torchdiffeq, backpropagation": theirs(torchdiffeq.odeint),
        "sknode, continuous": ours("continuous"),
        "sknode, discrete": ours("discrete"),
        "sknode, continuous, any module": ours("continuous", plain),
        "sknode, discrete, any module": ours("discrete", plain),
    }
    jobs = {name: partial(gradient, solve) for name, solve in solvers.items()}
    for name in ("continuous", "discrete"):
        jobs[f"sknode, {name}, no kernels"] = without_kernels(ours(name))
    return jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    field, _, y0, t, targets = make_problem(torch.float64)

    def exactly(y0):
        return solve_ode(field, y0, t, method="dopri8", rtol=1e-11, atol=1e-11).y

    exact = gradient(exactly, field, y0, targets)
    field, net, y0, t, targets = make_problem(torch.float32)
    jobs = contestants(field, net, t)
    times = {name: [] for name in jobs}
    errors = {}
    for turn in range(args.rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            found = job(field, y0, targets)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
            errors[name] = ((found - exact).abs().max() / exact.abs().max()).item()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'solver':36s}{'error':>9s}{'ms':>9s}{'adjoint x':>11s}{'backprop x':>12s}")
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, ms in median.items():
        one = median["torchdiffeq, adjoint"] / ms
        two = median["torchdiffeq, backpropagation"] / ms
        print(f"{name:36s}{errors[name]:9.1e}{ms:9.1f}{one:11.1f}{two:12.1f}")


if __name__ == "__main__":
    main()
