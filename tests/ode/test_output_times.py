"""Output times that repeat, restart, run backwards, or come afterwards."""

import pytest
import torch
import torchdiffeq

from sknode import ode
from sknode.ode import solve_ode
from sknode.ode.methods import get_method

# scipy evaluates all outputs of a step together, which rounds in its own ways
METHODS = [m for m in ode.METHODS if not m.startswith("scipy_")]
ADAPTIVE = [m for m in METHODS if get_method(m).adaptive]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=["per_sample", "shared"])
def step_control(request):
    return request.param


@pytest.fixture
def y0(random):
    return random(6, 2).abs()


def settings_for(method):
    return {} if get_method(method).adaptive else {"step_size": 0.13}


@pytest.mark.parametrize("method", METHODS)
def test_outputs_change_neither_steps_nor_final_states(
    method, step_control, y0, riccati
):
    settings = settings_for(method) | {"method": method, "step_control": step_control}
    ends = solve_ode(riccati(), y0, [0.2, 2.0], **settings)
    for n in (3, 50):
        t = torch.linspace(0.2, 2.0, n, dtype=torch.float64)
        many = solve_ode(riccati(), y0, t, **settings)
        assert torch.equal(many.y[:, -1], ends.y[:, -1])
        for name in ("n_steps", "n_accepted", "n_rejected"):
            assert torch.equal(many.stats[name], ends.stats[name])


@pytest.mark.parametrize("method", METHODS)
def test_outputs_do_not_depend_on_each_other(method, step_control, y0, riccati):
    settings = settings_for(method) | {"method": method, "step_control": step_control}
    t = torch.linspace(0.2, 2.0, 40, dtype=torch.float64)
    many = solve_ode(riccati(), y0, t, **settings)
    few = solve_ode(riccati(), y0, t[[0, 3, 17, 18, 39]], **settings)
    assert torch.equal(few.y, many.y[:, [0, 3, 17, 18, 39]])


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("direction", [1, -1])
def test_outputs_are_as_accurate_as_the_steps(method, direction, swirl):
    length = torch.linspace(0, direction * 2.0, 25, dtype=torch.float64)
    t = swirl.times(length) + (2.0 if direction < 0 else 0.0)
    y0 = swirl.exact(t)[:, 0].contiguous()
    solution = solve_ode(swirl.f, y0, t, method=method, rtol=1e-6, atol=1e-6)
    error = (solution.y - swirl.exact(t)).abs().amax((0, 2))
    # no output is much worse than the worst of what the steps themselves reach, or
    # than what they were asked for
    assert error.max() < 1e-4
    assert error.max() < max(5 * error[-8:].max(), 1e-6)


def test_times_may_be_numbers_of_any_kind(y0, riccati):
    expected = solve_ode(riccati(), y0, tensor([0.0, 1.0, 2.0]))
    for t in (
        [0, 1, 2],
        (0.0, 1.0, 2.0),
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([0.0, 1.0, 2.0]),
        tensor([0.0, 1.0, 2.0]).numpy(),
        range(3),
    ):
        solution = solve_ode(riccati(), y0, t)
        assert torch.equal(solution.y, expected.y)
        assert solution.t.dtype == torch.float64


def test_one_grid_or_the_same_grid_in_rows_is_the_same(y0, riccati, make_mlp):
    t = torch.linspace(0.2, 2.0, 9, dtype=torch.float64)
    for f in (riccati(), make_mlp(2, (16,), time_dependent=True)):
        one = solve_ode(f, y0, t)
        for rows in (t.expand(6, -1), t.repeat(6, 1), t.repeat(6, 1).t().clone().t()):
            assert torch.equal(solve_ode(f, y0, rows).y, one.y)


def test_rows_may_end_early_by_repeating_their_last_time(y0, riccati):
    t = tensor([0.1, 0.4, 0.5, 0.9, 1.3])
    length = [5, 4, 3, 2, 1, 5]
    rows = torch.stack([t[:n].repeat(5)[: 5 * n][:n].clone() for n in [5] * 6])
    for row, n in zip(rows, length, strict=True):
        row[n:] = row[n - 1]
    solution = solve_ode(riccati(), y0, rows)
    assert solution.success
    for i, n in enumerate(length):
        alone = solve_ode(riccati(), y0[i : i + 1], t[:n])
        torch.testing.assert_close(
            solution.y[i, :n], alone.y[0], rtol=1e-14, atol=1e-14
        )
        last = alone.y[0, -1].expand(5 - n, -1)
        torch.testing.assert_close(solution.y[i, n:], last, rtol=1e-14, atol=1e-14)
        assert solution.stats["n_steps"][i] == alone.stats["n_steps"][0]


