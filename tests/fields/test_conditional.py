"""Fields that depend on a condition, a row each."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from sknode.fields import (
    ClassMixtureField,
    ConcatSquashField,
    GivenField,
    JointMixtureField,
    LogDensityField,
    MixtureField,
    PlanarField,
)
from sknode.ode import solve_ode


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixture(n_components, size):
    root = draw(n_components, size, size, seed=1)
    covariances = root @ root.mT / size + 0.1 * torch.eye(size).double()
    return draw(n_components, size), covariances


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["classes", "values"])
def case(request):
    """A conditional mixture in three dimensions, with a condition a row."""
    weights = 0.5 + draw(4, seed=2).abs()
    if request.param == "classes":
        weights = torch.tensor([[2.0, 0], [1, 0], [0, 5], [1, 5]]).double()
        field = ClassMixtureField(weights, *mixture(4, 3))
        return field, torch.eye(2).double().repeat(6, 1)
    return JointMixtureField(3, weights, *mixture(4, 5)), draw(12, 2, seed=3)


def test_density_given_values_is_joint_over_marginal():
    means, covariances = mixture(4, 5)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    x, c = draw(12, 3, seed=4), draw(12, 2, seed=5)
    flow = JointMixtureField(3, weights, means, covariances).given(c)

    def log_density(rows, part):
        laws = [
            stats.multivariate_normal(m[part], s[part, part]).logpdf(rows) + np.log(w)
            for w, m, s in zip(
                weights.numpy(), means.numpy(), covariances.numpy(), strict=True
            )
        ]
        return logsumexp(laws, axis=0)

    joint = log_density(torch.cat([x, c], 1).numpy(), slice(0, 5))
    expected = joint - log_density(c.numpy(), slice(3, 5))
    close(flow.log_density(torch.tensor(1.0), x), torch.from_numpy(expected))


def test_density_given_a_class_is_that_of_its_components():
    means, covariances = mixture(3, 2)
    weights = torch.tensor([[2.0, 0], [1, 0], [0, 5]]).double()
    field, x = ClassMixtureField(weights, means, covariances), draw(6, 2, seed=4)
    one = MixtureField(weights[:2, 0], means[:2], covariances[:2])
    other = MixtureField(weights[2:, 1], means[2:], covariances[2:])
    flow, t = field.given(torch.eye(2).double()[[0, 0, 0, 1, 1, 1]]), torch.tensor(0.7)
    expected = torch.cat([one.log_density(t, x[:3]), other.log_density(t, x[3:])])
    close(flow.log_density(t, x), expected)
    close(flow(t, x), torch.cat([one(t, x[:3]), other(t, x[3:])]))


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_divergences_and_scores_are_derivatives(case, t):
    field, condition = case
    y, t = draw(12, 3, seed=6), torch.tensor(t, dtype=torch.float64)
    slope, divergence = field.given(condition).with_divergence(t, y)
    velocity, score = field.given(condition).with_score(t, y)
    close(velocity, slope)
    for i in range(12):
        flow = field.given(condition[i : i + 1])
        row = y[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda z: flow(t, z), row)  # noqa: B023
        close(jacobian[0, :, 0].trace(), divergence[i])
        gradient = torch.autograd.functional.jacobian(
            lambda z: flow.log_density(t, z),  # noqa: B023
            row,
        )
        close(gradient[0, 0], score[i])
        close(flow(t, row)[0], slope[i])


def test_flow_carries_the_normal_to_the_conditional_mixture(case):
    field, condition = case
    flow, z = field.given(condition), draw(12, 3, seed=7)
    base = -0.5 * z.square().sum(1) - 1.5 * np.log(2 * np.pi)
    state = torch.cat([z, base[:, None]], 1)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = solve_ode(LogDensityField(flow), state, times, rtol=1e-9, atol=1e-9).y[:, -1]
    close(flow.log_density(torch.tensor(1.0), y[:, :3]), y[:, 3], 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PlanarField(3, 7, condition_dim=2),
        lambda: ConcatSquashField(3, (9, 8), condition_dim=2),
    ],
    ids=["planar", "squash"],
)
def test_given_fields_know_their_divergence(make):
    torch.manual_seed(0)
    field, condition = make().double(), draw(8, 2)
    t, y = torch.tensor(0.3).double(), draw(8, 3, seed=1)
    slope, divergence = GivenField(field, condition).with_divergence(t, y)
    close(GivenField(field, condition)(t, y), slope)
    for i in range(8):
        given = GivenField(field, condition[i : i + 1])
        jacobian = torch.autograd.functional.jacobian(
            lambda z: given(t, z),  # noqa: B023
            y[i : i + 1],
        )
        close(jacobian[0, :, 0].trace(), divergence[i])
    assert (field(t, y, condition + 1) != slope).all()
    with pytest.raises(ValueError, match=r"condition must have shape \(n, 2\)"):
        field(t, y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PlanarField(3, condition_dim=-1), "condition_dim must be an integer"),
        (
            lambda: PlanarField(3)(torch.tensor(0.0), draw(2, 3).float(), draw(2, 1)),
            "condition must be None",
        ),
        (
            lambda: ClassMixtureField(torch.ones(2), *mixture(2, 3)),
            r"weights must have shape \(n_components, n_classes\)",
        ),
        (
            lambda: ClassMixtureField(torch.tensor([[1.0, 0], [1, 0]]), *mixture(2, 3)),
            "nor all zero in a class",
        ),
        (
            lambda: JointMixtureField(3, torch.ones(2), *mixture(2, 3)),
            "dim must be positive and less than .* 3. Got 3",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
