"""Steps that are kept on autograd's tape as they are taken, for any callable."""

import gc
import weakref

import pytest
import torch

from sknode.ode import solve_ode, tape
from sknode.ode.tableaus import METHODS, get_tableau
from sknode.ode.tape import LiveTape

FIXED = ("euler", "midpoint", "rk4")
ENDS = torch.tensor([[1.0], [1.3], [-0.7], [0.2]], dtype=torch.float64)
TIMES = {
    "two": torch.tensor([0.0, 1.3], dtype=torch.float64),
    "some": torch.tensor([1.3, 0.6, 0.5, -0.2], dtype=torch.float64),
    "rows": torch.linspace(0, 1, 4, dtype=torch.float64) * ENDS,
}


@pytest.fixture
def w():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 2, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def tapes(monkeypatch):
    """The tapes of all solves, in order."""
    found = []

    def make(*args):
        found.append(LiveTape(*args))
        return found[-1]

    make.suits = LiveTape.suits
    monkeypatch.setattr("sknode.ode.integrate.LiveTape", make)
    return found


def make_y0(n, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


def make_field(w):
    return lambda t, y: torch.tanh(y @ w) * torch.sin(3 * t) + torch.cos(t) * y


def with_gradients(f, y0, t, inputs=(), **settings):
    """Return the states and the gradients of a mixture of them."""
    y0 = y0.clone().requires_grad_()
    y = solve_ode(f, y0, t, **settings).y
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y.detach(), *torch.autograd.grad((weights * y).sum(), (y0, *inputs))]


def check(monkeypatch, f, y0, t, inputs=(), **settings):
    """Compare with what comes of steps that are taken again for their reverse."""
    kept = with_gradients(f, y0, t, inputs, **settings)
    monkeypatch.setattr(tape, "TAPE_BYTES", 0)
    again = with_gradients(f, y0, t, inputs, **settings)
    assert torch.equal(kept[0], again[0])
    with torch.no_grad():
        assert torch.equal(kept[0], solve_ode(f, y0, t, **settings).y)
    for one, two in zip(kept[1:], again[1:], strict=True):
        assert two.isfinite().all()
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
@pytest.mark.parametrize("times", TIMES)
def test_same_as_from_steps_taken_again(
    method, step_control, times, w, tapes, monkeypatch
):
    if step_control == "shared" and times == "rows":
        times = "some"
    settings = {"step_size": 0.11} if method in FIXED else {"rtol": 1e-4, "atol": 1e-4}
    settings |= {"method": method, "step_control": step_control}
    check(monkeypatch, make_field(w), make_y0(4), TIMES[times], [w], **settings)
    # the dense output of some methods has stages of its own
    tableau = get_tableau(method)
    own = tableau.n_stages_extended > tableau.n_stages and times != "two"
    assert [x.n_records > 0 for x in tapes] == ([] if own else [True, False])


@pytest.mark.parametrize("row_wise", [False, True])
def test_lanes_that_leave_the_batch(row_wise, w, tapes, monkeypatch):
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    t = t * torch.linspace(0.05, 3, 300, dtype=torch.float64)[:, None]
    settings = {"rtol": 1e-6, "atol": 1e-6, "row_wise": row_wise}
    check(monkeypatch, make_field(w), make_y0(300), t, [w], **settings)
    assert tapes[0].n_records > 5


