"""Evaluations of the continuous adjoint backwards against those forwards (figure 3c).

A classifier is trained on the digits; then, at several tolerances, one batch is solved
and differentiated: by this package's continuous adjoint, by its `odeint_adjoint` and by
torchdiffeq's, all with one step for the whole batch, for the mean log-loss over the
batch, and for the same times a small and a large number. With the small one, absolute
tolerances ask nothing of the cotangents: what is left is to solve for the states again.

    python tests/benchmarks/adjoint_evaluations.py
"""

from functools import partial

import torch
import torchdiffeq
from sklearn.datasets import load_digits
from torch.nn import functional as F

from sknode import ODENetClassifier
from sknode.ode import odeint_adjoint, solve_ode

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BATCH = 128


def ours(field, y0, tolerance):
    return solve_ode(
        field,
        y0,
        [0.0, 1.0],
        rtol=tolerance,
        atol=tolerance,
        gradient="continuous",
        step_control="shared",
    ).y[:, -1]


def like_torchdiffeq(solver, field, y0, tolerance):
    t = torch.tensor([0.0, 1.0], dtype=y0.dtype)
    # the parameters are part of the error norm unless told otherwise: the seminorm
    options = {"norm": "seminorm"}
    return solver(
        field, y0, t, rtol=tolerance, atol=tolerance, adjoint_options=options
    )[-1]


SOLVERS = {
    "sknode, continuous": ours,
    "sknode, odeint_adjoint": partial(like_torchdiffeq, odeint_adjoint),
    "torchdiffeq, odeint_adjoint": partial(
        like_torchdiffeq, torchdiffeq.odeint_adjoint
    ),
}


def count(net, x, target, solver, tolerance, factor):
    """Return evaluations forwards and backwards."""
    calls = []
    hook = net.field.register_forward_pre_hook(lambda *_: calls.append(1))
    y0 = net.initial_state(x).detach().requires_grad_()
    y = solver(net.field, y0, tolerance)
    forward = len(calls)
    (factor * F.cross_entropy(net.output_map(y), target)).backward()
    hook.remove()
    return forward, len(calls) - forward


def main():
    X, y = load_digits(return_X_y=True)
    clf = ODENetClassifier(random_state=0).fit(X, y)
    net, x = clf.module_, torch.from_numpy(X[:BATCH])
    target = torch.from_numpy(y[:BATCH])
    print(f"evaluations forwards, backwards, and their ratio; a batch of {BATCH}")
    print(" " * 42 + "".join(f"{tolerance:^20.0e}" for tolerance in TOLERANCES))
    for factor in (1e-8, 1.0, 1e4):
        for name, solver in SOLVERS.items():
            cells = ""
            for tolerance in TOLERANCES:
                forward, backward = count(net, x, target, solver, tolerance, factor)
                cells += f"{forward:6d}{backward:6d}{backward / forward:6.2f}  "
            print(f"{name:30s} loss x {factor:<5g}{cells}", flush=True)


if __name__ == "__main__":
    main()
