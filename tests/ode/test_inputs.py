"""States and slopes of any layout, and what is refused."""

import pytest
import torch

from sknode.ode import solve_ode


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=["per_sample", "shared"])
def step_control(request):
    return request.param


@pytest.fixture(params=["callable", "mlp"])
def field(request, riccati, make_mlp):
    if request.param == "callable":
        return riccati()
    return make_mlp(2, (16,), time_dependent=True)


@pytest.mark.parametrize("batch", [1, 5, 16, 32])
def test_states_need_not_be_contiguous(batch, field, step_control, random):
    plain = random(batch, 2).abs()
    expected = solve_ode(field, plain, [0.0, 0.5, 1.0], step_control=step_control).y
    wide = torch.zeros(2 * batch, 6, dtype=torch.float64)
    wide[::2, ::3] = plain
    for y0 in (plain.t().contiguous().t(), wide[::2, ::3], plain.flip(0).flip(0)):
        assert torch.equal(y0, plain)
        y0 = y0.requires_grad_()
        y = solve_ode(field, y0, [0.0, 0.5, 1.0], step_control=step_control).y
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.isfinite(y0.grad).all()


def test_states_may_be_expanded(field, step_control):
    y0 = tensor([0.3, 0.7]).expand(16, 2)
    y = solve_ode(field, y0, [0.0, 1.0], step_control=step_control).y
    alone = solve_ode(field, y0.clone(), [0.0, 1.0], step_control=step_control).y
    assert torch.equal(y, alone)


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_slopes_need_not_be_contiguous(batch, step_control, random):
    matrix = random(3, 3, seed=1)

    def plain(t, y):
        return (y @ matrix.t()) * torch.cos(t)

    def transposed(t, y):
        # columns as samples, as in a textbook
        return (matrix @ y.t()).t() * torch.cos(t)

    def expanded(t, y):
        return torch.cos(t).reshape(-1, 1).expand(batch, 3)

    y0 = random(batch, 3)
    for settings in ({}, {"rtol": 1e-3}):
        settings = settings | {"step_control": step_control}
        expected = solve_ode(plain, y0, [0.0, 0.5, 1.0], **settings)
        got = solve_ode(transposed, y0, [0.0, 0.5, 1.0], **settings)
        torch.testing.assert_close(got.y, expected.y, rtol=1e-10, atol=1e-10)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = solve_ode(expanded, y0, t, step_control=step_control).y
    torch.testing.assert_close(y[:, -1], y0 + torch.sin(t[-1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 2, 3), (4, 1, 2, 1)])
def test_states_may_have_any_shape(shape, step_control, riccati, random):
    y0 = random(*shape).abs()
    t = tensor([0.1, 0.5, 1.2])
    y = solve_ode(riccati(), y0, t, step_control=step_control).y
    assert y.shape == (4, 3, *shape[1:])
    times = t.reshape(-1, *(1 for _ in shape[1:]))
    exact = riccati().exact(0.1, y0[:, None], times)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


def test_shape_of_the_state_does_not_matter_to_the_numbers(riccati, random):
    flat = random(4, 6).abs()
    one = solve_ode(riccati(), flat, [0.0, 0.3, 1.0]).y
    two = solve_ode(riccati(), flat.view(4, 2, 3), [0.0, 0.3, 1.0]).y
    assert torch.equal(one, two.flatten(2))


