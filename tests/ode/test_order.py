"""Errors shrink with the step at the rate that the order of a method promises."""

import numpy as np
import pytest
import torch

from sknode.ode import METHODS, solve_ode
from sknode.ode.tableaus import get_tableau

# steps per interval: small enough for the leading term of the error, large enough
# for the error to stay far above rounding
N_STEPS = {
    "euler": (400, 600, 900, 1350),
    "midpoint": (120, 180, 270, 400),
    "heun": (120, 180, 270, 400),
    "bosh3": (80, 120, 180, 270),
    "rk4": (60, 90, 135, 200),
    "dopri5": (40, 60, 90, 135),
    "tsit5": (40, 60, 90, 135),
    "dopri8": (14, 18, 24, 32),
}
INSIDE = np.array([0.11, 0.28, 0.5, 0.69, 0.86])


def slope(steps, errors):
    """Return the slope of the line through the logarithms."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def errors_at(problem, method, n, places, **settings):
    """Take n constant steps; return the largest error at these places in them."""
    h = (problem.t1 - problem.t0) / n
    inner = problem.t0 + h * (np.arange(n)[:, None] + places).ravel()
    # several places, because at a single one the leading term may happen to vanish
    t = torch.tensor([problem.t0, *inner, problem.t1], dtype=torch.float64)
    solution = solve_ode(
        problem.f, problem.y0(), t, method=method, step_size=h, **settings
    )
    return h, (solution.y[0, 1:-1] - problem.exact(t[1:-1])).abs().max().item()


@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
@pytest.mark.parametrize("method", METHODS)
def test_error_of_steps_has_the_order_of_the_method(method, step_control, coupled):
    points = [
        errors_at(coupled, method, n, np.ones(1), step_control=step_control)
        for n in N_STEPS[method]
    ]
    steps, errors = zip(*points, strict=True)
    assert slope(steps, errors) == pytest.approx(get_tableau(method).order, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_error_inside_steps_has_the_order_of_the_dense_output(method, coupled):
    points = [errors_at(coupled, method, n, INSIDE) for n in N_STEPS[method]]
    steps, errors = zip(*points, strict=True)
    order = get_tableau(method).dense_order
    assert slope(steps, errors) == pytest.approx(order, abs=0.15)


def test_order_is_seen_to_drop_when_stages_get_the_wrong_time(coupled):
    # the test above can tell: a field that ignores where in the step it is called
    # is what a code with wrong nodes would integrate
    def frozen(t, y):
        return coupled.f(torch.floor(t * 50) / 50, y)

    good = [errors_at(coupled, "rk4", n, np.ones(1)) for n in (25, 50)]
    wrong = type(coupled)(frozen, coupled.exact, coupled.t0, coupled.t1)
    bad = [errors_at(wrong, "rk4", n, np.ones(1)) for n in (25, 50)]
    assert slope(*zip(*good, strict=True)) > 3.5
    assert slope(*zip(*bad, strict=True)) < 2
