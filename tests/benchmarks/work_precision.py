"""Work and precision of the solver beside the same methods elsewhere.

Every solver integrates every problem at ``rtol = atol`` from 1e-3 to 1e-10, in float64.
Work is the number of evaluations of the vector field, and the time; precision is the
error at the end of the interval, in the scale where the tolerance itself is ``tol``
(see ``scaled_error`` in ``tests/ode/detest.py``). On the 25 DETEST problems
evaluations are summed, and errors are averaged geometrically. In a batch a sample's
evaluations are the mean over the batch, and the error is the largest.

Then, for each method, the evaluations that it needs for an error are compared with
those of the same method elsewhere, by interpolation between the tolerances (linear in
the logarithms). Errors at one end vary with the luck of a step sequence by a factor
of two or so, and evaluations by its fifth or eighth root: a ratio within a few per
cent of 1 says that there is no difference. scipy's solvers call the same torch
function through NumPy, so times compare solvers on the same field.

    python tests/benchmarks/work_precision.py [--csv] [--rounds 3] [--only DETEST]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from scipy.integrate import solve_ivp
from torch import Tensor

from sknode.ode import METHODS, solve_ode

sys.path.insert(0, str(Path(__file__).parents[1] / "ode"))
from detest import (
    ARENSTORF,
    DETEST,
    Problem,
    mlp_problem,
    scaled_error,
    van_der_pol_problem,
)

# half decades, so that interpolation has something to hold on to
TOLERANCES = [10 ** (-k / 2) for k in range(6, 21)]
OURS = [m for m in ("dopri5", "tsit5", "dopri8", "adams") if m in METHODS]
# dopri8 is the code DOP853. torchdiffeq's method of this name is the 8(7) pair of
# Prince & Dormand, another method of that order.
SAME_ELSEWHERE = {
    "sknode dopri5": ["scipy RK45", "torchdiffeq dopri5"],
    "sknode tsit5": ["scipy RK45", "torchdiffeq dopri5"],
    "sknode dopri8": ["scipy DOP853", "torchdiffeq dopri8"],
    "sknode adams": ["scipy LSODA"],
}


@dataclass(frozen=True)
class Case:
    """A problem with a batch of initial states and the end states they lead to."""

    problem: Problem
    y0: Tensor
    reference: Tensor

    @classmethod
    def single(cls, problem: Problem, reference: Tensor | None = None) -> Case:
        if reference is None:
            reference = problem.reference
        return cls(problem, problem.y0, reference[None])


@dataclass
class Result:
    """Evaluations of a sample, scaled error, seconds."""

    evaluations: float
    error: float
    seconds: float


def make_suites() -> dict[str, list[Case]]:
    generator = torch.Generator().manual_seed(0)
    mlp = mlp_problem()
    y0 = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    ends = [Problem("", mlp.f, tuple(row), mlp.t_end).reference for row in y0.tolist()]
    return {
        "DETEST": [Case.single(problem) for problem in DETEST.values()],
        "Arenstorf": [Case.single(ARENSTORF, ARENSTORF.y0[0])],
        "Van der Pol, mu=5": [Case.single(van_der_pol_problem(5.0))],
        "MLP, batch 1": [Case.single(mlp)],
        "MLP, batch 64": [Case(mlp, y0, torch.stack(ends))],
    }


def with_sknode(method: str) -> Callable:
    def solve(case: Case, tolerance: float):
        solution = solve_ode(
            case.problem.f,
            case.y0,
            case.problem.t,
            method=method,
            rtol=tolerance,
            atol=tolerance,
            max_steps=100_000,
        )
        return solution.y[:, -1], solution.stats["n_f_evals"].double().mean().item()

    return solve


def with_scipy(method: str) -> Callable:
    def solve(case: Case, tolerance: float):
        shape, f = case.y0.shape, case.problem.f

        def slope(t, y):
            t = torch.tensor(t, dtype=torch.float64)
            return f(t, torch.from_numpy(y).view(shape)).reshape(-1).numpy()

        solution = solve_ivp(
            slope,
            (0.0, case.problem.t_end),
            case.y0.reshape(-1).numpy(),
            method=method,
            rtol=tolerance,
            atol=tolerance,
        )
        return torch.from_numpy(solution.y[:, -1]).view(shape), solution.nfev

    return solve


def with_torchdiffeq(method: str) -> Callable:
    def solve(case: Case, tolerance: float):
        calls = 0

        def f(t, y):
            nonlocal calls
            calls += 1
            return case.problem.f(t, y)

        y = torchdiffeq.odeint(
            f, case.y0, case.problem.t, method=method, rtol=tolerance, atol=tolerance
        )
        return y[-1], calls

    return solve


def make_solvers() -> dict[str, Callable]:
    return {
        **{f"sknode {m}": with_sknode(m) for m in OURS},
        **{f"scipy {m}": with_scipy(m) for m in ("RK45", "DOP853", "LSODA")},
        **{f"torchdiffeq {m}": with_torchdiffeq(m) for m in ("dopri5", "dopri8")},
    }


def measure(solve: Callable, cases: list[Case], tolerance: float, rounds: int):
    """Solve all cases of a suite; return a Result for each."""
    results = []
    for case in cases:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            y, evaluations = solve(case, tolerance)
            seconds.append(time.perf_counter() - start)
        error = scaled_error(y, case.reference).max().item()
        results.append(Result(evaluations, error, statistics.median(seconds)))
    return results


def summarise(results: list[Result]) -> Result:
    """Add up the work of a suite's cases, average the error geometrically."""
    # an error may be zero by luck
    errors = [max(r.error, 1e-16) for r in results]
    return Result(
        sum(r.evaluations for r in results),
        statistics.geometric_mean(errors),
        sum(r.seconds for r in results),
    )


