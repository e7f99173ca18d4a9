"""scipy's solvers behind `solve_ode`: the numbers are scipy's, the rest is ours."""

import numpy as np
import pytest
import scipy.integrate
import torch

from sknode.ode import SolverWarning, Status, StepController, solve_ode
from sknode.ode.methods import get_method
from sknode.ode.scipy_solvers import SCIPY_METHODS

COMPLEX = ["scipy_rk45", "scipy_rk23", "scipy_dop853", "scipy_bdf"]
every_method = pytest.mark.parametrize("method", SCIPY_METHODS)

T = torch.tensor([0.0, 0.3, 1.1, 2.0], dtype=torch.float64)
TIMES = {
    "forwards": T,
    "backwards": torch.tensor([0.3, 0.2, 0.15, 0.1], dtype=torch.float64),
    "rows": T * torch.tensor([[1.0], [0.4], [-0.2], [0.0]], dtype=torch.float64),
    "two": T[[0, -1]],
    "one": T[:1],
    "repeated": T[[0, 0, 1, 1, 3, 3]],
}


def oscillator(t, y):
    """Driven Van der Pol."""
    x, v = y.unbind(-1)
    t = t.reshape(t.shape[: x.ndim]) if t.ndim else t
    return torch.stack([v, 2 * (1 - x * x) * v - x + torch.sin(t)], -1)


def oscillator_jacobian(t, y):
    return np.array([[0, 1], [-4 * y[0] * y[1] - 1, 2 * (1 - y[0] ** 2)]])


def by_scipy(method, y0, times, **settings):
    """Solve one sample by `scipy.integrate.solve_ivp`."""
    if method in ("scipy_radau", "scipy_bdf", "scipy_lsoda"):
        settings["jac"] = oscillator_jacobian

    def f(t, y):
        slope = oscillator(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y))
        return slope.numpy()

    ends = (times[0].item(), times[-1].item())
    return scipy.integrate.solve_ivp(f, ends, y0, SCIPY_METHODS[method], **settings)


@pytest.fixture
def y0(random):
    return random(4, 2)


@every_method
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("row_wise", [False, True])
def test_every_sample_is_a_problem_of_its_own(method, times, row_wise, y0):
    t = TIMES[times]
    solution = solve_ode(oscillator, y0, t, method=method, row_wise=row_wise)
    assert solution.success
    assert solution.y.shape == (4, t.shape[-1], 2)
    for i in range(4):
        row = t[i] if t.ndim == 2 else t
        if row[0] == row[-1]:
            assert torch.equal(solution.y[i], y0[i].expand(len(row), -1))
            assert solution.stats["n_steps"][i] == solution.stats["n_f_evals"][i] == 0
            continue
        unique, back = np.unique(row, return_inverse=True)
        unique = unique if row[-1] > row[0] else unique[::-1]
        back = back if row[-1] > row[0] else len(unique) - 1 - back
        expected = by_scipy(method, y0[i], row, rtol=1e-6, atol=1e-6, t_eval=unique)
        torch.testing.assert_close(
            solution.y[i], torch.from_numpy(expected.y.T[back]), rtol=1e-9, atol=1e-11
        )
        assert solution.t_reached[i] == row[-1]
        # outputs at the ends need no evaluation here
        spare = 6 if method == "scipy_dop853" else 0
        count = solution.stats["n_f_evals"][i].item()
        assert expected.nfev - spare <= count <= expected.nfev


@every_method
def test_steps_are_counted(method, y0):
    solution = solve_ode(oscillator, y0, T, method=method)
    for i in range(4):
        expected = by_scipy(method, y0[i], T, rtol=1e-6, atol=1e-6)
        assert solution.stats["n_steps"][i] == len(expected.t) - 1
        assert solution.stats["n_accepted"][i] == len(expected.t) - 1
    assert not solution.stats["n_rejected"].any()


