"""Events: found for every sample alone, located, counted, differentiable."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from sknode.ode import Event, Status, solve_ode
from sknode.ode.tableaus import METHODS, get_tableau

ADAPTIVE = [m for m in METHODS if get_tableau(m).adaptive]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def circle(t, y):
    """Turn with unit speed."""
    return torch.stack([-y[..., 1], y[..., 0]], -1)


def on_circle(angles):
    angles = torch.as_tensor(angles, dtype=torch.float64)
    return torch.stack([torch.cos(angles), torch.sin(angles)], -1)


def height(t, y):
    return y[:, 1]


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [20.0, -20.0])
def test_a_terminal_event_ends_every_sample_at_its_own_time(method, end):
    angles = torch.tensor([0.1, 1.0, 2.0, 3.0], dtype=torch.float64)
    tolerance = 1e-6 if method in ("heun", "bosh3") else 1e-10
    solution = solve_ode(
        circle,
        on_circle(angles),
        [0.0, end],
        event=height,
        method=method,
        rtol=tolerance,
        atol=tolerance,
        max_steps=100_000,
    )
    expected = math.pi - angles if end > 0 else -angles
    (found,) = solution.events
    assert found.sample.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(found.t, expected, rtol=0, atol=1e3 * tolerance)
    torch.testing.assert_close(solution.t_reached, found.t, rtol=0, atol=1e-12)
    assert (solution.status == Status.EVENT).all()
    assert solution.success
    assert found.y[:, 1].abs().max() < 1e-9
    torch.testing.assert_close(solution.y[:, -1], found.y, rtol=0, atol=1e-9)


def test_the_end_of_one_sample_stops_no_other(random):
    y0 = on_circle(random(40))
    t = torch.linspace(0, 5, 11, dtype=torch.float64)
    free = solve_ode(circle, y0, t)

    def only_some(t, y):
        never = torch.arange(len(y)) % 3 > 0
        return torch.where(never, torch.ones_like(y[:, 1]), y[:, 1])

    solution = solve_ode(circle, y0, t, event=only_some)
    others = torch.arange(40) % 3 > 0
    assert torch.equal(solution.y[others], free.y[others])
    assert (solution.status[others] == Status.SUCCESS).all()
    assert (solution.status[~others] == Status.EVENT).all()
    assert set(solution.events[0].sample.tolist()) == set(range(0, 40, 3))


def test_outputs_after_the_event_hold_its_state():
    t = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    y0 = on_circle([math.pi - 1.5])
    for grad in (False, True):
        y0 = y0.requires_grad_(grad)
        solution = solve_ode(circle, y0, t, event=height, **TIGHT)
        exact = on_circle(math.pi - 1.5 + torch.clamp(t, max=1.5))
        torch.testing.assert_close(solution.y[0].detach(), exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("direction", "first"), [(1, 2 * math.pi), (-1, math.pi)])
def test_direction(direction, first):
    event = Event(height, direction=direction)
    solution = solve_ode(circle, on_circle([0.3]), [0.0, 20.0], event=event, **TIGHT)
    assert solution.events[0].t.item() == pytest.approx(first - 0.3, abs=1e-8)


def test_events_that_do_not_end_are_all_noted():
    event = Event(height, terminal=False)
    solution = solve_ode(
        circle, on_circle([0.3, 2.0]), [0.0, 10.0], event=event, **TIGHT
    )
    (found,) = solution.events
    expected = [
        *(math.pi * np.array([1, 2, 3]) - 0.3),
        *(math.pi * np.array([1, 2, 3]) - 2.0),
    ]
    assert found.sample.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(found.t, expected, atol=1e-8)
    assert (solution.status == Status.SUCCESS).all()


def test_an_event_may_end_at_its_third_occurrence():
    event = Event(height, terminal=3)
    solution = solve_ode(circle, on_circle([0.3]), [0.0, 20.0], event=event, **TIGHT)
    assert len(solution.events[0].t) == 3
    assert solution.t_reached.item() == pytest.approx(3 * math.pi - 0.3, abs=1e-8)


def test_several_events_in_one_step_keep_their_order():
    # with free steps both lie in one step; what comes after the end is not noted
    def f(t, y):
        return torch.ones_like(y)

    y0 = torch.zeros(3, 1, dtype=torch.float64)
    events = [
        Event(lambda t, y: y[:, 0] - 0.5),
        Event(lambda t, y: y[:, 0] - 0.4, terminal=False),
        Event(lambda t, y: y[:, 0] - 0.6, terminal=False),
    ]
    solution = solve_ode(f, y0, [0.0, 1.0], event=events)
    times = [x.t.tolist() for x in solution.events]
    assert times[0] == pytest.approx([0.5] * 3)
    assert times[1] == pytest.approx([0.4] * 3)
    assert times[2] == []


def test_agrees_with_scipy(random):
    def f(t, y):
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v, 2 * (1 - x**2) * v - x + torch.cos(t)], 1)

    y0 = random(4, 2)
    solution = solve_ode(
        f, y0, [0.0, 8.0], event=Event(lambda t, y: y[:, 0], terminal=False), **TIGHT
    )
    for i, start in enumerate(y0.numpy()):

        def g(t, y):
            v = 2 * (1 - y[0] ** 2) * y[1] - y[0] + np.cos(t)
            return [y[1], v]

        reference = solve_ivp(
            g, [0, 8], start, events=lambda t, y: y[0], rtol=1e-11, atol=1e-11
        )
        got = solution.events[0].t[solution.events[0].sample == i]
        np.testing.assert_allclose(got, reference.t_events[0], atol=1e-7)


def test_a_zero_at_the_start_is_no_event():
    solution = solve_ode(circle, on_circle([0.0]), [0.0, 5.0], event=height, **TIGHT)
    assert solution.events[0].t.item() == pytest.approx(math.pi, abs=1e-8)


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
def test_times_and_states_are_differentiable(gradient, random):
    rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    level = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    y0 = (random(3, 1).abs() + 1).requires_grad_()
    t0 = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    # y' = -rate t y reaches the level at t^2 = t0^2 + 2 log(y0 / level) / rate
    def solve(y0, t0, rate, level):
        t = torch.stack([t0, torch.tensor(9.0, dtype=torch.float64)])
        solution = solve_ode(
            lambda t, y: -rate * t * y,
            y0,
            t,
            event=lambda t, y: y[:, 0] - level,
            gradient=gradient,
            **TIGHT,
        )
        (found,) = solution.events
        return found.t, solution.y[:, -1, 0]

    inputs = (y0, t0, rate, level)
    exact = torch.sqrt(t0**2 + 2 * torch.log(y0[:, 0] / level) / rate)
    t, y = solve(*inputs)
    torch.testing.assert_close(t, exact, rtol=0, atol=1e-8)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    got = torch.autograd.grad((t * weights).sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad((exact * weights).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    # the state at the event is the level, whatever else changes
    got = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    for a, b in zip(got, (0.0, 0.0, 0.0, 3.0), strict=True):
        torch.testing.assert_close(a, torch.full_like(a, b), rtol=0, atol=1e-6)


def test_every_occurrence_is_differentiable():
    omega = torch.tensor([1.0, 1.5], dtype=torch.float64, requires_grad=True)

    def f(t, y):
        return omega[:, None] * circle(t, y)

    event = Event(height, terminal=False)
    y0 = on_circle([0.3, 0.5])
    solution = solve_ode(f, y0, [0.0, 7.0], event=event, **TIGHT)
    (found,) = solution.events
    number = torch.tensor([1, 2, 1, 2, 3], dtype=torch.float64)
    angle = torch.tensor([0.3, 0.5], dtype=torch.float64)
    exact = (number * math.pi - angle[found.sample]) / omega[found.sample]
    torch.testing.assert_close(found.t, exact, rtol=0, atol=1e-8)
    (got,) = torch.autograd.grad(found.t.sum(), omega)
    (expected,) = torch.autograd.grad(exact.sum(), omega)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_mlp_fields_leave_the_kernels_for_events(make_mlp, random):
    field = make_mlp(2, (16,))
    y0 = random(300, 2)
    event = Event(lambda t, y: y[:, 0] - 1)
    solution = solve_ode(field, y0, [0.0, 3.0], event=event, **TIGHT)
    (found,) = solution.events
    assert 0 < len(found.t) < 300
    assert (found.y[:, 0] - 1).abs().max() < 1e-6
    found.t.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in field.parameters())
    with torch.no_grad():
        again = solve_ode(field, y0, [0.0, 3.0], event=event, **TIGHT)
    torch.testing.assert_close(again.events[0].t, found.t.detach(), rtol=0, atol=1e-8)


def test_shared_control_ends_the_whole_batch(random):
    y0 = on_circle(torch.tensor([0.3, 0.5, 0.9]))
    solution = solve_ode(
        circle,
        y0,
        [0.0, 9.0],
        step_control="shared",
        event=lambda t, y: y[:, 1].min(),
        **TIGHT,
    )
    (found,) = solution.events
    assert found.t.item() == pytest.approx(math.pi - 0.9, abs=1e-7)
    assert found.y.shape == (1, 3, 2)
    assert (solution.status == Status.EVENT).all()


def test_rows_of_times_of_their_own_and_both_directions():
    y0 = on_circle([0.5, 0.5])
    t = torch.tensor([[0.0, 10.0], [0.0, -10.0]], dtype=torch.float64)
    solution = solve_ode(circle, y0, t, event=height, **TIGHT)
    np.testing.assert_allclose(solution.events[0].t, [math.pi - 0.5, -0.5], atol=1e-8)


def test_bad_events_are_named():
    y0 = on_circle([0.5, 0.7])
    with pytest.raises(TypeError, match="event must be callable"):
        solve_ode(circle, y0, [0.0, 1.0], event=3)
    with pytest.raises(ValueError, match="one number a sample"):
        solve_ode(circle, y0, [0.0, 1.0], event=lambda t, y: y)
    with pytest.raises(ValueError, match="direction"):
        Event(height, direction=2)
    with pytest.raises(ValueError, match="terminal"):
        Event(height, terminal=-1)
