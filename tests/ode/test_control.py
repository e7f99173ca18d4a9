"""Step sizes follow the tolerance, and cost what the methods' stages cost."""

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from sknode.ode import SolverWarning, Status, StepController, solve_ode, tape
from sknode.ode.tableaus import METHODS, get_tableau

ADAPTIVE = [m for m in METHODS if get_tableau(m).adaptive]
EVERY_ADAPTIVE = [*ADAPTIVE, "adams"]
# what the lower orders can reach in a few thousand steps
TOLERANCES = {
    "heun": [1e-3, 1e-4, 1e-5, 1e-6],
    "bosh3": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8],
    "dopri5": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9],
    "tsit5": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9],
    "dopri8": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9],
    "adams": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11],
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def decay(t, y):
    return -y


# Problems of Hull, Enright, Fellen & Sedgwick, "Comparing numerical methods for
# ordinary differential equations", SIAM J. Numer. Anal. 9 (1972).
def _a2(t, y):
    return -(y**3) / 2


def _a4(t, y):
    return y / 4 * (1 - y / 20)


def _b1(t, y):
    a, b = y[..., :1], y[..., 1:]
    return torch.cat([2 * (a - a * b), -(b - a * b)], -1)


def _b5(t, y):
    a, b, c = y.split(1, -1)
    return torch.cat([b * c, -a * c, -0.51 * a * b], -1)


def _orbit(t, y):
    x, v = y[..., :2], y[..., 2:]
    return torch.cat([v, -x / (x**2).sum(-1, keepdim=True) ** 1.5], -1)


def _e2(t, y):
    a, b = y[..., :1], y[..., 1:]
    return torch.cat([b, (1 - a**2) * b - a], -1)


def _e5(t, y):
    v = y[..., 1:]
    return torch.cat([v, torch.sqrt(1 + v**2) / (25 - t)], -1)


DETEST = {
    "A2": (_a2, [1.0]),
    "A4": (_a4, [1.0]),
    "B1": (_b1, [1.0, 3.0]),
    "B5": (_b5, [0.0, 1.0, 1.0]),
    "D1": (_orbit, [0.9, 0.0, 0.0, (1.1 / 0.9) ** 0.5]),
    "D3": (_orbit, [0.5, 0.0, 0.0, (1.5 / 0.5) ** 0.5]),
    "E2": (_e2, [2.0, 0.0]),
    "E5": (_e5, [0.0, 0.0]),
}


def endpoint(f, y0, method, tol):
    """Return scipy's solution at 10, and what it cost."""
    result = scipy.integrate.solve_ivp(
        lambda t, y: f(tensor(t), tensor(y)).numpy(),
        (0.0, 10.0),
        y0,
        method=method,
        rtol=tol,
        atol=tol,
    )
    return tensor(result.y[:, -1]), result.nfev


@pytest.mark.parametrize("method", EVERY_ADAPTIVE)
def test_global_error_is_proportional_to_the_tolerance(method, swirl):
    t, errors = swirl.times([0, swirl.length]), []
    for tol in TOLERANCES[method]:
        solution = solve_ode(swirl.f, swirl.y0, t, method=method, rtol=tol, atol=tol)
        error = (solution.y - swirl.exact(t))[:, -1]
        errors.append(error.square().mean().sqrt().item())
    assert (np.diff(errors) < 0).all()
    slope = np.polyfit(np.log(TOLERANCES[method]), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("tol", [1e-5, 1e-6, 1e-7, 1e-8])
def test_standard_problems_cost_less_than_with_scipy_at_equal_error(tol):
    # The method and the error norm are the same. Errors of order five fall with the
    # fifth power of the steps; how much they grow along the solution is the problem's
    # affair, and the same for both.
    costs = []
    for f, y0 in DETEST.values():
        exact = endpoint(f, y0, "DOP853", 1e-13)[0]
        reference, evaluations = endpoint(f, y0, "RK45", tol)
        solution = solve_ode(f, tensor([y0]), [0.0, 10.0], rtol=tol, atol=tol)
        error = (solution.y[0, -1] - exact).norm()
        ratio = (error / (reference - exact).norm()).item()
        cost = solution.stats["n_f_evals"].item() / evaluations
        assert ratio < 4
        costs.append(cost * ratio**0.2)
    assert max(costs) < 1.25
    assert scipy.stats.gmean(costs) < 0.95


def step_ends(f, method="dopri5"):
    """Return where the steps of a recorded solve ended, if its first step was given."""
    every = get_tableau(method).n_stages - 1
    return [t.item() for t in f.times[::every]]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_steps_lead_to_the_end_in_equal_ones(method, recorder):
    # a constant slope: whatever the controller asks for is accepted
    f = recorder(lambda t, y: torch.ones_like(y))
    settings = {"method": method, "first_step": 0.1, "max_step": 0.4}
    solve_ode(f, tensor([[1.0]]), [0.0, 1.0], **settings)
    # not 0.1, 0.4, 0.4, 0.1
    assert step_ends(f, method) == pytest.approx([0.0, 0.1, 0.4, 0.7, 1.0])


def test_first_step_that_is_given_is_not_shortened(recorder):
    f = recorder(decay)
    solve_ode(f, tensor([[1.0]]), [0.0, 1.0], first_step=0.6)
    assert step_ends(f)[1] == pytest.approx(0.6, rel=1e-12)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (1.0, [0.0, 0.3, 0.65, 1.0]),
        # a half of what is left would be too short: as long as possible, then the rest
        (0.8, [0.0, 0.3, 0.7, 0.8]),
    ],
)
def test_steps_are_not_shortened_below_the_least(end, expected, recorder):
    f = recorder(decay)
    settings = {"rtol": 1e-2, "first_step": 0.3, "min_step": 0.3, "max_step": 0.4}
    assert solve_ode(f, tensor([[1.0]]), [0.0, end], **settings).success
    assert step_ends(f) == pytest.approx(expected)


