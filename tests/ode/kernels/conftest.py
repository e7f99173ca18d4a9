"""Solve the same with the kernels and with torch, and compare."""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sknode.fields import MLPField
from sknode.ode import Solution, SolverWarning, kernels, solve_ode


@pytest.fixture(autouse=True)
def one_thread():
    """Let torch, too, do these small problems on one thread: more only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def built():
    """Ask for the kernels."""
    if not kernels.available():
        pytest.skip("built without kernels")


@pytest.fixture(params=kernels.instruction_sets() or ["none"])
def instruction_set(request, built):
    """Every set of instructions that this processor has, one after another."""
    with kernels.use(request.param):
        yield request.param


def weights(shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def make_field():
    """Make a field with reproducible weights; ``biases`` says which layers have one."""

    def make(
        dim,
        hidden,
        activation="tanh",
        *,
        time=False,
        biases=True,
        gain=1.5,
        dtype=torch.float64,
        seed=0,
    ) -> MLPField:
        sizes = list(itertools.pairwise((dim + time, *hidden, dim)))
        biases = [biases] * len(sizes) if isinstance(biases, bool) else biases
        layers = []
        for i, ((n_in, n_out), bias) in enumerate(zip(sizes, biases, strict=True)):
            layer = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
            with torch.no_grad():
                scale = gain / n_in**0.5
                layer.weight.copy_(scale * weights((n_out, n_in), seed + i, dtype))
                if bias:
                    layer.bias.copy_(0.3 * weights((n_out,), seed + 50 + i, dtype))
            layers.append(layer)
        return MLPField.from_linears(layers, activation)

    return make


@pytest.fixture
def make_states():
    """Make reproducible initial states."""

    def make(batch, dim, *, dtype=torch.float64, seed=7):
        return weights((batch, dim), seed, dtype)

    return make


class Alarm(Exception):
    """Raised by a signal handler."""


@pytest.fixture
def interrupted_after():
    """Return a context that raises an exception by a signal, and wants it to come."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs POSIX timers")

    def handler(number, frame):
        raise Alarm

    @contextlib.contextmanager
    def interrupted(seconds):
        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        start = time.monotonic()
        try:
            with pytest.raises(Alarm):
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - start < 10

    return interrupted


@dataclass
class Outcome:
    """A solve with the gradients of some function of its states."""

    solution: Solution
    gradients: list[Tensor]  # of y0, then of the parameters
    fused: bool


def is_fused(y: Tensor) -> bool:
    """Return whether the kernels computed a differentiable solution."""
    node = y.grad_fn
    while not hasattr(node, "run"):
        node = node.next_functions[0][0]
    return node.run.fused


def solve(field, y0, t, **settings) -> Outcome:
    y0 = y0.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        solution = solve_ode(field, y0, t, **settings)
    cotangents = torch.cos(torch.arange(solution.y.numel(), dtype=y0.dtype))
    inputs = [y0, *(p for p in field.parameters() if p.requires_grad)]
    loss = (cotangents.view_as(solution.y) * solution.y).sum()
    gradients = torch.autograd.grad(loss, inputs)
    return Outcome(solution, list(gradients), is_fused(solution.y))


@pytest.fixture
def run():
    """Solve and differentiate."""
    return solve


@pytest.fixture
def fused():
    """Tell whether the kernels computed a differentiable solution."""
    return is_fused


@pytest.fixture
def compare():
    """Solve by torch and with every set of instructions: the same, up to rounding.

    Steps are the same to the last one. The bound on differences is relative to the
    largest state, and to the largest gradient, if these are larger than one.
    """

    def check(field, y0, t, *, within=1e-10, **settings) -> Solution:
        with kernels.reference():
            expected = solve(field, y0, t, **settings)
        assert not expected.fused
        for name in kernels.instruction_sets():
            with kernels.use(name):
                got = solve(field, y0, t, **settings)
            assert got.fused
            assert_same(got, expected, within, f"{name}: ")
        return expected.solution

    return check


def assert_same(got: Outcome, expected: Outcome, within: float, where: str) -> None:
    one, two = got.solution, expected.solution
    assert torch.equal(one.status, two.status), where
    for name, count in two.stats.items():
        assert torch.equal(one.stats[name], count), where + name
    largest = max(float(g.abs().max()) for g in expected.gradients)
    assert largest > 0
    pairs = [
        (one.t_reached, two.t_reached, float(two.t_reached.abs().max())),
        (one.y, two.y, float(two.y.detach().abs().max())),
        *(
            (a, b, largest)
            for a, b in zip(got.gradients, expected.gradients, strict=True)
        ),
    ]
    for a, b, size in pairs:
        torch.testing.assert_close(
            a, b, rtol=0, atol=within * max(size, 1.0), msg=lambda m: where + m
        )
