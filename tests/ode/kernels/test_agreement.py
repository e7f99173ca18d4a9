"""The kernels compute what torch computes: steps, states, statuses, gradients."""

import pytest
import torch

from sknode.fields import ACTIVATIONS
from sknode.ode import StepController, kernels, solve_ode
from sknode.ode.tableaus import METHODS, get_tableau

WIDTHS = (1, 3, 5, 16, 17, 64)
SMOOTH = [name for name in ACTIVATIONS if name not in ("relu", "elu")]
T = torch.tensor([0.0, 0.2, 0.21, 1.1], dtype=torch.float64)
CONSTANT = {"step_size": 0.17}
ADAPTIVE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(7,), (17, 4), (5, 16, 9)])
@pytest.mark.parametrize("time", [False, True])
def test_activations_and_depths(
    activation, hidden, time, make_field, make_states, compare
):
    field = make_field(3, hidden, activation, time=time)
    compare(field, make_states(21, 3), T, **CONSTANT)
    if activation in SMOOTH:
        compare(field, make_states(21, 3), T, **ADAPTIVE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_arguments_of_any_size(dtype, activation, instruction_set, make_field):
    # y1' = activation(8 y0), for one step: what overflows is at the end of the range
    limits = torch.finfo(dtype)
    x = torch.linspace(-100, 100, 2001, dtype=dtype)
    ends = torch.tensor([1e3, 1e5, 1e30, limits.max, limits.tiny, 0], dtype=dtype)
    x = torch.cat([x, ends, -ends])
    field = make_field(2, (1,), activation, biases=False, dtype=dtype)
    with torch.no_grad():
        field.layers[0].weight.copy_(torch.tensor([[8.0, 0.0]]))
        field.layers[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
        y0 = torch.stack([x, torch.zeros_like(x)], 1)
        solution = solve_ode(field, y0, [0.0, 1.0], method="euler", step_size=1.0)
    got = solution.y[:, -1, 1].double()
    expected = getattr(torch, activation)(8 * x.double())
    error = (got - expected).abs()
    if activation == "sigmoid":
        # the argument is rounded, which shows where it is large
        relative = limits.eps * (2 + 8 * x.abs().clamp(max=100).double())
        assert (error < 2 * limits.tiny + relative * expected).all()
    assert error.max() < 2 * limits.eps


def error(outcome, exact):
    """Return the largest error of the states, and of gradients relative to theirs."""
    pairs = zip(outcome.gradients, exact.gradients, strict=True)
    gradients = max((a - b).abs().max() / b.abs().max() for a, b in pairs)
    return (outcome.solution.y - exact.solution.y).abs().max(), gradients


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_kinks_cost_what_they_cost_torch(
    activation, instruction_set, make_field, make_states, run
):
    # Where the field is linear the error estimate is mere rounding, and so is the step
    # size: steps may differ, and how they meet the kinks.
    field, y0 = make_field(3, (17, 16), activation, time=True), make_states(200, 3)
    settings = {"rtol": 1e-5, "atol": 1e-5}
    exact = run(field, y0, T, rtol=1e-11, atol=1e-11)
    got = run(field, y0, T, **settings)
    with kernels.reference():
        expected = run(field, y0, T, **settings)
    assert got.fused and got.solution.success
    one, two = got.solution.stats["n_steps"], expected.solution.stats["n_steps"]
    assert (one - two).abs().double().mean() < 0.05 * two.double().mean()
    for mine, theirs in zip(error(got, exact), error(expected, exact), strict=True):
        assert mine < 1.1 * theirs


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("depth", [1, 2])
def test_widths(dim, depth, make_field, make_states, compare):
    for i, width in enumerate(WIDTHS):
        field = make_field(dim, (width, 5)[:depth], time=i % 2 == 1, seed=i)
        compare(field, make_states(17, dim), T, **ADAPTIVE)


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize(
    "biases", [(True, True, True), (False, False, False), (False, True, False)]
)
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_biases(time, biases, activation, make_field, make_states, compare):
    field = make_field(4, (6, 5), activation, time=time, biases=biases, gain=2)
    compare(field, make_states(5, 4), T, **ADAPTIVE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [CONSTANT, ADAPTIVE], ids=["constant", "adaptive"])
def test_methods(method, settings, make_field, make_states, compare):
    if settings is ADAPTIVE and not get_tableau(method).adaptive:
        settings = {"step_size": 0.05}
    field = make_field(3, (16, 8), time=True, gain=2)
    t = torch.linspace(0, 1.4, 12, dtype=torch.float64)
    compare(field, make_states(19, 3), t, method=method, **settings)


@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri8"])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6, 1e-8])
def test_tolerances(method, tolerance, make_field, make_states, compare):
    field = make_field(2, (16,), time=True, gain=3)
    settings = {"method": method, "rtol": tolerance, "atol": tolerance}
    solution = compare(field, make_states(16, 2), T, within=1e-9, **settings)
    # tighter tolerances must matter
    assert tolerance > 1e-6 or solution.stats["n_accepted"].min() >= 4


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_sizes(batch, dtype, make_field, make_states, compare):
    field = make_field(3, (9,), dtype=dtype)
    # constant steps: in single precision, too, they are the same ones
    within = 1e-10 if dtype == torch.float64 else 2e-6
    compare(field, make_states(batch, 3, dtype=dtype), T, within=within, **CONSTANT)


def test_nobody(instruction_set, make_field):
    y0 = torch.zeros(0, 3, dtype=torch.float64)
    field, t = make_field(3, (9,)), T.numpy()
    assert kernels.serves(field.closed_form(y0.shape[1:]), y0, T)
    assert solve_ode(field, y0, t).y.shape == (0, 4, 3)


def test_single_precision_is_as_accurate_as_torch(
    instruction_set, make_field, make_states, run
):
    # An error estimate near its bound may be accepted by one and not by the other:
    # steps are not the same, but their number and the error are alike.
    double = make_field(4, (32, 17), "softplus", time=True)
    single = make_field(4, (32, 17), "softplus", time=True, dtype=torch.float32)
    settings = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    y0 = make_states(200, 4)
    exact = run(double, y0, T, rtol=1e-11, atol=1e-11)
    got = run(single, y0.float(), T, **settings)
    with kernels.reference():
        expected = run(single, y0.float(), T, **settings)
    assert got.fused and got.solution.success
    one, two = got.solution.stats["n_steps"], expected.solution.stats["n_steps"]
    assert one.double().mean() == pytest.approx(two.double().mean().item(), rel=0.02)
    for mine, theirs in zip(error(got, exact), error(expected, exact), strict=True):
        assert mine < 1.2 * theirs


def ragged(batch, n_times):
    """Rows that start, end and turn at will, some with repeated times, some nowhere."""
    generator = torch.Generator().manual_seed(3)
    t = torch.rand(batch, n_times, generator=generator, dtype=torch.float64)
    t = t.sort(1).values * torch.linspace(0.1, 2, batch, dtype=torch.float64)[:, None]
    t = t + torch.randn(batch, 1, generator=generator, dtype=torch.float64)
    t[1::3] = t[1::3].flip(1)
    repeat = torch.arange(n_times) // 2
    t[::4] = t[::4][:, repeat]
    t[2::5, n_times // 2 :] = t[2::5, -1:]  # the end, many times
    t[3::7, : n_times // 2] = t[3::7, :1]  # the start, many times
    t[5::11] = t[5::11, :1]
    return t


@pytest.mark.parametrize("n_times", [1, 2, 3, 20])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("settings", [CONSTANT, ADAPTIVE], ids=["constant", "adaptive"])
def test_rows_of_times(n_times, method, settings, make_field, make_states, compare):
    field, t = make_field(2, (12,), time=True, gain=2), ragged(37, n_times)
    compare(field, make_states(37, 2), t, method=method, **settings)


@pytest.mark.parametrize(
    "t",
    [
        [0.5],
        [0.5, 0.5, 0.5],
        [1.0, 0.4, 0.4, -0.3, -0.3],
        [0.0, 0.0, 1.0, 1.0],
        [1e6, 1e6 + 0.3, 1e6 + 1],
        [0.0, 1e-300],
        [1.0, 1.0 + 2e-16],
    ],
)
def test_one_grid_of_times(t, make_field, make_states, compare):
    field = make_field(2, (12,), time=True)
    compare(field, make_states(18, 2), torch.tensor(t, dtype=torch.float64), **ADAPTIVE)


@pytest.mark.parametrize(
    "settings",
    [
        {"first_step": 1e-3},
        {"first_step": 50.0},
        {"controller": "PID"},
        {"controller": StepController(0.1, 0.4, 0.05, safety=0.8, factor_max=4)},
        {"rtol": 0.0},
        {"atol": 0.0},
        {"min_step": 0.02, "rtol": 1e-7},
        {"max_steps": 4},
        {"max_steps": 2**70},
        {"step_size": 5.0},
        {"step_size": 0.1, "max_steps": 7},
    ],
    ids=str,
)
def test_settings(settings, make_field, make_states, compare):
    field = make_field(3, (16, 5), time=True, gain=2)
    # who gives up does so at a time that carries the rounding of all step sizes
    compare(field, make_states(20, 3), T, within=1e-9, **{**ADAPTIVE, **settings})


class Solver(torch.nn.Module):
    """A solve as a module, so that its parameters can be replaced."""

    def __init__(self, field, t, **settings):
        super().__init__()
        self.field, self.t, self.settings = field, t, settings

    def forward(self, y0):
        return solve_ode(self.field, y0, self.t, **self.settings).y


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize(
    "settings",
    [{"method": "dopri8", "step_size": 0.3}, {"rtol": 1e-11, "atol": 1e-11}],
    ids=["constant", "adaptive"],
)
def test_gradcheck(
    activation, settings, instruction_set, make_field, make_states, fused
):
    field = make_field(2, (4, 3), activation, time=True, biases=(True, False, True))
    solver = Solver(field, ragged(3, 4), **settings)
    names = [name for name, _ in solver.named_parameters()]

    def solve(y0, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(solver, replaced, (y0,))

    inputs = (make_states(3, 2).requires_grad_(), *solver.parameters())
    assert fused(solve(*inputs))
    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-5, atol=1e-6, fast_mode=True)