@every_method
def test_shared_control_is_one_system(method, y0):
    def coupled(t, y):
        assert t.ndim == 0
        return torch.sin(t) - 3 * y + y.roll(1, 0) * y.flip(1)

    def flat(t, y):
        return (
            coupled(torch.tensor(t), torch.from_numpy(y).view(4, 2)).flatten().numpy()
        )

    solution = solve_ode(
        coupled, y0, T, method=method, step_control="shared", rtol=1e-5
    )
    assert solution.y.shape == (4, 4, 2)
    start = y0.flatten().numpy()
    exact = scipy.integrate.solve_ivp(
        flat, (0, 2), start, "DOP853", t_eval=T, rtol=1e-10, atol=1e-10
    ).y
    exact = torch.from_numpy(exact.T.reshape(4, 4, 2)).transpose(0, 1)
    torch.testing.assert_close(solution.y, exact, rtol=1e-3, atol=1e-4)
    assert len(set(solution.stats["n_f_evals"].tolist())) == 1


@every_method
def test_a_function_may_hold_a_value_for_every_sample(method, y0):
    rate = torch.arange(4, dtype=torch.float64)[:, None]
    y = solve_ode(lambda t, y: -rate * y, y0, [0.0, 1.0], method=method).y
    torch.testing.assert_close(y[:, -1], y0 * torch.exp(-rate), rtol=1e-3, atol=1e-4)


@every_method
def test_a_closed_form_is_used(method, make_mlp, y0):
    field = make_mlp(2, (8,), time_dependent=True)
    with torch.no_grad():
        one = solve_ode(field, y0, T, method=method)
        two = solve_ode(lambda t, y: field(t, y), y0, T, method=method)
    torch.testing.assert_close(one.y, two.y, rtol=1e-8, atol=1e-9)


@every_method
def test_single_precision_is_cast(method, y0):
    def f(t, y):
        assert t.dtype == y.dtype == torch.float32
        return oscillator(t, y)

    y = solve_ode(f, y0.float(), T, method=method, rtol=1e-4, atol=1e-4).y
    exact = solve_ode(oscillator, y0, T, method="dopri8", rtol=1e-9, atol=1e-9).y
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("method", COMPLEX)
def test_complex_states(method, random):
    y0, rate = torch.complex(random(3, 1), random(3, 1, seed=1)), -0.2 + 3j
    y = solve_ode(lambda t, y: rate * y, y0, T, method=method).y
    exact = y0[:, None] * torch.exp(rate * T)[:, None]
    torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["scipy_radau", "scipy_lsoda"])
def test_complex_states_are_refused_where_scipy_cannot(method):
    y0 = torch.ones(2, 1, dtype=torch.complex128)
    with pytest.raises(TypeError, match=f"{method}.*y0 must be real"):
        solve_ode(lambda t, y: 1j * y, y0, T, method=method)


@every_method
def test_a_sample_that_blows_up_leaves_the_others_alone(method):
    y0 = torch.tensor([[0.5], [1.25], [torch.nan], [-1.0]], dtype=torch.float64)
    with pytest.warns(SolverWarning, match="of 4 samples"):
        solution = solve_ode(lambda t, y: y**2, y0, [0.0, 0.5, 1.0], method=method)
    assert solution.status.tolist() == [
        Status.SUCCESS,
        Status.STEP_TOO_SMALL,
        Status.NON_FINITE,
        Status.SUCCESS,
    ]
    assert 0.79 < solution.t_reached[1] < 0.81
    assert solution.y[1, 1, 0] == pytest.approx(1.25 / (1 - 1.25 * 0.5), rel=1e-3)
    assert torch.isfinite(solution.y[1]).all()
    torch.testing.assert_close(
        solution.y[::3, -1], y0[::3] / (1 - y0[::3]), rtol=1e-3, atol=1e-4
    )


