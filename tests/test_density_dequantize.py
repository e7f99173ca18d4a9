"""CNFDensity with dequantize: columns of rounded values."""

import pickle

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from sknode import CNFDensity
from sknode._density_dequantize import Grid

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SHORT = {"max_iter": 3, "n_components": 2, "random_state": 0}


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    rooms = rng.binomial(6, 0.4, size=400)
    price = (rooms + rng.gamma(2.0, size=400)).round(1)
    return pd.DataFrame({"rooms": rooms, "price": price, "x": rng.normal(size=400)})


@pytest.fixture(scope="module")
def fitted(frame):
    density = CNFDensity(**SHORT, dequantize=["rooms", "price"], early_stopping=False)
    return density.fit(frame)


def test_density_times_width_is_the_probability():
    law = stats.binom(8, 0.3)
    X = law.rvs(size=(2000, 1), random_state=0)
    density = CNFDensity(dequantize=True, random_state=0, max_iter=10).fit(3.0 * X)
    assert density.widths_ == 3.0
    values = np.arange(9)
    logs = density.score_samples(3.0 * values[:, None]) + np.log(3.0)
    assert np.exp(logs).sum() == pytest.approx(1.0, abs=0.05)
    assert law.pmf(values) @ (law.logpmf(values) - logs) < 0.05
    # over the cells: what samples have
    share = (density.sample(4000, random_state=0) == 3 * values).mean(0)
    np.testing.assert_allclose(share, law.pmf(values), atol=0.03)


def test_density_integrates_to_one():
    X = stats.poisson(3).rvs(size=(300, 1), random_state=0)
    density = CNFDensity(**SHORT, dequantize=[0], early_stopping=False).fit(X)
    x = np.linspace(-20, 40, 6001)
    total = np.exp(density.score_samples(x[:, None])).sum() * (x[1] - x[0])
    assert total == pytest.approx(1.0, abs=1e-4)


def test_resolution_is_the_smallest_gap(fitted):
    np.testing.assert_allclose(fitted.widths_, [1.0, 0.1, 0.0])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_resolution_is_no_rounding(dtype):
    X = np.array([[0.1 * k, 1e7 + k % 5] for k in range(60)] + [[0.3, 1e7]] * 5)
    X = np.r_[X, [[0.1 + 0.2, 1e7]]].astype(dtype)
    density = CNFDensity(dequantize=[0, 1], max_iter=1, random_state=0).fit(X)
    np.testing.assert_allclose(density.widths_, [0.1, 1.0], rtol=1e-4)


def test_samples_are_on_the_grid(fitted, frame):
    X = fitted.sample(500, random_state=0)
    assert (X[:, 0] == X[:, 0].round()).all()
    assert set(X[:, 0]) <= set(range(-2, 9))
    np.testing.assert_allclose(X[:, 1] * 10, (X[:, 1] * 10).round(), atol=1e-9)
    assert len(np.unique(X[:, 2])) == 500
    # only samples are rounded
    moved = frame.assign(rooms=frame["rooms"] + 0.25)
    Z = fitted.transform(moved)
    np.testing.assert_allclose(fitted.inverse_transform(Z), moved, atol=1e-5)


def test_ways_to_name_columns_mean_the_same(fitted, frame):
    settings = {**SHORT, "early_stopping": False}
    for columns in ([0, 1], [True, True, False], {"rooms": 1, 1: fitted.widths_[1]}):
        again = CNFDensity(dequantize=columns, **settings).fit(frame)
        np.testing.assert_array_equal(
            again.score_samples(frame), fitted.score_samples(frame)
        )


def test_true_takes_the_columns_that_are_warned_of(frame):
    with pytest.warns(UserWarning, match=r"again and again: rooms\. .* dequantize"):
        CNFDensity(**SHORT, dequantize=["price"]).fit(frame)
    assert (CNFDensity(**SHORT, dequantize=True).fit(frame).widths_ == [1, 0, 0]).all()


