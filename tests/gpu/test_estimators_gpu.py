"""Estimators on a GPU: fit there, load and predict anywhere."""

import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_friedman1, make_moons
from sklearn.exceptions import ConvergenceWarning

from sknode import ODENetClassifier, ODENetRegressor


def test_fit_on_the_gpu_predict_on_the_cpu(cuda):
    X, y = make_moons(300, noise=0.1, random_state=0)
    net = ODENetClassifier(device="cuda", random_state=0).fit(X, y)
    assert next(net.module_.parameters()).device.type == "cuda"
    assert net.score(X, y) > 0.95
    there = net.predict_proba(X)
    loaded = pickle.loads(pickle.dumps(net)).set_params(device="cpu")
    np.testing.assert_allclose(loaded.predict_proba(X), there, atol=1e-3)


def test_auto_is_the_accelerator(cuda):
    X, y = make_moons(100, random_state=0)
    net = ODENetClassifier(device="auto", max_iter=3, random_state=0)
    with pytest.warns(ConvergenceWarning):
        net.fit(X, y)
    assert next(net.module_.parameters()).device.type == "cuda"


def test_a_regressor_and_its_penalties(cuda):
    X, y = make_friedman1(300, random_state=0)
    penalties = {"kinetic_penalty": 0.01, "jacobian_penalty": 0.01}
    reg = ODENetRegressor(device="cuda", random_state=0, **penalties).fit(X, y)
    assert reg.score(X, y) > 0.9
    loaded = pickle.loads(pickle.dumps(reg)).set_params(device="cpu")
    np.testing.assert_allclose(loaded.predict(X), reg.predict(X), rtol=1e-2, atol=1e-2)


def test_images(cuda):
    X, y = load_digits(return_X_y=True)
    settings = {"image_shape": (1, 8, 8), "n_channels": 16, "random_shift": 1}
    net = ODENetClassifier(device="cuda", **settings, random_state=0)
    net.fit(X[:1000], y[:1000])
    assert net.score(X[1000:], y[1000:]) > 0.9
    assert net.count_evaluations(X[:5]).shape == (5,)