@pytest.mark.parametrize(
    "controller", ["PI", "I", "PID", StepController(0.3, 0.3, 0.1)]
)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_controllers_meet_the_tolerance(method, controller, coupled):
    t = tensor([coupled.t0, coupled.t1])
    solution = solve_ode(
        coupled.f,
        coupled.y0(),
        t,
        method=method,
        rtol=1e-5,
        atol=1e-5,
        controller=controller,
    )
    error = (solution.y[0, -1] - coupled.exact(t[-1])).norm()
    assert solution.success
    assert error < 1e-4 * coupled.exact(t[-1]).norm()


def test_controllers_by_name_are_instances():
    def steps(controller):
        y0 = tensor([[1.0]])
        return solve_ode(
            lambda t, y: -50 * (y - torch.cos(t)), y0, [0.0, 3.0], controller=controller
        ).stats["n_steps"]

    assert steps("PI") == steps(StepController())
    assert steps("I") == steps(StepController(pcoeff=0.0, icoeff=1.0))
    assert steps("PID") == steps(StepController(pcoeff=0.2, icoeff=0.5))
    assert len({steps(name).item() for name in ("PI", "I", "PID")}) == 3


@pytest.mark.parametrize("controller", ["PI", "PID"])
def test_memory_rejects_fewer_steps_where_stability_limits_them(controller):
    def rejected(controller):
        y0 = tensor([[1.0]])
        return solve_ode(
            lambda t, y: -500 * (y - torch.cos(t)),
            y0,
            [0.0, 3.0],
            controller=controller,
        ).stats["n_rejected"]

    assert rejected(controller) < rejected("I")


@pytest.mark.parametrize("controller", ["PD", None, 1.0])
def test_unknown_controller_is_an_error(controller):
    with pytest.raises(ValueError, match="controller must be 'PI', 'I', 'PID'"):
        solve_ode(decay, tensor([[1.0]]), [0.0, 1.0], controller=controller)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"safety": 0.0}, "safety"),
        ({"safety": 1.5}, "safety"),
        ({"safety": float("nan")}, "safety"),
        ({"factor_min": 0.0}, "factor_min"),
        ({"factor_min": 1.0}, "factor_min"),
        ({"factor_max": 1.0}, "factor_max"),
        ({"factor_max": float("nan")}, "factor_max"),
    ],
)
def test_controller_checks_its_parameters(settings, named):
    with pytest.raises(ValueError, match=named):
        StepController(**settings)


class TestControllerFactor:
    def test_integral_control_aims_at_the_tolerance(self):
        ratio, none = np.array([1.0, 32.0, 1 / 32]), np.ones((3, 0))
        factor = StepController(0, 1, safety=0.8).factor(ratio, none, 5)
        np.testing.assert_allclose(factor, [0.8, 0.4, 1.6])

    def test_is_bounded_whatever_the_error(self):
        ratio, none = np.array([np.inf, 1e300, 0.0, 1e-300]), np.ones((4, 0))
        factor = StepController().factor(ratio, none, 5)
        np.testing.assert_allclose(factor, [0.2, 0.2, 10, 10])

    def test_history_enters_by_the_published_formula(self):
        ratio, history = np.array([0.5]), np.array([[0.7, 0.2]])
        p, i, d = 0.3, 0.4, 0.1
        factor = StepController(p, i, d).factor(ratio, history, 5)
        expected = 0.9 * 0.5 ** (-(p + i + d) / 5)
        expected *= 0.7 ** ((p + 2 * d) / 5) * 0.2 ** (-d / 5)
        np.testing.assert_allclose(factor, expected)

    def test_rejected_step_never_grows(self):
        # the history alone would ask for a larger step
        ratio, history = np.array([1.1]), np.array([[1e4]])
        controller = StepController(pcoeff=0.9, icoeff=0.1)
        assert controller.factor(ratio, history, 5) <= 0.9


