"""The achieved error is in proportion to the tolerance, problem by problem.

Errors are those at the end of the interval, in units that make the tolerance comparable
(`scaled_error`). A solver controls the error of its steps; what becomes of these is
the problem's doing. So a bound on all 25 problems has to leave room for the orbits of
class D, whose errors grow by a few hundred over three revolutions, while the median
stays near the tolerance.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from detest import (
    ARENSTORF,
    DETEST,
    GRAVITY,
    LORENZ,
    PLANETS,
    PUBLISHED_END_STATES,
    ROBERTSON,
    ROBERTSON_STATES,
    SUN,
    RowByRow,
    mlp_problem,
    scaled_error,
    tanh_network,
    van_der_pol,
    van_der_pol_problem,
)
from scipy.integrate import solve_ivp

from sknode.fields import MLPField
from sknode.ode import Status, solve_ode


@dataclass(frozen=True)
class Promise:
    """What a method has to keep on the 25 problems, at all of its tolerances.

    Attributes
    ----------
    tolerances : tuple of float
        ``rtol = atol``, descending.
    median : tuple of float
        Range of the median of the problems' errors, as a multiple of the tolerance.
    worst : float
        The same for the largest error.
    slope : tuple of float
        Range of the median slope of log error over log tolerance; 1 is proportional.
    least_slope : float
        Bound on that of every problem. It is lower where stability limits the steps, or
        a few steps at a loose tolerance get more than was asked for.
    """

    tolerances: tuple[float, ...] = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
    median: tuple[float, float] = (0.1, 5.0)
    worst: float = 1000.0
    slope: tuple[float, float] = (0.85, 1.15)
    least_slope: float = 0.6


# Measured: medians of 0.9 to 2.3, 0.8 to 2.4, 0.10 to 0.34 and 2.8 to 8.9 tolerances,
# largest errors of 2340, 520, 160 and 430; slopes of 0.99, 1.02, 0.87 and 0.98, the
# least of 0.75, 0.71, 0.39 and 0.48. The few steps of order 8 are shortened most.
PROMISES = {
    "dopri5": Promise(worst=4000.0),
    "tsit5": Promise(),
    "dopri8": Promise(median=(0.05, 1.0), least_slope=0.3),
    "bosh3": Promise(
        tolerances=(1e-4, 1e-5, 1e-6, 1e-7), median=(0.1, 15.0), least_slope=0.4
    ),
}


@cache
def batches() -> list[RowByRow]:
    return RowByRow.by_dimension(DETEST.values())


def names() -> list[str]:
    return [problem.name for batch in batches() for problem in batch.problems]


@cache
def solve_all(method: str, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors and the statuses of the problems in the order of names()."""
    errors, statuses = [], []
    for batch in batches():
        solution = solve_ode(
            batch, batch.y0, batch.t, method=method, rtol=tolerance, atol=tolerance
        )
        errors.append(scaled_error(solution.y[:, -1], batch.reference))
        statuses.append(solution.status)
    return torch.cat(errors).numpy(), torch.cat(statuses).numpy()


