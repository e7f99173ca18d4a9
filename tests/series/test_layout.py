"""SeriesLayout: time, series, context and covariates in rows of observations."""

import pickle

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sknode._series.keys import encode_series
from sknode._series.layout import SeriesLayout
from sknode._series.table import Source
from sknode._series.times import as_times

DAY = 86400.0


def learned(X, **kwargs):
    """Return the layout of X, and what it reads in X."""
    layout = SeriesLayout.learn(X, **kwargs)
    return layout, layout.read(X)


def days(n, **kwargs):
    """Return n days in 2024."""
    return pd.date_range("2024-01-01", periods=n, **kwargs)


@pytest.fixture
def wards():
    """Return rows of two wards in a long table with every kind of column."""
    return pd.DataFrame(
        {
            "age": [30, 30, 41, 41],
            "ward": ["b", "b", "a", "a"],
            "when": days(4)[[1, 0, 0, 3]],
            "dose": [0.5, 1.5, 2.5, 3.5],
            "known": [np.nan, 7.0, np.nan, np.nan],
        }
    )


# --- where time is --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dates", "periods", "zoned"])
def test_columns_that_repeat_the_index_are_time_and_series(kind):
    days = pd.date_range("2024-01-01", periods=3, name="day")
    if kind == "periods":
        days = days.to_period("D")
    if kind == "zoned":
        days = days.tz_localize("Asia/Tokyo")
    X = days.to_frame()
    layout = SeriesLayout.learn(X)
    assert layout.time == Source("column", 0, "day") and not layout.covariates
    time = layout.read(X.reset_index(drop=True)).time
    np.testing.assert_array_equal(time, [0, 86400, 2 * 86400])
    index = pd.MultiIndex.from_product([["a", "b"], days], names=["shop", "day"])
    for several in (index.to_frame(), index.to_frame().assign(price=[1.0] * 6)):
        for series in (None, "shop"):
            layout = SeriesLayout.learn(several, series=series)
            assert layout.time == Source("column", 1, "day")
            assert layout.series == [Source("column", 0, "shop")]
            assert layout.covariates == list(range(2, several.shape[1]))
    # other dates are no covariate
    later = X.set_axis(days.shift(1))
    with pytest.raises(ValueError, match="covariate column 'day'"):
        SeriesLayout.learn(later).read(later)


@pytest.mark.parametrize(
    "index",
    [
        days(3),
        days(3, tz="Europe/Paris"),
        days(3, freq="D").to_period("D"),
        days(3) - pd.Timestamp("2024-01-01"),
        pd.Index(days(3).date),
    ],
    ids=["naive", "aware", "period", "timedelta", "date"],
)
def test_auto_takes_a_dated_index_first(index):
    X = pd.DataFrame({"x": [1.0, 2.0, 3.0]}, index=index)
    layout, rows = learned(X)
    np.testing.assert_array_equal(rows.time, [0, DAY, 2 * DAY])
    np.testing.assert_array_equal(rows.covariates.ravel(), [1, 2, 3])
    assert list(layout.to_times(rows.time)) == list(as_times(X.index, ""))


def test_auto_then_takes_the_first_dated_column(wards):
    layout, rows = learned(wards, series="ward", context="known")
    assert (layout.time.place, layout.time.name) == ("column", "when")
    np.testing.assert_array_equal(rows.time, [DAY, 0, 0, 3 * DAY])


def test_auto_then_takes_the_first_free_column(wards):
    X = wards[["ward", "known", "age", "dose"]]
    layout, rows = learned(X, series="ward", context="known")
    assert layout.time.name == "age"
    np.testing.assert_array_equal(rows.time, [0, 0, 11, 11])
    np.testing.assert_array_equal(rows.covariates, wards[["dose"]])


def test_auto_takes_the_dated_level_and_the_others_name_series(wards):
    X = wards.set_index(["ward", "when"])[["dose"]]
    for index in (X.index, X.index.swaplevel()):
        layout, rows = learned(X.set_axis(index))
        np.testing.assert_array_equal(rows.time, [DAY, 0, 0, 3 * DAY])
        assert rows.ids.tolist() == ["b", "b", "a", "a"]
        assert layout.time_name == "when" and layout.series_names == ["ward"]


def test_several_other_levels_name_series_together(wards):
    X = wards.set_index(["ward", "when", "age"])[["dose"]]
    layout, rows = learned(X)
    assert rows.ids.tolist() == [("b", 30), ("b", 30), ("a", 41), ("a", 41)]
    assert layout.series_names == ["ward", "age"]
    _, chosen = learned(X, series="ward")
    assert chosen.ids.tolist() == ["b", "b", "a", "a"]


