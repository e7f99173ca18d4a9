"""Rows of f computed for oscillators of very different stiffness, in one batch.

1000 Van der Pol oscillators from (2, 0) on t in [0, 20], with mu spread evenly in the
logarithm over 0.1 to 25, in float64 with dopri5. Each has its own mu in its state, so
that rows can be taken apart. Work is the number of rows of the vector field that were
computed: the sum of ``len(y)`` over its calls. Under per-sample control every
oscillator takes the steps that it needs at 1e-6, and leaves the batch at its end; under
one step size for all, the stiffest at each moment decides for everyone.

The two are compared at equal worst error over the batch (`scaled_error`, at the end):
the tolerance of shared control, whose error norm averages over the batch, is tuned by
bisection. So is that of torchdiffeq, which has shared control only.

    python tests/benchmarks/van_der_pol.py [--batch 1000] [--rounds 1]
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from torch import Tensor

from sknode.ode import solve_ode

sys.path.insert(0, str(Path(__file__).parents[1] / "ode"))
from detest import scaled_error, van_der_pol

T_END = 20.0
MU = (0.1, 25.0)
TOLERANCE = 1e-6


class Counted:
    """The field, with the calls and the rows that were computed."""

    def __init__(self):
        self.calls = self.rows = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(y)
        return van_der_pol(t, y)


@dataclass
class Result:
    """What a solve did, and how well."""

    calls: int
    rows: int
    seconds: float
    error: float


def rows_may_leave() -> dict[str, bool]:
    """Return the setting that lets samples leave the batch, where there is one."""
    known = "row_wise" in inspect.signature(solve_ode).parameters
    return {"row_wise": True} if known else {}


def ours(**settings) -> Callable:
    def solve(f, y0, tolerance):
        t = torch.tensor([0.0, T_END], dtype=torch.float64)
        solution = solve_ode(
            f, y0, t, rtol=tolerance, atol=tolerance, max_steps=100_000, **settings
        )
        return solution.y[:, -1]

    return solve


def through_torchdiffeq(f, y0, tolerance):
    t = torch.tensor([0.0, T_END], dtype=torch.float64)
    return torchdiffeq.odeint(
        f, y0, t, method="dopri5", rtol=tolerance, atol=tolerance
    )[-1]


def measure(solve: Callable, y0: Tensor, exact: Tensor, tolerance: float) -> Result:
    """Solve once."""
    f = Counted()
    start = time.perf_counter()
    y = solve(f, y0, tolerance)
    seconds = time.perf_counter() - start
    return Result(f.calls, f.rows, seconds, scaled_error(y, exact).max().item())


def tolerance_for(solve: Callable, y0: Tensor, exact: Tensor, error: float) -> float:
    """Return about the loosest tolerance whose error is at most the given one.

    Errors are not monotonic in the tolerance: the bisection, in the logarithm over
    1e-3 to 1e-11, ends at a tolerance that does reach the error.
    """
    loose, tight = np.log(1e-3), np.log(1e-11)
    if measure(solve, y0, exact, np.exp(tight)).error > error:
        raise RuntimeError(f"no tolerance down to 1e-11 reaches the error {error:.1e}")
    for _ in range(10):
        middle = (loose + tight) / 2
        if measure(solve, y0, exact, np.exp(middle)).error <= error:
            tight = middle
        else:
            loose = middle
    return float(np.exp(tight))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="timings per solve")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    mu = torch.logspace(*np.log10(MU), args.batch, dtype=torch.float64)
    y0 = torch.stack([torch.full_like(mu, 2.0), torch.zeros_like(mu), mu], dim=1)
    exact = ours(method="dopri8", **rows_may_leave())(van_der_pol, y0, 1e-13)

    per_sample = ours(**rows_may_leave())
    base = measure(per_sample, y0, exact, TOLERANCE)
    needed = solve_ode(
        van_der_pol, y0, [0.0, T_END], rtol=TOLERANCE, atol=TOLERANCE, max_steps=100_000
    ).stats["n_f_evals"]
    contestants = {
        "sknode, per sample": (per_sample, TOLERANCE),
        "sknode, shared": (ours(step_control="shared"), None),
        "torchdiffeq": (through_torchdiffeq, None),
    }
    leave = "leave" if rows_may_leave() else "do not leave"
    print(f"{args.batch} oscillators; samples that have arrived {leave} the batch")
    print(f"evaluations a sample: {needed.min()} to {needed.max()}, {needed.sum()} all")
    print(
        f"{'':20s}{'tolerance':>10s}{'worst error':>12s}{'calls':>8s}{'rows':>10s}"
        f"{'of shared':>10s}{'seconds':>9s}"
    )
    results = {}
    for name, (solve, tolerance) in contestants.items():
        if tolerance is None:
            tolerance = tolerance_for(solve, y0, exact, base.error)
        found = [measure(solve, y0, exact, tolerance) for _ in range(args.rounds)]
        found[0].seconds = statistics.median(r.seconds for r in found)
        results[name] = tolerance, found[0]
    shared = results["sknode, shared"][1].rows
    for name, (tolerance, r) in results.items():
        print(
            f"{name:20s}{tolerance:10.1e}{r.error:12.1e}{r.calls:8d}{r.rows:10d}"
            f"{r.rows / shared:10.2f}{r.seconds:9.2f}"
        )
    print(
        f"needed by the samples, without blocks of rows: {needed.sum()}, "
        f"{needed.sum() / shared:.2f} of shared"
    )


if __name__ == "__main__":
    main()