class TestRepeatedTimes:
    # the first step is much too long: what was asked for at its start must not get
    # lost when it is rejected
    first_step = 1.0

    def f(self, t, y):
        return -3 * y * y

    @pytest.mark.parametrize("gradient", ["discrete", "backprop"])
    def test_have_the_same_states_and_gradients(self, gradient, step_control):
        # a batch of two whose rows reject their first steps together, and one of many
        # where some do and others do not
        for y0 in (tensor([[1.0], [2.0]]), torch.linspace(0, 3, 40).double()[:, None]):
            kwargs = {"gradient": gradient, "step_control": step_control}
            kwargs["first_step"] = self.first_step
            start, again = (y0.clone().requires_grad_() for _ in range(2))
            once = solve_ode(self.f, start, [0.0, 0.6, 1.0], **kwargs)
            twice = solve_ode(self.f, again, [0.0, 0.0, 0.0, 0.6, 0.6, 1.0], **kwargs)
            assert once.stats["n_rejected"].max() > 0
            repeated = once.y[:, [0, 0, 0, 1, 1, 2]]
            torch.testing.assert_close(twice.y, repeated, rtol=1e-14, atol=1e-14)
            weights = tensor([1.0, 2.0, 3.0])[:, None]
            (once.y * weights).sum().backward()
            weights = tensor([0.5, 0.3, 0.2, 1.5, 0.5, 3.0])[:, None]
            (twice.y * weights).sum().backward()
            torch.testing.assert_close(again.grad, start.grad, rtol=1e-12, atol=1e-12)

    def test_work_in_large_batches_of_an_mlp(self, make_mlp, random):
        # records are then reduced to the rows that moved
        field, y0 = make_mlp(2, (16,), gain=4.0), 2 * random(400, 2)
        t = torch.linspace(0.01, 2, 400, dtype=torch.float64)[:, None]

        def gradients(offsets, weights):
            field.zero_grad()
            start = y0.clone().requires_grad_()
            y = solve_ode(field, start, t * tensor(offsets), first_step=0.5).y
            (y * tensor(weights)[:, None]).sum().backward()
            return [start.grad, *(p.grad.clone() for p in field.parameters())]

        one = gradients([0.0, 0.5, 1.0], [1.0, 2.0, 3.0])
        two = gradients([0.0, 0.0, 0.5, 0.5, 1.0], [0.4, 0.6, 1.5, 0.5, 3.0])
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_all_equal_times_are_the_initial_state(self, step_control):
        y0 = tensor([[1.0], [2.0]]).requires_grad_()
        y = solve_ode(self.f, y0, [0.5] * 4, step_control=step_control).y
        assert torch.equal(y, y0[:, None].expand(2, 4, 1))
        y.sum().backward()
        assert torch.equal(y0.grad, torch.full((2, 1), 4.0, dtype=torch.float64))


def test_a_single_time_is_the_initial_state(y0, riccati, step_control):
    solution = solve_ode(riccati(), y0, [0.7], step_control=step_control)
    assert solution.success
    assert torch.equal(solution.y, y0[:, None])
    assert (solution.t_reached == 0.7).all()
    assert (solution.stats["n_steps"] == 0).all()


def test_backwards_is_forwards_through_the_mirror(swirl, step_control):
    t = torch.linspace(2.0, -1.0, 7, dtype=torch.float64)
    y0 = swirl.y0
    # the norm of the velocity bounds growth on this side
    back = solve_ode(swirl.f, 0.5 * y0, t, step_control=step_control)
    mirror = solve_ode(
        lambda t, y: -swirl.f(-t, y), 0.5 * y0, -t, step_control=step_control
    )
    torch.testing.assert_close(back.y, mirror.y, rtol=1e-12, atol=1e-12)
    assert torch.equal(back.stats["n_steps"], mirror.stats["n_steps"])


def test_there_and_back_again(swirl):
    there = solve_ode(swirl.f, swirl.y0, [0.0, 1.0], rtol=1e-10, atol=1e-10).y[:, -1]
    back = solve_ode(swirl.f, there, [1.0, 0.0], rtol=1e-10, atol=1e-10).y[:, -1]
    torch.testing.assert_close(back, swirl.y0, rtol=1e-7, atol=1e-7)


