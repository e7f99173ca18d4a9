"""How much of the machine's rate of matrix products a solve by the kernels reaches.

The largest case of `solver.py`: 8 states, two hidden layers of 128, 4096 samples,
dopri5 at rtol = atol = 1e-5, float32. Beside it: torch's product of matrices of the
hidden layer's size, (4096, 128) by (128, 128), and the best of larger ones, which is
taken for the machine's rate. The share of the solve is that of its products, those of
steps that were refused included; the same solve with the cheapest activation tells what
tanh costs, and the rest is stages, errors, steps and dense output.

    python tests/benchmarks/kernel_rate.py [--rounds 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sknode.fields import MLPField
from sknode.ode import kernels, solve_ode

DIM, HIDDEN, BATCH = 8, 128, 4096
TOLERANCE, SCALE = 1e-5, 3.0


def median_time(function, rounds):
    """Return the median time of a call in seconds, the caches warm."""
    times = []
    for turn in range(rounds + 2):
        started = time.perf_counter()
        function()
        if turn >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def product_rate(rows, inner, columns, rounds):
    """Return the rate of a matrix product in GFLOP/s."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    seconds = median_time(lambda: torch.mm(a, b, out=out), rounds)
    return 2e-9 * rows * inner * columns / seconds


def make_field(activation):
    """Return the field of `solver.py`, with another activation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(DIM, (HIDDEN, HIDDEN), activation, time_dependent=False)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(SCALE if activation == "tanh" else 1.0)
    return field


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{torch.get_num_threads()} threads, {kernels.chosen()}")
    rate = 0.0
    for shape in [(BATCH, HIDDEN, HIDDEN), (1024, 1024, 1024), (2048, 2048, 2048)]:
        own = product_rate(*shape, args.rounds)
        rate = max(rate, own)
        print(f"product {shape!s:24s}{own:8.1f} GFLOP/s")
    torch.manual_seed(0)
    y0, t = torch.randn(BATCH, DIM), torch.tensor([0.0, 1.0])
    for activation in ("tanh", "relu"):
        field = make_field(activation)

        @torch.no_grad()
        def solve(field=field):
            return solve_ode(field, y0, t, rtol=TOLERANCE, atol=TOLERANCE)

        evaluations = solve().stats["n_f_evals"].double().mean().item()
        seconds = median_time(solve, args.rounds)
        per_evaluation = 2 * sum(w.numel() for w in field.parameters() if w.ndim == 2)
        own = 1e-9 * BATCH * evaluations * per_evaluation / seconds
        print(
            f"solve, {activation:5s}{evaluations:6.1f} evaluations "
            f"{1e3 * seconds:7.1f} ms {own:7.1f} GFLOP/s, {own / rate:.0%} of the best"
        )


if __name__ == "__main__":
    main()