@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
@pytest.mark.parametrize("length", [1e-9, 1e-3, 1.0, 1e9])
@pytest.mark.parametrize("y0", [0.0, 1.0, 1e8])
def test_first_step_lies_inside_the_interval(length, y0, step_control, recorder):
    # as slow as the interval is long, so that a single step may do
    f = recorder(lambda t, y: -y / length)
    solution = solve_ode(f, tensor([[y0]]), [0.0, length], step_control=step_control)
    times = torch.stack([t.max() for t in f.times])
    assert times.min() >= 0 and times.max() <= length
    assert solution.t_reached.item() == length
    assert solution.y[0, -1, 0] == pytest.approx(y0 * np.exp(-1), rel=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "adams"])
@pytest.mark.parametrize("slope", [0.0, 1e-30, 1e30])
def test_first_step_copes_with_extreme_slopes(slope, method):
    solution = solve_ode(
        lambda t, y: torch.full_like(y, slope),
        tensor([[1.0]]),
        [0.0, 1.0],
        method=method,
    )
    assert solution.success
    assert solution.y[0, -1, 0] == pytest.approx(1.0 + slope)


@pytest.mark.parametrize("method", ["dopri5", "adams"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_of_intervals_may_differ_by_many_orders(dtype, method):
    ends = tensor([1e-9, 1e-3, 1.0, 1e3, 1e9])
    t = torch.stack([torch.zeros(5, dtype=torch.float64), ends], 1)
    rate = (1 / ends).to(dtype)[:, None]
    y0 = torch.ones(5, 1, dtype=dtype)
    solution = solve_ode(lambda t, y: -rate * y, y0, t, rtol=2e-6, method=method)
    expected = torch.full((5, 1), np.exp(-1), dtype=dtype)
    torch.testing.assert_close(solution.y[:, -1], expected, rtol=5e-6, atol=0)
    assert torch.equal(solution.t_reached.double(), ends)


def test_first_step_is_taken_as_given(recorder):
    f = recorder(decay)
    solve_ode(f, tensor([[1.0]]), [0.0, 1.0], first_step=0.01)
    # slope at the start, then the six stages of the first step
    assert f.times[6].item() == pytest.approx(0.01, rel=1e-12)


def test_first_step_beyond_the_end_is_cut(recorder):
    f = recorder(lambda t, y: -1e-3 * y)
    solution = solve_ode(f, tensor([[1.0]]), [0.0, 1.0], first_step=50.0)
    assert max(t.max().item() for t in f.times) == 1.0
    assert solution.stats["n_steps"].item() == 1


# a method that starts at order one has to start with short steps
@pytest.mark.parametrize(("method", "enough"), [("dopri5", 1e-5), ("adams", 1e-7)])
def test_step_below_min_step_fails_readably(method, enough):
    y0 = tensor([[1.0]])
    settings = {"rtol": 1e-9, "atol": 1e-9, "method": method}
    fine = solve_ode(lambda t, y: -100 * y, y0, [0.0, 1.0], min_step=enough, **settings)
    assert fine.success
    with pytest.warns(SolverWarning, match="min_step"):
        solution = solve_ode(
            lambda t, y: -100 * y, y0, [0.0, 1.0], min_step=0.05, **settings
        )
    assert solution.status.tolist() == [Status.STEP_TOO_SMALL]
    assert solution.t_reached.item() < 1


def test_min_step_does_not_keep_the_last_step_from_being_short():
    solution = solve_ode(decay, tensor([[1.0]]), [0.0, 1e-3], min_step=0.1)
    assert solution.success
    assert solution.t_reached.item() == 1e-3


@pytest.mark.parametrize("method", ["dopri5", "adams"])
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
def test_max_steps_is_a_status(step_control, method):
    settings = {"step_control": step_control, "rtol": 1e-8, "atol": 1e-8}
    settings["method"] = method
    needed = solve_ode(decay, tensor([[1.0]]), [0.0, 5.0], **settings)
    n = needed.stats["n_steps"].item()
    exactly = solve_ode(decay, tensor([[1.0]]), [0.0, 5.0], max_steps=n, **settings)
    assert exactly.success
    with pytest.warns(SolverWarning, match="max_steps"):
        short = solve_ode(
            decay, tensor([[1.0]]), [0.0, 5.0], max_steps=n - 1, **settings
        )
    assert short.status.tolist() == [Status.MAX_STEPS]
    assert short.stats["n_steps"].item() == n - 1
    assert 0 < short.t_reached.item() < 5


@pytest.mark.parametrize("n", [1, 3, 10, 100, 1000])
@pytest.mark.parametrize("t0", [0.0, 0.2, -7.0])
def test_constant_steps_that_divide_the_interval_are_that_many(n, t0):
    # rounding in the sum of the steps must not leave a sliver at the end
    solution = solve_ode(
        decay, tensor([[1.0]]), [t0, t0 + 1.0], method="euler", step_size=1.0 / n
    )
    assert solution.stats["n_steps"].item() == n
    assert solution.y[0, -1, 0] == pytest.approx((1 - 1 / n) ** n, rel=1e-12, abs=1e-15)


def test_constant_steps_that_do_not_divide_the_interval_end_on_a_shorter_one(recorder):
    f = recorder(decay)
    solution = solve_ode(f, tensor([[1.0]]), [0.0, 1.0], method="euler", step_size=0.3)
    times = [t.item() for t in f.times]
    assert times == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])
    assert solution.y[0, -1, 0] == pytest.approx(0.7**3 * 0.9)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_methods_without_estimate_ask_for_a_step_size(method):
    with pytest.raises(ValueError, match=f"'{method}'.*step_size"):
        solve_ode(decay, tensor([[1.0]]), [0.0, 1.0], method=method)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rtol": -1.0}, "rtol"),
        ({"atol": float("nan")}, "atol"),
        ({"atol": float("inf")}, "atol"),
        ({"rtol": "tight"}, "rtol"),
        ({"rtol": 0, "atol": 0}, "rtol and atol"),
        ({"min_step": -1.0}, "min_step"),
        ({"first_step": 0.0}, "first_step"),
        ({"first_step": float("inf")}, "first_step"),
        ({"step_size": -0.1}, "step_size"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 10.0}, "max_steps"),
        ({"max_steps": True}, "max_steps"),
        ({"method": "rk45"}, "method"),
        ({"step_control": "global"}, "step_control"),
        ({"gradient": "magic"}, "gradient"),
    ],
)
def test_bad_settings_are_named(settings, error):
    with pytest.raises(ValueError, match=error):
        solve_ode(decay, tensor([[1.0]]), [0.0, 1.0], **settings)


