"""Rosenbrock methods: coefficients, stiff problems, fates of lanes, gradients."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch
from test_order import error_inside_steps, error_of_steps, slope
from test_tableaus import THETAS, dense_weights, density, rooted_trees

from sknode.fields import MLPField
from sknode.ode import SolverWarning, Status, solve_ode
from sknode.ode.rodas import RODAS5P

METHOD = {"method": "rodas5p"}
T = torch.tensor([0.0, 0.3, 1.1, 2.0], dtype=torch.float64)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def exact(coefficients):
    """Return float64 coefficients as fractions."""
    return np.vectorize(Fraction, otypes=[object])(coefficients)


def inverse_of_lower_triangle(matrix):
    """Return the inverse, by forward substitution."""
    inverse = exact(np.eye(len(matrix)))
    for i, row in enumerate(matrix):
        inverse[i] = (inverse[i] - row[:i] @ inverse[:i]) / row[i]
    return inverse


class TestCoefficients:
    """In the literature's form: alpha, gamma_ij, b.

    The change of form is made with fractions: in float64 its rounding, which differs
    from one BLAS to the next, is as large as what the conditions leave.
    """

    fractions = inverse_of_lower_triangle(
        exact(np.eye(8)) / Fraction(RODAS5P.gamma) - exact(RODAS5P.C)
    )
    gamma = fractions.astype(float)
    alpha = (exact(RODAS5P.a) @ fractions).astype(float)
    beta = alpha + gamma
    b = (exact(RODAS5P.b) @ fractions).astype(float)
    embedded = (exact(RODAS5P.b - RODAS5P.error) @ fractions).astype(float)

    def elementary(self, tree):
        """Return what each stage contributes to a tree's elementary weight.

        Hairer & Wanner II, section IV.7: where a vertex has a single branch, its slope
        is seen through the Jacobian too.
        """
        matrix = self.beta if len(tree) == 1 else self.alpha
        weights = np.ones(8)
        for branch in tree:
            weights = weights * (matrix @ self.elementary(branch))
        return weights

    def residuals(self, b, order, theta=1.0):
        return [
            b @ self.elementary(tree) - theta**order / density(tree)
            for tree in rooted_trees(order)
        ]

    def test_stages_come_one_after_the_other(self):
        assert not np.triu(RODAS5P.a).any()
        assert not np.triu(RODAS5P.C).any()
        np.testing.assert_allclose(np.diag(self.gamma), RODAS5P.gamma, atol=1e-15)

    def test_nodes_are_row_sums(self):
        np.testing.assert_allclose(self.alpha.sum(1), RODAS5P.c, atol=1e-14)
        np.testing.assert_allclose(self.gamma.sum(1), RODAS5P.d, atol=1e-14)

    @pytest.mark.parametrize("order", range(1, 6))
    def test_order_conditions(self, order):
        np.testing.assert_allclose(self.residuals(self.b, order), 0, atol=1e-14)

    def test_order_is_not_higher(self):
        assert np.abs(self.residuals(self.b, 6)).max() > 1e-3
        assert np.abs(self.residuals(self.embedded, 5)).max() > 1e-3

    @pytest.mark.parametrize("order", range(1, 5))
    def test_order_conditions_of_embedded_method_and_dense_output(self, order):
        np.testing.assert_allclose(self.residuals(self.embedded, order), 0, atol=1e-14)
        for theta, weights in zip(THETAS, dense_weights(RODAS5P, THETAS), strict=True):
            got = self.residuals(weights @ self.gamma, order, theta)
            np.testing.assert_allclose(got, 0, atol=5e-14)

    def test_stiffly_accurate_and_l_stable(self):
        np.testing.assert_allclose(self.b, self.beta[-1], atol=1e-14)
        ones = np.ones(8)
        for b in (self.b, self.embedded):
            assert 1 - b @ np.linalg.solve(self.beta, ones) == pytest.approx(
                0, abs=1e-12
            )
            for y in np.logspace(-3, 5, 500):
                z = 1j * y
                stages = np.linalg.solve(np.eye(8) - z * self.beta, ones)
                assert abs(1 + z * b @ stages) <= 1 + 1e-12


class TestOrder:
    counts = (40, 60, 90, 135)

    def test_steps(self, swirl):
        errors = [error_of_steps(swirl, swirl.f, "rodas5p", n) for n in self.counts]
        assert -slope(self.counts, errors) == pytest.approx(5, abs=0.15)

    def test_inside_of_steps(self, swirl):
        errors = [error_inside_steps(swirl, swirl.f, "rodas5p", n) for n in self.counts]
        assert -slope(self.counts, errors) == pytest.approx(
            RODAS5P.dense_order, abs=0.15
        )

    @pytest.mark.parametrize("rate", [1e4, 1e6, 1e8])
    def test_stiff_order(self, rate):
        # Prothero & Robinson: the order falls to 3, the error with the stiffness
        def exact(t):
            return torch.sin(t) + torch.cos(2 * t)

        def f(t, y):
            return -rate * (y - exact(t)) + torch.cos(t) - 2 * torch.sin(2 * t)

        t, counts, errors = double(0.0, 2.0), (10, 20, 40), []
        for n in counts:
            y = solve_ode(f, exact(t[:1])[None], t, step_size=2 / n, **METHOD).y
            errors.append((y[0, -1, 0] - exact(t[1])).abs().item())
        assert -slope(counts, errors) == pytest.approx(3.1, abs=0.2)
        assert errors[0] < 1e-3 / rate


def robertson(t, y):
    a, b, c = y.unbind(-1)
    first, last = -0.04 * a + 1e4 * b * c, 3e7 * b * b
    return torch.stack([first, -first - last, last], -1)


def van_der_pol(t, y):
    """With the stiffness as a third component that stays."""
    x, v, mu = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x, 0 * mu], -1)


def reference(f, y0, t_end, **settings):
    def numpy_f(t, y):
        return f(t, torch.from_numpy(y)).numpy()

    return scipy.integrate.solve_ivp(numpy_f, (0, t_end), y0, "Radau", **settings)


class TestStiffProblems:
    @pytest.mark.parametrize(
        ("f", "y0", "t_end", "atol"),
        [
            (robertson, [1.0, 0.0, 0.0], 1e5, 1e-10),
            (robertson, [1.0, 0.0, 0.0], 1e11, 1e-10),
            (van_der_pol, [2.0, 0.0, 1000.0], 2000.0, 1e-6),
        ],
    )
    def test_meets_the_tolerance_in_few_steps(self, f, y0, t_end, atol):
        exact = reference(f, y0, t_end, rtol=1e-10, atol=1e-4 * atol).y[:, -1]
        exact = torch.from_numpy(exact)
        radau = reference(f, y0, t_end, rtol=1e-6, atol=atol)
        t = double(0.0, t_end)
        solution = solve_ode(f, double(y0), t, rtol=1e-6, atol=atol, **METHOD)
        error = (solution.y[0, -1] - exact).abs() / (atol + 1e-6 * exact.abs())
        assert error.max() < 2
        assert solution.stats["n_steps"].item() < 1.2 * (len(radau.t) - 1)

    def test_error_is_proportional_to_the_tolerance(self):
        y0, t = double([2.0, 0.0, 30.0]), double(0.0, 30.0)
        exact = reference(van_der_pol, y0[0], 30.0, rtol=1e-11, atol=1e-12)
        exact, errors = torch.from_numpy(exact.y[:, -1]), []
        tolerances = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
        for tol in tolerances:
            y = solve_ode(van_der_pol, y0, t, rtol=tol, atol=tol, **METHOD).y
            errors.append((y[0, -1] - exact).abs().max().item())
        assert slope(tolerances, errors) == pytest.approx(1, abs=0.15)

    def test_errors_fade_on_a_slow_manifold(self):
        exact = reference(robertson, [1.0, 0.0, 0.0], 1e4, rtol=1e-11, atol=1e-15)
        exact = torch.from_numpy(exact.y[:, -1])
        for tol in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
            y0, t = double([1.0, 0.0, 0.0]), double(0.0, 1e4)
            y = solve_ode(robertson, y0, t, rtol=tol, atol=1e-4 * tol, **METHOD).y
            assert (y[0, -1] - exact).abs().max() < 0.2 * tol

    def test_every_sample_pays_for_its_own_stiffness(self):
        mu = double([1.0], [10.0], [100.0], [1000.0])
        y0 = torch.cat([torch.full_like(mu, 2), torch.zeros_like(mu), mu], 1)
        t = double(0.0, 15.0, 30.0)
        solution = solve_ode(van_der_pol, y0, t, **METHOD)
        assert solution.success
        steps = solution.stats["n_steps"]
        # the stiffest has not left its slow manifold
        assert steps[0] > 4 * steps[3]
        for i in range(4):
            alone = solve_ode(van_der_pol, y0[i : i + 1], t, **METHOD)
            assert alone.stats["n_steps"] == steps[i]
            exact = reference(
                van_der_pol, y0[i], 30.0, rtol=1e-8, atol=1e-8, t_eval=t
            ).y.T
            torch.testing.assert_close(
                solution.y[i], torch.from_numpy(exact), rtol=1e-4, atol=1e-4
            )

    def test_an_explicit_method_needs_far_more(self):
        y0, t = double([2.0, 0.0, 1000.0]), double(0.0, 10.0)
        implicit = solve_ode(van_der_pol, y0, t, **METHOD)
        explicit = solve_ode(van_der_pol, y0, t, max_steps=100_000)
        few, many = (s.stats["n_f_evals"].item() for s in (implicit, explicit))
        assert 50 * few < many

    @pytest.mark.parametrize("step_control", ["per_sample", "shared"])
    def test_single_precision(self, step_control):
        y0 = torch.tensor([[2.0, 0.0, 100.0], [1.0, 0.0, 1.0]])
        settings = {**METHOD, "step_control": step_control}
        y = solve_ode(van_der_pol, y0, [0.0, 10.0], rtol=1e-4, atol=1e-4, **settings).y
        exact = solve_ode(
            van_der_pol, y0.double(), [0.0, 10.0], rtol=1e-9, atol=1e-9, **settings
        ).y
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)


def coupled_rows(t, y):
    """Rows that see each other, nonlinear."""
    return -50 * (y - torch.sin(t)) + y.roll(1, 0) * y.flip(1)


class TestLanes:
    def test_a_sample_has_the_same_bits_in_whatever_batch(self, random):
        # a multiple of the vector width, which products and sums are blocked by
        y0 = torch.cat([random(40, 2), random(40, 1, seed=1).abs() * 30], 1)
        whole = solve_ode(van_der_pol, y0, T, **METHOD)
        for n in (1, 3, 17):
            part = solve_ode(van_der_pol, y0[:n], T, **METHOD)
            assert torch.equal(part.y, whole.y[:n])
            assert torch.equal(part.stats["n_steps"], whole.stats["n_steps"][:n])

    def test_an_mlp_has_the_same_bits_in_whatever_batch(self, make_mlp, random):
        field, y0 = make_mlp(4, (16, 32), time_dependent=True), random(300, 4)
        with torch.no_grad():
            whole = solve_ode(field, y0, T, **METHOD).y
            for n in (1, 3, 16, 17, 100):
                assert torch.equal(solve_ode(field, y0[:n], T, **METHOD).y, whole[:n])

    def test_rows_leave_where_they_may(self, random):
        ends = 6 * torch.linspace(0.1, 1, 400, dtype=torch.float64) ** 4
        t, sizes = double(0.0, 0.4, 1.0) * ends[:, None], []

        def f(t, y):
            sizes.append(len(y))
            return 50 * (torch.sin(3 * t) - y**3)

        y0 = random(400, 2)
        whole, computed = solve_ode(f, y0, t, **METHOD), sum(sizes)
        sizes.clear()
        parts = solve_ode(f, y0, t, row_wise=True, **METHOD)
        assert sum(sizes) < 0.7 * computed
        torch.testing.assert_close(parts.y, whole.y, rtol=1e-12, atol=1e-12)

    def test_shared_control_solves_one_system(self, random):
        y0 = random(3, 2)
        shared = solve_ode(coupled_rows, y0, T, step_control="shared", **METHOD)
        tight = solve_ode(
            coupled_rows, y0, T, step_control="shared", rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(shared.y, tight.y, rtol=1e-5, atol=1e-5)
        assert len(set(shared.stats["n_steps"].tolist())) == 1

    def test_an_mlp_under_shared_control(self, make_mlp, random):
        field, y0 = make_mlp(3, (8,), time_dependent=True), random(4, 3)
        settings = {**METHOD, "step_control": "shared"}
        with torch.no_grad():
            one = solve_ode(field, y0, T, **settings)
            two = solve_ode(lambda t, y: field(t, y), y0, T, **settings)
        torch.testing.assert_close(one.y, two.y, rtol=1e-12, atol=1e-12)

    def test_states_of_any_shape(self, random):
        y0 = random(5, 2, 3)
        flat = solve_ode(lambda t, y: torch.sin(t) - 50 * y**3, y0.flatten(1), T)
        shaped = solve_ode(lambda t, y: torch.sin(t) - 50 * y**3, y0, T, **METHOD)
        assert shaped.y.shape == (5, 4, 2, 3)
        torch.testing.assert_close(shaped.y.flatten(2), flat.y, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, -1.0), (1e6, 1e6 + 1e-3)])
    def test_f_stays_inside_the_interval(self, ends, random):
        low, high = min(ends), max(ends)

        def f(t, y):
            assert (t >= low).all()
            assert (t <= high).all()
            return torch.sin(t) * y - torch.sin(2 * y)

        t = double(ends[0], (ends[0] + ends[1]) / 2, ends[1])
        y0 = random(6, 2).requires_grad_()
        solution = solve_ode(f, y0, t, **METHOD)
        solution.y.sum().backward()
        assert (solution.t_reached == ends[1]).all()

    def test_an_interval_without_length_changes_nothing(self, random):
        y0 = random(3, 2)
        t = double([0.0, 0.0], [0.0, 1.0], [2.0, 2.0])
        solution = solve_ode(coupled_rows, y0, t, **METHOD)
        assert torch.equal(solution.y[[0, 2], -1], y0[[0, 2]])
        assert solution.stats["n_steps"].tolist()[::2] == [0, 0]

    def test_a_singular_matrix_is_a_rejection(self):
        # 1 / gamma - h is zero in the first step of the first sample
        first = 1 / RODAS5P.gamma
        y0, t = double([1.0], [0.5]), double(0.0, 5.0)
        solution = solve_ode(
            lambda t, y: y, y0, t, first_step=first, rtol=1e-8, **METHOD
        )
        assert solution.success
        assert (solution.stats["n_rejected"] > 0).all()
        exact = y0 * np.exp(5.0)
        torch.testing.assert_close(solution.y[:, -1], exact, rtol=1e-5, atol=0)
        with pytest.warns(SolverWarning, match="not finite"):
            solution = solve_ode(lambda t, y: y, y0, t, step_size=first, **METHOD)
        assert (solution.status == Status.NON_FINITE).all()

    def test_an_infinite_jacobian_ends_one_sample_only(self, random):
        y0 = random(5, 1).abs() + 0.1
        bad = y0.clone()
        bad[2] = 0.0
        t = double(0.0, 0.5, 1.0)
        good = solve_ode(lambda t, y: y.sqrt(), y0, t, **METHOD)
        with pytest.warns(SolverWarning, match=r"1 of 5 samples \(2\)"):
            solution = solve_ode(lambda t, y: y.sqrt(), bad, t, **METHOD)
        others = torch.arange(5) != 2
        assert solution.status[2] == Status.NON_FINITE
        assert torch.equal(solution.y[others], good.y[others])

    def test_a_sample_that_blows_up_is_reported(self):
        y0, t = double([0.5], [1.25]), double(0.0, 0.5, 1.0)
        with pytest.warns(SolverWarning, match=r"1 of 2 samples \(1\)"):
            solution = solve_ode(lambda t, y: y**2, y0, t, **METHOD)
        assert 0.79 < solution.t_reached[1] < 0.81
        assert solution.y[0, -1, 0] == pytest.approx(1.0, rel=1e-5)

    def test_the_jacobian_is_kept_while_steps_are_rejected(self, recorder):
        f = recorder(van_der_pol)
        y0, t = double([2.0, 0.0, 50.0]), double(0.0, 100.0)
        with torch.no_grad():
            stats = solve_ode(f, y0, t, **METHOD).stats
        steps, accepted = (stats[k].item() for k in ("n_steps", "n_accepted"))
        assert steps > accepted
        assert stats["n_f_evals"].item() == 2 + 8 * steps
        assert f.calls == 2 + 8 * steps + accepted

    def test_complex_states_are_refused(self):
        y0 = torch.ones(2, 1, dtype=torch.complex128)
        with pytest.raises(TypeError, match=r"rodas5p.*y0 must be real"):
            solve_ode(lambda t, y: 1j * y, y0, T, **METHOD)


TIMES = {
    "forwards": double(0.0, 0.4, 0.5, 1.3),
    "backwards": double(1.3, 0.6, 0.5, -0.2),
    "rows": torch.linspace(0, 1, 4, dtype=torch.float64)
    * double([1.0], [1.3], [-0.7], [0.2]),
}


class TestGradients:
    @pytest.fixture
    def w(self, random):
        return random(2, 2, seed=3).requires_grad_()

    @staticmethod
    def make_field(w):
        return lambda t, y: torch.tanh(y @ w) * torch.sin(3 * t) + torch.cos(t) * y

    @staticmethod
    def gradients(f, parameters, y0, t, **settings):
        y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_()
        y = solve_ode(f, y0, t, **METHOD, **settings).y
        weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
        return [y, *torch.autograd.grad((weights * y).sum(), (y0, t, *parameters))]

    @pytest.mark.parametrize("settings", [{}, {"step_size": 0.3}])
    @pytest.mark.parametrize("step_control", ["per_sample", "shared"])
    @pytest.mark.parametrize("times", TIMES)
    def test_equals_backpropagation_through_the_same_steps(
        self, settings, step_control, times, w, random
    ):
        times = "forwards" if step_control == "shared" and times == "rows" else times
        one, two = (
            self.gradients(
                self.make_field(w),
                [w],
                random(4, 2, seed=2),
                TIMES[times],
                step_control=step_control,
                gradient=gradient,
                **settings,
            )
            for gradient in ("discrete", "backprop")
        )
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("settings", [{"step_size": 0.3}, {"rtol": 1e-9}])
    @pytest.mark.parametrize("step_control", ["per_sample", "shared"])
    def test_gradcheck(self, settings, step_control, w, random):
        def solve(y0, t, w):
            return solve_ode(
                self.make_field(w),
                y0,
                t,
                atol=1e-9,
                step_control=step_control,
                **METHOD,
                **settings,
            ).y

        y0, t = random(2, 2, seed=2).requires_grad_(), double(0.1, 0.45, 0.8)
        inputs = (y0, t.requires_grad_(), w)
        assert torch.autograd.gradcheck(solve, inputs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("time_dependent", [False, True])
    @pytest.mark.parametrize("step_control", ["per_sample", "shared"])
    def test_an_mlp_has_those_of_autograd(
        self, time_dependent, step_control, make_mlp, random
    ):
        field = make_mlp(2, (8, 8), time_dependent=time_dependent)
        y0, parameters = random(20, 2), list(field.parameters())
        one, two = (
            self.gradients(f, parameters, y0, TIMES["forwards"], gradient=gradient)
            for f, gradient in (
                (field, "discrete"),
                (lambda t, y: field(t, y), "backprop"),
            )
        )
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_of_a_stiff_problem(self):
        # the end of Van der Pol's slow phase by its stiffness, against differences
        def end(mu):
            y0 = torch.stack([double(2.0)[0], double(0.0)[0], mu])[None]
            t = double(0.0, 300.0)
            return solve_ode(van_der_pol, y0, t, rtol=1e-8, atol=1e-8, **METHOD).y

        mu = double(1000.0)[0].requires_grad_()
        (grad,) = torch.autograd.grad(end(mu)[0, -1, 0], mu)
        with torch.no_grad():
            change = end(mu + 0.5)[0, -1, 0] - end(mu - 0.5)[0, -1, 0]
        assert grad.item() == pytest.approx(change.item(), rel=1e-4)

    def test_what_a_function_has_captured_gets_its_gradient(self, random):
        rate = double(0.7)[0].requires_grad_()
        scale, y0 = rate * 2, random(3, 2)  # not a leaf
        y = solve_ode(lambda t, y: -scale * y, y0, double(0.0, 1.0), **METHOD).y
        (grad,) = torch.autograd.grad(y[:, -1].sum(), rate)
        expected = (-2 * y0 * torch.exp(-2 * rate)).sum()
        torch.testing.assert_close(grad, expected.detach(), rtol=1e-5, atol=1e-5)

    def test_parameters_without_influence_have_none(self, random):
        field = MLPField(2, (4,)).double()
        used, unused = (random(1, seed=i).requires_grad_() for i in range(2))

        class Field(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.used, self.unused = field, used, unused

            def forward(self, t, y):
                return self.inner(t, y) * self.used

        y = solve_ode(Field(), random(3, 2), double(0.0, 1.0), **METHOD).y
        y.sum().backward()
        assert used.grad is not None
        assert unused.grad is None

    def test_memory_of_a_step_is_its_state(self, random):
        y0, field = random(8, 3), MLPField(3, (16,)).double()
        y = solve_ode(field, y0, double(0.0, 1.0), step_size=0.1, **METHOD).y
        node = y.grad_fn
        while not hasattr(node, "run"):
            node = node.next_functions[0][0]
        records = node.run.trace.records
        assert len(records) == 10
        for one, two in pairwise(records):
            assert one.y.shape == (16, 3)  # a block of rows
            assert one.y.grad_fn is None
            assert one.y.data_ptr() != two.y.data_ptr()

    def test_second_derivatives_come_from_backpropagation(self, w, random):
        y0 = random(3, 2).requires_grad_()
        y = solve_ode(
            self.make_field(w), y0, double(0.0, 1.0), gradient="backprop", **METHOD
        ).y
        (grad,) = torch.autograd.grad(y[:, -1].pow(2).sum(), y0, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(grad.sum(), w)[0]).all()