@pytest.mark.parametrize("n_times", [1, 2, 3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_empty_batch_gives_an_empty_solution(
    n_times, requires_grad, field, step_control
):
    y0 = torch.zeros(0, 2, dtype=torch.float64, requires_grad=requires_grad)
    t = torch.linspace(0, 1, n_times, dtype=torch.float64)
    solution = solve_ode(field, y0, t, step_control=step_control)
    assert solution.y.shape == (0, n_times, 2)
    assert solution.y.dtype == torch.float64
    assert solution.success
    assert solution.status.shape == solution.t_reached.shape == (0,)
    assert {tuple(v.shape) for v in solution.stats.values()} == {(0,)}
    assert solution.messages == []


@pytest.mark.parametrize(
    ("y0", "error", "message"),
    [
        ([1.0], TypeError, "torch tensor"),
        (torch.ones(2, 1, dtype=torch.int64), TypeError, "float32 or float64"),
        (torch.ones(2, 1, dtype=torch.float16), TypeError, "float32 or float64"),
        (torch.tensor(1.0), ValueError, "batch dimension"),
        (torch.ones(3, 0), ValueError, "empty state"),
    ],
)
def test_bad_states_are_named(y0, error, message):
    with pytest.raises(error, match=message):
        solve_ode(lambda t, y: -y, y0, [0.0, 1.0])


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([0.0, 2.0, 1.0], ValueError, "monotonic"),
        ([2.0, 0.0, 1.0], ValueError, "monotonic"),
        ([0.0, float("nan")], ValueError, "finite"),
        ([0.0, float("inf")], ValueError, "finite"),
        ([], ValueError, "shape"),
        (1.0, ValueError, "shape"),
        (torch.ones(2, 2), ValueError, r"\(3, n_times\)"),
        (torch.ones(3, 0), ValueError, "shape"),
        (torch.ones(3, 2, 1), ValueError, "shape"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "real"),
        (torch.tensor([[0.0, 1], [0, 1], [1, 0.5]]).flip(1).sort(0)[0], None, None),
    ],
)
def test_bad_times_are_named(t, error, message):
    y0 = torch.ones(3, 1, dtype=torch.float64)
    if error is None:
        # rows may run in different directions: no error
        assert solve_ode(lambda t, y: -y, y0, t).success
        return
    with pytest.raises(error, match=message):
        solve_ode(lambda t, y: -y, y0, t)


def test_one_row_out_of_order_is_enough():
    t = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    with pytest.raises(ValueError, match="monotonic"):
        solve_ode(lambda t, y: -y, torch.ones(2, 1, dtype=torch.float64), t)


def test_rows_of_times_are_refused_under_shared_control():
    t = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    with pytest.raises(ValueError, match=r"\(n_times,\)"):
        solve_ode(
            lambda t, y: -y,
            torch.ones(2, 1, dtype=torch.float64),
            t,
            step_control="shared",
        )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (None, TypeError, "callable"),
        (lambda t, y: 0.0, TypeError, "must return a tensor"),
        (lambda t, y: y[:1], ValueError, "shape of y"),
        (lambda t, y: y[..., None], ValueError, "shape of y"),
        (lambda t, y: y.float(), TypeError, "dtype of y"),
    ],
)
def test_bad_fields_are_named(f, error, message, requires_grad, step_control):
    y0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=requires_grad)
    with pytest.raises(error, match=message):
        solve_ode(f, y0, [0.0, 1.0], step_control=step_control)


def test_errors_inside_the_field_come_through(random):
    def f(t, y):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        solve_ode(f, random(2, 2), [0.0, 1.0])


def test_a_field_may_return_its_argument(random, step_control):
    # the state itself is its slope: no copy, and nobody must write to it
    y0 = random(3, 2).requires_grad_()
    solution = solve_ode(
        lambda t, y: y, y0, [0.0, 0.5, 1.0], step_control=step_control, first_step=1.0
    )
    exact = y0.detach() * torch.e
    torch.testing.assert_close(solution.y[:, -1].detach(), exact, rtol=1e-5, atol=1e-5)
    solution.y[:, -1].sum().backward()
    torch.testing.assert_close(
        y0.grad, torch.full_like(exact, torch.e), rtol=1e-5, atol=1e-5
    )


def test_a_field_may_keep_the_states_that_it_is_given(random):
    # for inspection: they are not written to afterwards
    kept, copies = [], []

    def f(t, y):
        kept.append(y)
        copies.append(y.clone())
        return -y * t

    y0 = random(3, 2).requires_grad_()
    solve_ode(f, y0, [0.0, 0.3, 1.0]).y.sum().backward()
    for one, two in zip(kept, copies, strict=True):
        assert torch.equal(one, two)