def test_auto_without_columns_takes_the_last_level_or_a_numeric_index():
    index = pd.MultiIndex.from_tuples([("a", 3), ("b", 5)])
    layout, rows = learned(pd.DataFrame(index=index))
    np.testing.assert_array_equal(rows.time, [0, 2])
    assert rows.ids.tolist() == ["a", "b"]
    assert rows.covariates.shape == (2, 0) and layout.n_features_in == 0
    _, rows = learned(pd.DataFrame(index=[2.5, 1.0]))
    np.testing.assert_array_equal(rows.time, [1.5, 0])
    with pytest.raises(ValueError, match="no column of times"):
        SeriesLayout.learn(pd.DataFrame(index=range(3)))


@pytest.mark.parametrize("time", ["when", 2, -3])
def test_time_by_label_and_position(wards, time):
    _, rows = learned(wards, time=time, series="ward", context="known")
    np.testing.assert_array_equal(rows.time, [DAY, 0, 0, 3 * DAY])


def test_time_by_name_of_level_and_index(wards):
    X = wards[["dose", "when"]].set_index("when")
    for time in ("when", "index"):
        _, rows = learned(X, time=time)
        np.testing.assert_array_equal(rows.time, [DAY, 0, 0, 3 * DAY])
    _, rows = learned(wards[["dose"]].iloc[::2], time="index")
    np.testing.assert_array_equal(rows.time, [0, 2])
    _, rows = learned(
        wards.rename(columns={"dose": "index"})[["age", "index"]], time="index"
    )
    np.testing.assert_array_equal(rows.time, [0, 1, 2, 3])


def test_integers_are_positions_whatever_the_labels():
    X = pd.DataFrame({1: [5.0, 7.0], 0: [1.0, 2.0]})
    layout, rows = learned(X, time=0)
    np.testing.assert_array_equal(rows.time, [0, 2])
    assert layout.feature_names is None


# --- series ---------------------------------------------------------------------------


def test_one_series_without_a_key():
    _, rows = learned(np.arange(6.0).reshape(3, 2))
    assert rows.ids.dtype == object and len(set(rows.ids)) == 1


@pytest.mark.parametrize(
    "ids",
    [
        ["x", "y", "x"],
        [3, -1, 3],
        [1.5, 2.0, 1.5],
        [True, False, True],
        [("a", 1), ("b", 2), ("a", 1)],
        list(days(3)[[0, 1, 0]]),
    ],
    ids=["str", "int", "float", "bool", "tuple", "Timestamp"],
)
@pytest.mark.parametrize("dtype", [None, "category", object])
def test_series_have_names_of_any_type(ids, dtype):
    X = pd.DataFrame({"t": [0.0, 1.0, 2.0], "id": pd.Series(ids, dtype=dtype)})
    _, rows = learned(X, time="t", series="id")
    assert rows.ids.dtype == object and rows.ids.tolist() == ids
    codes, names = encode_series(rows.ids)
    assert codes.tolist() == [0, 1, 0] and names == ids[:2]


def test_series_by_position_level_index_and_list(wards):
    expected, wards = ["b", "b", "a", "a"], wards.drop(columns="known")
    for series in ("ward", 1, ["ward"]):
        assert learned(wards, series=series)[1].ids.tolist() == expected
    by_level = wards.set_index("ward")
    for series in ("ward", "index"):
        assert learned(by_level, series=series)[1].ids.tolist() == expected
    both = learned(wards, series=["ward", "age"])[1].ids
    assert both.tolist() == [("b", 30), ("b", 30), ("a", 41), ("a", 41)]


def test_a_dated_level_that_names_series_is_not_time():
    # forecasts: each made on a day, for days to come
    made, ahead = days(2)[[0, 0, 1]], days(4)[[1, 2, 3]]
    index = pd.MultiIndex.from_arrays([made, ahead], names=["made", "for"])
    layout, rows = learned(
        pd.DataFrame({"x": [1.0, 2.0, 3.0]}, index=index), series="made"
    )
    assert layout.time_name == "for" and rows.ids.tolist() == list(made)
    np.testing.assert_array_equal(rows.time, [0, DAY, 2 * DAY])


def test_missing_names_of_series_raise_an_error(wards):
    wards["ward"] = ["a", None, "b", "b"]
    with pytest.raises(ValueError, match="1 missing values in column 'ward'"):
        learned(wards, series="ward")