def test_shared_control_is_torchdiffeq_with_its_norm(swirl):
    t = torch.linspace(0, 2, 9, dtype=torch.float64)
    ours = solve_ode(swirl.f, swirl.y0, t, step_control="shared", rtol=1e-6, atol=1e-8)
    theirs = torchdiffeq.odeint(
        swirl.f, swirl.y0, t, method="dopri5", rtol=1e-6, atol=1e-8
    )
    error = (ours.y - theirs.transpose(0, 1)).abs().max()
    assert error < 2e-5


class TestInterpolate:
    @pytest.fixture
    def solution(self, y0, riccati):
        return solve_ode(riccati(), y0, [0.2, 1.0, 2.0])

    def test_equals_the_output_times_of_a_solve(self, solution, y0, riccati):
        t = torch.linspace(0.2, 2.0, 13, dtype=torch.float64)
        expected = solve_ode(riccati(), y0, t).y
        got = solution.interpolate(t)
        assert torch.equal(got[:, :-1], expected[:, :-1])
        torch.testing.assert_close(got[:, -1], expected[:, -1], rtol=1e-14, atol=0)

    def test_takes_times_in_any_order(self, solution):
        t = torch.linspace(0.2, 2.0, 13, dtype=torch.float64)
        order = torch.tensor([4, 0, 12, 7, 7, 3])
        assert torch.equal(
            solution.interpolate(t[order]), solution.interpolate(t)[:, order]
        )

    def test_takes_a_row_of_times_for_every_sample(self, solution, random):
        t = 0.2 + 1.8 * torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
        got = solution.interpolate(t.double())
        for i in range(6):
            assert torch.equal(got[i], solution.interpolate(t[i].double())[i])

    def test_serves_rows_of_different_intervals_and_directions(self, y0, riccati):
        ends = tensor([[0.2, 2.0], [2.0, 0.5], [0.3, 0.3], [1.0, 0.4], [0, 1], [0, 5]])
        y0 = 0.05 * y0
        solution = solve_ode(riccati(), y0, ends)
        t = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * tensor([0.8, 0.1, 0.5])
        exact = riccati().exact(ends[:, :1, None], y0[:, None], t[:, :, None])
        torch.testing.assert_close(solution.interpolate(t), exact, rtol=1e-5, atol=1e-5)

    def test_has_the_shape_of_the_state(self, riccati):
        y0 = torch.ones(4, 2, 3, dtype=torch.float64)
        solution = solve_ode(riccati(), y0, [0.0, 1.0])
        assert solution.interpolate(tensor([0.1, 0.2])).shape == (4, 2, 2, 3)

    def test_is_differentiable(self, riccati):
        y0 = tensor([[0.5], [2.0]]).requires_grad_()
        t = tensor([0.4, 0.9]).requires_grad_()
        settings = {"rtol": 1e-10, "atol": 1e-10}
        y = solve_ode(riccati(), y0, [0.1, 1.0], **settings).interpolate(t)
        got = torch.autograd.grad(y.sum(), (y0, t))
        exact = riccati().exact(tensor(0.1), y0, t)
        expected = torch.autograd.grad(exact.sum(), (y0, t))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    def test_works_under_shared_control(self, y0, riccati):
        solution = solve_ode(riccati(), y0, [0.2, 2.0], step_control="shared")
        got = solution.interpolate(tensor([1.0, 0.5]))
        exact = riccati().exact(0.2, y0[:, None], tensor([1.0, 0.5])[:, None])
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("t", [0.19, 2.01, float("nan"), float("inf")])
    def test_refuses_times_outside(self, solution, t):
        with pytest.raises(ValueError, match="between the first and the last"):
            solution.interpolate(tensor([0.5, t]))

    @pytest.mark.parametrize("shape", [(), (5, 2), (6, 2, 1)])
    def test_refuses_other_shapes(self, solution, shape):
        with pytest.raises(ValueError, match="shape"):
            solution.interpolate(torch.ones(shape))

    def test_of_no_times_is_empty(self, solution):
        assert solution.interpolate(tensor([])).shape == (6, 0, 2)


@pytest.mark.parametrize("n_times", [2, 3, 4])
def test_many_rows_with_inner_times_do_not_warn(n_times, riccati, make_mlp, random):
    # torch says only once what is slow; here every time, so that tests see it
    t = torch.linspace(0.1, 1, n_times, dtype=torch.float64)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        for n in (1, 5, 16, 399, 400):
            for f in (riccati(), make_mlp(2, (16,))):
                for times in (t, t.expand(n, -1), t * torch.linspace(1, 2, n)[:, None]):
                    assert solve_ode(f, random(n, 2).abs(), times).success
    finally:
        torch.set_warn_always(before)
