"""Divergences in closed form are the traces of the Jacobians."""

import math

import pytest
import torch

from sknode.fields import (
    ACTIVATIONS,
    ConcatSquashField,
    DivergenceField,
    LogDensityField,
    MixtureField,
    MLPField,
    PlanarField,
    SumField,
)
from sknode.fields.activations import get_activation, value_and_slope
from sknode.ode import solve_ode


def mixture(dim=3, n_components=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n_components, dim, dim, generator=generator).double()
    covariances = 0.3 * root @ root.mT / dim + 0.02 * torch.eye(dim).double()
    means = torch.randn(n_components, dim, generator=generator).double()
    weights = 0.2 + torch.rand(n_components, generator=generator).double()
    return MixtureField(weights, means, covariances)


def make(name):
    torch.manual_seed(0)
    fields = {
        "squash1": lambda: ConcatSquashField(3, (9,)),
        "squash2": lambda: ConcatSquashField(3, (9, 8)),
        "squash4": lambda: ConcatSquashField(3, (9, 8, 7, 6), "silu", n_frequencies=0),
        "planar": lambda: PlanarField(3, 7),
        "mixture": mixture,
        "sum": lambda: SumField(PlanarField(3, 7), ConcatSquashField(3), mixture()),
        "any": lambda: DivergenceField(MLPField(3, (5, 6, 7), time_dependent=True)),
    }
    return fields[name]().double()


FIELDS = ("squash1", "squash2", "squash4", "planar", "mixture", "sum", "any")


@pytest.fixture
def y():
    generator = torch.Generator().manual_seed(1)
    return 1.5 * torch.randn(20, 3, generator=generator, dtype=torch.float64)


def trace(f, y):
    rows = [torch.autograd.functional.jacobian(f, row[None])[0, :, 0] for row in y]
    return torch.stack([row.trace() for row in rows])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_divergence_is_the_trace_of_the_jacobian(name, t, y):
    field, t = make(name), torch.tensor(t, dtype=torch.float64)
    slope, divergence = field.with_divergence(t, y)
    close(slope, field(t, y))
    close(divergence, trace(lambda row: field(t, row), y))


@pytest.mark.parametrize("name", FIELDS)
def test_rows_may_have_times_of_their_own(name, y):
    field, t = make(name), torch.linspace(0, 1, 20, dtype=torch.float64)
    slope, divergence = field.with_divergence(t[:, None], y)
    singles = [field.with_divergence(s, row[None]) for s, row in zip(t, y, strict=True)]
    close(slope, torch.cat([a for a, _ in singles]))
    close(divergence, torch.cat([b for _, b in singles]))


@pytest.mark.parametrize("name", FIELDS)
def test_both_results_are_differentiable(name, y):
    field, y = make(name), y[:3].clone().requires_grad_()
    t = torch.tensor(0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: field.with_divergence(t, y), y)
    slope, divergence = field.with_divergence(t, y)
    (slope.sum() + divergence.sum()).backward()
    for parameter in field.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize("name", FIELDS)
def test_without_gradients_the_same_and_no_graph(name, y):
    field, t = make(name), torch.tensor(0.4, dtype=torch.float64)
    expected = field.with_divergence(t, y)
    with torch.no_grad():
        results = field.with_divergence(t, y)
    for actual, value in zip(results, expected, strict=True):
        assert not actual.requires_grad
        close(actual, value.detach())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_of_activations(activation):
    z = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    value, slope = value_and_slope(activation, z)
    close(value, get_activation(activation).function(z))
    (expected,) = torch.autograd.grad(value.sum(), z)
    apart = z.detach().abs() > 1e-9  # where relu has no slope
    close(slope[apart], expected[apart])


def test_zero_start_leaves_a_sum_as_it_is(y):
    start = mixture()
    t = torch.tensor(0.3, dtype=torch.float64)
    for residual in (
        ConcatSquashField(3, (9, 8), zero_init=True),
        PlanarField(3, 7, zero_init=True),
    ):
        total = SumField(start, residual.double())
        for a, b in zip(
            total.with_divergence(t, y), start.with_divergence(t, y), strict=True
        ):
            close(a.detach(), b)


def test_a_condition_changes_the_field_and_not_the_other_rows(y):
    torch.manual_seed(0)
    field = ConcatSquashField(3, (9, 8), condition_dim=2).double()
    t, condition = torch.tensor(0.3).double(), torch.zeros(20, 2).double()
    slope, divergence = field.with_divergence(t, y, condition)
    close(divergence, trace(lambda row: field(t, row, condition[:1]), y))
    condition[0] = 1.0
    changed = (field(t, y, condition) != slope).any(1)
    assert changed[0] and not changed[1:].any()
    with pytest.raises(ValueError, match=r"condition must have shape \(n, 2\)"):
        field(t, y)
    with pytest.raises(ValueError, match="condition must be None"):
        ConcatSquashField(3).double()(t, y, condition)


def test_probes_estimate_the_divergence_without_bias(y):
    torch.manual_seed(0)
    field = MLPField(3, (8, 8)).double()
    t = torch.tensor(0.0, dtype=torch.float64)
    exact = DivergenceField(field).with_divergence(t, y)[1]
    # all eight vectors of signs together are the expectation
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()
    close(DivergenceField(field, signs).with_divergence(t, y)[1], exact)
    one = DivergenceField(field, signs[:1]).with_divergence(t, y)[1]
    assert (one - exact).abs().max() > 1e-3