def test_new_series_get_the_next_numbers():
    ids = np.array(["c", "a", "c", "z"], dtype=object)
    codes, names = encode_series(ids, ["a", "b"])
    assert codes.tolist() == [2, 0, 2, 3] and names == ["a", "b", "c", "z"]


# --- covariates and context -----------------------------------------------------------


def test_all_other_columns_are_covariates(wards):
    layout, rows = learned(wards, series="ward", context="known")
    np.testing.assert_array_equal(rows.covariates, wards[["age", "dose"]])
    assert layout.n_covariates == 2
    assert layout.feature_names == list(wards.columns)
    assert layout.n_features_in == 5
    assert rows.covariates.dtype == np.float64


@pytest.mark.parametrize(
    "dtype", ["i1", "u8", "f4", "f2", "bool", "Int64", "boolean", "Float32", "object"]
)
def test_covariates_of_any_numeric_type(dtype):
    X = pd.DataFrame({"t": [0.0, 1.0], "x": pd.Series([1, 0]).astype(dtype)})
    np.testing.assert_array_equal(learned(X)[1].covariates, [[1], [0]])


@pytest.mark.parametrize(
    "column, found",
    [
        (["a", "b"], "str"),
        (pd.Series(["a", "b"], dtype="category"), "category"),
        (pd.Series(["a", 1], dtype=object), "mixed"),
        (days(2), "datetime64"),
        (pd.Series([1j, 2j]), "complex"),
        (pd.arrays.SparseArray([0.0, 1.0]), "sparse"),
    ],
)
def test_covariates_that_are_no_numbers_raise_an_error(column, found):
    X = pd.DataFrame({"t": [0.0, 1.0], "city": column})
    with pytest.raises(ValueError, match=f"covariate column 'city'.*{found}"):
        learned(X, time="t")


def test_strings_are_to_be_encoded(wards):
    with pytest.raises(ValueError, match=r"column 'ward' .* must be numeric. Encode"):
        learned(wards, context="known")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_covariates_must_be_finite(wards, bad):
    layout = SeriesLayout.learn(wards, series="ward", context="known")
    wards.loc[2, "dose"] = bad
    word = "infinity in" if bad in (np.inf, -np.inf) else "NaN in"
    with pytest.raises(ValueError, match=f"{word} covariate column 'dose'"):
        layout.read(wards)


@pytest.mark.parametrize("context", ["known", 4, ["known"], ["known", "dose"]])
def test_context_may_be_unknown(wards, context):
    _, rows = learned(wards, series="ward", context=context)
    names = context if isinstance(context, list) else ["known"]
    np.testing.assert_array_equal(rows.context, wards[names])
    assert learned(wards[["when", "dose"]])[1].context is None


def test_context_must_not_be_infinite(wards):
    wards["known"] = [np.inf, 1, 2, 3]
    with pytest.raises(ValueError, match="infinity in context column 'known'"):
        learned(wards, series="ward", context="known")


def test_missing_context_column_raises_an_error_that_names_it(wards):
    layout = SeriesLayout.learn(wards, series="ward", context="known")
    with pytest.raises(ValueError, match=r"lacks columns .*'known' \(context\)"):
        layout.read(wards.drop(columns="known"))
    with pytest.raises(ValueError, match=r"'ward' \(series\), 'when' \(time\)"):
        layout.read(wards.drop(columns=["ward", "when"]))


# --- calendar -------------------------------------------------------------------------


def test_calendar_follows_the_covariates_in_local_time():
    local = pd.DatetimeIndex(["2024-03-30 06:00", "2024-03-31 06:00"])
    X = pd.DataFrame({"x": [1.0, 2.0]}, index=local.tz_localize("Europe/Berlin"))
    layout, rows = learned(X, calendar=("hour", "dayofweek"))
    assert rows.covariates.shape == (2, 5) and layout.n_covariates == 5
    np.testing.assert_allclose(
        rows.covariates[:, :3], [[1, 1, 0], [2, 1, 0]], atol=1e-9
    )
    # where the clocks are does not depend on the zone of later rows
    again = layout.read(X.tz_convert("UTC"))
    np.testing.assert_array_equal(again.covariates, rows.covariates)


def test_calendar_needs_datetimes():
    with pytest.raises(ValueError, match="needs datetimes"):
        SeriesLayout.learn(np.zeros((2, 1)), calendar=("hour",))


