"""The training loop and its optimizers."""

import itertools
import math
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from torch import nn

from sknode import CNFDensity, ODENetClassifier, _training
from sknode._optimizers import _Optimizer, make_optimizer
from sknode._training import (
    Average,
    History,
    Recipe,
    train,
    warn_of_setbacks,
)
from sknode.ode import SolverError

RECIPE = Recipe(
    max_iter=10,
    batch_size=8,
    learning_rate=0.01,
    alpha=0.0,
    tol=0.0,
    n_iter_no_change=100,
    optimizer="muon",
)


def make_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def run(recipe, n=40, network=None, history=None, **options):
    """Train; return the learning rates, the number of rows seen, and the history."""
    network = network or make_network()
    optimizer = make_optimizer(network, recipe.optimizer, recipe.learning_rate)
    rates, seen, history = [], [], history or History()

    def objective(x):
        rates.append(optimizer.param_groups[0]["lr"])
        seen.append(x[:, 0].detach().clone())
        return network(x).square()[:, 0], torch.ones(len(x))

    x = torch.arange(3.0 * n).reshape(n, 3) / (3 * n)
    generator = torch.Generator().manual_seed(0)
    arguments = (x,), torch.ones(n), objective, optimizer, recipe, generator, history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        train(network, *arguments, **options)
    return rates, seen, history