def test_rows_may_have_probes_of_their_own(y):
    field = MLPField(y.shape[1], (8, 8)).double()
    probes = torch.randint(2, (3, *y.shape)).double() * 2 - 1
    t = torch.tensor(0.5, dtype=torch.float64)
    _, divergence = DivergenceField(field, probes).with_divergence(t, y)
    for row in range(len(y)):
        alone = DivergenceField(field, probes[:, row])
        _, expected = alone.with_divergence(t, y[row : row + 1])
        torch.testing.assert_close(divergence[row : row + 1], expected)


def reference(field_arguments, x):
    weights, means, covariances = field_arguments
    logs = [
        torch.distributions.MultivariateNormal(m, c).log_prob(x) + w.log()
        for w, m, c in zip(weights / weights.sum(), means, covariances, strict=True)
    ]
    return torch.stack(logs).logsumexp(0)


@pytest.mark.parametrize("small", [1.0, 1e-4, 1e-8])
def test_mixture_field_carries_the_normal_to_the_mixture(small):
    weights = torch.tensor([0.3, 0.5, 1.2]).double()
    means = torch.tensor([[0.0, 1.0], [-1.5, 0.0], [1.0, -1.0]]).double()
    root = torch.tensor([[[0.6, 0.0], [0.3, 0.4]]] * 3).double()
    scale = torch.tensor([1.0, 0.5, small]).double()[:, None, None]
    covariances = scale * (root @ root.mT)
    field = MixtureField(weights, means, covariances)
    torch.manual_seed(0)
    x1 = torch.cat(
        [
            torch.distributions.MultivariateNormal(m, c).sample((30,))
            for m, c in zip(means, covariances, strict=True)
        ]
    )
    expected = reference((weights, means, covariances), x1)
    one = torch.tensor(1.0).double()
    torch.testing.assert_close(field.log_density(one, x1), expected)
    state = torch.cat([x1, torch.zeros(90, 1).double()], 1)
    solution = solve_ode(
        LogDensityField(field), state, [1.0, 0.0], rtol=1e-10, atol=1e-10
    )
    x0, change = solution.y[:, -1, :2], solution.y[:, -1, 2]
    base = -0.5 * x0.square().sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(base - change, expected, rtol=1e-6, atol=1e-6)


def test_mixture_field_is_the_conditional_mean_of_the_path():
    # E[x1 - x0 | x_t] by quadrature over x1, in one dimension
    weights = torch.tensor([0.4, 0.6]).double()
    means, covariances = torch.tensor([[-1.0], [0.7]]), torch.tensor([[[0.2]], [[0.5]]])
    field = MixtureField(weights, means.double(), covariances.double())
    y = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x1 = torch.linspace(-8, 8, 20001, dtype=torch.float64)[None]
    density = field.log_density(torch.tensor(1.0), x1.T).exp()
    for t in (0.2, 0.5, 0.8):
        x0 = (y - t * x1) / (1 - t)
        joint = density * torch.exp(-0.5 * x0.square())
        expected = (joint * (x1 - x0)).sum(1) / joint.sum(1)
        torch.testing.assert_close(field(torch.tensor(t), y)[:, 0], expected)


def test_scores_are_gradients_of_the_log_density(y):
    field, y = mixture(), y.requires_grad_()
    for t in (0.0, 0.6, 1.0):
        velocity, score = field.with_score(torch.tensor(t), y)
        (expected,) = torch.autograd.grad(
            field.log_density(torch.tensor(t), y).sum(), y
        )
        close(score, expected)
        close(velocity, field(torch.tensor(t), y))


def test_far_away_the_mixture_stays_finite():
    field = mixture()
    y = torch.tensor([[1e6, -1e6, 1e6]], dtype=torch.float64)
    for t in (0.0, 0.5, 1.0):
        slope, divergence = field.with_divergence(torch.tensor(t), y)
        assert torch.isfinite(slope).all() and torch.isfinite(divergence).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConcatSquashField(0), "positive integers"),
        (lambda: ConcatSquashField(2, ()), "at least one layer"),
        (lambda: ConcatSquashField(2, n_frequencies=-1), "n_frequencies must be"),
        (lambda: ConcatSquashField(2, activation="cube"), "activation must be one of"),
        (lambda: PlanarField(2, 0), "positive integers"),
        (lambda: PlanarField(2, n_frequencies=-1), "n_frequencies must be"),
        (lambda: SumField(), "at least one field"),
        (lambda: DivergenceField(MLPField(2, (3,)), torch.ones(2)), "probes must have"),
        (
            lambda: MixtureField(torch.ones(1), torch.ones(2, 2), torch.eye(2)[None]),
            "must have shapes",
        ),
        (
            lambda: MixtureField(torch.ones(1), torch.ones(1, 2), -torch.eye(2)[None]),
            "positive definite",
        ),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_units_are_placed_where_the_data_are():
    torch.manual_seed(0)
    rows = torch.randn(50, 3) + torch.tensor([0.0, 10.0, -10.0])
    field = ConcatSquashField(3, (12, 8), n_frequencies=0)
    field.place_units(rows, 4.0, torch.Generator().manual_seed(0))
    weight = field.layers[0].weight
    assert ((weight != 0).sum(1) == 1).all()  # along one component each
    assert ((weight != 0).sum(0) == 4).all()
    steep = weight.abs().sum(1)
    assert (steep >= 2.0).all() and (steep <= 6.0).all()
    centres = -field.modulation.bias[20:32] / weight.sum(1)
    component = weight.abs().argmax(1)
    for centre, i in zip(centres, component, strict=True):
        assert (rows[:, i] - centre).abs().min() < 1e-4
    again = ConcatSquashField(3, (12, 8), n_frequencies=0)
    again.place_units(rows, 4.0, torch.Generator().manual_seed(0))
    assert torch.equal(again.layers[0].weight, weight)
