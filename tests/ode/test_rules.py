"""The rules that decide the numerics: independence, dtypes, failures, the interval."""

import pytest
import torch

from sknode.fields import MLPField
from sknode.ode import METHODS, SolverWarning, Status, solve_ode
from sknode.ode.methods import get_method

FIXED = ("euler", "midpoint", "rk4")


def settings(method):
    return {"step_size": 0.07} if method in FIXED else {}


def oscillator(t, y):
    """Van der Pol, elementwise in the batch."""
    x, v = y[:, :1], y[:, 1:]
    return torch.cat([v, 2 * (1 - x**2) * v - x], 1)


@pytest.fixture
def y0():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 2, generator=generator, dtype=torch.float64)


T = torch.tensor([0.0, 0.3, 1.1, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_has_the_same_bits_in_whatever_batch(method, y0):
    whole = solve_ode(oscillator, y0, T, method=method, **settings(method))
    for n in (1, 3, 17):
        part = solve_ode(oscillator, y0[:n], T, method=method, **settings(method))
        assert torch.equal(part.y, whole.y[:n])
        assert torch.equal(part.stats["n_steps"], whole.stats["n_steps"][:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_mlp_has_the_same_bits_in_whatever_batch(dtype):
    generator = torch.Generator().manual_seed(0)
    # Even widths: where a row of an odd one lies in memory decides how the library's
    # matrix product rounds it.
    field = MLPField(4, (20, 32), time_dependent=True).to(dtype)
    y0 = 2 * torch.randn(600, 4, generator=generator, dtype=dtype)
    with torch.no_grad():
        whole = solve_ode(field, y0, T, rtol=1e-4, atol=1e-4).y
        for n in (1, 2, 3, 5, 16, 17, 33, 100, 333):
            part = solve_ode(field, y0[:n], T, rtol=1e-4, atol=1e-4).y
            assert torch.equal(part, whole[:n])
        order = torch.randperm(600, generator=generator)
        permuted = solve_ode(field, y0[order], T, rtol=1e-4, atol=1e-4).y
    assert torch.equal(permuted, whole[order])


def test_shared_control_couples_the_batch(y0):
    whole = solve_ode(oscillator, y0, T, step_control="shared")
    part = solve_ode(oscillator, y0[:3], T, step_control="shared")
    assert not torch.equal(part.y, whole.y[:3])
    assert len(set(whole.stats["n_steps"].tolist())) == 1


@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f_sees_one_dtype(dtype, step_control, y0):
    def f(t, y):
        assert t.dtype == y.dtype == dtype
        assert t.shape == (() if step_control == "shared" else (len(y), 1))
        return -y * t

    y0 = y0.to(dtype).requires_grad_()
    solution = solve_ode(f, y0, T, step_control=step_control, rtol=1e-4, atol=1e-4)
    solution.y.sum().backward()
    assert solution.y.dtype == y0.grad.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, -1.0), (1e6, 1e6 + 1e-3)])
def test_f_stays_inside_the_interval(method, ends, y0):
    low, high = min(ends), max(ends)

    def f(t, y):
        assert (t >= low).all()
        assert (t <= high).all()
        return torch.sin(t) * y - torch.sin(2 * y)

    kwargs = {"step_size": abs(high - low) / 7.5} if method in FIXED else {}
    differentiable = "discrete" in get_method(method).gradients
    y0 = y0.requires_grad_(differentiable)
    t = torch.tensor([ends[0], (ends[0] + ends[1]) / 2, ends[1]], dtype=torch.float64)
    solution = solve_ode(f, y0, t, method=method, **kwargs)
    if differentiable:
        solution.y.sum().backward()
    assert (solution.t_reached == ends[1]).all()


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_a_sample_that_blows_up_leaves_the_others_alone(method, y0):
    def f(t, y):
        return y**2

    y0 = y0[:, :1].abs().clamp(max=0.9)
    bad = y0.clone()
    bad[7] = 1.25  # infinite at t = 0.8
    good = solve_ode(f, y0, torch.tensor([0.0, 0.5, 1.0]), method=method)
    with pytest.warns(SolverWarning, match=r"1 of 40 samples \(7\)"):
        solution = solve_ode(f, bad, torch.tensor([0.0, 0.5, 1.0]), method=method)
    others = torch.arange(40) != 7
    assert torch.equal(solution.y[others], good.y[others])
    assert (solution.status[others] == Status.SUCCESS).all()
    assert solution.status[7] != Status.SUCCESS
    assert 0.79 < solution.t_reached[7] < 0.81
    # what it reached is there, and after that its last good state
    assert solution.y[7, 1, 0] == pytest.approx(1.25 / (1 - 1.25 * 0.5), rel=1e-4)
    assert torch.isfinite(solution.y[7]).all()
    assert not solution.success
    assert "rtol" in solution.messages[7]
    # and without it
    without = solve_ode(f, bad[others], [0.0, 0.5, 1.0], method=method)
    assert torch.equal(without.y, solution.y[others])


@pytest.mark.parametrize("method", ["dopri5", "adams"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_reported(value, method, y0):
    y0 = y0.clone()
    y0[3, 1] = value
    with pytest.warns(SolverWarning, match="not finite"):
        solution = solve_ode(oscillator, y0, T, method=method)
    assert solution.status.nonzero().flatten().tolist() == [3]
    assert solution.status[3] == Status.NON_FINITE


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_a_slope_that_is_nowhere_finite_is_reported(method, y0):
    def f(t, y):
        return torch.where(torch.arange(len(y))[:, None] == 2, torch.nan, -y)

    with pytest.warns(SolverWarning, match="not finite"):
        solution = solve_ode(f, y0, T, method=method)
    assert solution.status.nonzero().flatten().tolist() == [2]
    assert torch.equal(solution.y[2, -1], y0[2])


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_a_trial_step_that_is_not_finite_is_only_shortened(method):
    def f(t, y):
        # undefined beyond what the solution reaches
        return torch.where(y > 1.0 + 1e-9, torch.nan, 1.0 - y)

    y0 = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
    solution = solve_ode(f, y0, [0.0, 3.0], first_step=3.0, method=method)
    exact = 1 - (1 - y0) * torch.exp(torch.tensor(-3.0, dtype=torch.float64))
    assert solution.success
    torch.testing.assert_close(solution.y[:, -1], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_running_out_of_steps_is_a_status(method, y0):
    with pytest.warns(SolverWarning, match="max_steps"):
        solution = solve_ode(oscillator, y0, [0.0, 100.0], method=method, max_steps=10)
    assert (solution.status == Status.MAX_STEPS).all()
    assert (solution.stats["n_steps"] == 10).all()
    assert (solution.t_reached < 100).all()


def test_solving_draws_no_random_numbers(y0):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    solve_ode(oscillator, y0.requires_grad_(), T).y.sum().backward()
    assert torch.equal(torch.rand(2), expected)