def test_gradients_are_shortened_to_the_median_of_recent_ones(monkeypatch):
    monkeypatch.setattr(_training, "RECENT", 5)
    network, clip = make_network(), _training.Clip(None)
    direction = [torch.ones_like(p) for p in network.parameters()]
    unit = sum(float(x.sum()) for x in direction) ** 0.5
    norms = []
    for norm in [3.0, 1.0, 2.0, math.inf, 5.0, 0.5, 4.0, 1.5]:
        for p, x in zip(network.parameters(), direction, strict=True):
            p.grad = x * (norm / unit)
        clip(list(network.parameters()))
        norms.append(norm)
        recent = sorted(x for x in norms[-5:] if math.isfinite(x))
        median = recent[(len(recent) - 1) // 2]
        found = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        # what is not finite cannot be shortened
        expected = min(norm, median) if math.isfinite(norm) else math.nan
        assert float(found) == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_penalty_pulls_on_matrices_with_either_optimizer():
    for name in ("adam", "muon"):
        recipe = Recipe(**{**vars(RECIPE), "optimizer": name, "alpha": 1e6})
        network = make_network()
        norm = float(network[0].weight.detach().norm())
        run(recipe, network=network)
        assert float(network[0].weight.detach().norm()) < 0.9 * norm


def test_muon_goes_on_from_its_state():
    X, y = make_moons(60, noise=0.1, random_state=0)
    settings = {"optimizer": "muon", "random_state": 0, "hidden_layer_sizes": (8,)}
    whole = ODENetClassifier(**settings)
    for _ in range(2):
        whole.partial_fit(X, y, classes=[0, 1])
    halves = ODENetClassifier(**settings).partial_fit(X, y, classes=[0, 1])
    halves = pickle.loads(pickle.dumps(halves)).partial_fit(X, y)
    np.testing.assert_allclose(
        whole.decision_function(X), halves.decision_function(X), rtol=1e-12
    )


def test_learning_rate_falls_evenly_on_request():
    rates, _, _ = run(Recipe(**{**vars(RECIPE), "decays": True, "batch_size": 40}))
    np.testing.assert_allclose(rates, 0.01 * (1 - np.arange(10) / 10))


def test_learning_rate_falls_for_a_share_of_the_epochs_before():
    settings = {"tol": math.inf, "n_iter_no_change": 3, "max_iter": 100}
    settings |= {"fall_share": 2.0, "batch_size": 40}
    rates, _, history = run(Recipe(**{**vars(RECIPE), **settings}))
    constant = rates.count(0.01)
    falling = len(rates) - constant
    assert history.converged
    assert falling == 2 * constant
    assert np.all(np.diff(rates[constant:]) < 0)


@pytest.mark.parametrize(("start", "n_falling"), [(0.0, 3), (1.0, 0)])
def test_training_that_gains_nothing_ends_without_a_fall(start, n_falling):
    settings = {"tol": 0.1, "n_iter_no_change": 3, "max_iter": 100, "batch_size": 40}
    recipe = Recipe(**{**vars(RECIPE), **settings})
    history = History(start=start)
    rates, _, _ = run(recipe, history=history, validate=lambda: 1.0)
    assert history.converged
    assert len(rates) - rates.count(0.01) == n_falling


def test_epochs_of_some_rows_draw_them_anew():
    recipe = Recipe(**{**vars(RECIPE), "epoch_rows": 16})
    _, seen, history = run(recipe)
    epochs = [set(torch.cat(seen[i : i + 2]).tolist()) for i in range(0, 20, 2)]
    assert all(len(rows) == 16 for rows in epochs)
    assert len(set.union(*epochs)) > 32  # two epochs have no more
    assert history.nfe == [1.0] * 10


@pytest.mark.parametrize("most", [1, 2])
def test_training_goes_on_from_earlier_weights_after_solves_that_failed(most):
    network, history = make_network(), History()
    average = Average(network, 0.9)
    recipe = replace(
        RECIPE,
        max_iter=6,
        most_setbacks=most,
        optimizer="adam",
        ends=False,
        warns=False,
    )
    optimizer = make_optimizer(network, recipe.optimizer, recipe.learning_rate)
    calls, rates, scores = 0, [], iter([1.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    kept = []

    def objective(x):
        nonlocal calls
        calls += 1
        if calls in (9, 12):
            raise SolverError("Too many steps.")
        if calls == 10:  # those of the second epoch were the best ones
            assert all(map(torch.equal, network.parameters(), kept[1]))
            assert all(map(torch.equal, average.module.parameters(), kept[1]))
        rates.append(optimizer.param_groups[0]["lr"])
        return network(x).square()[:, 0], torch.ones(len(x))

    def validate():
        kept.append([p.detach().clone() for p in average.module.parameters()])
        return next(scores)

    def run():
        train(
            network,
            (torch.randn(16, 3),),
            torch.ones(16),
            objective,
            optimizer,
            recipe,
            torch.Generator().manual_seed(0),
            history,
            validate=validate,
            average=average,
        )

    if most == 1:
        with pytest.raises(SolverError, match="failed in epoch 6 of the training"):
            run()
    else:
        run()
        with pytest.warns(ConvergenceWarning, match="failed in training: 2"):
            warn_of_setbacks("sknode", history)
        assert len(history.loss) == 6 and history.setbacks == 2
        # 8 updates before the first one, 2 until the second
        assert rates == [0.01] * 8 + [0.005] * 2 + [0.0025] * 2
        assert all(map(torch.equal, network.parameters(), kept[1]))


def interrupt_at(monkeypatch, n_steps):
    """Let the user press Ctrl-C within a later step of an optimizer."""
    steps, step = itertools.count(1), _Optimizer.step

    def interrupted(self):
        if next(steps) == n_steps:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(_Optimizer, "step", interrupted)


@pytest.mark.parametrize("averaged", [False, True])
def test_an_interruption_leaves_the_best_weights(monkeypatch, averaged):
    network, scores, seen = make_network(), iter([1.0, 3.0, 2.0]), []
    average = Average(network, 0.9) if averaged else None
    followed = average.module if averaged else network
    recipe = replace(RECIPE, optimizer="adam")

    def validate():
        seen.append([p.detach().clone() for p in followed.parameters()])
        return next(scores)

    interrupt_at(monkeypatch, 17)  # the second step of the fourth epoch
    with pytest.raises(KeyboardInterrupt):
        run(recipe, network=network, validate=validate, average=average)
    assert len(seen) == 3
    for p, expected in zip(network.parameters(), seen[1], strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_an_interruption_of_the_first_epoch_comes_through(monkeypatch, early_stopping):
    X, y = make_moons(100, random_state=0)
    clf = ODENetClassifier(early_stopping=early_stopping, random_state=0)
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(X, y)
    with pytest.raises(NotFittedError):
        clf.predict(X)


def test_an_interruption_later_on_keeps_what_was_learned(monkeypatch):
    X, y = make_moons(100, random_state=0)
    clf = ODENetClassifier(early_stopping=True, max_iter=9, random_state=0)
    interrupt_at(monkeypatch, 11)
    with pytest.warns(UserWarning, match="interrupted"):
        clf.fit(X, y)
    assert clf.n_iter_ == len(clf.validation_scores_) == len(clf.loss_curve_) == 3
    clf.predict(X)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_an_interruption_of_the_first_epoch_of_a_flow(monkeypatch, early_stopping):
    X = np.random.default_rng(0).normal(size=(250, 2))
    density = CNFDensity(
        early_stopping=early_stopping, n_components=1, marginals=False, random_state=0
    )
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        density.fit(X)
    with pytest.raises(NotFittedError):
        density.score(X)


def test_training_needs_no_gradients_of_the_caller():
    X, y = make_moons(100, random_state=0)
    clf = ODENetClassifier(max_iter=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        expected = clf.fit(X, y).predict_proba(X)
        with torch.no_grad():
            clf.fit(X, y)
    np.testing.assert_array_equal(clf.predict_proba(X), expected)