def test_rows_can_be_made_without_a_table(wards):
    layout, rows = learned(wards, series="ward", context="known", calendar="yearday")
    known = wards[["age", "dose"]].to_numpy(float)
    made = layout.rows_at(rows.ids, rows.time, known)
    np.testing.assert_array_equal(made.covariates, rows.covariates)
    np.testing.assert_array_equal(made.time, rows.time)
    assert made.context.shape == (4, 1) and np.isnan(made.context).all()
    with pytest.raises(ValueError, match="0 covariates, but were 2 in fit"):
        layout.rows_at(rows.ids, rows.time)


# --- arrays and other containers ------------------------------------------------------


def test_arrays_are_read_by_position():
    X = np.array([[1.0, 0.0, 9.0, np.nan], [4.0, 1.0, 8.0, 2.0]])
    layout, rows = learned(X, series=1, context=[3])
    np.testing.assert_array_equal(rows.time, [0, 3])
    np.testing.assert_array_equal(rows.covariates, [[9], [8]])
    np.testing.assert_array_equal(rows.context, [[np.nan], [2]])
    assert rows.ids.tolist() == [0, 1]
    assert layout.feature_names is None and layout.n_features_in == 4


def test_lists_keep_a_type_per_column():
    X = [["a", 1, 0.5], ["b", 3, 1.5]]
    _, rows = learned(X, series=0)
    assert rows.ids.tolist() == ["a", "b"]
    np.testing.assert_array_equal(rows.time, [0, 2])
    np.testing.assert_array_equal(rows.covariates, [[0.5], [1.5]])


def test_arrays_of_objects_may_hold_datetimes_and_strings():
    X = np.array([["a", d] for d in days(2)], dtype=object)
    _, rows = learned(X, series=0)
    np.testing.assert_array_equal(rows.time, [0, DAY])


@pytest.mark.parametrize("frame", [False, True])
def test_read_only_memory_maps(tmp_path, frame):
    X = np.memmap(tmp_path / "X", dtype=float, mode="w+", shape=(3, 2))
    X[:] = np.arange(6).reshape(3, 2)
    X.flush()
    X = np.memmap(tmp_path / "X", dtype=float, mode="r", shape=(3, 2))
    _, rows = learned(pd.DataFrame(X, copy=False) if frame else X)
    np.testing.assert_array_equal(rows.time, [0, 2, 4])
    np.testing.assert_array_equal(rows.covariates.ravel(), [1, 3, 5])


def test_frame_and_array_say_the_same():
    X = np.random.default_rng(0).normal(size=(5, 3))
    _, of_array = learned(X)
    layout, of_frame = learned(pd.DataFrame(X, columns=list("abc")))
    np.testing.assert_array_equal(of_array.time, of_frame.time)
    np.testing.assert_array_equal(layout.read(X).covariates, of_array.covariates)


def test_X_is_left_alone(wards):
    before = wards.copy()
    rows = learned(wards, series="ward", context="known")[1]
    rows.time[:] = rows.covariates[:] = rows.context[:] = 0
    rows.ids[:] = "z"
    pd.testing.assert_frame_equal(wards, before)
    X = np.arange(6.0).reshape(3, 2)
    rows = learned(X)[1]
    rows.time[:] = rows.covariates[:] = 0
    np.testing.assert_array_equal(X.ravel(), np.arange(6))


def test_time_is_relative_to_the_first_of_training():
    X = pd.DataFrame(index=days(3))
    layout = SeriesLayout.learn(X)
    earlier = pd.DataFrame(index=days(2) - pd.Timedelta(10, "D"))
    np.testing.assert_array_equal(layout.read(earlier).time, [-10 * DAY, -9 * DAY])


# --- what is wrong --------------------------------------------------------------------


@pytest.mark.parametrize("parameter", ["time", "series", "context"])
def test_unknown_names_raise_an_error_that_lists_the_columns(wards, parameter):
    message = rf"{parameter}='nix' is no column.*\['age', 'ward'.*levels \[None\]"
    with pytest.raises(ValueError, match=message):
        SeriesLayout.learn(wards, **{parameter: "nix"})
    with pytest.raises(
        ValueError, match=f"{parameter}=5 is no column of X, which has 5"
    ):
        SeriesLayout.learn(wards, **{parameter: 5})
    with pytest.raises(ValueError, match=f"{parameter}='t' .* X is an array"):
        SeriesLayout.learn(np.zeros((2, 2)), **{parameter: "t"})