def evaluations_at(results: list[Result], errors: np.ndarray) -> np.ndarray:
    """Interpolate the evaluations needed for some errors; NaN outside the range.

    Where a tighter tolerance gave a larger error, the two trade places: the curve of
    evaluations over errors is made monotonic by sorting either of them.
    """
    x = np.sort([np.log(max(r.error, 1e-16)) for r in results])
    y = np.sort([np.log(r.evaluations) for r in results])[::-1]
    return np.exp(np.interp(np.log(errors), x, y, left=np.nan, right=np.nan))


def print_table(suite: str, summaries: dict[str, list[Result]]) -> None:
    print(f"\n## {suite}: evaluations and error, by tolerance")
    whole = range(0, len(TOLERANCES), 2)
    print(f"{'':20s}" + "".join(f"{TOLERANCES[i]:>17.0e}" for i in whole))
    for name, results in summaries.items():
        cells = (
            f"{results[i].evaluations:8.0f} {results[i].error:8.1e}" for i in whole
        )
        print(f"{name:20s}" + "".join(cells))
    print("milliseconds")
    for name, results in summaries.items():
        cells = (f"{1e3 * results[i].seconds:17.1f}" for i in whole)
        print(f"{name:20s}" + "".join(cells))


def print_ratios(suite: str, summaries: dict[str, list[Result]]) -> None:
    errors = 10.0 ** np.arange(-3, -10, -1)
    print(f"\n## {suite}: evaluations at equal error, ours over theirs (1 is equal)")
    print(f"{'error':40s}" + "".join(f"{e:8.0e}" for e in errors) + "    mean")
    for name, others in SAME_ELSEWHERE.items():
        for other in others if name in summaries else ():
            ours, theirs = (evaluations_at(summaries[x], errors) for x in (name, other))
            ratios = ours / theirs
            cells = "".join("       -" if np.isnan(r) else f"{r:8.2f}" for r in ratios)
            mean = np.exp(np.nanmean(np.log(ratios)))
            print(f"{name + ' / ' + other:40s}{cells}{mean:8.2f}")


def print_csv(rows) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["suite", "problem", "solver", "tolerance", "evaluations", "error", "seconds"]
    )
    for suite, problem, solver, tolerance, r in rows:
        values = (f"{v:.6g}" for v in (tolerance, r.evaluations, r.error, r.seconds))
        writer.writerow([suite, problem, solver, *values])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="print all results as CSV")
    parser.add_argument("--rounds", type=int, default=1, help="timings per solve")
    parser.add_argument("--only", default="", help="suites whose name starts so")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    # scipy warns where LSODA had trouble; its error says so too
    warnings.simplefilter("ignore")
    rows = []
    for suite, cases in make_suites().items():
        if not suite.startswith(args.only):
            continue
        summaries = {}
        for name, solve in make_solvers().items():
            results = [measure(solve, cases, x, args.rounds) for x in TOLERANCES]
            summaries[name] = [summarise(r) for r in results]
            rows += [
                (suite, case.problem.name, name, tolerance, r)
                for tolerance, found in zip(TOLERANCES, results, strict=True)
                for case, r in zip(cases, found, strict=True)
            ]
        if not args.csv:
            print_table(suite, summaries)
            print_ratios(suite, summaries)
    if args.csv:
        print_csv(rows)


if __name__ == "__main__":
    main()
