"""A result is its sample's own: neighbours, place and threads do not matter to it."""

import warnings

import pytest
import torch

from sknode.ode import SolverWarning, kernels, solve_ode

SETTINGS = [
    {"rtol": 1e-5, "atol": 1e-5},
    {"method": "dopri8", "rtol": 1e-7, "atol": 1e-7, "controller": "PID"},
    {"method": "rk4", "step_size": 0.13},
]


def rows_of_times(batch, n_times):
    spread = torch.linspace(-1, 2, batch, dtype=torch.float64)[:, None]
    return spread * torch.linspace(0, 1, n_times, dtype=torch.float64)


@pytest.fixture(params=["shared", "own"])
def times(request):
    """Output times: the same for all rows, or others for each."""

    def make(batch):
        t = rows_of_times(batch, 6)
        return t[-1] if request.param == "shared" else t

    return make


def pick(t, index):
    return t if t.ndim == 1 else t[index]


def assert_equal_rows(got, expected, index):
    """Compare to the bit: states, gradients of the initial states, counts."""
    one, two = got.solution, expected.solution
    assert torch.equal(one.y, two.y[index])
    assert torch.equal(one.status, two.status[index])
    assert torch.equal(one.t_reached, two.t_reached[index])
    for name, count in two.stats.items():
        assert torch.equal(one.stats[name], count[index]), name


@pytest.mark.parametrize("settings", SETTINGS, ids=["dopri5", "dopri8", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu"])
def test_rows_do_not_depend_on_the_batch(
    settings, dtype, activation, times, instruction_set, make_field, make_states, run
):
    batch = 37
    field = make_field(3, (17, 5), activation, time=True, dtype=dtype, gain=2)
    y0, t = make_states(batch, 3, dtype=dtype), times(batch)
    everyone = run(field, y0, t, **settings)
    generator = torch.Generator().manual_seed(0)
    choices = [torch.randperm(batch, generator=generator), torch.arange(batch).flip(0)]
    choices += [torch.arange(n) for n in (1, 2, 15, 16, 17, 33)]
    choices += [torch.tensor([i]) for i in (5, 36)]
    choices.append(torch.arange(batch).repeat(3))
    for index in choices:
        got = run(field, y0[index], pick(t, index), **settings)
        assert_equal_rows(got, everyone, index)


@pytest.mark.parametrize("dim", [1, 2, 7, 16])
@pytest.mark.parametrize("width", [1, 3, 33])
@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_gradients_of_a_row_do_not_depend_on_the_batch(
    dim, width, gradient, instruction_set, make_field, make_states
):
    field, t = make_field(dim, (width,), "silu", time=True), rows_of_times(37, 4)
    y0 = make_states(37, dim)

    def differentiate(index):
        start = y0[index].requires_grad_()
        y = solve_ode(field, start, t[index], gradient=gradient).y
        return torch.autograd.grad(y.sin().sum(), start)[0]

    everyone = differentiate(torch.arange(37))
    for index in (torch.arange(37).flip(0), torch.arange(5), torch.tensor([36])):
        assert torch.equal(differentiate(index), everyone[index])


def outcomes(field, y0, t, **settings):
    """Return all that a solve leaves of every row, recorded and not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        with torch.no_grad():
            found = [solve_ode(field, y0, t, **settings)]
        start = y0.clone().requires_grad_()
        found.append(solve_ode(field, start, t, **settings))
    yield torch.autograd.grad(found[1].y.sin().sum(), start)[0]
    for solution in found:
        yield from (solution.y, solution.status, solution.t_reached)
        yield from solution.stats.values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_times", [2, 5])
def test_rows_that_end_at_different_times(
    dtype, n_times, instruction_set, make_field, make_states
):
    # the last ones of a tile move together, whatever lanes they were in
    field = make_field(3, (11, 6), gain=3, dtype=dtype)
    y0 = make_states(90, 3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    length = 12 * torch.rand(90, 1, generator=generator, dtype=torch.float64) ** 5
    length[[4, 17]] = 0
    t = length * torch.linspace(0, 1, n_times, dtype=torch.float64)
    settings = {"rtol": 1e-5, "atol": 1e-5, "max_steps": 42}
    alone = [list(outcomes(field, y0[[i]], t[[i]], **settings)) for i in range(len(y0))]
    expected = [torch.cat(rows) for rows in zip(*alone, strict=True)]
    status = expected[2]
    assert 0 < (status > 0).sum() < 10
    for n in (5, 16, 17, 33, 40, 90):
        together = outcomes(field, y0[:n], t[:n], **settings)
        for one, two in zip(together, expected, strict=True):
            assert torch.equal(one, two[:n])


def test_a_failing_neighbour_changes_nothing(
    instruction_set, make_field, make_states, run
):
    field, y0, t = make_field(3, (8,)), make_states(20, 3), rows_of_times(20, 4)
    good = torch.tensor([i for i in range(20) if i not in (0, 3, 17)])
    bad = y0.clone()
    bad[0], bad[3, 1], bad[17] = torch.nan, torch.inf, 1e300
    expected = run(field, y0[good], t[good])
    got = run(field, bad, t)
    assert got.solution.status[[0, 3]].tolist() == [3, 3]
    for one, two in (
        (got.solution.y[good], expected.solution.y),
        (got.solution.status[good], expected.solution.status),
        (got.gradients[0][good].isfinite().all(), torch.tensor(True)),
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 17, 700])
def test_threads_change_no_bit(
    dtype, batch, instruction_set, make_field, make_states, run, monkeypatch
):
    monkeypatch.setattr(kernels, "THREAD_WORK", 0)
    field = make_field(3, (33, 16), time=True, dtype=dtype)
    y0, t = make_states(batch, 3, dtype=dtype), rows_of_times(batch, 4)
    torch.set_num_threads(1)
    expected = run(field, y0, t)
    # more than there are processors, so that they do take turns
    for threads in (2, 7):
        torch.set_num_threads(threads)
        got = run(field, y0, t)
        assert torch.equal(got.solution.y, expected.solution.y)
        for a, b in zip(got.gradients, expected.gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("thread_work", [0, 10**12])
@pytest.mark.parametrize("max_steps", [9, 1000])
def test_lanes_go_on_with_further_samples(
    thread_work, max_steps, make_field, make_states, compare, monkeypatch
):
    # some samples take no step, some many, some fail, in no order
    monkeypatch.setattr(kernels, "THREAD_WORK", thread_work)
    batch = 400
    length = 6 * torch.rand(batch, 1, generator=torch.Generator().manual_seed(0)) ** 4
    length[::7] = 0
    length[::11] *= -1
    t = length.double() * torch.tensor([0, 0.3, 0.3, 0.8, 1], dtype=torch.float64)
    field, y0 = make_field(3, (9,), time=True), make_states(batch, 3)
    # where a sample gives up, rounding in its error estimates shows
    compare(field, y0, t, max_steps=max_steps, within=1e-7)


def test_wide_layers_share_their_memory(make_field, make_states, compare):
    # gradients are summed up in parts, fewer of them where a part is large
    field = make_field(2, (1500, 1500), "relu", gain=1)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    compare(field, make_states(130, 2), t, method="euler", step_size=1.0)
