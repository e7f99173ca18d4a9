"""Speed of the solver beside torchdiffeq, torchode and diffrax, at equal error.

Tanh fields of the given sizes, dopri5 on t in [0, 1], float32. Weights are torch's
default initialisation times 3, y0 is standard normal. All solvers run in one process,
in turns of a tenth of a second; a figure is the median of the calls. The error is the
largest deviation of a component from a float64 solution at 1e-12. Diffrax is compiled
by jax.jit beforehand, with steps for every sample (vmap) or for the batch.

At one tolerance, solvers end at errors up to ten times apart: they take its norm over a
sample or over the batch, and choose steps differently. So each runs at the loosest
rtol = atol of a grid, 10 a decade, whose error is at most a target: the error that
torchdiffeq, the field's standard, has at 1e-5. As errors do not fall evenly with the
tolerance, the next two tighter ones have to stay within 1.2 times the target: a lucky
one does not count. With --at-tolerance, all run at 1e-5, whatever their errors. Errors
are those of the solutions, gradients are not compared.

    python tests/benchmarks/solver.py [--rounds 15] [--device cpu] [--threads 2]
    python tests/benchmarks/solver.py --at-tolerance
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from functools import partial

import numpy as np
import torch
from torch import nn

from sknode.fields import MLPField
from sknode.ode import solve_ode

# state, hidden size (twice), batch, output times
CASES = [(2, 32, 64, 2), (2, 64, 1024, 2), (4, 20, 1000, 100), (8, 128, 4096, 2)]
STANDARD = 1e-5  # the tolerance that sets the target
TOLERANCES = [10 ** (-k / 10) for k in range(30, 71)]  # from loose to tight
SLACK, FOLLOWERS = 1.2, 2  # of the target, for so many tighter tolerances
CALLS, SECONDS = 3, 0.1  # in a row: at least so many, and for so long
# At most, and doubled where they do not suffice: diffrax is faster with few checkpoints
DIFFRAX_STEPS, DIFFRAX_MOST = 64, 4096
OURS, BASE = "sknode, per sample", "torchdiffeq"
# Peers whose samples have steps of their own, as ours: those of the others depend on
# their neighbours in the batch.
PER_SAMPLE = "torchode", "diffrax, per sample"


def make_problem(dim, hidden, batch, n_times, device):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linears = [nn.Linear(dim, hidden), nn.Linear(hidden, hidden)]
        linears.append(nn.Linear(hidden, dim))
    with torch.no_grad():
        for p in (p for layer in linears for p in layer.parameters()):
            p.mul_(3)
    y0 = torch.randn(batch, dim, generator=generator)
    linears = [layer.to(device) for layer in linears]
    return linears, y0.to(device), torch.linspace(0, 1, n_times, device=device)


class Plain(nn.Module):
    """The field as a user of the other packages would write it."""

    def __init__(self, linears):
        super().__init__()
        one, two, three = linears
        self.net = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), three)

    def forward(self, t, y):
        return self.net(y)


def contestants(linears, y0, t):
    """Return name -> function of the tolerance, which returns a function that solves.

    That function takes y0 and returns (batch, n_times, dim).
    """
    field, plain = MLPField.from_linears(linears), Plain(linears)

    def ours(step_control, f=field):
        def at(tol):
            options = {"rtol": tol, "atol": tol, "step_control": step_control}
            return lambda y0: solve_ode(f, y0, t, **options).y

        return at

    found = {
        OURS: ours("per_sample"),
        "sknode, shared": ours("shared"),
        "sknode, any module": ours("per_sample", plain),
    }
    try:
        import torchdiffeq
    except ImportError:
        pass
    else:

        def through(function):
            def at(tol):
                options = {"method": "dopri5", "rtol": tol, "atol": tol}
                return lambda y0: function(plain, y0, t, **options).transpose(0, 1)

            return at

        found[BASE] = through(torchdiffeq.odeint)
        found["torchdiffeq, adjoint"] = through(torchdiffeq.odeint_adjoint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchode
    except ImportError:
        pass
    else:

        def through_torchode(tol):
            term = torchode.ODETerm(plain)
            controller = torchode.IntegralController(tol, tol, term=term)
            method = torchode.Dopri5(term=term)
            solver = torchode.AutoDiffAdjoint(method, controller)

            def solve(y0):
                grid = t.expand(len(y0), -1)
                problem = torchode.InitialValueProblem(y0=y0, t_eval=grid)
                return solver.solve(problem).ys

            return solve

        found["torchode"] = through_torchode
    return found


def torch_jobs(linears, y0, t):
    """Return name -> function of the tolerance, which returns functions to call.

    They are the solution to compare, forward, and forward with gradient.
    """

    def jobs(make, tol):
        solve = make(tol)
        forward = partial(forward_only, solve, y0)
        return forward, forward, partial(forward_backward, solve, y0, linears)

    makers = contestants(linears, y0, t)
    return {name: partial(jobs, make) for name, make in makers.items()}


def diffrax_jobs(linears, y0, t):
    """Return the same as torch_jobs, compiled once for all tolerances."""
    try:
        import diffrax
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}
    weights = [
        tuple(jnp.asarray(p.detach().cpu().numpy()) for p in (x.weight, x.bias))
        for x in linears
    ]
    start, times = jnp.asarray(y0.cpu().numpy()), jnp.asarray(t.cpu().numpy())

    def field(_, y, weights):
        (a, b), (c, d), (e, f) = weights
        return jnp.tanh(jnp.tanh(y @ a.T + b) @ c.T + d) @ e.T + f

    def solve(max_steps, weights, y0, tol):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            t0=0.0,
            t1=1.0,
            dt0=None,
            y0=y0,
            args=weights,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            max_steps=max_steps,
            throw=False,  # times that are not reached are inf, see at()
        ).ys

    def per_sample(max_steps, *arguments):
        return jax.vmap(partial(solve, max_steps), (None, 0, None))(*arguments)

    def compiled(batched, batch_axis):
        def loss(*arguments):
            return (batched(*arguments) ** 2).sum()

        forward = jax.jit(batched, static_argnums=0)
        gradient = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)

        def at(tol):
            max_steps, tol = DIFFRAX_STEPS, jnp.asarray(tol, start.dtype)

            def job(function):
                return jax.block_until_ready(function(max_steps, weights, start, tol))

            def solution():
                return torch.tensor(np.array(job(forward))).movedim(batch_axis, 0)

            while not solution().isfinite().all() and max_steps < DIFFRAX_MOST:
                max_steps *= 2
            return solution, partial(job, forward), partial(job, gradient)

        return at

    return {
        "diffrax, per sample": compiled(per_sample, 0),
        "diffrax, shared": compiled(solve, 1),
    }


def loosest(error_at, target):
    """Return the loosest tolerance that reaches the target, or None.

    Those that follow it have to as well, within some slack.
    """
    kept = []
    for tol in TOLERANCES:
        error = error_at(tol)
        if error <= (SLACK * target if kept else target):
            kept.append(tol)
        else:
            kept = []
        if len(kept) > FOLLOWERS:
            return kept[0]
    return None


def forward_backward(solve, y0, linears):
    """One training step: solve, and the gradient of a sum of squares."""
    for layer in linears:
        layer.zero_grad(set_to_none=True)
    y0 = y0.detach().requires_grad_()
    (solve(y0) ** 2).sum().backward()
    return y0.grad


def forward_only(solve, y0):
    with torch.no_grad():
        return solve(y0)


def measure(functions, rounds, device):
    """Time functions in turns; return the median of each in milliseconds.

    A turn is some calls in a row, as in a training: the first still finds the caches,
    and torch's threads, as the solver before has left them.
    """
    times = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            spent, calls = 0.0, 0
            while calls < CALLS or spent < SECONDS:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                spent, calls = spent + seconds, calls + 1
                if turn >= 2:
                    times[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def float64_solution(linears, y0, t):
    double = [nn.Linear(x.in_features, x.out_features).double() for x in linears]
    for one, two in zip(double, linears, strict=True):
        one.load_state_dict({k: v.double() for k, v in two.state_dict().items()})
        one.to(y0.device)
    tight = {"method": "dopri8", "rtol": 1e-12, "atol": 1e-12}
    field = MLPField.from_linears(double)
    with torch.no_grad():
        return solve_ode(field, y0.double(), t.double(), **tight).y


def run_case(case, args):
    """Choose the tolerances of a case, time its contestants and print their table."""
    linears, y0, t = make_problem(*case, torch.device(args.device))
    exact = float64_solution(linears, y0, t)
    makers = torch_jobs(linears, y0, t)
    if args.device == "cpu":
        makers |= diffrax_jobs(linears, y0, t)

    def error_at(name, tol):
        return (makers[name](tol)[0]() - exact).abs().max().item()

    base = BASE if BASE in makers else OURS
    tols, title = dict.fromkeys(makers, STANDARD), f"all at {STANDARD:.0e}"
    if not args.at_tolerance:
        target = error_at(base, STANDARD)
        tols = {name: loosest(partial(error_at, name), target) for name in makers}
        title = f"errors up to {target:.1e}"
    errors = {name: error_at(name, tol) for name, tol in tols.items() if tol}
    jobs = {name: makers[name](tols[name]) for name in errors}
    forward = {name: job[1] for name, job in jobs.items() if "adjoint" not in name}
    both = {name: job[2] for name, job in jobs.items()}
    device = torch.device(args.device)
    tables = [measure(functions, args.rounds, device) for functions in (forward, both)]
    size = "state {}, hidden {} x 2, batch {}, {} output times".format(*case)
    print(f"\n{size}; {title}")
    print_table(tols, errors, *tables, base)
    print_summary(*tables)


def print_table(tols, errors, forward, both, base):
    """Print a line for every contestant, with its speed as a multiple of base's."""
    print(
        f"{'solver':24s}{'tolerance':>10s}{'error':>10s}{'forward ms':>12s}{'x':>7s}"
        f"{'+ gradient ms':>15s}{'x':>7s}"
    )

    def columns(table, name, width):
        if name not in table:
            return " " * (width + 7)
        ratio = table.get(base, math.nan) / table[name]
        return f"{table[name]:{width}.2f}{ratio:7.2f}"

    for name, tol in tols.items():
        if tol is None:
            print(f"{name:24s} not at any tolerance down to {TOLERANCES[-1]:.0e}")
        else:
            print(
                f"{name:24s}{tol:10.1e}{errors[name]:10.1e}"
                + columns(forward, name, 12)
                + columns(both, name, 15)
            )


def print_summary(forward, both):
    """Print the fastest peers and torchdiffeq, and how much faster ours is."""
    if OURS not in both:
        print(f"{OURS}: does not reach the target")
        return
    print(f"ours: forward {forward[OURS]:.2f} ms, with gradient {both[OURS]:.2f} ms")
    peers = [name for name in both if "sknode" not in name]
    for label, names in (
        ("fastest peer", peers),
        ("with steps per sample", [x for x in peers if x in PER_SAMPLE]),
        (BASE, [x for x in peers if x == BASE]),
    ):
        tables = [{x: t[x] for x in names if x in t} for t in (forward, both)]
        if not all(tables):
            continue
        found = []
        for table, own in zip(tables, (forward[OURS], both[OURS]), strict=True):
            name = min(table, key=table.get)
            which = "" if name == label else f" ({name})"
            found.append(f"{table[name]:.2f} ms{which}: {table[name] / own:.2f}x")
        print(f"{label}: forward {found[0]}; with gradient {found[1]}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", type=int, nargs="+", default=range(1, 5))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--at-tolerance", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}"
    )
    for number in args.cases:
        run_case(CASES[number - 1], args)


if __name__ == "__main__":
    main()
