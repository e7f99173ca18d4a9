"""Speed of `odeint` and `odeint_adjoint` beside torchdiffeq's, called the same way.

A tanh field 2-32-32-2, 64 samples, float32, torch's default initialisation, t in
[0, 1], default tolerances. A figure is the least CPU time of the rounds, in
milliseconds: on one thread, and unlike the wall time not disturbed by what else the
machine does.

    python tests/benchmarks/odeint.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import time

import torch
import torchdiffeq
from torch import nn

from sknode.ode import odeint, odeint_adjoint

CASES = [
    ("dopri5, 2 times", 2, {}),
    ("dopri5, 20 times", 20, {}),
    ("dopri5, 2 times, 1e-5", 2, {"rtol": 1e-5, "atol": 1e-5}),
    ("rk4, 20 times", 20, {"method": "rk4"}),
    ("euler, 20 times", 20, {"method": "euler"}),
    ("implicit_adams, 20 times", 20, {"method": "implicit_adams"}),
]


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )

    def forward(self, t, y):
        return self.net(y)


def least(function, rounds):
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    f, y0 = Field(), torch.randn(64, 2)

    def forward(solver, t, settings):
        with torch.no_grad():
            solver(f, y0, t, **settings)

    def both(solver, t, settings):
        y = solver(f, y0.clone().requires_grad_(), t, **settings)
        y.sum().backward()

    solvers = (torchdiffeq.odeint, odeint), (torchdiffeq.odeint_adjoint, odeint_adjoint)
    print(f"{'':26}{'forward':>14}{'and backward':>16}{'adjoint':>16}")
    print(f"{'':26}" + f"{'theirs':>8}{'ours':>8}" * 3)
    for name, n_times, settings in CASES:
        t = torch.linspace(0, 1, n_times)
        runs = [(forward, s) for s in solvers[0]] + [
            (both, s) for p in solvers for s in p
        ]
        figures = [
            least(lambda: run(solver, t, settings), rounds)  # noqa: B023
            for run, solver in runs
        ]
        print(f"{name:26}" + "".join(f"{x:8.2f}" for x in figures))


if __name__ == "__main__":
    main()