def ladder(method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tolerances and errors of shape (tolerances, problems)."""
    tolerances = PROMISES[method].tolerances
    return np.array(tolerances), np.array([solve_all(method, x)[0] for x in tolerances])


@pytest.mark.parametrize("method", PROMISES)
class TestTolerance:
    def test_every_problem_succeeds(self, method):
        for tolerance in PROMISES[method].tolerances:
            statuses = solve_all(method, tolerance)[1]
            assert len(statuses) == 25
            assert (statuses == Status.SUCCESS).all(), tolerance

    def test_error_is_near_the_tolerance_for_most_problems(self, method):
        tolerances, errors = ladder(method)
        multiples = np.median(errors, axis=1) / tolerances
        least, most = PROMISES[method].median
        # far below would be a waste of steps
        assert (multiples > least).all(), multiples
        assert (multiples < most).all(), multiples

    def test_error_is_a_modest_multiple_of_the_tolerance_for_all(self, method):
        tolerances, errors = ladder(method)
        multiples = errors / tolerances[:, None]
        worst = names()[multiples.max(axis=0).argmax()]
        assert multiples.max() < PROMISES[method].worst, (worst, multiples.max())

    def test_error_falls_in_proportion_to_the_tolerance(self, method):
        tolerances, errors = ladder(method)
        slopes = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
        least, most = PROMISES[method].slope
        assert least < np.median(slopes) < most
        assert slopes.min() > PROMISES[method].least_slope, names()[slopes.argmin()]


class TestProblems:
    """The problems are what the literature says."""

    @pytest.mark.parametrize("name", DETEST)
    def test_end_state_is_the_published_one(self, name):
        published = torch.tensor(PUBLISHED_END_STATES[name], dtype=torch.float64)
        reference = DETEST[name].reference[: len(published)]
        assert scaled_error(reference, published) < 1e-11

    @pytest.mark.parametrize("name", DETEST)
    def test_field_serves_batches_single_states_and_both_forms_of_time(self, name):
        problem = DETEST[name]
        y = problem.y0 * torch.tensor([[1.0], [1.1]], dtype=torch.float64) + 0.1
        t = torch.tensor([[0.5], [1.5]], dtype=torch.float64)
        together = problem.f(t, y)
        assert together.shape == y.shape
        assert together.dtype == torch.float64
        for i in range(2):
            alone = problem.f(t[i, 0], y[i])
            torch.testing.assert_close(alone, together[i], rtol=1e-14, atol=1e-14)

    def test_planets_keep_their_energy(self):
        # in the barycentric frame, which the field itself knows nothing of
        mass = torch.tensor([SUN, *PLANETS], dtype=torch.float64)

        def energy(state):
            x, v = (
                torch.cat([torch.zeros(1, 3, dtype=torch.float64), part.view(5, 3)])
                for part in state.split(15)
            )
            v = v - (mass[:, None] * v).sum(0) / mass.sum()
            i, j = torch.triu_indices(6, 6, 1)
            potential = (mass[i] * mass[j] / (x[i] - x[j]).norm(dim=1)).sum()
            return (mass * (v**2).sum(1)).sum() / 2 - GRAVITY * potential

        problem = DETEST["C5"]
        before, after = energy(problem.y0[0]), energy(problem.reference)
        assert after == pytest.approx(before.item(), rel=1e-11)

    def test_arenstorf_orbit_closes(self):
        assert scaled_error(ARENSTORF.reference, ARENSTORF.y0[0]) < 1e-9
        solution = solve_ode(
            ARENSTORF.f,
            ARENSTORF.y0,
            ARENSTORF.t,
            method="dopri8",
            rtol=1e-12,
            atol=1e-12,
        )
        assert scaled_error(solution.y[0, -1], ARENSTORF.y0[0]) < 1e-6

    def test_oscillators_are_independent_rows(self):
        mu = (0.5, 1.0, 5.0)
        problems = [van_der_pol_problem(value) for value in mu]
        y0 = torch.cat([p.y0 for p in problems])
        settings = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10}
        together = solve_ode(van_der_pol, y0, problems[0].t, **settings)
        assert together.y[:, -1, 2].tolist() == list(mu)
        for row, problem in zip(together.y[:, -1], problems, strict=True):
            assert scaled_error(row, problem.reference) < 1e-7
        # E2 is the same equation with mu = 1
        torch.testing.assert_close(
            problems[1].reference[:2], DETEST["E2"].reference, rtol=0, atol=1e-11
        )

    def test_lorenz_reaches_its_end(self):
        solution = solve_ode(LORENZ.f, LORENZ.y0, LORENZ.t, rtol=1e-9, atol=1e-9)
        assert scaled_error(solution.y[0, -1], LORENZ.reference) < 1e-6

    def test_network_is_the_one_of_the_closed_form(self):
        problem = mlp_problem()
        field = MLPField.from_linears(tanh_network())
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        t = torch.tensor(0.0, dtype=torch.float64)
        torch.testing.assert_close(problem.f(t, y), field(t, y))

    def test_robertson_states_are_those_of_an_implicit_solver(self):
        def jacobian(t, y):
            y = torch.from_numpy(y)
            f = ROBERTSON.f
            return torch.autograd.functional.jacobian(lambda y: f(None, y), y).numpy()

        solution = solve_ivp(
            ROBERTSON.numpy_f,
            (0.0, 40.0),
            np.array(ROBERTSON.start),
            method="Radau",
            jac=jacobian,
            rtol=1e-9,
            atol=np.array([1e-12, 1e-18, 1e-12]),
            t_eval=[0.4, 4.0, 40.0],
        )
        expected = np.array([ROBERTSON_STATES[t] for t in (0.4, 4.0, 40.0)]).T
        np.testing.assert_allclose(solution.y, expected, rtol=1e-7)

    def test_robertson_states_lose_no_mass(self):
        # a + b + c = 1; and b is in balance once the fast reaction has settled
        for t, (a, b, c) in ROBERTSON_STATES.items():
            assert a + b + c == pytest.approx(1.0, abs=1e-13), t
            assert 0.04 * a == pytest.approx(1e4 * b * c + 3e7 * b**2, rel=2e-3), t
