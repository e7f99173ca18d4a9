"""Flows of densities by the kernels: what torch computes, row by row."""

import pytest
import torch

from sknode._density_flow import DensityFlow
from sknode.fields import (
    ACTIVATIONS,
    ConcatSquashField,
    LogDensityField,
    MixtureField,
    PlanarField,
)
from sknode.ode import kernels, solve_ode
from sknode.ode.march import march

HIDDEN = [(9,), (9, 8), (1, 5), (64, 17)]
T = torch.tensor([1.0, 0.7, 0.1], dtype=torch.float64)
GRID = [1.0, 0.8, 0.35, 0.0]
ADAPTIVE = {"rtol": 1e-5, "atol": 1e-6, "row_wise": True}


def squash(dim, hidden, activation="silu", **settings):
    """Return a field that depends on time and bends."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = ConcatSquashField(dim, hidden, activation, **settings).double()
    with torch.no_grad():
        field.modulation.weight.mul_(5.0)
    return field


def mixture(dim, n_components):
    generator = torch.Generator().manual_seed(1)
    means, roots, weights = (
        torch.randn(n_components, *shape, generator=generator, dtype=torch.float64)
        for shape in ((dim,), (dim, dim), ())
    )
    covariances = 0.4 * roots @ roots.mT / dim + 0.1 * torch.eye(dim).double()
    return MixtureField(weights.square() + 0.1, means, covariances)


def flow(dim, hidden, n_components=0, activation="silu", **settings):
    """Return a field of states (n, dim + 1), with the flow of a mixture or without."""
    field = squash(dim, hidden, activation, **settings)
    if not n_components:
        return LogDensityField(field)
    module = DensityFlow(dim, n_components, False, False, "mlp", hidden, activation)
    module.residual, module.mixture = field, mixture(dim, n_components)
    return module


def stepped(field, y0, grid=GRID):
    """Return the end and its gradients: by the state, and by the parameters."""
    y0 = y0.clone().requires_grad_()
    end = march(field, y0, grid)
    weights = torch.cos(torch.arange(end.numel(), dtype=end.dtype)).view_as(end)
    inputs = [y0, *(p for p in field.parameters() if p.requires_grad)]
    return [end, *torch.autograd.grad((weights * end).sum(), inputs)]


def assert_near(got, expected, within=1e-10):
    for a, b in zip(got, expected, strict=True):
        size = max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=within * size)


# kinks magnify the rounding of step sizes: see test_agreement.py
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if "elu" not in a])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("n_components", [0, 3])
def test_solves_are_those_of_torch(
    activation, hidden, n_components, make_states, compare
):
    field = flow(3, hidden, n_components, activation)
    compare(field, make_states(21, 4), T, **ADAPTIVE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("n_components", [0, 3])
def test_marches_are_those_of_torch(
    activation, hidden, n_components, instruction_set, make_states, fused
):
    field, y0 = flow(3, hidden, n_components, activation), make_states(37, 4)
    got = stepped(field, y0)
    assert fused(got[0])
    with kernels.reference():
        expected = stepped(field, y0)
    assert_near(got, expected)


@pytest.mark.parametrize("dim", [1, 2, 8, 17])
@pytest.mark.parametrize("n_components", [0, 1, 7])
@pytest.mark.parametrize("batch", [1, 70])
def test_sizes(dim, n_components, batch, instruction_set, make_states):
    field = flow(dim, (19, 33), n_components, n_frequencies=dim % 3)
    y0 = make_states(batch, dim + 1)
    got = stepped(field, y0)
    with kernels.reference():
        assert_near(got, stepped(field, y0))


@pytest.mark.parametrize("n_components", [0, 3])
def test_single_precision_is_near(n_components, instruction_set, make_states):
    field, y0 = flow(4, (32, 32), n_components), make_states(40, 5)
    expected = stepped(field, y0)
    got = stepped(field.float(), y0.float())
    assert got[0].dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("n_components", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_the_batch(
    n_components, dtype, instruction_set, make_states
):
    field = flow(3, (17, 9), n_components).to(dtype)
    y0 = make_states(45, 4, dtype=dtype)
    end, slope = stepped(field, y0)[:2]
    with torch.no_grad():
        solved = solve_ode(field, y0, T, **ADAPTIVE).y
    for index in (torch.arange(44, -1, -1), torch.arange(7), torch.tensor([33])):
        assert torch.equal(march(field, y0[index], GRID), end[index])
        with torch.no_grad():
            assert torch.equal(
                solve_ode(field, y0[index], T, **ADAPTIVE).y, solved[index]
            )
    doubled = march(field, y0.repeat(2, 1).requires_grad_(), GRID)
    assert torch.equal(doubled[45:], end)
    assert slope.shape == y0.shape


def test_times_may_be_those_of_rows(make_states, compare):
    spread = torch.linspace(0.4, 0.9, 21, dtype=torch.float64)[:, None]
    compare(flow(2, (9, 8), 2), make_states(21, 3), T * spread, **ADAPTIVE)


@pytest.mark.parametrize("method", ["tsit5", "dopri8"])
def test_other_methods(method, make_states, compare):
    compare(flow(2, (9, 8), 2), make_states(9, 3), T, method=method, **ADAPTIVE)


def test_a_row_that_fails_is_not_a_number_and_alone(instruction_set, make_states):
    field, y0 = flow(3, (9, 8)), make_states(20, 4)
    expected = march(field, y0, GRID)
    y0[3] = torch.nan
    got = march(field, y0, GRID)
    assert got[3].isnan().all()
    rest = torch.arange(20) != 3
    assert torch.equal(got[rest], expected[rest])


def test_frozen_parameters_get_no_gradient(instruction_set, make_states, fused):
    field, y0 = flow(3, (9, 8), 2), make_states(20, 4)
    field.residual.layers[1].weight.requires_grad_(False)
    got = stepped(field, y0)
    assert fused(got[0])
    with kernels.reference():
        assert_near(got, stepped(field, y0))


class Halved(ConcatSquashField):
    """Another field with the same parameters."""

    def with_divergence(self, t, y, condition=None):
        slope, divergence = super().with_divergence(t, y, condition)
        return slope / 2, divergence / 2


def hooked():
    field = LogDensityField(squash(3, (9, 8)))
    field.field.last.register_forward_hook(lambda module, args, value: value / 2)
    return field


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogDensityField(squash(3, (9, 8, 7))),
        lambda: LogDensityField(Halved(3, (9, 8)).double()),
        lambda: LogDensityField(PlanarField(3, 7).double()),
        lambda: DensityFlow(3, 2, True, False, "planar", (7,), "tanh").double(),
        hooked,
    ],
    ids=["deep", "subclass", "planar", "planar flow", "hooked"],
)
def test_what_has_no_kernel_goes_by_torch(make, make_states):
    field, y0 = make(), make_states(10, 4)
    got = stepped(field, y0)
    with kernels.reference():
        expected = stepped(field, y0)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("gradient", ["continuous", "backprop"])
def test_other_gradients_go_by_torch(gradient, make_states, run):
    field, y0 = flow(3, (9, 8), 2), make_states(10, 4)
    settings = {"row_wise": True, "rtol": 1e-9, "atol": 1e-9}
    got = run(field, y0, T, **settings)
    y = y0.clone().requires_grad_()
    solution = solve_ode(field, y, T, gradient=gradient, **settings)
    weights = torch.cos(torch.arange(solution.y.numel(), dtype=y.dtype))
    loss = (weights.view_as(solution.y) * solution.y).sum()
    inputs = [y, *field.parameters()]
    assert_near(torch.autograd.grad(loss, inputs), got.gradients, within=1e-6)
