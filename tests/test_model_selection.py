"""Splits of time series: by the value of time, whatever the order of rows."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import (
    GridSearchCV,
    TimeSeriesSplit,
    cross_val_predict,
    cross_validate,
)

from sknode.model_selection import PanelBlockKFold, PanelTimeSeriesSplit

BOTH = [PanelTimeSeriesSplit, PanelBlockKFold]


def column(values):
    return np.asarray(values, dtype=float)[:, None]


def folds(splitter, X):
    return [(train.tolist(), test.tolist()) for train, test in splitter.split(X)]


@pytest.fixture
def panel():
    """Stations that share a calendar, unsorted, with two rows a day now and then."""
    rng = np.random.default_rng(0)
    day = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(90, size=200), "D")
    station = rng.choice(["north", "south", "west"], size=200)
    return pd.DataFrame({"station": station, "day": day, "wind": rng.normal(size=200)})


# --- cuts -----------------------------------------------------------------------------


def test_cuts_are_those_of_scikit_learn_where_rows_are_sorted_and_equally_spaced():
    time = column(range(12))
    ours, theirs = PanelTimeSeriesSplit(3), TimeSeriesSplit(3)
    for mine, other in zip(ours.split(time), theirs.split(time), strict=True):
        np.testing.assert_array_equal(mine[0], other[0])
        np.testing.assert_array_equal(mine[1], other[1])


@pytest.mark.parametrize("test_size", [None, "12D"])
def test_no_cut_leaves_later_rows_in_training_or_splits_a_time(panel, test_size):
    cv = PanelTimeSeriesSplit(4, series="station", test_size=test_size)
    day, tested = panel["day"], []
    for train, test in cv.split(panel):
        assert day.iloc[train].max() < day.iloc[test].min()
        # nothing in between, nothing but the past
        assert len(train) == (day <= day.iloc[train].max()).sum()
        tested.append(test)
    tested = np.concatenate(tested)
    assert len(tested) == len(set(tested)) == (day >= day.iloc[tested].min()).sum()
    assert day.max() in set(day.iloc[tested])


def test_stretches_have_equally_many_distinct_times():
    time = column([0, 0, 0, 1, 100, 100, 101, 2000, 2001])
    assert [test for _, test in folds(PanelTimeSeriesSplit(2), time)] == [
        [4, 5, 6],
        [7, 8],
    ]


def test_a_test_size_counts_back_from_the_end():
    # 0.1 * 3 > 0.3: rounding must not move rows across a cut
    time = column(np.arange(10) * 0.1)
    cv = PanelTimeSeriesSplit(3, test_size=0.2)
    assert [test for _, test in folds(cv, time)] == [[4, 5], [6, 7], [8, 9]]
    for unit in (1e-9, 1e9):
        cv = PanelTimeSeriesSplit(3, test_size=0.2 * unit)
        assert [test for _, test in folds(cv, time * unit)] == [[4, 5], [6, 7], [8, 9]]


def test_gap_and_max_train_size_are_lengths_of_time():
    time = column([0, 1, 2, 3, 4, 5, 6, 7, 8, 9.5])
    cv = PanelTimeSeriesSplit(2, test_size=3, gap=1)
    assert folds(cv, time) == [
        ([0, 1, 2], [4, 5, 6]),
        ([0, 1, 2, 3, 4, 5], [7, 8, 9]),
    ]
    cv = PanelTimeSeriesSplit(2, test_size=3, gap=1, max_train_size=2)
    assert [train for train, _ in folds(cv, time)] == [[1, 2], [4, 5]]


def test_series_may_be_cut_at_times_of_their_own():
    # two patients, whose days count from their admission, and one who came once
    X = np.c_[[0, 0, 0, 0, 1, 1, 2], [1, 2, 3, 4, 10, 20, 5]].astype(float)
    cv = PanelTimeSeriesSplit(1, time=1, series=0, per_series=True)
    assert folds(cv, X) == [([0, 1, 4, 6], [2, 3, 5])]
    cv = PanelTimeSeriesSplit(1, time=1, series=0, per_series=True, test_size=1)
    assert folds(cv, X) == [([0, 1, 2, 4], [3, 5, 6])]
    common = PanelTimeSeriesSplit(1, time=1, series=0, test_size=10)
    assert folds(common, X) == [([0, 1, 2, 3, 4, 6], [5])]


# --- blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("block_length", [None, "5D", pd.Timedelta(30, "D")])
def test_every_row_is_tested_once_and_a_time_stays_whole(panel, shuffle, block_length):
    cv = PanelBlockKFold(
        4, series="station", block_length=block_length, shuffle=shuffle
    )
    fold = np.full(len(panel), -1)
    for k, (train, test) in enumerate(cv.split(panel)):
        assert (fold[test] == -1).all()
        np.testing.assert_array_equal(np.union1d(train, test), np.arange(len(panel)))
        fold[test] = k
    assert set(fold) == {0, 1, 2, 3}
    assert panel.assign(fold=fold).groupby(["station", "day"]).fold.nunique().max() == 1


def test_blocks_are_as_long_as_asked_and_contiguous_in_each_series(panel):
    cv = PanelBlockKFold(3, series="station", block_length="6D")
    for _, test in cv.split(panel):
        for _, rows in panel.iloc[test].groupby("station"):
            start = panel.loc[panel["station"] == rows["station"].iloc[0], "day"].min()
            block = (rows["day"] - start) // pd.Timedelta("6D")
            # in turn: no two successive blocks are hidden together
            assert np.diff(np.unique(block)).min() > 1
            for number in block.unique():
                of_block = panel["station"].eq(rows["station"].iloc[0]) & (
                    (panel["day"] - start) // pd.Timedelta("6D") == number
                )
                assert set(panel.index[of_block]) <= set(rows.index)


def test_rounding_does_not_move_rows_to_another_block():
    time = column(np.arange(12) * 0.1)
    cv = PanelBlockKFold(2, block_length=0.3)
    assert folds(cv, time)[0][1] == [0, 1, 2, 6, 7, 8]


def test_blocks_without_rows_leave_no_fold_empty():
    # with fold = block % 2 the second fold would have nothing
    assert folds(PanelBlockKFold(2, block_length=1), column([0, 2, 4, 6])) == [
        ([1, 3], [0, 2]),
        ([0, 2], [1, 3]),
    ]


def test_short_series_are_spread_over_the_folds():
    X = np.c_[np.arange(6), np.zeros(6)]
    sizes = [len(test) for _, test in PanelBlockKFold(3, time=1, series=0).split(X)]
    assert sizes == [2, 2, 2]


def test_shuffled_blocks_are_drawn_by_the_seed_and_never_three_in_a_row():
    time = column(np.arange(300))

    def fold(seed):
        cv = PanelBlockKFold(3, block_length=10, shuffle=True, random_state=seed)
        result = np.empty(300, dtype=int)
        for k, (_, test) in enumerate(cv.split(time)):
            result[test] = k
        return result[::10]

    np.testing.assert_array_equal(fold(0), fold(0))
    assert (fold(0) != fold(1)).any()
    assert (np.sort(fold(0).reshape(10, 3)) == [0, 1, 2]).all()


# --- times of any kind ----------------------------------------------------------------


def in_every_place(times):
    """Yield the same times as they may come, with how they are named."""
    values = np.arange(len(times))
    yield {}, pd.DataFrame({"t": times, "v": values})
    yield {"time": "t"}, pd.DataFrame({"v": values, "t": times})
    yield {"time": "t"}, pd.DataFrame({"v": values}, index=pd.Index(times, name="t"))
    yield {"time": "index"}, pd.DataFrame({"v": values}, index=pd.Index(times))


SECONDS = np.array([5, 0, 1, 1, 9, 3, 7, 12]) * 3600
KINDS = {
    **{
        unit: pd.to_datetime(SECONDS, unit="s").as_unit(unit)
        for unit in ("s", "ms", "us", "ns")
    },
    "zone": pd.to_datetime(SECONDS, unit="s", utc=True).tz_convert("Europe/Berlin"),
    "timedelta": pd.to_timedelta(SECONDS, unit="s"),
    "period": pd.to_datetime(SECONDS, unit="s").to_period("h"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dates_of_any_kind_anywhere_are_cut_alike(kind):
    numeric = column(SECONDS)
    forecasts = folds(PanelTimeSeriesSplit(2, test_size=4 * 3600.0), numeric)
    blocks = folds(PanelBlockKFold(2, block_length=2 * 3600.0), numeric)
    for where, X in in_every_place(KINDS[kind]):
        assert folds(PanelTimeSeriesSplit(2, test_size="4h", **where), X) == forecasts
        assert folds(PanelBlockKFold(2, block_length="2h", **where), X) == blocks
    index = pd.MultiIndex.from_arrays([["a"] * 8, KINDS[kind]], names=["id", "t"])
    X = pd.DataFrame({"v": range(8)}, index=index)
    cv = PanelTimeSeriesSplit(2, time="t", series="id", test_size="4h")
    assert folds(cv, X) == forecasts


@pytest.mark.parametrize(
    "duration", ["4h", pd.Timedelta("4h"), np.timedelta64(4, "h"), pd.offsets.Hour(4)]
)
def test_durations_come_in_many_forms(duration):
    X = pd.DataFrame({"t": KINDS["us"]})
    expected = folds(PanelTimeSeriesSplit(2, test_size="4h"), X)
    assert folds(PanelTimeSeriesSplit(2, test_size=duration), X) == expected
    for gap in (0, "0s", pd.Timedelta(0)):
        cv = PanelTimeSeriesSplit(2, test_size=duration, gap=gap)
        assert folds(cv, X) == expected


def test_series_may_have_any_kind_of_name():
    time = np.arange(12.0) % 4
    expected = None
    for ids in (np.repeat([7, 3, 5], 4), np.repeat(["b", "a", "c"], 4)):
        X = pd.DataFrame({"who": ids, "t": time})
        cv = PanelTimeSeriesSplit(1, time="t", series="who", per_series=True)
        expected = expected or folds(cv, X)
        assert folds(cv, X) == expected == [([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])]


# --- scikit-learn's protocol ----------------------------------------------------------


@pytest.mark.parametrize("splitter", BOTH)
def test_works_in_scikit_learns_searches(splitter):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"t": rng.uniform(0, 10, 60), "x": rng.normal(size=60)})
    y = np.sin(X["t"])
    cv = splitter(3, time="t")
    assert cv.get_n_splits(X, y) == cv.get_n_splits() == 3
    scores = cross_validate(LinearRegression(), X, y, cv=cv, error_score="raise")
    assert len(scores["test_score"]) == 3
    search = GridSearchCV(
        GaussianProcessRegressor(), {"alpha": [1e-3, 1e-1]}, cv=cv, n_jobs=2
    )
    search = clone(search).fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_every_row_gets_a_prediction_from_block_folds():
    X = column(np.linspace(0, 1, 20))
    predicted = cross_val_predict(LinearRegression(), X, X[:, 0], cv=PanelBlockKFold())
    np.testing.assert_allclose(predicted, X[:, 0], atol=1e-12)


@pytest.mark.parametrize("splitter", BOTH)
def test_splitters_are_copied_and_shown_as_those_of_scikit_learn(splitter):
    cv = splitter(2, time="t", series="who")
    for copy in (clone(cv, safe=False), pickle.loads(pickle.dumps(cv))):
        assert vars(copy) == vars(cv)
    assert repr(cv).startswith(f"{splitter.__name__}(")
    assert "n_splits=2" in repr(cv) and "series='who'" in repr(cv)


@pytest.mark.parametrize("splitter", BOTH)
def test_groups_are_ignored_with_a_warning(splitter):
    X = column(range(6))
    with pytest.warns(UserWarning, match="ignores groups"):
        list(splitter(2).split(X, groups=np.zeros(6)))


@pytest.mark.parametrize("splitter", BOTH)
def test_rows_and_targets_must_be_equally_many(splitter):
    with pytest.raises(ValueError, match="inconsistent numbers"):
        list(splitter(2).split(column(range(6)), np.zeros(5)))


# --- clear words ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splitter", "arguments", "message"),
    [
        (PanelTimeSeriesSplit, {"n_splits": 0}, "n_splits must be an integer >= 1"),
        (PanelTimeSeriesSplit, {"n_splits": 2.5}, "n_splits must be an integer"),
        (PanelBlockKFold, {"n_splits": 1}, "n_splits must be an integer >= 2"),
        (PanelBlockKFold, {"random_state": 0}, "no effect without shuffle=True"),
    ],
)
def test_wrong_parameters_are_refused(splitter, arguments, message):
    with pytest.raises(ValueError, match=message):
        splitter(**arguments)


DATES = pd.DataFrame({"t": pd.date_range("2024", periods=10, freq="D")})
NUMBERS = pd.DataFrame({"t": np.arange(10.0)})


@pytest.mark.parametrize(
    ("cv", "X", "message"),
    [
        (PanelTimeSeriesSplit(2, test_size=3), DATES, "test_size must be a timedelta"),
        (PanelTimeSeriesSplit(2, test_size="x"), DATES, "test_size must be a timedel"),
        (PanelTimeSeriesSplit(2, test_size="-3D"), DATES, "test_size must be a timed"),
        (PanelTimeSeriesSplit(2, gap=1), DATES, "gap must be a timedelta"),
        (PanelTimeSeriesSplit(2, gap="-1s"), DATES, "gap must be a timedelta"),
        (PanelTimeSeriesSplit(2, gap=np.timedelta64(1, "s")), NUMBERS, "gap must be"),
        (PanelTimeSeriesSplit(2, test_size="3D"), NUMBERS, "test_size must be a posi"),
        (PanelTimeSeriesSplit(2, test_size=0), NUMBERS, "test_size must be a positive"),
        (PanelTimeSeriesSplit(2, gap=-1), NUMBERS, "gap must be a number >= 0"),
        (PanelTimeSeriesSplit(2, gap=np.nan), NUMBERS, "gap must be a number >= 0"),
        (PanelTimeSeriesSplit(2, max_train_size=-1), NUMBERS, "max_train_size must be"),
        (PanelTimeSeriesSplit(10), NUMBERS, "no rows to test in split 10 of n_splits="),
        (PanelTimeSeriesSplit(2, gap=9), NUMBERS, "no rows to train on in split 1"),
        (PanelTimeSeriesSplit(2, test_size=0.4), NUMBERS, "no rows to test in split 1"),
        (PanelTimeSeriesSplit(2, test_size=8), NUMBERS, "no rows to train on in spli"),
        (PanelBlockKFold(2, block_length=0), NUMBERS, "block_length must be a posit"),
        (PanelBlockKFold(2, block_length=1), DATES, "block_length must be a timed"),
        (PanelBlockKFold(3, block_length=5), NUMBERS, "3 folds need .* X has 2"),
        (PanelBlockKFold(11), NUMBERS, "n_splits=11 folds need .* X has 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_with_clear_words(cv, X, message):
    with pytest.raises(ValueError, match=message):
        list(cv.split(X))