@pytest.mark.parametrize("columns", [["rooms", "price"], ["rooms"]])
def test_weights_are_repetitions_and_the_order_does_not_matter(frame, columns):
    frame = frame[columns] if len(columns) == 2 else frame[["rooms", "x"]]
    weight = np.random.default_rng(0).integers(0, 4, len(frame))
    density = CNFDensity(**SHORT, dequantize=columns)
    weighted = clone(density).fit(frame, sample_weight=weight)
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(400), weight))
    repeated = density.fit(frame.iloc[order])
    np.testing.assert_array_equal(
        weighted.score_samples(frame), repeated.score_samples(frame)
    )


def test_repeated_rows_get_noise_of_their_own_only_without_continuous_columns():
    grid, count = Grid(np.zeros(2), np.array([1.0, 2.0])), np.array([3.0, 1.0])
    X, limits = np.array([[0.0, 0.0], [5.0, 4.0]]), (np.full(2, -np.inf), np.full(2, 9))
    rng = np.random.default_rng(0)
    spread, source = grid.spread(X, count, *limits, rng)
    assert source.tolist() == [0, 0, 0, 1]
    assert len(np.unique(spread, axis=0)) == 4
    assert (np.abs(spread - X[source]) < [0.5, 1.0]).all()
    grid = Grid(np.zeros(2), np.array([1.0, 0.0]))
    spread, source = grid.spread(X, count, *limits, rng)
    assert source.tolist() == [0, 1]
    np.testing.assert_array_equal(spread[:, 1], X[:, 1])


def test_only_ratios_of_other_weights_matter(frame):
    frame = frame[["rooms", "price"]]
    weight = np.random.default_rng(0).uniform(size=len(frame))
    density = CNFDensity(**SHORT, dequantize=["rooms", "price"])
    one = clone(density).fit(frame, sample_weight=weight)
    two = clone(density).fit(frame, sample_weight=4 * weight)
    np.testing.assert_allclose(
        one.score_samples(frame), two.score_samples(frame), rtol=1e-9
    )


def test_limits_move_outwards_by_half_a_width(frame):
    density = CNFDensity(
        **SHORT, bounds={"rooms": (0, 6), "price": (0, None)}, dequantize=["rooms"]
    ).fit(frame)
    X = frame.iloc[:3].to_numpy()
    X[:, 0] = [0, 6, 3]
    assert np.isfinite(density.score_samples(frame)).all()
    assert np.isfinite(
        density.score_samples(pd.DataFrame(X, columns=frame.columns))
    ).all()
    X[:, 0] = [-0.5, 6.5, -0.49]
    logs = density.score_samples(pd.DataFrame(X, columns=frame.columns))
    assert np.isfinite(logs).tolist() == [False, False, True]
    sample = density.sample(2000, random_state=0)
    assert set(sample[:, 0]) == set(range(7))
    assert (sample[:, 1] > 0).all()


def test_values_beyond_moved_limits_are_rejected(frame):
    with pytest.raises(ValueError, match=r"rooms \(\d+ rows at or below 0.5\)"):
        CNFDensity(bounds={"rooms": (1, None)}, dequantize=True).fit(frame)


def test_survives_and_cross_validates(fitted, frame):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(
        again.sample(5, random_state=0), fitted.sample(5, random_state=0)
    )
    density = clone(fitted).set_params(max_iter=1)
    assert np.isfinite(cross_val_score(density, frame, cv=2)).all()


@pytest.mark.parametrize(
    ("dequantize", "message"),
    [
        (["width"], "dequantize names a column 'width'"),
        ([3], "dequantize must have columns .* from 0 to 2. Got 3"),
        ([True, False], "for each of the 3 columns .* mask. Got 2"),
        ({"rooms": 0}, "positive widths. Got 0 for column 'rooms'"),
        ({"rooms": np.inf}, "positive widths. Got inf"),
        ({"rooms": "1"}, "positive widths. Got '1'"),
    ],
)
def test_wrong_columns_are_named(dequantize, message, frame):
    with pytest.raises(ValueError, match=message):
        CNFDensity(dequantize=dequantize).fit(frame)
