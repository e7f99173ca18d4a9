"""The discrete adjoint: exact, complete, frugal, and like any torch operation."""

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from sknode.fields import MLPField
from sknode.ode import SolverWarning, kernels, solve_ode
from sknode.ode.tableaus import METHODS

FIXED = ("euler", "midpoint", "rk4")
TIMES = {
    "forwards": torch.tensor([0.0, 0.4, 0.5, 1.3], dtype=torch.float64),
    "backwards": torch.tensor([1.3, 0.6, 0.5, -0.2], dtype=torch.float64),
    "rows": torch.linspace(0, 1, 4, dtype=torch.float64)
    * torch.tensor([[1.0], [1.3], [-0.7], [0.2]], dtype=torch.float64),
}


@pytest.fixture
def y0():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 2, generator=generator, dtype=torch.float64)


@pytest.fixture
def w():
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    return w.requires_grad_()


def make_field(w):
    return lambda t, y: torch.tanh(y @ w) * torch.sin(3 * t) + torch.cos(t) * y


def gradients(gradient, w, y0, t, **kwargs):
    y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_()
    y = solve_ode(make_field(w), y0, t, gradient=gradient, **kwargs).y
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y, *torch.autograd.grad((weights * y).sum(), (y0, t, w))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
@pytest.mark.parametrize("times", TIMES)
def test_equals_backpropagation_through_the_same_steps(
    method, step_control, times, y0, w
):
    if step_control == "shared" and times == "rows":
        times = "forwards"
    kwargs = {"step_size": 0.11} if method in FIXED else {"rtol": 1e-4, "atol": 1e-4}
    kwargs |= {"method": method, "step_control": step_control}
    one = gradients("discrete", w, y0, TIMES[times], **kwargs)
    two = gradients("backprop", w, y0, TIMES[times], **kwargs)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
def test_gradcheck_with_constant_steps(method, step_control, y0, w):
    # constant steps make the numbers a smooth function of everything
    def solve(y0, t, w):
        return solve_ode(
            make_field(w),
            y0,
            t,
            method=method,
            step_control=step_control,
            step_size=0.3,
        ).y

    t = torch.tensor([0.1, 0.45, 0.8], dtype=torch.float64)
    inputs = (y0[:2].clone().requires_grad_(), t.requires_grad_(), w)
    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8"])
def test_gradcheck_with_adaptive_steps(method, y0, w):
    def solve(y0, t, w):
        return solve_ode(make_field(w), y0, t, method=method, rtol=1e-11, atol=1e-11).y

    t = torch.tensor([0.1, 0.45, 0.8], dtype=torch.float64)
    inputs = (y0[:2].clone().requires_grad_(), t.requires_grad_(), w)
    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-5, atol=1e-6)


def test_interval_without_length_has_a_slope_at_its_end(y0):
    t = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    for gradient in ("discrete", "backprop"):
        y = solve_ode(lambda t, y: 2 * y, y0, t, gradient=gradient).y
        (grad,) = torch.autograd.grad(y[:, -1].sum(), t)
        expected = 2 * y0.sum() * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        torch.testing.assert_close(grad, expected)


