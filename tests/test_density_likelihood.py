"""CNFDensity where training simulates: penalties, estimated divergences, own fields."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from sknode import CNFDensity
from sknode._density_flow import DensityFlow, FlowWithEnergy
from sknode.datasets import make_density
from sknode.fields import DivergenceField
from sknode.ode import solve_ode

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SHORT = {
    "n_components": 1,
    "marginals": False,
    "refine": False,
    "early_stopping": False,
    "max_iter": 6,
    "random_state": 0,
}


class Swirl(nn.Module):
    """A small field of one's own, without closed form."""

    def __init__(self, shape):
        super().__init__()
        (dim,) = shape
        self.inner, self.outer = nn.Linear(dim + 1, 16), nn.Linear(16, dim)
        self.unused = nn.Linear(dim, dim)

    def forward(self, t, y):
        # times are a column, as promised, so that they can be stacked
        return self.outer(torch.tanh(self.inner(torch.cat([y, t], 1))))


class Bends(nn.Module):
    """A field of single states in disguise."""

    def forward(self, t, y):
        return y[:, :1]


@pytest.fixture(scope="module")
def moons():
    return make_density("moons", 400, random_state=0)[0]


@pytest.mark.slow
def test_penalties_make_flows_that_spend_less(moons):
    def spent(**penalties):
        density = CNFDensity(**SHORT, objective="likelihood", **penalties).fit(moons)
        flow = density.module_
        field = FlowWithEnergy(flow, torch.ones(2, dtype=torch.float64))
        state = torch.zeros(200, 5, dtype=torch.float64)
        state[:, :2] = torch.from_numpy(density.transform(moons)[:200])
        end = solve_ode(field, state, torch.tensor([0.0, 1.0]), rtol=1e-6).y[:, -1]
        return end[:, 3:].mean(0), density.score(moons)

    plain, score = spent()
    kinetic, kinetic_score = spent(kinetic_penalty=3.0)
    jacobian, jacobian_score = spent(jacobian_penalty=3.0)
    assert kinetic[0] < 0.95 * plain[0]
    assert jacobian[1] < 0.95 * plain[1]
    # what a penalty costs is likelihood
    assert kinetic_score < score
    assert jacobian_score < score


def test_energies_are_integrals_of_the_velocity():
    torch.manual_seed(0)
    flow = DensityFlow(2, 3, True, False, "mlp", (8, 8), "tanh").double()
    with torch.no_grad():
        flow.residual.last.weight.normal_()
    probe = torch.tensor([1.0, -1.0], dtype=torch.float64)
    field = FlowWithEnergy(flow, probe)
    t, y = torch.tensor(0.3, dtype=torch.float64), torch.randn(4, 2).double()
    slope = field(t, nn.functional.pad(y, (0, 3)))
    velocity = flow.velocity(t, y)
    torch.testing.assert_close(slope[:, :3], flow(t, nn.functional.pad(y, (0, 1))))
    torch.testing.assert_close(slope[:, 3], velocity.square().mean(1))
    for row in range(4):
        point = y[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda z: flow.velocity(t, z)[0], point
        )[:, 0]
        torch.testing.assert_close(slope[row, 4], (probe @ jacobian).square().mean())


def test_penalties_belong_to_simulation(moons):
    with pytest.raises(ValueError, match="use objective='likelihood'"):
        CNFDensity(kinetic_penalty=0.1).fit(moons)


@pytest.mark.parametrize(
    "objective",
    ["flow_matching", pytest.param("likelihood", marks=pytest.mark.slow)],
)
def test_a_field_of_ones_own_is_trained_and_exact(moons, objective):
    density = CNFDensity(
        **{**SHORT, "refine": True, "max_iter": 12},
        vector_field=Swirl,
        objective=objective,
        learning_rate_init=2e-2,
    ).fit(moons)
    gaussian = CNFDensity(n_components=1, marginals=False, max_iter=1).fit(moons[:150])
    assert isinstance(density.module_.residual, DivergenceField)
    assert density.score(moons) > gaussian.score(moons) + 0.1
    point = moons[:1]

    def transform(x):
        return density.transform(x.reshape(1, -1))[0]

    h, eye = 1e-5, np.eye(2)
    steps = [
        (transform(point + h * e) - transform(point - h * e)) / (2 * h) for e in eye
    ]
    log_det = np.linalg.slogdet(np.array(steps))[1]
    base = -0.5 * (transform(point) ** 2).sum() - np.log(2 * np.pi)
    np.testing.assert_allclose(density.score_samples(point), base + log_det, atol=1e-5)
    again = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(
        again.score_samples(moons), density.score_samples(moons)
    )
    assert clone(density).vector_field is Swirl


def test_a_field_of_ones_own_can_be_searched(moons):
    search = GridSearchCV(
        CNFDensity(**SHORT, vector_field=Swirl), {"alpha": [1e-4, 1e-3]}, cv=2, n_jobs=2
    ).fit(moons)
    assert np.isfinite(search.best_score_)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"vector_field": Swirl}, {"hidden_layer_sizes": (16,) * 3}]
)
@pytest.mark.parametrize("refine", [True, False])
def test_estimated_divergences_train_about_as_well(moons, settings, refine):
    settings = {
        **SHORT,
        **settings,
        "refine": refine,
        "objective": "likelihood",
        "max_iter": 10,
        "optimizer": "adam",
        "learning_rate_init": 1e-2,
    }
    exact = CNFDensity(**settings).fit(moons)
    estimated = CNFDensity(**settings, divergence="hutchinson").fit(moons)
    gaussian = CNFDensity(n_components=1, marginals=False, max_iter=1).fit(moons[:150])
    assert estimated.loss_curve_ != exact.loss_curve_
    gains = [d.score(moons) - gaussian.score(moons) for d in (estimated, exact)]
    assert gains[0] > 0.5 * gains[1] > 0.05
    # an estimate in training only: the log-density is that of the transform
    a, b = (estimated.score_samples(moons) for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_unsuitable_fields_are_rejected(moons):
    with pytest.raises(TypeError, match="factory"):
        CNFDensity(vector_field=Swirl((2,))).fit(moons)
    with pytest.raises(ValueError, match="vector_field"):
        CNFDensity(vector_field=lambda shape: Bends()).fit(moons)
    with pytest.raises(ValueError, match="vector_field must be None"):
        CNFDensity(vector_field=Swirl, conditional=True).fit(moons, moons[:, 0] > 0)


def test_penalties_reach_fit_target():
    def log_ring(x):
        return -8.0 * (x.square().sum(1).sqrt() - 2.0).square()

    losses = [
        CNFDensity((8,), max_iter=3, kinetic_penalty=strength, random_state=0)
        .fit_target(log_ring, 2)
        .loss_curve_[0]
        for strength in (0.0, 1.0)
    ]
    assert losses[1] > losses[0] + 0.1
