"""What the loop offers beyond times and tolerances: stops, limits, leaving, complex."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sknode.ode import solve_ode
from sknode.ode.grid import Grid, Stops
from sknode.ode.integrate import integrate
from sknode.ode.solve import _make_options
from sknode.ode.vector_field import bind


@pytest.fixture
def y0(random):
    return random(40, 2)


def run(f, y0, times, stops=None, **settings):
    """Integrate as `solve_ode` does, with stops."""
    field = bind(f, len(y0), y0.shape[1:], False, row_wise=True)
    grid = replace(Grid.from_times(np.asarray(times, np.float64)), stops=stops)
    with torch.no_grad():
        return integrate(field, y0, grid, _make_options(y0.dtype, **settings))


def test_steps_end_at_stops(y0, recorder):
    f = recorder(lambda t, y: -y)
    stops = Stops(np.array([0.25, 0.5]))
    trace = run(f, y0, [0.0, 1.0], stops)
    seen = torch.cat([t.flatten() for t in f.times])
    for stop in (0.25, 0.5):
        assert (seen == stop).any()
    assert trace.n_jumps.sum() == 0
    exact = y0 * np.exp(-1.0)
    torch.testing.assert_close(trace.y[:, -1], exact, rtol=1e-5, atol=1e-6)


def test_stops_of_every_lane_its_own(y0):
    reached = np.full(48, -1.0)

    def on_reach(rows, first, last, t, y, k):
        landed = last > first
        reached[rows[landed]] = t[landed]
        return y, k

    times = np.linspace(0.1, 0.9, 40)[:, None]
    run(lambda t, y: -y, y0, [0.0, 1.0], Stops(times, on_reach))
    np.testing.assert_array_equal(reached[:40], times[:, 0])


def test_states_may_jump_at_a_stop(y0):
    def f(t, y):
        return -y

    def on_reach(rows, first, last, t, y, k):
        landed = torch.from_numpy(last > first)[:, None]
        y = torch.where(landed, y + 1, y)
        return y, torch.where(landed, -y, k)

    trace = run(f, y0, [0.0, 1.0], Stops(np.array([0.5]), on_reach), rtol=1e-9)
    exact = (y0 * np.exp(-0.5) + 1) * np.exp(-0.5)
    torch.testing.assert_close(trace.y[:, -1], exact, rtol=1e-6, atol=1e-6)
    assert (trace.n_jumps == 1).all()


def test_a_stop_does_not_shorten_the_steps_after_it(y0):
    def f(t, y):
        return torch.cos(t) * torch.ones_like(y)

    plain = run(f, y0, [0.0, 10.0])
    # just after a step has begun
    stopped = run(f, y0, [0.0, 10.0], Stops(np.array([0.02, 5.0])))
    assert (stopped.n_steps <= plain.n_steps + 3).all()


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_no_step_is_longer_than_max_step(method, y0, recorder):
    f = recorder(lambda t, y: 0 * y)
    solution = solve_ode(f, y0, [0.0, 1.0], method=method, max_step=0.1)
    assert (solution.stats["n_steps"] >= 10).all()
    ends = sorted({round(t.max().item(), 12) for t in f.times})
    assert max(np.diff(ends)) <= 0.1 + 1e-12
    assert solution.success


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_rows_leave_where_they_may(method, random):
    sizes = []

    def f(t, y):
        sizes.append(len(y))
        return torch.stack([-y[:, 1] * y[:, 0], torch.zeros_like(y[:, 1])], 1)

    rate = torch.logspace(-1, 3, 512, dtype=torch.float64)
    y0 = torch.stack([random(512).abs() + 1, rate], 1)
    whole = solve_ode(f, y0, [0.0, 1.0], method=method)
    computed = sum(sizes)
    sizes.clear()
    parts = solve_ode(f, y0, [0.0, 1.0], method=method, row_wise=True)
    assert sum(sizes) < 0.5 * computed
    assert torch.equal(parts.y, whole.y)
    for name, values in whole.stats.items():
        assert torch.equal(parts.stats[name], values)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_complex_states(method, random):
    rate = torch.complex(torch.tensor(-0.2).double(), torch.tensor(3.0).double())
    rate.requires_grad_()
    y0 = torch.complex(random(5, 2), random(5, 2, seed=1)).requires_grad_()
    t = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64, requires_grad=True)

    def solve(y0, t, rate):
        return solve_ode(
            lambda t, y: rate * y, y0, t, method=method, rtol=1e-11, atol=1e-11
        ).y

    exact = y0[:, None] * torch.exp(rate * (t - t[0]))[:, None]
    torch.testing.assert_close(solve(y0, t, rate), exact, rtol=1e-8, atol=1e-8)
    got = torch.autograd.grad(solve(y0, t, rate).abs().sum(), (y0, t, rate))
    expected = torch.autograd.grad(exact.abs().sum(), (y0, t, rate))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
