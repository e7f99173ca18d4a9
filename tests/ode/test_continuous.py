"""The continuous adjoint: right in the limit, complete, and free of the steps."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from sknode.fields import MLPField
from sknode.ode import SolverError, SolverWarning, kernels, solve_ode
from sknode.ode.methods import _METHODS, Method
from sknode.ode.runge_kutta import ExplicitStepper
from sknode.ode.solve import solve
from sknode.ode.tableaus import get_tableau

TIMES = {
    "forwards": torch.tensor([0.0, 0.4, 0.5, 1.3], dtype=torch.float64),
    "backwards": torch.tensor([1.3, 0.6, 0.5, -0.2], dtype=torch.float64),
    "repeated": torch.tensor([0.0, 0.0, 0.4, 0.4, 0.4, 1.0, 1.0]).double(),
    "ends": torch.tensor([0.0, 1.0], dtype=torch.float64),
    # forwards, backwards, ending early, nowhere, inner times of its own
    "rows": torch.tensor(
        [
            [0.0, 0.4, 0.5, 1.3, 1.3],
            [1.0, 0.6, 0.1, -0.2, -0.2],
            [0.0, 0.3, 0.8, 0.8, 0.8],
            [0.5, 0.5, 0.5, 0.5, 0.5],
            [0.1, 0.2, 0.9, 1.1, 1.4],
        ],
        dtype=torch.float64,
    ),
}
CONTROLS = ("per_sample", "shared")
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
EXACT = {"method": "dopri8", "rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def y0(random):
    return random(5, 2)


@pytest.fixture(params=["function", "module", "mlp", "mlp with time", "silu"])
def field(request, make_mlp, random):
    """Return fields of all kinds with the tensors that they depend on."""
    if request.param == "function":
        w = random(2, 2, seed=3).requires_grad_()

        def f(t, y):
            return torch.tanh(y @ w) * torch.sin(3 * t) + torch.cos(t) * y

        return f, [w]
    if request.param == "module":
        field = Module()
        return field, [field.used]
    settings = {"activation": "silu"} if request.param == "silu" else {}
    settings["time_dependent"] = request.param == "mlp with time"
    mlp = make_mlp(2, (8, 5), **settings)
    return mlp, list(mlp.parameters())


class Module(torch.nn.Module):
    """A field with a parameter of every kind."""

    def __init__(self):
        super().__init__()
        self.used = torch.nn.Parameter(torch.tensor([0.4, 1.0]).double())
        self.unused = torch.nn.Parameter(torch.tensor(1.0).double())
        self.frozen = torch.nn.Parameter(torch.tensor(1.0).double(), False)

    def forward(self, t, y):
        return torch.sin(self.used * y) * self.frozen - t * y


def gradients(f, inputs, y0, t, *, weigh=None, **settings):
    """Return the gradients of a sum over all outputs with weights of both signs."""
    y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_()
    y = solve_ode(f, y0, t, **settings).y
    if weigh is None:
        weigh = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
    return torch.autograd.grad((weigh * y).sum(), (y0, t, *inputs))


def assert_all_close(found, expected, within):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=within, atol=within)


@pytest.mark.parametrize(
    ("times", "step_control"),
    [(x, c) for x in TIMES for c in CONTROLS if (x, c) != ("rows", "shared")],
)
def test_tends_to_the_exact_gradient(field, times, step_control, y0):
    f, inputs = field
    t, settings = TIMES[times], {"step_control": step_control}
    found = gradients(f, inputs, y0, t, gradient="continuous", **settings, **TIGHT)
    for gradient in ("discrete", "backprop"):
        exact = gradients(f, inputs, y0, t, gradient=gradient, **settings, **EXACT)
        assert_all_close(found, exact, 1e-7)


@pytest.mark.parametrize("method", ["bosh3", "bosh3", "tsit5", "dopri5", "dopri8"])
def test_the_error_falls_with_the_tolerance(method, field, y0):
    f, inputs = field
    t = TIMES["rows"]
    exact = gradients(f, inputs, y0, t, gradient="discrete", **EXACT)

    def error(tolerance):
        settings = {"method": method, "rtol": tolerance, "atol": tolerance}
        found = gradients(f, inputs, y0, t, gradient="continuous", **settings)
        return max(
            (a - b).abs().max().item() for a, b in zip(found, exact, strict=True)
        )

    loose, tight = error(1e-3), error(1e-7)
    assert loose < 0.1
    # steps from one output to the next may be short enough for any tolerance
    assert tight < 1e-4 and tight < max(0.02 * loose, 1e-6)


@pytest.mark.parametrize("method", ["rk4", "midpoint", "euler", "dopri5"])
def test_constant_steps(method, y0, make_mlp):
    field = make_mlp(2, (8,), time_dependent=True)
    inputs, t = list(field.parameters()), TIMES["forwards"]
    exact = gradients(field, inputs, y0, t, gradient="discrete", **EXACT)
    order = get_tableau(method).order

    def error(step_size):
        settings = {"method": method, "step_size": step_size}
        found = gradients(field, inputs, y0, t, gradient="continuous", **settings)
        return max(
            (a - b).abs().max().item() for a, b in zip(found, exact, strict=True)
        )

    coarse, fine = error(0.1), error(0.05)
    assert coarse < 0.1
    # dense outputs of the solve forwards are of lower order than the best methods
    assert coarse > 2 ** (min(order, 4) - 0.6) * fine


@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
def test_gradcheck(step_control, y0, random):
    w = random(2, 2, seed=3).requires_grad_()

    def solution(y0, t, w):
        def f(t, y):
            return torch.tanh(y @ w) * torch.sin(3 * t) + torch.cos(t) * y

        settings = {"step_control": step_control, "gradient": "continuous"}
        return solve_ode(f, y0, t, **settings, **EXACT).y

    t = torch.tensor([0.1, 0.45, 0.8], dtype=torch.float64)
    inputs = (y0[:2].clone().requires_grad_(), t.requires_grad_(), w)
    assert torch.autograd.gradcheck(solution, inputs, rtol=1e-5, atol=1e-6)


def test_states_of_any_shape(y0, random):
    w = random(3, 3, seed=1).requires_grad_()
    y0 = random(4, 2, 3)

    def f(t, y):
        return torch.tanh(y @ w) * torch.sin(3 * t)

    for step_control in ("per_sample", "shared"):
        settings = {"step_control": step_control}
        t = TIMES["forwards"]
        exact = gradients(f, [w], y0, t, gradient="discrete", **settings, **EXACT)
        found = gradients(f, [w], y0, t, gradient="continuous", **settings, **TIGHT)
        assert_all_close(found, exact, 1e-7)


def test_complex_states(random):
    rate = torch.complex(torch.tensor(-0.2).double(), torch.tensor(3.0).double())
    rate.requires_grad_()
    y0 = torch.complex(random(5, 2), random(5, 2, seed=1)).requires_grad_()
    t = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    y = solve_ode(lambda t, y: rate * y, y0, t, gradient="continuous", **TIGHT).y
    exact = y0[:, None] * torch.exp(rate * (t - t[0]))[:, None]
    found = torch.autograd.grad(y.abs().sum(), (y0, t, rate))
    expected = torch.autograd.grad(exact.abs().sum(), (y0, t, rate))
    assert_all_close(found, expected, 1e-7)


def test_parameters_without_influence_have_none(y0):
    field = Module()
    solve_ode(field, y0, [0.0, 1.0], gradient="continuous").y.sum().backward()
    assert field.used.grad is not None
    assert field.unused.grad is None
    assert field.frozen.grad is None


def test_the_scale_of_the_loss_does_not_matter(field, y0):
    # powers of two: not a bit of the numbers themselves depends on it
    f, inputs = field
    y = solve_ode(f, y0.requires_grad_(), [0.0, 0.4, 1.0], gradient="continuous").y
    inputs = (y0, *inputs)
    loss = (y**2).mean()
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    for factor in (2.0**-80, 2.0**20):
        scaled = torch.autograd.grad(factor * loss, inputs, retain_graph=True)
        for a, b in zip(plain, scaled, strict=True):
            assert torch.equal(factor * a, b)


def test_a_sample_does_not_depend_on_the_others(make_mlp, random):
    field, y0 = make_mlp(2, (16,)), random(40, 2)

    def gradient(y0):
        y0 = y0.clone().requires_grad_()
        y = solve_ode(field, y0, [0.0, 0.4, 1.0], gradient="continuous").y
        return torch.autograd.grad((y**2).sum(), y0)[0]

    with kernels.reference():
        whole = gradient(y0)
        for part in (slice(0, 1), slice(7, 30)):
            assert torch.equal(gradient(y0[part]), whole[part])


def test_samples_without_influence_take_no_steps(y0, recorder):
    f = recorder(lambda t, y: -(1 + 1000 * (y[:, :1].detach() > 5)) * y)
    y0[0] = 10.0  # stiff, but not in the loss
    y0.requires_grad_()
    y = solve_ode(f, y0, [0.0, 1.0], gradient="continuous", **TIGHT).y
    before = f.calls
    (grad,) = torch.autograd.grad(y[1:, -1].sum(), y0)
    assert f.calls - before < before / 3
    assert torch.equal(grad[0], torch.zeros(2).double())
    torch.testing.assert_close(grad[1:], torch.full((4, 2), np.exp(-1.0)).double())


def test_failed_samples_do_not_poison(make_mlp, random):
    field, y0 = make_mlp(2, (8,)), random(40, 2)
    bad = y0.clone()
    bad[1] = torch.nan
    with pytest.warns(SolverWarning):
        solution = solve_ode(field, bad, [0.0, 1.0], gradient="continuous")
    good = torch.arange(40) != 1
    found = torch.autograd.grad(solution.y[good, -1].sum(), list(field.parameters()))
    y = solve_ode(field, y0[good], [0.0, 1.0], gradient="continuous").y
    expected = torch.autograd.grad(y[:, -1].sum(), list(field.parameters()))
    assert_all_close(found, expected, 1e-12)


def test_failed_samples_count_as_far_as_they_got(y0, random):
    rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    stiff = torch.tensor([1.0, 1.0, 30.0, 1.0, 1.0]).double()[:, None]

    def f(t, y):
        return torch.sin(stiff * rate * y) + t

    t = torch.tensor([0.0, 0.3, 0.6, 1.5], dtype=torch.float64)
    settings = {"rtol": 1e-7, "atol": 1e-7, "max_steps": 20}
    found = {}
    for gradient in ("discrete", "continuous"):
        a, b = y0.clone().requires_grad_(), t.clone().requires_grad_()
        extra = {}
        if gradient == "continuous":
            extra["adjoint"] = {"max_steps": 1000}
        solution = solve(f, a, b, gradient=gradient, **settings, **extra)
        assert (solution.status != 0).sum() == 1
        assert 0 < solution.t_reached[2] < 1.5
        found[gradient] = torch.autograd.grad(solution.y.sin().sum(), (a, b, rate))
    assert_all_close(found["continuous"], found["discrete"], 1e-4)


def test_a_failed_solve_backwards_is_an_error(y0):
    y0.requires_grad_()
    for f in (lambda t, y: -40 * y, MLPField(2, (8,)).double()):
        solution = solve(
            f,
            y0,
            torch.tensor([0.0, 1.0]),
            gradient="continuous",
            adjoint={"max_steps": 1},
        )
        assert solution.success
        with pytest.raises(SolverError, match=r"backwards.*5 of 5.*max_steps"):
            solution.y.sum().backward()


def test_a_cotangent_that_is_no_number_stays_in_its_sample(field, y0):
    f, inputs = field
    y0.requires_grad_()
    y = solve_ode(f, y0, [0.0, 0.4, 1.0], gradient="continuous").y
    weigh = torch.ones_like(y)
    weigh[1, 1, 0] = torch.inf
    found = torch.autograd.grad((weigh * y).sum(), (y0, *inputs))
    assert found[0][1].isnan().all()
    rows = torch.arange(5) != 1
    assert found[0][rows].isfinite().all()
    assert all(g.isnan().any() for g in found[1:])


def test_rejected_steps_without_numbers_leave_no_trace():
    # the first step backwards suits the second sample, but leads the first one, which
    # is steep at the end, to where there is no root
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[0.01], [25.0]], dtype=torch.float64, requires_grad=True)
    steep = torch.tensor([[30.0], [0.0]], dtype=torch.float64)

    def f(t, y):
        return rate * (1 + steep * torch.exp(-30 * (3 - t) ** 2) * y.sqrt())

    def solution(gradient, **settings):
        t = torch.tensor([0.0, 3.0], dtype=torch.float64)
        y = solve_ode(f, y0, t, gradient=gradient, **settings).y
        return torch.autograd.grad(y[:, -1].sum(), (y0, rate))

    exact = solution("discrete", **EXACT)
    found = solution("continuous", first_step=2.99, **TIGHT)
    assert_all_close(found, exact, 1e-6)


def test_derivatives_of_derivatives_are_refused(y0):
    y0.requires_grad_()
    y = solve_ode(lambda t, y: y.sin(), y0, [0.0, 1.0], gradient="continuous").y
    (grad,) = torch.autograd.grad(y.pow(2).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_backward_twice_gives_the_same(field, y0):
    f, inputs = field
    y0.requires_grad_()
    loss = solve_ode(f, y0, [0.0, 0.5, 1.0], gradient="continuous").y.sum()
    inputs = (y0, *inputs)
    one = torch.autograd.grad(loss, inputs, retain_graph=True)
    two = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_changes_in_between_are_noticed(y0):
    field = MLPField(2, (8,)).double()
    loss = solve_ode(field, y0, [0.0, 1.0], gradient="continuous").y.sum()
    with torch.no_grad():
        field.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_methods_without_stages_use_their_dense_output(field, y0, monkeypatch):
    f, inputs = field
    tableau = get_tableau("dopri8")

    def make_stepper(field, options):
        assert options.tableau is None
        return ExplicitStepper(field, replace(options, tableau=tableau))

    monkeypatch.setitem(_METHODS, "other", Method("other", True, make_stepper))
    t = TIMES["rows"]
    exact = gradients(f, inputs, y0, t, gradient="discrete", **EXACT)
    settings = {"method": "other", **TIGHT}
    found = gradients(f, inputs, y0, t, gradient="continuous", **settings)
    assert_all_close(found, exact, 1e-7)


def test_other_settings_for_the_solve_backwards(y0, recorder):
    f = recorder(lambda t, y: torch.sin(3 * y) - t)
    y0.requires_grad_()
    t = torch.tensor([0.0, 2.0])
    calls = []
    for adjoint in ({}, {"rtol": 1e-3, "atol": 1e-3, "method": "bosh3"}):
        settings = {"rtol": 1e-9, "atol": 1e-9, "adjoint": adjoint}
        y = solve(f, y0, t, gradient="continuous", **settings).y
        before = f.calls
        y.sum().backward()
        calls.append(f.calls - before)
    assert calls[1] < calls[0] / 2


@pytest.mark.parametrize("times", [x for x in TIMES if x != "rows"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4", "euler"])
def test_kernels_and_torch_agree(method, times, make_mlp, random):
    field = make_mlp(3, (17, 5), activation="silu", time_dependent=True)
    y0, t = random(37, 3).requires_grad_(), TIMES[times]
    inputs = (y0, *field.parameters())
    settings = {"method": method, "gradient": "continuous", "rtol": 1e-6, "atol": 1e-7}
    if method in ("rk4", "euler"):
        settings["step_size"] = 0.07

    def gradient():
        y = solve_ode(field, y0, t, **settings).y
        weigh = torch.cos(torch.arange(y.numel()).double()).view_as(y)
        weigh[3] = 0  # a sample that stays
        return torch.autograd.grad((weigh * y).sum(), inputs)

    with kernels.reference():
        expected = gradient()
    for name in kernels.instruction_sets():
        with kernels.use(name):
            assert_all_close(gradient(), expected, 1e-8)


def test_kernels_and_torch_agree_on_rows_and_their_own_numbers(make_mlp, random):
    field, y0 = make_mlp(2, (9,), gain=3.0), random(40, 2).requires_grad_()
    t = TIMES["rows"].repeat(8, 1) * (1 + 0.01 * torch.arange(40).double()[:, None])
    inputs = (y0, *field.parameters())
    weigh = random(40, 5, 2, seed=5)

    def gradient(y0, t, weigh, inputs):
        y = solve_ode(field, y0, t, gradient="continuous").y
        return torch.autograd.grad((weigh * y).sum(), inputs)

    with kernels.reference():
        expected = gradient(y0, t, weigh, inputs)
    for name in kernels.instruction_sets():
        with kernels.use(name):
            found = gradient(y0, t, weigh, inputs)
            assert_all_close(found, expected, 1e-8)
            # not a bit depends on the samples beside it
            some = torch.tensor([3, 20, 38])
            alone = gradient(y0[some], t[some], weigh[some], [y0])
            assert torch.equal(alone[0][some], found[0][some])


def test_kernels_do_not_depend_on_the_number_of_threads(make_mlp, random):
    field, y0 = make_mlp(4, (32, 32)), random(500, 4).requires_grad_()
    inputs, before = (y0, *field.parameters()), torch.get_num_threads()

    def gradient(threads):
        torch.set_num_threads(threads)
        y = solve_ode(field, y0, TIMES["forwards"], gradient="continuous").y
        return torch.autograd.grad(y.sum(), inputs)

    try:
        one, two = gradient(1), gradient(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", [*kernels.instruction_sets(), "reference"])
def test_rejected_steps_without_numbers_leave_no_trace_in_an_mlp(name):
    # A rotation, with a wall at y1 = 1 beyond which everything overflows. Half of
    # the samples pass just before it, where steps may lead beyond; the others step on.
    field = MLPField(2, (5,), activation="relu").double()
    one, two = field.layers
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1], [1, 0]]))
        one.bias.copy_(torch.tensor([0, 0, 0, 0, -1]))
        two.weight.copy_(torch.tensor([[0, 0, -1, 1, 0], [1, -1, 0, 0, 0]]))
        two.weight[0, 4] = 1e200
        two.bias.zero_()
    start = torch.linspace(-1, 0, 16, dtype=torch.float64).repeat(2)
    radius = torch.tensor([1 - 1e-5, 0.1]).double().repeat_interleave(16)
    y0 = radius[:, None] * torch.stack([start.cos(), start.sin()], 1)
    y0.requires_grad_()
    # whose second stage is that of Euler's method, outside the circle
    adjoint = {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4}
    settings = {"gradient": "continuous", "adjoint": adjoint}
    with kernels.use(name):
        y = solve(field, y0, torch.tensor([0.0, 1.0]), **settings).y
        found = torch.autograd.grad(y[:, -1].sum(), (y0, *field.parameters()))
    # the transpose of the rotation by one radian
    turned = torch.tensor([np.cos(1) + np.sin(1), np.cos(1) - np.sin(1)]).double()
    torch.testing.assert_close(found[0], turned.expand(32, 2), rtol=1e-2, atol=1e-2)
    assert all(g.isfinite().all() for g in found)


def peak_memory(job):
    """Return the most bytes that torch held for a job at any one time."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        job()
    events = list(seen.profiler.kineto_results.experimental_event_tree())
    changes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    changes = np.array([size for _, size in sorted(changes)])
    return changes.cumsum().max()


