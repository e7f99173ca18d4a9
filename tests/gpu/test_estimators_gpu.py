"""Estimators on a GPU: fit there, load and predict anywhere."""

import pickle

import numpy as np
import pytest
from sklearn.datasets import make_moons
from sklearn.exceptions import ConvergenceWarning

from sknode import ODENetClassifier


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
