"""What cannot be solved ends in a status, in time, as it does without the kernels."""

import math
import warnings

import pytest
import torch

from sknode.ode import Status, kernels, solve_ode

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


def assert_same_end(field, y0, t, run, **settings):
    """Compare what is left, non-finite values included; return the statuses."""
    got = run(field, y0, t, **settings)
    with kernels.reference():
        expected = run(field, y0, t, **settings)
    assert got.fused
    one, two = got.solution, expected.solution
    assert torch.equal(one.status, two.status)
    for name, count in two.stats.items():
        assert torch.equal(one.stats[name], count), name
    torch.testing.assert_close(one.t_reached, two.t_reached, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.y, two.y, rtol=1e-7, atol=1e-9, equal_nan=True)
    return one.status.tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("settings", [{}, {"step_size": 0.1}, {"first_step": 0.1}])
def test_states_that_are_no_numbers(
    value, settings, instruction_set, make_field, make_states, run
):
    field, y0 = make_field(3, (5,)), make_states(18, 3)
    y0[4, 1] = y0[17] = value
    status = assert_same_end(field, y0, T, run, **settings)
    assert [i for i, s in enumerate(status) if s] == [4, 17]
    assert status[4] == Status.NON_FINITE
    # an interval without length asks for nothing
    assert run(field, y0, [0.5, 0.5]).solution.success


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "relu"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_parameters_that_are_no_numbers(
    value, activation, layer, kind, instruction_set, make_field, make_states
):
    field = make_field(3, (5, 4), activation)
    with torch.no_grad():
        getattr(field.layers[layer], kind)[0] = value
        # infinite weights make steps of the field that take very many to pass
        solution = solve_ode_quietly(field, make_states(18, 3), T, max_steps=200)
    if value is torch.nan or layer == 2:
        assert set(solution.status.tolist()) == {Status.NON_FINITE}
    assert solution.y.isfinite().all()


def solve_ode_quietly(*args, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solve_ode(*args, **settings)


@pytest.fixture
def explosive(make_field):
    """Make a field that grows without bound, from a time on that depends on y0."""

    def make(dtype=torch.float64, rate=40.0):
        field = make_field(1, (2,), "relu", dtype=dtype, biases=False)
        with torch.no_grad():
            field.layers[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
            field.layers[1].weight.copy_(rate * torch.tensor([[1.0, -1.0]]))
        return field

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings", [{"rtol": 1e-3}, {"step_size": 0.05}], ids=["adaptive", "constant"]
)
def test_numbers_that_overflow_on_the_way(dtype, settings, instruction_set, explosive):
    # y' = rate * y leaves the range of numbers at some time inside the interval
    y0 = torch.tensor([[1.0], [0.0], [-1e-3], [1e20]], dtype=dtype)
    rate = 40.0 if dtype == torch.float32 else 200.0
    t = torch.tensor([0.0, 2.0, 8.0], dtype=torch.float64)
    field = explosive(dtype, rate)
    with torch.no_grad():
        solution = solve_ode_quietly(field, y0, t, **settings)
    assert solution.y.isfinite().all()
    failed, adaptive = solution.status[[0, 2, 3]], "rtol" in settings
    if dtype == torch.float64 or not adaptive:
        assert set(failed.tolist()) == {Status.NON_FINITE}
    else:
        # in single precision time can go on where the state no longer moves
        assert set(failed.tolist()) <= {Status.NON_FINITE, Status.MAX_STEPS}
    assert solution.status[1] == Status.SUCCESS
    if adaptive:
        # up to where the slope, rate * |y0| * exp(rate * t), ends
        size = y0[[0, 2, 3], 0].abs().double()
        end = (math.log(torch.finfo(dtype).max / rate) - size.log()) / rate
        torch.testing.assert_close(
            solution.t_reached[[0, 2, 3]], end, rtol=0, atol=0.05
        )


@pytest.mark.parametrize("settings", [{}, {"step_size": 0.01}])
@pytest.mark.parametrize("max_steps", [1, 3])
def test_too_many_steps(
    settings, max_steps, instruction_set, make_field, make_states, run
):
    field = make_field(2, (16,), gain=4)
    settings = {"rtol": 1e-8, "atol": 1e-8, "max_steps": max_steps, **settings}
    status = assert_same_end(field, make_states(17, 2), T, run, **settings)
    assert set(status) == {Status.MAX_STEPS}


@pytest.mark.parametrize("min_step", [0.05, 0.2, 5.0])
def test_too_small_steps(min_step, instruction_set, make_field, make_states, run):
    field = make_field(2, (16,), gain=4)
    settings = {"rtol": 1e-9, "atol": 1e-9, "min_step": min_step}
    status = assert_same_end(field, make_states(17, 2), T, run, **settings)
    assert min_step > 0.1 or Status.STEP_TOO_SMALL in status


@pytest.mark.parametrize("length", [0.5, 4, 20])
@pytest.mark.parametrize("settings", [{}, {"first_step": 1e-8}, {"first_step": 100.0}])
def test_steps_below_the_resolution_of_time(
    length, settings, instruction_set, make_field, make_states
):
    field = make_field(2, (4,), gain=30)
    t = torch.tensor([1e15, 1e15 + length], dtype=torch.float64)
    with torch.no_grad():
        solution = solve_ode_quietly(field, make_states(3, 2), t, **settings)
    assert set(solution.status.tolist()) <= {Status.SUCCESS, Status.STEP_TOO_SMALL}
    assert solution.status.any()
    assert solution.stats["n_steps"].max() < 100


def test_failed_samples_give_no_gradient_to_the_others(
    instruction_set, make_field, make_states, run
):
    field, y0 = make_field(3, (8,)), make_states(20, 3)
    bad = y0.clone()
    bad[::3] = torch.nan
    good = [i for i in range(20) if i % 3]

    def gradients(y0, rows):
        y = solve_ode_quietly(field, y0, T).y[rows]
        return torch.autograd.grad(y.sin().sum(), list(field.parameters()))

    pairs = zip(gradients(bad, good), gradients(y0[good], ...), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def test_many_steps_take_memory_for_each_and_no_more(
    instruction_set, make_field, make_states, fused
):
    field, n = make_field(2, (2,)), 100_000
    y0 = make_states(16, 2).requires_grad_()
    y = solve_ode(field, y0, [0.0, 1.0], method="euler", step_size=1 / n, max_steps=n).y
    node = y.grad_fn
    while not hasattr(node, "run"):
        node = node.next_functions[0][0]
    kept = kernels.recorded_bytes(node.run.trace.records)
    assert kept < 1.05 * n * 16 * (2 + 3) * 8
    y.sum().backward()
    assert y0.grad.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_signals_end_a_solve(
    threads, make_field, make_states, monkeypatch, interrupted_after
):
    monkeypatch.setattr(kernels, "THREAD_WORK", 0)
    torch.set_num_threads(threads)
    field, y0 = make_field(2, (8,)), make_states(64, 2)
    with torch.no_grad(), interrupted_after(0.2):
        solve_ode(field, y0, [0.0, 1.0], step_size=1e-9, max_steps=10**9)
