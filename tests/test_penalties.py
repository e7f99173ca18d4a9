"""The penalties on the flow (Finlay et al. 2020), as parameters of the ODE-Nets."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

import sknode._network
from sknode import ODENetClassifier, ODENetRegressor
from sknode.fields import EnergyField
from sknode.ode import solve_ode

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def moons():
    return make_moons(150, noise=0.1, random_state=0)


def train(moons, **penalties):
    settings = {"max_iter": 40, "learning_rate_init": 1e-2, "tol": 0.0}
    return ODENetClassifier(**settings, random_state=0, **penalties).fit(*moons)


@pytest.fixture(scope="module")
def plain(moons):
    return train(moons)


def evaluations(clf, X):
    tight = copy.deepcopy(clf).set_params(rtol=1e-6, atol=1e-6)
    return tight.count_evaluations(X).mean()


def energies(clf, X):
    """Return what the flow spends, by fine quadrature along exact trajectories."""
    module = copy.deepcopy(clf.module_)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    with torch.no_grad():
        start = module.initial_state(torch.from_numpy(X))
        path = solve_ode(module.field, start, t, rtol=1e-8, atol=1e-8).y
        slopes = torch.stack([module.field(t[i], path[:, i]) for i in range(101)], 1)
        squares = torch.stack(
            [
                module.field.jacobian(t[i], path[:, i])[0].square().sum((1, 2))
                for i in range(101)
            ],
            1,
        )
    kinetic = torch.trapezoid(slopes.square().mean(-1), t, dim=1).mean()
    return float(kinetic), float(torch.trapezoid(squares / 2, t, dim=1).mean())


def test_penalties_save_evaluations_at_the_same_accuracy(moons, plain):
    straight = train(moons, kinetic_penalty=0.1, jacobian_penalty=0.1)
    assert evaluations(straight, moons[0]) < 0.7 * evaluations(plain, moons[0])
    assert straight.score(*moons) > plain.score(*moons) - 0.03
    assert energies(straight, moons[0])[0] < 0.8 * energies(plain, moons[0])[0]


def test_a_jacobian_penalty_makes_the_field_smoother(moons, plain):
    smooth = train(moons, jacobian_penalty=0.1)
    assert energies(smooth, moons[0])[1] < 0.8 * energies(plain, moons[0])[1]
    assert smooth.score(*moons) > plain.score(*moons) - 0.03


def test_penalties_of_zero_are_none(moons, plain):
    zero = train(moons, kinetic_penalty=0, jacobian_penalty=0.0)
    np.testing.assert_array_equal(
        zero.decision_function(moons[0]), plain.decision_function(moons[0])
    )
    assert zero.loss_curve_ == plain.loss_curve_
    # and a little is a little
    little = ODENetClassifier(
        kinetic_penalty=1e-12, rtol=1e-6, atol=1e-6, max_iter=3, random_state=0
    )
    none = copy.deepcopy(little).set_params(kinetic_penalty=0.0)
    np.testing.assert_allclose(
        little.fit(*moons).loss_curve_, none.fit(*moons).loss_curve_, rtol=1e-5
    )


def test_the_loss_contains_the_energies(moons):
    X, _ = moons
    settings = {
        "learning_rate_init": 1e-14,
        "alpha": 0,
        "rtol": 1e-8,
        "atol": 1e-8,
        "max_iter": 1,
        "random_state": 0,
    }
    plain = ODENetRegressor(**settings).fit(X, X)
    kinetic, _ = energies(plain, X)
    penalized = ODENetRegressor(kinetic_penalty=3.0, **settings).fit(X, X)
    assert penalized.loss_ - plain.loss_ == pytest.approx(3 * kinetic, rel=1e-3)
    # the signs are drawn: between the smallest and the largest by any of them
    with_jacobian = ODENetRegressor(jacobian_penalty=2.0, **settings).fit(X, X)
    share = (with_jacobian.loss_ - plain.loss_) / (2 * energies(plain, X)[1])
    assert 0 < share < 2


def test_the_probes_are_signs_drawn_anew_for_every_batch(moons, monkeypatch):
    probes = []

    def spy(field, shape, probe):
        probes.append(probe)
        return EnergyField(field, shape, probe)

    monkeypatch.setattr(sknode._network, "EnergyField", spy)
    ODENetClassifier(
        jacobian_penalty=0.1, augment_dim=8, batch_size=50, max_iter=4, random_state=0
    ).fit(*moons)
    drawn = torch.stack(probes)
    assert drawn.shape == (12, 10)
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    assert len(drawn.unique(dim=0)) == 12


def test_penalties_are_reproducible_and_draw_from_random_state_only(moons):
    torch.manual_seed(0)
    settings = {"jacobian_penalty": 0.5, "max_iter": 3}
    one = ODENetClassifier(**settings, random_state=0).fit(*moons)
    torch.manual_seed(1)
    two = ODENetClassifier(**settings, random_state=0).fit(*moons)
    three = ODENetClassifier(**settings, random_state=1).fit(*moons)
    assert one.loss_curve_ == two.loss_curve_ != three.loss_curve_


@pytest.mark.parametrize("penalty", ["kinetic_penalty", "jacobian_penalty"])
def test_a_weight_of_two_is_a_row_twice(penalty):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(24, 2)), np.arange(24) % 3
    weight = rng.integers(1, 3, 24)
    settings = {penalty: 0.3, "max_iter": 15, "tol": 0.0, "random_state": 0}
    one = ODENetClassifier(batch_size=24, **settings)
    one.fit(X, y, sample_weight=weight)
    two = ODENetClassifier(batch_size=weight.sum(), **settings)
    two.fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    np.testing.assert_allclose(
        one.decision_function(X), two.decision_function(X), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("gradient", ["continuous", "backprop"])
def test_every_gradient_trains_alike(moons, gradient):
    settings = {
        "kinetic_penalty": 0.1,
        "jacobian_penalty": 0.1,
        "rtol": 1e-6,
        "atol": 1e-6,
        "max_iter": 3,
        "random_state": 0,
    }
    one = ODENetClassifier(**settings).fit(*moons)
    two = ODENetClassifier(gradient=gradient, **settings).fit(*moons)
    np.testing.assert_allclose(one.loss_curve_, two.loss_curve_, rtol=1e-5)


@pytest.mark.parametrize("penalty", ["kinetic_penalty", "jacobian_penalty"])
def test_negative_penalties_are_refused(moons, penalty):
    with pytest.raises(ValueError, match=penalty):
        ODENetClassifier(**{penalty: -1.0}).fit(*moons)
