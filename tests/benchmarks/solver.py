"""Speed of the solver beside torchdiffeq, torchode and diffrax, at equal or less error.

Tanh fields of the given sizes, dopri5 at rtol = atol = 1e-5 on t in [0, 1], float32.
Weights are torch's default initialisation times 3, y0 is standard normal. All solvers
run in one process, in turns; a figure is the median of the rounds. The error is the
largest deviation of a component from a float64 solution at 1e-12. Diffrax is compiled
by jax.jit beforehand, with steps for every sample (vmap) or for the batch.

    python tests/benchmarks/solver.py [--rounds 15] [--device cpu] [--threads 2]
"""

from __future__ import annotations

import argparse
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
RTOL = ATOL = 1e-5
CALLS = 3  # in a row
DIFFRAX_STEPS = 64  # at most: fewer checkpoints than by default, and faster


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
    """Return name -> function that solves and returns (batch, n_times, dim)."""
    field, plain = MLPField.from_linears(linears), Plain(linears)

    def ours(step_control, f=field):
        def solve(y0):
            return solve_ode(
                f, y0, t, rtol=RTOL, atol=ATOL, step_control=step_control
            ).y

        return solve

    found = {
        "sknode, per sample": ours("per_sample"),
        "sknode, shared": ours("shared"),
        "sknode, any module": ours("per_sample", plain),
    }
    try:
        import torchdiffeq
    except ImportError:
        pass
    else:

        def through(function):
            return lambda y0: function(
                plain, y0, t, method="dopri5", rtol=RTOL, atol=ATOL
            ).transpose(0, 1)

        found["torchdiffeq"] = through(torchdiffeq.odeint)
        found["torchdiffeq, adjoint"] = through(torchdiffeq.odeint_adjoint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchode
    except ImportError:
        pass
    else:
        term = torchode.ODETerm(plain)
        method = torchode.Dopri5(term=term)
        controller = torchode.IntegralController(ATOL, RTOL, term=term)
        solver = torchode.AutoDiffAdjoint(method, controller)

        def through_torchode(y0):
            grid = t.expand(len(y0), -1)
            problem = torchode.InitialValueProblem(y0=y0, t_eval=grid)
            return solver.solve(problem).ys

        found["torchode"] = through_torchode
    return found


def diffrax_jobs(linears, y0, t):
    """Return name -> (forward, forward and gradient), compiled, without arguments."""
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

    def solve(weights, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            t0=0.0,
            t1=1.0,
            dt0=None,
            y0=y0,
            args=weights,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=ATOL),
            max_steps=DIFFRAX_STEPS,
        ).ys

    jobs = {}
    for kind in ("per sample", "shared"):
        batched = jax.vmap(solve, (None, 0)) if kind == "per sample" else solve
        forward = jax.jit(batched)
        gradient = jax.jit(
            jax.grad(lambda *x, batched=batched: (batched(*x) ** 2).sum(), (0, 1))
        )
        jobs[f"diffrax, {kind}"] = tuple(
            lambda f=f: jax.block_until_ready(f(weights, start))
            for f in (forward, gradient)
        )
    return jobs


def forward_backward(solve, y0, linears):
    """One training step: solve, and the gradient of a sum of squares."""
    for layer in linears:
        layer.zero_grad(set_to_none=True)
    y0 = y0.detach().requires_grad_()
    (solve(y0) ** 2).sum().backward()
    return y0.grad


def forward_only(solve, y0, linears):
    with torch.no_grad():
        return solve(y0)


def measure(functions, rounds, device):
    """Time functions in turns; return the median of each in milliseconds.

    A turn is a few calls in a row, as in a training: the first still finds the caches,
    and torch's threads, as the solver before has left them.
    """
    times = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            for _ in range(CALLS):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 2:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    for case in CASES:
        linears, y0, t = make_problem(*case, device)
        double = [nn.Linear(x.in_features, x.out_features).double() for x in linears]
        for one, two in zip(double, linears, strict=True):
            one.load_state_dict({k: v.double() for k, v in two.state_dict().items()})
            one.to(device)
        with torch.no_grad():
            exact = solve_ode(
                MLPField.from_linears(double),
                y0.double(),
                t.double(),
                method="dopri8",
                rtol=1e-12,
                atol=1e-12,
            ).y
        solvers = contestants(linears, y0, t)
        error = {
            name: (forward_only(solve, y0, linears) - exact).abs().max().item()
            for name, solve in solvers.items()
        }
        others = diffrax_jobs(linears, y0, t) if device.type == "cpu" else {}
        for name, (forward, _) in others.items():
            found = torch.tensor(np.array(forward()))
            if "shared" in name:
                found = found.transpose(0, 1)
            error[name] = (found - exact).abs().max().item()
        tables = []
        for k, function in enumerate((forward_only, forward_backward)):
            jobs = {
                name: partial(function, solve, y0, linears)
                for name, solve in solvers.items()
                if not (function is forward_only and "adjoint" in name)
            }
            jobs |= {name: both[k] for name, both in others.items()}
            tables.append(measure(jobs, args.rounds, device))
        forward, both = tables
        print("\nstate {}, hidden {} x 2, batch {}, {} output times".format(*case))
        print(
            f"{'solver':24s}{'error':>10s}{'forward ms':>12s}{'x':>7s}"
            f"{'+ gradient ms':>15s}{'x':>7s}"
        )
        base = "torchdiffeq" if "torchdiffeq" in solvers else next(iter(solvers))
        for name in error:
            one, two = forward.get(name), both[name]
            first = "" if one is None else f"{one:12.2f}{forward[base] / one:7.2f}"
            print(
                f"{name:24s}{error[name]:10.1e}{first:>19s}"
                f"{two:15.2f}{both[base] / two:7.2f}"
            )


if __name__ == "__main__":
    main()