def test_what_a_function_has_captured_gets_its_gradient(y0):
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    scale = rate * 2  # not a leaf
    y = solve_ode(lambda t, y: -scale * y, y0, [0.0, 1.0], rtol=1e-10, atol=1e-10).y
    (grad,) = torch.autograd.grad(y[:, -1].sum(), rate)
    expected = (-2 * y0 * torch.exp(-2 * rate)).sum()
    torch.testing.assert_close(grad, expected.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_what_a_function_captures_for_later_is_not_lost(gradient, y0):
    early = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    late = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def f(t, y):
        return -(late if (t > 0.5).any() else early) * y

    y = solve_ode(f, y0, [0.0, 1.0], gradient=gradient).y
    with pytest.raises(ValueError, match="took no part in its first evaluation"):
        y.sum().backward()


def test_parameters_without_influence_have_none(y0):
    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.unused = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.frozen = torch.nn.Parameter(
                torch.tensor(1.0, dtype=torch.float64), requires_grad=False
            )

        def forward(self, t, y):
            return -self.used * self.frozen * y

    field = Field()
    solve_ode(field, y0, [0.0, 1.0]).y.sum().backward()
    assert field.used.grad is not None
    assert field.unused.grad is None
    assert field.frozen.grad is None


def test_no_grad_leaves_no_graph(y0, w):
    with torch.no_grad():
        assert not solve_ode(make_field(w), y0, [0.0, 1.0]).y.requires_grad
    assert solve_ode(make_field(w), y0, [0.0, 1.0]).y.requires_grad


def test_an_outer_optimizer_learns_through_it(y0):
    torch.manual_seed(0)
    field = MLPField(2, (16,)).double()
    optimizer = torch.optim.Adam(field.parameters(), lr=0.05)
    target = 0.3 * y0 + 1.0
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((solve_ode(field, y0, [0.0, 1.0]).y[:, -1] - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_backward_twice_gives_the_same(y0):
    field = MLPField(2, (8,)).double()
    loss = solve_ode(field, y0, [0.0, 0.5, 1.0]).y.sum()
    parameters = tuple(field.parameters())
    one = torch.autograd.grad(loss, parameters, retain_graph=True)
    two = torch.autograd.grad(loss, parameters)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_weights_changed_in_between_are_noticed(y0):
    field = MLPField(2, (8,)).double()
    loss = solve_ode(field, y0, [0.0, 1.0]).y.sum()
    with torch.no_grad():
        field.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_array_of_times_may_change_in_between(y0):
    grads = []
    for factor in (1.0, 0.3):
        field = MLPField.from_linears(
            [torch.nn.Linear(2, 3).double(), torch.nn.Linear(3, 2).double()]
        )
        with torch.no_grad():
            for i, p in enumerate(field.parameters()):
                p.copy_(torch.linspace(-1, 1 + i, p.numel()).view_as(p))
        times = np.linspace(0.0, 1.0, 5)
        y = solve_ode(field, y0, times).y
        times *= factor
        y.square().sum().backward()
        grads.append([p.grad for p in field.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# of a sum, cotangents are constants
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_come_from_backpropagation(y0, w, power):
    def slope(gradient):
        y0_ = y0.clone().requires_grad_()
        y = solve_ode(make_field(w), y0_, [0.0, 1.0], gradient=gradient).y
        loss = y[:, -1].pow(power).sum()
        (grad,) = torch.autograd.grad(loss, y0_, create_graph=True)
        return torch.autograd.grad(grad.sum(), w)

    assert torch.isfinite(slope("backprop")[0]).all()
    for gradient in ("discrete", "continuous"):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            slope(gradient)


@pytest.mark.parametrize("choice", ["reference", *kernels.instruction_sets()[:1]])
def test_a_graph_of_gradients_does_not_change_them(y0, choice):
    field = MLPField(2, (8,)).double()
    y0.requires_grad_()
    inputs = y0, *field.parameters()
    with kernels.use(choice):
        loss = solve_ode(field, y0, [0.0, 1.0]).y.sum()
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        found = torch.autograd.grad(loss, inputs, create_graph=True)
    for one, other in zip(found, expected, strict=True):
        assert one.requires_grad and torch.equal(one, other)


# torch's own, at its first dual tensor
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("which", ["y0", "t"])
@pytest.mark.parametrize("choice", ["reference", *kernels.instruction_sets()[:1]])
def test_derivatives_in_forward_mode_are_refused(y0, which, choice):
    field, t = MLPField(2, (8,)).double().requires_grad_(False), torch.tensor([0.0, 1])
    with kernels.use(choice), forward_ad.dual_level():
        arguments = {"y0": y0, "t": t.double()}
        given = arguments[which]
        arguments[which] = forward_ad.make_dual(given, torch.ones_like(given))
        for f in (field, lambda t, y: -y):
            with pytest.raises(NotImplementedError, match=f"forward mode: {which}"):
                solve_ode(f, **arguments)
        arguments[which] = arguments[which].requires_grad_()
        for gradient in ("discrete", "continuous", "backprop"):
            with pytest.raises(NotImplementedError, match=f"forward mode: {which}"):
                solve_ode(field, **arguments, gradient=gradient)


def test_failed_samples_do_not_poison_gradients(y0):
    field = MLPField(2, (8,)).double()
    bad = y0.clone()
    bad[1] = torch.nan
    with pytest.warns(SolverWarning):
        solution = solve_ode(field, bad, [0.0, 1.0])
    good = torch.tensor([0, 2, 3])
    solution.y[good, -1].sum().backward()
    expected = [p.grad.clone() for p in field.parameters()]
    field.zero_grad()
    solve_ode(field, y0[good], [0.0, 1.0]).y[:, -1].sum().backward()
    for p, e in zip(field.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-12)


# 64 x 16 hidden units a stage would be far more than the 64 x 3 state
BATCH, DIM = 64, 3


def recorded_steps(n_steps):
    """Take constant steps with gradients; return what is kept for the way back."""
    field = MLPField(DIM, (16,)).double()
    y0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    node = solve_ode(field, y0, [0.0, 1.0], step_size=1 / n_steps).y.grad_fn
    while not hasattr(node, "run"):
        node = node.next_functions[0][0]
    return node.run.trace.records


@pytest.mark.parametrize("n_steps", [10, 100])
def test_memory_of_a_step_is_its_state(n_steps):
    with kernels.reference():
        records = recorded_steps(n_steps)
    assert len(records) == n_steps
    for record in records:
        kept = record.y.numel() + record.h.numel() + record.t.size + record.t1.size
        assert record.outputs is None
        assert kept == BATCH * (DIM + 3)


@pytest.mark.skipif(not kernels.available(), reason="built without kernels")
@pytest.mark.parametrize("n_steps", [10, 100, 1000])
def test_memory_of_a_step_in_the_kernels_is_its_state(n_steps):
    kept = kernels.recorded_bytes(recorded_steps(n_steps))
    a_step = BATCH * (DIM + 3) * 8  # the state, two times and an index
    assert kept >= n_steps * a_step
    # whole pages of eight steps, and a little for the alignment of their memory
    assert kept <= 1.05 * (n_steps + 8) * a_step


@pytest.mark.parametrize("fused", [True, False])
def test_memory_is_free_as_soon_as_the_result_is(fused, y0):
    field = MLPField(2, (8,)).double()
    gc.disable()
    try:
        with contextlib.nullcontext() if fused else kernels.reference():
            y = solve_ode(field, y0, [0.0, 1.0]).y
        kept = weakref.ref(y)
        del y
        assert kept() is None
    finally:
        gc.enable()


def test_an_mlp_builds_no_graph_anywhere(y0, monkeypatch):
    field = MLPField(2, (8,)).double()

    def refuse(self, t, y):
        raise AssertionError("forward is for autograd")

    solution = solve_ode(field, y0, [0.0, 0.5, 1.0])
    with monkeypatch.context() as patch:
        # no module of the field is called in the backward pass either
        patch.setattr(torch.nn.Linear, "forward", refuse)
        solution.y.sum().backward()
    assert all(p.grad is not None for p in field.parameters())
    node = solution.y.grad_fn
    while not hasattr(node, "run"):
        node = node.next_functions[0][0]
    kinds = {type(parent).__name__ for parent, _ in node.next_functions if parent}
    assert kinds == {"AccumulateGrad"}
