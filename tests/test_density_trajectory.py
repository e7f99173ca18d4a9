"""Rows on their way from the normal distribution to the data."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from sknode import CNFDensity
from sknode.datasets import make_density


@pytest.fixture(scope="module")
def moons():
    return make_density("moons", 400, random_state=0)[0]


@pytest.fixture(
    scope="module",
    params=[{"n_components": 1}, {"refine": False}, {"marginals": True}],
    ids=["mixture_alone", "residual", "residual_and_finish"],
)
def density(request, moons):
    if "n_components" in request.param:
        return CNFDensity(**request.param).fit(moons[:100])  # no network
    estimator = CNFDensity(
        8, max_iter=3, early_stopping=False, random_state=0, **request.param
    )
    with pytest.warns(match="max_iter"):
        return estimator.fit(moons)


@pytest.mark.parametrize("n_times", [2, 4, 5])
def test_leads_from_transformed_rows_to_the_rows(density, moons, n_times):
    path = density.trajectory(moons[:20], n_times=n_times)
    assert path.shape == (20, n_times, 2)
    np.testing.assert_allclose(path[:, -1], moons[:20], atol=1e-12)
    Z = density.transform(moons[:20])
    np.testing.assert_allclose(path[:, 0], density._start.inverse(Z), atol=1e-5)


def test_fewer_times_are_a_part_of_more(density, moons):
    fine = density.trajectory(moons[:20], n_times=9)
    coarse = density.trajectory(moons[:20], n_times=5)
    np.testing.assert_allclose(fine[:, ::2], coarse, atol=1e-6)
    middle = density.trajectory(moons[:20], n_times=3)
    np.testing.assert_allclose(fine[:, ::4], middle, atol=1e-6)


def test_moves_as_the_velocity_says(moons):
    estimator = CNFDensity(n_components=2).fit(moons[:100])
    path = estimator.trajectory(moons[:5], n_times=401)
    start, module = estimator._start, estimator.module_
    z = start.forward(path[:, 200])[0]
    ahead, behind = (start.forward(path[:, i])[0] for i in (201, 199))
    slope = module.velocity(torch.tensor(0.5), torch.from_numpy(z))
    np.testing.assert_allclose((ahead - behind) * 200, slope, atol=1e-3)


def test_dtype_is_that_of_the_rows(density, moons):
    assert density.trajectory(moons[:2].astype(np.float32)).dtype == np.float32
    assert density.trajectory(moons[:2]).shape == (2, 50, 2)


@pytest.mark.parametrize("n_times", [1, 2.0, None])
def test_refuses_other_numbers_of_times(density, moons, n_times):
    with pytest.raises(ValueError, match="n_times must be an integer >= 2"):
        density.trajectory(moons, n_times=n_times)


def test_needs_a_fit(moons):
    with pytest.raises(NotFittedError):
        CNFDensity().trajectory(moons)