@pytest.mark.parametrize("settings", [{"rtol": 0.0}, {"atol": 0.0}])
def test_one_of_the_tolerances_may_be_zero(settings):
    solution = solve_ode(decay, tensor([[1.0, 2.0]]), [0.0, 1.0], **settings)
    expected = tensor([[1.0, 2.0]]) * np.exp(-1)
    torch.testing.assert_close(solution.y[:, -1], expected, rtol=1e-5, atol=0)


def test_component_that_stays_zero_needs_no_absolute_tolerance():
    # 0 / 0 is no error
    y0 = tensor([[0.0, 1.0]])
    solution = solve_ode(decay, y0, [0.0, 1.0], atol=0.0)
    torch.testing.assert_close(solution.y[0, -1], tensor([0.0, np.exp(-1)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defaults_suit_both_precisions(dtype):
    # no warning
    solution = solve_ode(decay, torch.ones(1, 1, dtype=dtype), [0.0, 1.0])
    assert solution.y[0, -1, 0] == pytest.approx(np.exp(-1), rel=1e-5)


def test_tolerance_beyond_the_precision_is_raised_with_a_warning():
    y0 = torch.ones(1, 1)
    with pytest.warns(SolverWarning, match="rtol=1e-12"):
        solution = solve_ode(decay, y0, [0.0, 1.0], rtol=1e-12, atol=1e-12)
    assert solution.y[0, -1, 0] == pytest.approx(np.exp(-1), rel=1e-5)


class TestCounts:
    """Evaluations: the first slope, one for the first step, and the stages."""

    @pytest.fixture(params=["per_sample", "shared"])
    def step_control(self, request):
        return request.param

    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_adaptive_steps(
        self, method, requires_grad, step_control, coupled, recorder
    ):
        f = recorder(coupled.f)
        y0 = coupled.y0().requires_grad_(requires_grad)
        t = [coupled.t0, coupled.t1]
        solution = solve_ode(
            f, y0, t, method=method, step_control=step_control, rtol=1e-4, atol=1e-4
        )
        steps = solution.stats["n_steps"].item()
        stages = {"heun": 2, "bosh3": 3, "dopri5": 6, "tsit5": 6, "dopri8": 12}
        assert f.calls == 1 + 1 + stages[method] * steps
        assert solution.stats["n_f_evals"].item() == f.calls
        assert solution.stats["n_f_evals"].dtype == torch.int64

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_given_first_step_saves_an_evaluation(
        self, method, step_control, coupled, recorder
    ):
        f = recorder(coupled.f)
        solution = solve_ode(
            f,
            coupled.y0(),
            [coupled.t0, coupled.t1],
            method=method,
            step_control=step_control,
            first_step=0.3,
        )
        per_step = get_tableau(method).n_stages - 1
        assert solution.stats["n_rejected"].item() > 0
        assert f.calls == 1 + per_step * solution.stats["n_steps"].item()
        assert solution.stats["n_f_evals"].item() == f.calls

    @pytest.mark.parametrize("method", METHODS)
    def test_constant_steps(self, method, step_control, coupled, recorder):
        f = recorder(coupled.f)
        solution = solve_ode(
            f,
            coupled.y0(),
            [coupled.t0, coupled.t1],
            method=method,
            step_control=step_control,
            step_size=0.3,
        )
        stages = {
            **{"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4},
            **{"bosh3": 3, "dopri5": 6, "tsit5": 6, "dopri8": 12},
        }
        assert solution.stats["n_steps"].item() == 4
        assert solution.stats["n_rejected"].item() == 0
        assert f.calls == 1 + 4 * stages[method]
        assert solution.stats["n_f_evals"].item() == f.calls

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_outputs_cost_nothing_but_the_extra_stages_of_dopri8(
        self, method, step_control, coupled, recorder
    ):
        inside = torch.linspace(coupled.t0, coupled.t1, 30, dtype=torch.float64)
        plain, f = recorder(coupled.f), recorder(coupled.f)
        settings = {"method": method, "step_control": step_control, "rtol": 1e-4}
        without = solve_ode(plain, coupled.y0(), inside[[0, -1]], **settings)
        solution = solve_ode(f, coupled.y0(), inside, **settings)
        # 30 times fall into every step
        extra = 3 if method == "dopri8" else 0
        accepted = without.stats["n_accepted"].item()
        assert f.calls == plain.calls + extra * accepted
        assert solution.stats["n_f_evals"].item() == f.calls

    def test_reverse_costs_the_stages_of_accepted_steps(
        self, step_control, coupled, recorder, monkeypatch
    ):
        monkeypatch.setattr(tape, "TAPE_BYTES", 0)  # keeps nothing else
        f = recorder(coupled.f)
        y0 = coupled.y0().requires_grad_()
        solution = solve_ode(
            f,
            y0,
            [coupled.t0, coupled.t1],
            step_control=step_control,
            first_step=0.5,
        )
        forward = f.calls
        solution.y[:, -1].sum().backward()
        assert solution.stats["n_rejected"].item() > 0
        assert f.calls - forward == 6 * solution.stats["n_accepted"].item()

    def test_steps_are_accepted_or_rejected(self, coupled):
        solution = solve_ode(
            coupled.f, coupled.y0(), [coupled.t0, coupled.t1], first_step=0.5
        )
        stats = solution.stats
        assert set(stats) == {"n_steps", "n_accepted", "n_rejected", "n_f_evals"}
        assert (stats["n_steps"] == stats["n_accepted"] + stats["n_rejected"]).all()

    @pytest.mark.parametrize("method", EVERY_ADAPTIVE)
    def test_every_sample_counts_its_own(self, method, riccati):
        y0 = tensor([[1e-3], [1.0], [100.0], [0.0]])
        together = solve_ode(riccati(), y0, [0.0, 2.0], method=method).stats
        for i in range(4):
            alone = solve_ode(riccati(), y0[i : i + 1], [0.0, 2.0], method=method)
            alone = alone.stats
            for name in together:
                assert together[name][i] == alone[name][0], name

    def test_shared_control_counts_the_same_for_all(self, riccati):
        y0 = tensor([[1e-3], [1.0], [100.0]])
        stats = solve_ode(riccati(), y0, [0.0, 2.0], step_control="shared").stats
        for name, values in stats.items():
            assert values.shape == (3,), name
            assert (values == values[0]).all(), name
