"""CNFDensity with bounds: columns with known limits."""

import pickle

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from sknode import CNFDensity
from sknode._density_bounds import Bounds, check_bounds

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SHORT = {"max_iter": 3, "n_components": 2, "random_state": 0}
LIMITS = {"share": (0, 1), "price": (0, None), "debt": (None, 0)}


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    price = rng.gamma(1.5, size=400)
    columns = {
        "share": rng.beta(0.8, 2.0, size=400),
        "price": price,
        "debt": -price * rng.uniform(0.5, 1.0, size=400),
        "free": rng.normal(size=400),
    }
    return pd.DataFrame(columns)


@pytest.fixture(scope="module")
def fitted(frame):
    return CNFDensity(**SHORT, bounds=LIMITS, early_stopping=False).fit(frame)


# --- the map --------------------------------------------------------------------------


@pytest.fixture
def bounds():
    low, high = np.array([0.0, 2.0, -np.inf]), np.array([3.0, np.inf, 1.0])
    return Bounds(low, high, np.array([3.0, 0.5, 2.0]))


def test_map_is_inverted_from_limit_to_limit(bounds):
    z = np.linspace(-8, 8, 33)[:, None].repeat(3, axis=1)
    X = bounds.inverse(z)
    assert bounds.is_inside(X).all()
    # as far as numbers next to a limit other than zero can tell
    inner = np.abs(z[:, 0]) < 5
    np.testing.assert_allclose(bounds.forward(X[inner])[0], z[inner], atol=1e-9)
    np.testing.assert_allclose(bounds.forward(X)[0][:17, 0], z[:17, 0], rtol=1e-12)


def test_log_determinant_is_that_of_the_map(bounds):
    # nearer to the limits rounding spoils the differences
    X = bounds.inverse(np.linspace(-2, 2, 21)[:, None].repeat(3, axis=1))
    h = 1e-6 * np.minimum(X - bounds.low, bounds.high - X)
    slope = (bounds.forward(X + h)[0] - bounds.forward(X - h)[0]) / (2 * h)
    log_det = np.log(slope).sum(1)
    np.testing.assert_allclose(bounds.forward(X)[1], log_det, atol=1e-6)


def test_uniform_and_exponential_columns_become_normal(bounds):
    share = np.array([1e-12, 0.01, 0.3, 0.9, 1 - 1e-12])
    expected = stats.norm.ppf(share)
    uniform = stats.uniform(0, 3).ppf(share)
    exponential = stats.expon(2, 0.5).ppf(share)
    mirrored = 1 - stats.expon(0, 2).ppf(share)
    Z, _ = bounds.forward(np.stack([uniform, exponential, mirrored], axis=1))
    for z, sign in zip(Z.T, (1, 1, -1), strict=True):
        np.testing.assert_allclose(sign * z, expected, rtol=1e-4)


def test_far_tails_are_finite(bounds):
    X = np.array([[5e-324, 2.0 + 5e-16, -1e300], [3.0 - 5e-16, 1e300, 1.0 - 2e-16]])
    Z, log_det = bounds.forward(X)
    assert np.isfinite(Z).all() and np.isfinite(log_det).all()
    assert (np.diff(Z, axis=0) > 0).all()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_rounding_puts_nothing_on_a_limit(dtype):
    bounds = Bounds(np.array([0.1]), np.array([0.7]), np.array([0.6]))
    X = bounds.keep_inside(bounds.inverse(np.array([[-40.0], [40.0]])).astype(dtype))
    assert X.dtype == dtype and bounds.is_inside(X).all()


# --- the estimator --------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(0, 1), (0, None), (None, 1)])
def test_density_integrates_to_one_between_the_limits(limits):
    rng = np.random.default_rng(0)
    X = rng.beta(2.0, 1.5, size=(300, 1))
    density = CNFDensity(**SHORT, bounds=[limits], early_stopping=False).fit(X)
    low, high = (
        (-9.0 if limits[0] is None else 0.0),
        (9.0 if limits[1] is None else 1.0),
    )
    # midpoints: the density may be steep at a limit
    edges = np.linspace(low, high, 20001)
    middle = (edges[1:] + edges[:-1]) / 2
    total = np.exp(density.score_samples(middle[:, None])).sum() * (edges[1] - edges[0])
    assert total == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(
    ("law", "limits"),
    [
        (stats.uniform(2, 3), (2, 5)),
        (stats.expon(1, 4), (1, None)),
        (stats.beta(0.7, 0.9), (0, 1)),
        (stats.gamma(1.2), (0, None)),
    ],
)
def test_density_at_limits_is_better_known(law, limits):
    X, test = (law.rvs(size=(500, 1), random_state=s) for s in (0, 1))
    settings = {"max_iter": 3, "random_state": 0}
    bounded = CNFDensity(bounds=[limits], **settings).fit(X).score(test)
    exact = law.logpdf(test).mean()
    assert exact - 0.03 < bounded < exact + 0.03
    assert bounded > CNFDensity(**settings).fit(X).score(test)