def test_a_part_of_the_steps(w, tapes, monkeypatch):
    settings = {"rtol": 1e-8, "atol": 1e-8}
    args = make_field(w), make_y0(4), TIMES["some"], [w]
    with_gradients(*args, **settings)
    total, each = tapes[0].n_records, tapes[0]._bytes_each
    monkeypatch.setattr(tape, "TAPE_BYTES", each * (total // 2))
    check(monkeypatch, *args, **settings)
    assert tapes[1].n_records == total // 2


def test_rejected_steps(w, tapes, monkeypatch):
    settings = {"rtol": 1e-6, "atol": 1e-6, "first_step": 0.2}
    t = torch.tensor([0.0, 1.3], dtype=torch.float64)
    y0 = make_y0(8) * torch.logspace(-5, 1, 8, dtype=torch.float64)[:, None]
    rejected = solve_ode(make_field(w), y0, t, **settings).stats["n_rejected"]
    assert 0 < (rejected > 0).sum() < 8  # some go on while others try again
    check(monkeypatch, make_field(w), y0, t, [w], **settings)
    assert tapes[0].n_records


def test_trials_that_are_not_finite_leave_gradients_alone(tapes, monkeypatch):
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def f(t, y):
        return -rate * torch.sqrt(y)  # not a number beyond zero

    y0 = torch.tensor([[100.0], [0.2501]], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    settings = {"rtol": 1e-3, "atol": 1e-3, "first_step": 1.0}
    rejected = solve_ode(f, y0, t, **settings).stats["n_rejected"]
    assert rejected.tolist()[0] == 0 < rejected[1]
    check(monkeypatch, f, y0, t, [rate], **settings)
    assert tapes[0].n_records


def test_nothing_is_evaluated_again(w):
    calls = []

    def f(t, y):
        calls.append(len(y))
        return torch.tanh(y @ w)

    y0 = make_y0(4).requires_grad_()
    solution = solve_ode(f, y0, TIMES["two"])
    assert len(calls) == solution.stats["n_f_evals"].max()
    calls.clear()
    solution.y.sum().backward()
    assert not calls


def test_memory_is_given_back(w, tapes):
    y = solve_ode(make_field(w), make_y0(4).requires_grad_(), TIMES["two"]).y
    kept = weakref.ref(tapes.pop())
    (first,) = torch.autograd.grad(y.sum(), w, retain_graph=True)
    gc.collect()
    assert kept() is not None
    (again,) = torch.autograd.grad(y.sum(), w)
    assert torch.equal(first, again)
    gc.collect()
    assert kept() is None


def test_fields_of_torch_func(w, monkeypatch):
    def energy(y):
        return torch.cos(y @ w).sum()

    def f(t, y):
        return torch.func.grad(energy)(y)

    check(monkeypatch, f, make_y0(4), TIMES["two"], [w])


def test_states_of_any_shape(w, tapes, monkeypatch):
    y0 = make_y0(12).view(4, 3, 2)
    check(monkeypatch, lambda t, y: torch.tanh(y @ w), y0, TIMES["some"], [w])
    assert tapes[0].n_records


def test_fields_without_a_gradient(monkeypatch):
    check(monkeypatch, lambda t, y: torch.ones_like(y), make_y0(4), TIMES["some"])


def test_a_field_that_does_not_suit_says_so(w):
    def f(t, y):
        return torch.tanh(y @ torch.ones(3, 3, dtype=y.dtype))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        solve_ode(f, make_y0(4).requires_grad_(), TIMES["two"])


def test_gradients_by_times_are_not_lost(w):
    t = TIMES["two"].clone().requires_grad_()
    y = solve_ode(make_field(w), make_y0(4).requires_grad_(), t).y
    assert torch.autograd.grad(y[:, -1].sum(), t)[0][1] != 0


def test_complex_states(tapes, monkeypatch):
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.complex(make_y0(4), make_y0(4, seed=5))

    def real_gradients(f, y0, t):
        y0 = y0.clone().requires_grad_()
        y = solve_ode(f, y0, t).y
        return torch.autograd.grad((y.real + y.imag**2).sum(), (y0, rate))

    def f(t, y):
        return 1j * rate * y * torch.cos(t)

    kept = real_gradients(f, y0, TIMES["some"])
    assert tapes[0].n_records
    monkeypatch.setattr(tape, "TAPE_BYTES", 0)
    for one, two in zip(kept, real_gradients(f, y0, TIMES["some"]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
