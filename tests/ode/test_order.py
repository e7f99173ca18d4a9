"""Errors shrink with the step at the rate that the order of a method promises."""

import numpy as np
import pytest
import torch

from sknode.ode import solve_ode
from sknode.ode.tableaus import METHODS, get_tableau

# steps per interval: small enough for the leading term of the error, large enough
# for the error to stay far above rounding
N_STEPS = {
    "euler": (400, 800, 1600),
    "midpoint": (160, 240, 360),
    "heun": (160, 240, 360),
    "bosh3": (160, 240, 360),
    "rk4": (120, 180, 270),
    "dopri5": (225, 340, 500, 750),
    "tsit5": (225, 340, 500, 750),
    "dopri8": (30, 36, 44, 54),
}
INSIDE = np.array([0.11, 0.28, 0.5, 0.69, 0.86])


def slope(steps, errors):
    """Return the slope of the line through the logarithms."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def error_of_steps(problem, f, method, n):
    """Take n constant steps; return the error at the end, over all rows."""
    t = problem.times([0, problem.length])
    h = problem.length / n
    solution = solve_ode(f, problem.y0, t, method=method, step_size=h)
    error = solution.y[:, -1] - problem.exact(t)[:, -1]
    return error.square().mean().sqrt().item()


def error_inside_steps(problem, f, method, n):
    """Take n constant steps; return the largest error inside some, over all rows."""
    h = problem.length / n
    some = np.linspace(0, n - 1, 10).round()
    inside = h * (some[:, None] + INSIDE).ravel()
    t = problem.times([0, *inside, problem.length])
    solution = solve_ode(f, problem.y0, t, method=method, step_size=h)
    error = (solution.y - problem.exact(t))[:, 1:-1].abs().amax((1, 2))
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("method", METHODS)
def test_error_of_steps_has_the_order_of_the_method(method, swirl):
    counts = N_STEPS[method]
    errors = [error_of_steps(swirl, swirl.f, method, n) for n in counts]
    order = get_tableau(method).order
    assert -slope(counts, errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_error_inside_steps_has_the_order_of_the_dense_output(method, swirl):
    counts = N_STEPS[method]
    errors = [error_inside_steps(swirl, swirl.f, method, n) for n in counts]
    order = get_tableau(method).dense_order
    assert -slope(counts, errors) == pytest.approx(order, abs=0.15)


def test_order_drops_when_stages_get_the_wrong_time(swirl):
    # what the tests above can tell: this field is as if a method had wrong nodes
    def late(t, y):
        return swirl.f(t + 0.01, y)

    errors = [error_of_steps(swirl, late, "rk4", n) for n in (120, 180, 270)]
    assert -slope((120, 180, 270), errors) < 1


@pytest.mark.parametrize("method", METHODS)
def test_shared_control_takes_the_same_constant_steps(method, coupled):
    def solve(step_control):
        return solve_ode(
            coupled.f,
            coupled.y0(),
            torch.linspace(coupled.t0, coupled.t1, 7, dtype=torch.float64),
            method=method,
            step_size=0.07,
            step_control=step_control,
        )

    torch.testing.assert_close(
        solve("shared").y, solve("per_sample").y, rtol=1e-14, atol=1e-14
    )