@every_method
def test_a_slope_that_stops_being_finite_is_reported(method, y0):
    def f(t, y):
        return torch.where(t > 0.5, torch.nan, -y)

    with pytest.warns(SolverWarning, match="not finite"):
        solution = solve_ode(f, y0, [0.0, 1.0], method=method)
    assert (solution.status == Status.NON_FINITE).all()
    assert ((solution.t_reached > 0.4) & (solution.t_reached <= 0.5)).all()
    torch.testing.assert_close(
        solution.y[:, -1],
        y0 * torch.exp(-solution.t_reached)[:, None],
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("method", ["scipy_radau", "scipy_bdf"])
def test_an_infinite_jacobian_is_reported(method):
    y0 = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    with pytest.warns(SolverWarning, match=r"1 of 2 samples \(0\).*not finite"):
        solution = solve_ode(lambda t, y: y.sqrt(), y0, [0.0, 1.0], method=method)
    assert solution.y[1, -1, 0] == pytest.approx(2.25, rel=1e-3)


@every_method
def test_limits(method, y0):
    with pytest.warns(SolverWarning, match="max_steps"):
        solution = solve_ode(oscillator, y0, [0.0, 90.0], method=method, max_steps=7)
    assert (solution.stats["n_steps"] == 7).all()
    assert (solution.t_reached < 90).all()
    limited = solve_ode(lambda t, y: 0 * y, y0, [0.0, 1.0], method=method, max_step=0.1)
    assert (limited.stats["n_steps"] >= 10).all()
    with pytest.warns(SolverWarning, match="min_step"):
        solve_ode(oscillator, y0, [0.0, 9.0], method=method, rtol=1e-9, min_step=0.1)
    first = solve_ode(lambda t, y: 0 * y, y0, [0.0, 1.0], method=method, first_step=5.0)
    assert first.success


@every_method
def test_tolerances_of_every_component(method, y0):
    tol = torch.tensor([1e-6, 1e-5], dtype=torch.float64)
    settings = {"rtol": tol, "atol": tol}
    if method in ("scipy_radau", "scipy_bdf"):
        with pytest.raises(ValueError, match="rtol for every component"):
            solve_ode(oscillator, y0, T, method=method, **settings)
        settings["rtol"] = 1e-6
    y = solve_ode(oscillator, y0, T, method=method, **settings).y
    settings = {k: np.asarray(v) for k, v in settings.items()}
    expected = by_scipy(method, y0[0], T, **settings).y[:, -1]
    torch.testing.assert_close(
        y[0, -1], torch.from_numpy(expected), rtol=1e-9, atol=1e-11
    )


@every_method
def test_tolerances_that_scipy_would_stumble_over(method, y0):
    # it would warn of the first and divide by the second
    solve_ode(oscillator, y0, [0.0, 0.1], method=method, rtol=1e-14)
    still = solve_ode(lambda t, y: 0 * y, 0 * y0, [0.0, 1.0], method=method, atol=0.0)
    assert still.success


@every_method
def test_a_discrete_gradient_is_refused_where_one_is_needed(method, y0):
    def f(t, y):
        return -y

    leaf = y0.clone().requires_grad_()
    for gradient in ("discrete", "backprop"):
        with pytest.raises(ValueError, match=f"{method}.*gradient='continuous'"):
            solve_ode(f, leaf, T, method=method, gradient=gradient)
    with torch.no_grad():
        assert solve_ode(f, leaf, T, method=method).success
    assert get_method(method).gradients == ("continuous",)


@every_method
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"step_size": 0.1}, "step_size must be None"),
        ({"controller": "PID"}, "controller"),
        ({"controller": StepController(safety=0.5)}, "controller"),
    ],
)
def test_what_scipy_does_not_have_is_refused(method, setting, message, y0):
    with pytest.raises(ValueError, match=message):
        solve_ode(oscillator, y0, T, method=method, **setting)


@every_method
def test_errors_of_f_come_through(method, y0):
    def f(t, y):
        if (t > 0.2).any():
            raise ZeroDivisionError("mine")
        return -y

    with pytest.raises(ZeroDivisionError, match="mine"):
        solve_ode(f, y0, T, method=method)


@every_method
def test_interpolation(method, y0):
    solution = solve_ode(oscillator, y0, T, method=method)
    inner = torch.tensor([0.2, 0.9], dtype=torch.float64)
    expected = by_scipy(method, y0[0], T, rtol=1e-6, atol=1e-6, t_eval=inner.numpy())
    got = solution.interpolate(inner)[0]
    torch.testing.assert_close(
        got, torch.from_numpy(expected.y.T.copy()), rtol=1e-9, atol=1e-11
    )