@pytest.mark.parametrize("kind", ["mlp", "function"])
def test_memory_does_not_depend_on_the_number_of_steps(kind, make_mlp, random):
    mlp = make_mlp(3, (16,))
    f = mlp if kind == "mlp" else (lambda t, y: mlp(t, y))
    y0 = random(64, 3).requires_grad_()

    def peak(gradient, n_steps):
        def job():
            y = solve_ode(f, y0, [0.0, 1.0], step_size=1 / n_steps, gradient=gradient).y
            torch.autograd.grad(y.sum(), y0)

        with kernels.reference():
            job()
            return peak_memory(job)

    assert peak("continuous", 40) <= 1.01 * peak("continuous", 8)
    assert peak("backprop", 40) > 3 * peak("continuous", 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "adjoint"}, "'discrete', 'continuous', 'backprop'"),
        ({"gradient": "continuous", "adjoint": {"method": "none"}}, "method must be"),
    ],
)
def test_bad_settings(settings, message, y0):
    with pytest.raises(ValueError, match=message):
        solve(lambda t, y: y, y0, [0.0, 1.0], **settings)


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "backprop"])
def test_cotangents_of_zero_give_gradients_of_zero(gradient):
    # not none: an optimizer would leave out its weight decay
    linear = torch.nn.Linear(3, 3)
    y = solve_ode(
        lambda t, y: torch.sin(linear(y)),
        torch.ones(5, 3),
        [0.0, 1.0],
        gradient=gradient,
    ).y
    (0 * y).sum().backward()
    assert all((p.grad == 0).all() for p in linear.parameters())
