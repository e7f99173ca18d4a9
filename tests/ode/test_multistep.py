"""The Adams method: its coefficients, its orders, and how it chooses among them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sknode.ode import METHODS, Status, solve_ode
from sknode.ode.grid import Grid, Stops
from sknode.ode.integrate import integrate
from sknode.ode.multistep import MAX_ORDER, AdamsStepper, basis_integrals
from sknode.ode.solve import _make_options
from sknode.ode.vector_field import bind

ORDERS = range(1, MAX_ORDER + 1)
# Steps per interval: small enough for the leading term to rule, and few enough for the
# error to stay above rounding, which beyond order nine no longer go together.
N_STEPS = {
    **{1: (200, 300), 2: (200, 300), 3: (250, 350), 4: (200, 280), 5: (200, 270)},
    **{6: (200, 270), 7: (180, 240), 8: (190, 240), 9: (180, 240)},
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def lengths_of(n, length, steps):
    """Split an interval into equal steps, or into such that change all the time."""
    weights = np.ones(n)
    if steps == "variable":
        weights += 0.3 * np.sin(np.arange(n) * 2.4)
    return weights / weights.sum() * length


def walk(f, exact, t, lengths, order):
    """Take given steps at one order, the first ones exactly, to have a past.

    Yields start and end of every step with states and slopes, and a function that
    gives the dense output at a place in the step.
    """
    y = exact(t)
    # every step is good enough
    options = _make_options(torch.float64, method="adams", rtol=1e9, atol=1e9)
    stepper = AdamsStepper(bind(f, len(y), y.shape[1:], False), options, order=order)
    k = f(t, y)
    stepper.start(SimpleNamespace(y=y, k=k))
    moved, lane = np.ones(len(y), bool), torch.arange(len(y))

    def dense(place):
        return stepper.dense(lane, torch.full((len(y),), place, dtype=torch.float64))

    for i, length in enumerate(lengths):
        t1, h = t + length, torch.full((len(y), 1), length, dtype=torch.float64)
        y1, k1 = stepper.attempt(t[:, 0].numpy(), t1[:, 0].numpy(), h, y, k)
        ratio, _ = stepper.judge(y, y1)
        if i < order:
            y1, computed = exact(t1), k1
            k1 = f(t1, y1)
            stepper._difference += k1 - computed
        else:
            yield t, y, k, t1, y1, k1, dense
        stepper.accept(moved)
        stepper.propose(None, np.full(len(y), length), ratio, moved)
        t, y, k = t1, y1, k1


class TestCoefficients:
    def test_with_equal_steps_are_those_of_adams(self):
        moments = 1 / np.arange(1.0, 6)[:, None]
        g = basis_integrals(moments, 1 / np.arange(1.0, 5))
        expected = [1, 1 / 2, 5 / 12, 3 / 8, 251 / 720]
        np.testing.assert_allclose(np.concatenate(g), expected, rtol=1e-14)

    def test_are_integrals(self):
        rng = np.random.default_rng(0)
        above, below = rng.uniform(0.5, 2, (2, 7, 3))
        x = np.array([0.7, -0.4, 2.0])
        moments = 1 / np.arange(1.0, 9)[:, None]
        got = basis_integrals(moments, x / below, (x + above) / below)
        nodes, weights = np.polynomial.legendre.leggauss(8)
        u, weights = (nodes[:, None] + 1) / 2, weights / 2
        basis = np.ones((8, 3))
        for j, values in enumerate(got):
            np.testing.assert_allclose(
                np.broadcast_to(values, 3), weights @ basis, rtol=1e-12
            )
            if j < 7:
                basis = basis * (u * x + above[j]) / below[j]


@pytest.mark.parametrize("steps", ["equal", "variable"])
class TestFixedOrder:
    @pytest.mark.parametrize("order", N_STEPS)
    def test_errors_have_one_order_more_by_local_extrapolation(
        self, order, steps, swirl
    ):
        def exact(t):
            return swirl.exact(t)[:, 0]

        errors = []
        for n in N_STEPS[order]:
            lengths = lengths_of(n, swirl.length, steps)
            inside = []
            for t, _, _, t1, y1, _, dense in walk(
                swirl.f, exact, swirl.t0[:, None], lengths, order
            ):
                for place in (0.3, 0.6):
                    error = dense(place) - exact(t + place * (t1 - t))
                    inside.append(error.abs().max())
                end = y1 - exact(t1)
            # errors build up at first
            inside = torch.stack(inside[len(inside) // 2 :])
            errors.append([x.square().mean().sqrt().item() for x in (end, inside)])
        ratio = np.log(np.divide(*errors)) / np.log(np.divide(*N_STEPS[order]))
        assert -ratio == pytest.approx(order + 1, abs=0.15)

    @pytest.mark.parametrize("order", ORDERS)
    def test_polynomials_are_exact_up_to_the_order(self, order, steps):
        def largest_error(degree):
            def exact(t):
                return (t / 3) ** degree - t

            def f(t, y):
                return degree / 3 * (t / 3) ** (degree - 1) - 1

            start, lengths = tensor([[-1.0], [0.0]]), lengths_of(25, 4.0, steps)
            errors = []
            for t, _, _, t1, y1, _, dense in walk(f, exact, start, lengths, order):
                errors.append((y1 - exact(t1)).abs().max())
                errors.append((dense(0.4) - exact(t + 0.4 * (t1 - t))).abs().max())
            return max(errors)

        assert largest_error(order + 1) < 2e-13
        assert largest_error(order + 2) > 1e-12

    @pytest.mark.parametrize("order", ORDERS)
    def test_dense_output_has_the_states_and_slopes_at_the_ends(
        self, order, steps, swirl
    ):
        # long steps, so that predicted and corrected slope are not the same
        lengths, d = lengths_of(20, 4.0, steps), 1e-4
        for t, y, k, t1, y1, k1, dense in walk(
            swirl.f, lambda t: swirl.exact(t)[:, 0], swirl.t0[:, None], lengths, order
        ):
            torch.testing.assert_close(dense(0.0), y, rtol=1e-13, atol=1e-13)
            assert torch.equal(dense(1.0), y1)
            h = t1 - t
            for end, slope, sign in ((0.0, k, 1), (1.0, k1, -1)):
                # one-sided differences of second order
                one, two = dense(end + sign * d), dense(end + 2 * sign * d)
                got = sign * (4 * one - two - 3 * dense(end)) / (2 * d * h)
                torch.testing.assert_close(got, slope, rtol=1e-6, atol=1e-6)
            if t1[0] > 3:
                break


def run(f, y0, times, stops=None, **settings):
    """Integrate as `solve_ode` does, with stops; return the trace."""
    field = bind(f, len(y0), y0.shape[1:], False, row_wise=True)
    grid = replace(Grid.from_times(np.asarray(times, np.float64)), stops=stops)
    options = _make_options(y0.dtype, **{"method": "adams"} | settings)
    with torch.no_grad():
        return integrate(field, y0, grid, options)


def circle(t, y):
    return torch.stack([y[:, 1], -y[:, 0]], 1)


def on_circle(t):
    return tensor([np.sin(t), np.cos(t)])


class TestChoiceOfOrder:
    def solve(self, tol, f=circle):
        trace = run(f, tensor([[0.0, 1.0]]), [0.0, 20.0], rtol=tol, atol=tol)
        return trace, trace.stepper._order[0]

    def test_rises_with_the_accuracy_asked_for(self):
        orders = [self.solve(tol)[1] for tol in (1e-3, 1e-6, 1e-9, 1e-12)]
        assert orders == sorted(orders)
        assert orders[0] <= 7 and orders[-1] >= 9

    def test_makes_accuracy_cheap(self):
        loose, tight = (self.solve(tol)[0].n_evaluations[0] for tol in (1e-4, 1e-12))
        assert tight < 6 * loose

    def test_falls_where_the_slope_is_rough(self):
        def f(t, y):
            return torch.where(torch.sin(5 * t) > 0, 1.0, -1.0) * torch.ones_like(y)

        trace, order = self.solve(1e-6, f)
        assert order <= 3
        assert trace.status[0] == Status.SUCCESS

    def test_is_low_where_the_problem_is_stiff(self):
        # stability limits the step, and most so at high order
        _, order = self.solve(1e-6, lambda t, y: -300 * (y - torch.cos(t)))
        assert order <= 4


class TestEfficiency:
    @pytest.mark.parametrize("tol", [1e-5, 1e-7, 1e-9])
    def test_needs_fewer_evaluations_than_the_others(self, tol, swirl):
        t = swirl.times([0, swirl.length])

        def solve(method):
            solution = solve_ode(
                swirl.f, swirl.y0, t, method=method, rtol=tol, atol=tol
            )
            error = (solution.y - swirl.exact(t))[:, -1].square().mean().sqrt()
            return solution.stats["n_f_evals"].double().mean(), error

        evaluations, error = solve("adams")
        for other in ("dopri5", "dopri8", "tsit5", "bosh3"):
            cost, reached = solve(other)
            assert evaluations < 0.8 * cost
            assert error < 10 * max(reached, tol)


class TestHardProblems:
    @pytest.mark.parametrize("rate", [1e2, 3e3])
    def test_stiff_ones_take_small_steps_but_arrive(self, rate):
        def f(t, y):
            return -rate * (y - torch.cos(t))

        exact = (rate**2 * np.cos(1) + rate * np.sin(1)) / (rate**2 + 1)
        solution = solve_ode(f, tensor([[1.0]]), [0.0, 1.0], method="adams")
        assert solution.success
        assert solution.y[0, -1, 0] == pytest.approx(exact, abs=1e-5)
        assert solution.stats["n_steps"].item() < 2 * rate + 100

    def test_a_jump_of_the_slope_is_crossed_at_low_order(self):
        def f(t, y):
            return torch.where(t < 1, -y, y)

        y0 = tensor([[1.0], [2.0]])
        settings = {"method": "adams", "rtol": 1e-10, "atol": 1e-10}
        solution = solve_ode(f, y0, [0.0, 2.0], **settings)
        torch.testing.assert_close(solution.y[:, -1], y0, rtol=1e-8, atol=0)
        assert solution.stats["n_steps"].max() < 200

    def test_many_steps_keep_the_error_small(self):
        settings = {"rtol": 1e-8, "atol": 1e-8, "max_step": 0.02}
        trace = run(circle, tensor([[0.0, 1.0]]), [0.0, 100.0], **settings)
        assert trace.n_steps[0] > 5000
        torch.testing.assert_close(trace.y[0, -1], on_circle(100), rtol=0, atol=1e-10)

    def test_where_only_the_prediction_has_a_slope_it_serves(self):
        seen = []

        def f(t, y):
            # every other call is for a corrected state; not the first two of all
            seen.append(t)
            value = circle(t, y)
            return value * torch.nan if len(seen) == 6 else value

        solution = solve_ode(
            f, tensor([[0.0, 1.0]]), [0.0, 1.0], method="adams", rtol=1e-8, atol=1e-8
        )
        assert torch.equal(seen[4], seen[5])
        assert solution.success
        error = solution.y[0, -1] - on_circle(1)
        assert error.abs().max() < 1e-6


def test_trial_slopes_that_are_not_finite_leave_no_trace_in_other_samples(random):
    # A turning point whose slope is undefined off its circle, by more or less for every
    # sample: steps are rejected at any order, each time with other orders around.
    def f(t, y):
        a, b, width = y.unbind(1)
        rate = 1 + 20 * torch.exp(-20 * torch.sin(t[:, 0] + 1e6 * width) ** 2)
        slope = torch.stack([rate * b, -rate * a, 0 * a], 1)
        off = (a * a + b * b - 1).abs() > width
        return torch.where(off[:, None], torch.nan, slope)

    width = torch.logspace(-5, -3, 40, dtype=torch.float64)[torch.arange(40) * 7 % 40]
    y0 = torch.stack([0 * width, 0 * width + 1, width], 1)
    settings = {"method": "adams", "rtol": 1e-7, "atol": 1e-7}
    whole = solve_ode(f, y0, [0.0, 6.0], **settings)
    assert whole.success
    assert whole.stats["n_rejected"].min() > 5
    for i in range(40):
        alone = solve_ode(f, y0[i : i + 1], [0.0, 6.0], **settings)
        assert torch.equal(alone.y[0], whole.y[i])
        assert alone.stats["n_f_evals"][0] == whole.stats["n_f_evals"][i]


class TestStops:
    @pytest.mark.parametrize("tol", [1e-4, 1e-10])
    @pytest.mark.parametrize("apart", [0.3, 1e-3, 1e-9, 1e-13])
    def test_steps_cut_short_do_no_harm(self, apart, tol):
        # pairs of stops with a very short step in between
        times = np.sort(np.concatenate([np.arange(1, 10), np.arange(1, 10) + apart]))
        settings = {"rtol": tol, "atol": tol}
        trace = run(circle, tensor([[0.0, 1.0]]), [0.0, 10.0], Stops(times), **settings)
        error = (trace.y[0, -1] - on_circle(10)).abs().max()
        assert error < 100 * tol
        plain = run(circle, tensor([[0.0, 1.0]]), [0.0, 10.0], **settings)
        assert trace.n_steps[0] < plain.n_steps[0] + 5 * len(times)

    @pytest.mark.parametrize("tol", [1e-4, 1e-10])
    def test_the_past_is_forgotten_where_states_jump(self, tol):
        def on_reach(rows, first, last, t, y, k):
            landed = torch.from_numpy(last > first)[:, None]
            y = torch.where(landed, y + 1, y)
            return y, torch.where(landed, circle(t, y), k)

        def solve(**settings):
            stops = Stops(np.arange(1.0, 5), on_reach)
            return run(circle, tensor([[0.0, 1.0]]), [0.0, 5.0], stops, **settings)

        trace = solve(rtol=tol, atol=tol)
        expected = solve(method="dopri8", rtol=1e-12, atol=1e-12).y
        assert (trace.y - expected)[0, -1].abs().max() < 100 * tol
        accepted = trace.n_steps - trace.n_rejected
        assert trace.n_evaluations == trace.n_steps + accepted + 4


@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
@pytest.mark.parametrize("first_step", [None, 0.3])
def test_evaluations_are_one_an_attempt_and_one_more_if_accepted(
    first_step, step_control, coupled, recorder
):
    f = recorder(coupled.f)
    solution = solve_ode(
        f,
        coupled.y0(),
        torch.linspace(coupled.t0, coupled.t1, 20, dtype=torch.float64),
        method="adams",
        first_step=first_step,
        step_control=step_control,
    )
    stats = {name: values.item() for name, values in solution.stats.items()}
    assert stats["n_rejected"] > 0 or first_step is None
    first = 1 if first_step else 2
    assert f.calls == first + stats["n_steps"] + stats["n_accepted"]
    assert stats["n_f_evals"] == f.calls


def test_complex_states(random):
    rate = torch.complex(tensor(-0.2), tensor(3.0))
    y0 = torch.complex(random(5, 2), random(5, 2, seed=1))
    t = tensor([0.0, 0.7, 2.0])
    y = solve_ode(
        lambda t, y: rate * y, y0, t, method="adams", rtol=1e-11, atol=1e-11
    ).y
    exact = y0[:, None] * torch.exp(rate * t)[:, None]
    torch.testing.assert_close(y, exact, rtol=1e-8, atol=1e-8)


class TestErrors:
    def test_a_gradient_that_is_not_served_is_named(self):
        y0 = tensor([[0.0, 1.0]]).requires_grad_()
        for gradient in ("discrete", "backprop"):
            with pytest.raises(ValueError, match=r"'adams'.*use gradient='continuous'"):
                solve_ode(circle, y0, [0.0, 1.0], method="adams", gradient=gradient)

    def test_parameters_ask_for_a_gradient_too(self, make_mlp, random):
        field, y0 = make_mlp(2, (8,)), random(3, 2)
        with pytest.raises(ValueError, match="gradient='discrete'"):
            solve_ode(field, y0, [0.0, 1.0], method="adams")
        with torch.no_grad():
            got = solve_ode(field, y0, [0.0, 1.0], method="adams").y
            expected = solve_ode(field, y0, [0.0, 1.0], rtol=1e-9, atol=1e-9).y
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_constant_steps_are_refused(self):
        assert "adams" in METHODS
        with pytest.raises(ValueError, match="'adams' cannot take constant steps"):
            solve_ode(circle, tensor([[0.0, 1.0]]), [0, 1], method="adams", step_size=1)