def test_a_column_has_one_role(wards):
    with pytest.raises(ValueError, match="time and series are both column 'when'"):
        SeriesLayout.learn(wards, time="when", series="when")
    with pytest.raises(ValueError, match="has another role"):
        SeriesLayout.learn(wards, time="when", context="when")
    with pytest.raises(ValueError, match="context cannot be time or series"):
        SeriesLayout.learn(wards, series="ward", context="ward")
    with pytest.raises(ValueError, match="twice"):
        SeriesLayout.learn(wards, context=["known", 4])
    with pytest.raises(ValueError, match="context='when' must be a column"):
        SeriesLayout.learn(wards.set_index("when"), context="when")


def test_labels_that_occur_twice_are_ambiguous(wards):
    X = wards.rename(columns={"dose": "age"})
    with pytest.raises(ValueError, match="time='age' names 2 columns"):
        SeriesLayout.learn(X, time="age")
    _, rows = learned(X, series="ward", context="known")
    np.testing.assert_array_equal(rows.covariates, wards[["age", "dose"]])


def test_missing_times_name_their_column(wards):
    wards.loc[1, "when"] = pd.NaT
    with pytest.raises(ValueError, match="column 'when' contain 1 missing values"):
        SeriesLayout.learn(wards, series="ward", context="known")
    X = np.array([[0.0, 1.0], [np.inf, 1.0]])
    with pytest.raises(ValueError, match="column 0 contain 1 infinite"):
        SeriesLayout.learn(X)


def test_other_kind_of_time_than_in_training(wards):
    layout = SeriesLayout.learn(wards, series="ward", context="known")
    with pytest.raises(TypeError, match=r"datetimes without .* 'when' holds numbers"):
        layout.read(wards.assign(when=1.0))


def test_other_columns_than_in_training(wards):
    X = wards[["when", "age", "dose"]]
    layout = SeriesLayout.learn(X)
    with pytest.raises(ValueError, match=r"did not have in fit: \['new'\]"):
        layout.read(X.assign(new=1))
    with pytest.raises(ValueError, match="same order"):
        layout.read(X[["when", "dose", "age"]])
    with pytest.raises(ValueError, match="has 2 features, but had 3"):
        layout.read(X.to_numpy()[:, :2])


def test_an_index_that_is_needed_must_be_there(wards):
    layout = SeriesLayout.learn(wards.set_index(["ward", "when"])[["dose"]])
    X = wards[["dose"]]
    with pytest.raises(
        ValueError, match=r"1 index levels, but had 2.*'when' is needed"
    ):
        layout.read(X)
    with pytest.raises(ValueError, match="0 index levels, but had 2"):
        layout.read(X.to_numpy())


def test_levels_may_come_in_another_order(wards):
    X = wards.set_index(["ward", "when"])[["dose"]]
    layout, rows = learned(X)
    again = layout.read(X.swaplevel())
    assert again.ids.tolist() == rows.ids.tolist()
    np.testing.assert_array_equal(again.time, rows.time)


@pytest.mark.parametrize(
    "X, error, message",
    [
        (np.zeros(3), ValueError, "Expected 2D array, got 1D"),
        (pd.Series([1.0]), ValueError, "to_frame"),
        (np.zeros((2, 2, 2)), ValueError, "got 3D"),
        (sparse.csr_matrix(np.eye(2)), TypeError, "Sparse data"),
        (np.zeros((0, 2)), ValueError, r"0 sample\(s\)"),
        (pd.DataFrame({"a": []}), ValueError, r"0 sample\(s\)"),
    ],
    ids=["1-D", "Series", "3-D", "sparse", "empty", "empty frame"],
)
def test_what_is_no_table_raises_an_error(X, error, message):
    with pytest.raises(error, match=message):
        SeriesLayout.learn(X)


# --- storing --------------------------------------------------------------------------


def layouts(wards):
    """Return layouts of every kind of table."""
    return [
        SeriesLayout.learn(np.zeros((2, 3)), series=1, context=2),
        SeriesLayout.learn(wards, series=["ward", "age"], context="known"),
        SeriesLayout.learn(
            wards.set_index(["ward", "when"])[["dose"]], calendar=("hour", "month")
        ),
    ]


def test_layouts_survive_pickle(wards):
    for layout in layouts(wards):
        assert pickle.loads(pickle.dumps(layout)) == layout


def test_layouts_survive_skops(wards):
    skops = pytest.importorskip("skops.io")
    for layout in layouts(wards):
        data = skops.dumps(layout)
        own = skops.get_untrusted_types(data=data)
        assert all(name.startswith("sknode._series.") for name in own)
        assert skops.loads(data, trusted=own) == layout