def test_nothing_leaves_the_limits(fitted, frame):
    X = fitted.sample(2000, random_state=0)
    low, high = check_bounds(LIMITS, fitted.feature_names_in_)
    assert ((X > low) & (X < high)).all()
    far = fitted.inverse_transform(np.array([[-30.0] * 4, [30.0] * 4], dtype="f4"))
    assert ((far > low) & (far < high)).all()
    Z = fitted.transform(frame)
    np.testing.assert_allclose(fitted.inverse_transform(Z), frame, atol=1e-5)


def test_density_beyond_limits_is_zero(fitted, frame):
    X = frame.iloc[:5].copy()
    expected = fitted.score_samples(X)
    X.loc[0, "share"] = 1.0
    X.loc[2, "price"] = -3.0
    logs = fitted.score_samples(X)
    assert (logs[[0, 2]] == -np.inf).all()
    np.testing.assert_allclose(logs[[1, 3, 4]], expected[[1, 3, 4]], rtol=1e-12)
    assert (fitted.score_samples(X.iloc[[0, 2]]) == -np.inf).all()
    with pytest.raises(ValueError, match=r"share \(1 rows at or above 1\), price"):
        fitted.transform(X)


def test_names_positions_and_pairs_mean_the_same(fitted, frame):
    settings = {**SHORT, "early_stopping": False}
    positions = {0: [0, 1], 1: (0, np.inf), 2: (-np.inf, 0)}
    pairs = [[0, 1], [0, None], [None, 0], [None, None]]
    for bounds in (positions, pairs):
        again = CNFDensity(bounds=bounds, **settings).fit(frame)
        np.testing.assert_array_equal(
            again.score_samples(frame), fitted.score_samples(frame)
        )


def test_units_do_not_matter():
    X = stats.gamma(1.5).rvs(size=(300, 1), random_state=0)
    one = CNFDensity(**SHORT, bounds=[(0, None)]).fit(X)
    other = CNFDensity(**SHORT, bounds=[(5, None)]).fit(5 + 1024 * X)
    logs = other.score_samples(5 + 1024 * X) + np.log(1024)
    np.testing.assert_allclose(one.score_samples(X), logs, atol=1e-6)


def test_survives(fitted, frame):
    skops = pytest.importorskip("skops.io")
    data = skops.dumps(fitted)
    trusted = skops.get_untrusted_types(data=data)
    for again in (
        pickle.loads(pickle.dumps(fitted)),
        skops.loads(data, trusted=trusted),
    ):
        np.testing.assert_array_equal(
            again.score_samples(frame), fitted.score_samples(frame)
        )


def test_grid_search_and_clone(frame):
    density = CNFDensity(max_iter=1, n_components=1, marginals=False, random_state=0)
    grid = {"bounds": [None, LIMITS]}
    search = GridSearchCV(clone(density), grid, cv=2).fit(frame)
    assert search.best_params_ == {"bounds": LIMITS}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"width": (0, 1)}, "names a column 'width', which X does not have: share"),
        ({4: (0, 1)}, "by position from 0 to 3. Got 4"),
        ({True: (0, 1)}, "by position from 0 to 3. Got True"),
        ({"share": (1, 0)}, r"low < high.* \(1.0, 0.0\) for column share"),
        ({"share": (0, float("nan"))}, "not NaN"),
        ({"share": (-1e308, 1e308)}, "not further apart"),
        ({"share": 1}, "pairs .low, high.*Got 1 for column share"),
        ({"share": (0, "a")}, "pairs .low, high"),
        ([(0, 1)], "each of the 4 columns.* Got 1"),
        ([0, 1, 2, 3], "pairs .low, high.* column share"),
        (
            {"share": (0.5, 1), "free": (None, 0)},
            r"share \(\d+ rows at or below 0.5\), free .*dequantize",
        ),
    ],
)
def test_wrong_bounds_are_named(bounds, message, frame):
    with pytest.raises(ValueError, match=message):
        CNFDensity(bounds=bounds).fit(frame)


def test_fit_target_has_no_bounds():
    with pytest.raises(ValueError, match="fit_target does not support bounds"):
        CNFDensity(bounds=[(0, 1)]).fit_target(len, 1)
