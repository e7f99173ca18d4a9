"""What mixtures are computed with."""

import numpy as np
import pytest
from scipy.special import logsumexp

from sknode import _mixture
from sknode._mixture import fit_mixture, log_sum_exp


@pytest.mark.parametrize("shift", [0.0, -1e5, 1e5])
def test_logarithms_of_sums_are_those_of_scipy(shift):
    rng = np.random.default_rng(0)
    values, weights = 30 * rng.normal(size=(50, 7)) + shift, rng.uniform(size=7)
    np.testing.assert_allclose(log_sum_exp(values), logsumexp(values, axis=1), 1e-13)
    expected = logsumexp(values, b=weights, axis=1)
    np.testing.assert_allclose(log_sum_exp(values, weights), expected, 1e-13)


def test_sums_of_nothing_are_minus_infinity():
    values = np.array([[-np.inf, -np.inf], [-np.inf, 1.0]])
    assert log_sum_exp(values).tolist() == [-np.inf, 1.0]


def test_there_are_no_more_components_than_rows(monkeypatch):
    rng = np.random.RandomState(0)
    X = rng.normal(size=(30, 2))
    squares, n_centres = _mixture._squares, []

    def rounded(X, centres):
        # a row may be a little off itself: there is always something left to draw
        n_centres.append(len(centres))
        return squares(X, centres) + 1e-16

    monkeypatch.setattr(_mixture, "_squares", rounded)
    fit_mixture(X, np.ones(30), 1000, rng)
    assert max(n_centres) <= 30
