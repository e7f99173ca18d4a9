"""WideLayout: channels of wide tables, read and filled."""

import pickle

import numpy as np
import pandas as pd
import pytest

from sknode._series.wide import WideLayout

DAY = 86400.0
NAN = np.nan


def filled(layout, X, value=0.25):
    """Return X with holes filled by values that tell cells apart."""
    values = layout.read(X).values
    return layout.write(X, value + np.arange(values.size).reshape(values.shape))


@pytest.fixture
def table():
    """Return a wide table with columns of every type, most with holes."""
    return pd.DataFrame(
        {
            "f8": [1 / 3, NAN, -0.0],
            "f4": np.array([NAN, 0.1, 0.2], dtype=np.float32),
            "i8": [2**60 + 1, 2, 3],
            "bool": [True, False, True],
            "Int64": pd.array([1, None, 3], dtype="Int64"),
            "Float32": pd.array([0.1, None, 3], dtype="Float32"),
            "boolean": pd.array([True, None, False], dtype="boolean"),
            "full": pd.array([1, 2, 3], dtype="Int16"),
            "object": pd.Series([1.5, None, 2], dtype=object),
        },
        index=pd.DatetimeIndex(["2024-01-03", "2024-01-01", "2024-01-02"], name="day"),
    )


# --- where time and series are --------------------------------------------------------

DATES = pd.DatetimeIndex(["2024-01-02", "2024-01-01", "2024-01-04"])


@pytest.mark.parametrize(
    "index, expected",
    [
        (DATES, [DAY, 0, 3 * DAY]),
        (DATES.as_unit("s").tz_localize("Asia/Tokyo"), [DAY, 0, 3 * DAY]),
        (DATES.to_period("D"), [DAY, 0, 3 * DAY]),
        (DATES - DATES[0], [DAY, 0, 3 * DAY]),
        (pd.Index(DATES.date), [DAY, 0, 3 * DAY]),
        (pd.Index([0.5, 0.25, 7]), [0.25, 0, 6.75]),
        (pd.Index([30, 10, 10]), [20, 0, 0]),
        (pd.RangeIndex(3), [0, 1, 2]),
        (pd.Index(["x", "y", "z"]), [0, 1, 2]),
    ],
    ids=["date", "aware", "period", "delta", "object", "f8", "i8", "range", "str"],
)
def test_time_is_the_index(index, expected):
    X = pd.DataFrame({"a": [1.0, NAN, 3.0]}, index=index)
    layout = WideLayout.learn(X)
    rows = layout.read(X)
    np.testing.assert_array_equal(rows.time, expected)
    np.testing.assert_array_equal(rows.values.ravel(), [1, NAN, 3])
    assert len(set(rows.ids)) == 1
    out = filled(layout, X)
    pd.testing.assert_index_equal(out.index, X.index)
    np.testing.assert_array_equal(out["a"], [1, 1.25, 3])


@pytest.mark.parametrize("ids", [["b", "b", "a"], [7, 7, 3]], ids=["str", "int"])
@pytest.mark.parametrize("dated", [True, False])
def test_levels_are_series_and_time(ids, dated):
    times = DATES if dated else [1, 0, 3]
    index = pd.MultiIndex.from_arrays([ids, times], names=["id", "t"])
    X = pd.DataFrame({"a": [1.0, NAN, 3.0], "b": [NAN, NAN, NAN]}, index=index)
    layout = WideLayout.learn(X)
    rows = layout.read(X)
    assert rows.ids.tolist() == ids
    np.testing.assert_array_equal(
        rows.time, np.array([1, 0, 3]) * (DAY if dated else 1)
    )
    assert layout.time_name == "t" and layout.series_names == ["id"]
    out = filled(layout, X)
    pd.testing.assert_index_equal(out.index, X.index)
    np.testing.assert_array_equal(out["b"], [1.25, 3.25, 5.25])


def test_long_tables_keep_their_columns_of_names_and_times():
    X = pd.DataFrame(
        {"id": ["b", "a", "b"], "x": [1.0, NAN, 2.0], "t": DATES, "y": [NAN, 2.0, 1.0]}
    )
    for time in ("auto", "t", 2):
        layout = WideLayout.learn(X, time=time, series="id")
        rows = layout.read(X)
        assert rows.ids.tolist() == ["b", "a", "b"]
        np.testing.assert_array_equal(rows.time, [DAY, 0, 3 * DAY])
        np.testing.assert_array_equal(rows.values, X[["x", "y"]])
        assert layout.channel_names == ["x", "y"]
        out = filled(layout, X)
        pd.testing.assert_frame_equal(out[["id", "t"]], X[["id", "t"]])
        assert out.columns.tolist() == X.columns.tolist()
        np.testing.assert_array_equal(out[["x", "y"]], [[1, 1.25], [2.25, 2], [2, 1]])


def test_rows_of_several_series_are_no_steps_in_time():
    X = pd.DataFrame({"id": ["a", "b"], "t": [0.0, 1.0], "x": [1.0, 2.0]})
    with pytest.raises(ValueError, match="Name the column of times"):
        WideLayout.learn(X, series="id")
    layout = WideLayout.learn(X, series="id", time="index")
    assert layout.channel_names == ["t", "x"]


def test_series_may_be_the_index_and_time_a_column():
    X = pd.DataFrame({"t": [3.0, 1.0], "x": [1.0, NAN]}, index=["a", "b"])
    rows = WideLayout.learn(X, series="index", time="t").read(X)
    assert rows.ids.tolist() == ["a", "b"]
    np.testing.assert_array_equal(rows.time, [2, 0])


def test_strings_that_are_dates_raise_an_error():
    X = pd.DataFrame({"x": [1.0, NAN]}, index=["2024-01-01", "2024-01-02"])
    with pytest.raises(ValueError, match=r"such as '2024-01-01'.*to_datetime"):
        WideLayout.learn(X)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, object])
def test_rows_of_arrays_are_steps(dtype):
    X = np.array([[1.0, NAN], [NAN, 2.0], [0.1, -0.0]], dtype=dtype)
    before = X.copy()
    layout = WideLayout.learn(X)
    rows = layout.read(X)
    np.testing.assert_array_equal(rows.time, [0, 1, 2])
    assert layout.channel_names == [0, 1]
    out = filled(layout, X)
    assert type(out) is np.ndarray and out.dtype == dtype
    np.testing.assert_array_equal(
        out, np.array([[1, 1.25], [2.25, 2], [0.1, 0]], dtype)
    )
    np.testing.assert_array_equal(X.astype(float), before.astype(float))
    assert np.signbit(float(out[2, 1]))


def test_arrays_may_have_columns_of_time_and_series():
    X = np.array([[1.0, 5.0, NAN], [1.0, 3.0, 2.0]])
    layout = WideLayout.learn(X, series=0, time=1)
    rows = layout.read(X)
    np.testing.assert_array_equal(rows.time, [2, 0])
    np.testing.assert_array_equal(filled(layout, X), [[1, 5, 0.25], [1, 3, 2]])


def test_integer_arrays_have_nothing_to_fill():
    X = np.arange(6).reshape(3, 2)
    out = filled(WideLayout.learn(X), X)
    assert out.dtype == X.dtype and out is not X
    np.testing.assert_array_equal(out, X)


# --- what is written ------------------------------------------------------------------


def test_types_names_and_index_stay(table):
    table.columns.name, table.attrs["unit"] = "channel", "ppm"
    before = table.copy(deep=True)
    out = filled(WideLayout.learn(table), table)
    expected = table.dtypes.astype(str)
    expected[["Int64", "boolean"]] = "Float64"
    assert out.dtypes.astype(str).tolist() == expected.tolist()
    pd.testing.assert_index_equal(out.index, table.index)
    pd.testing.assert_index_equal(out.columns, table.columns)
    assert out.attrs == table.attrs
    assert not out.isna().any(axis=None)
    pd.testing.assert_frame_equal(table, before)


def test_observed_cells_stay_to_the_bit(table):
    out = filled(WideLayout.learn(table), table)
    for name in table:
        seen = table[name].notna()
        assert out[name][seen].tolist() == table[name][seen].tolist()
    for name in ("f8", "f4"):
        seen = table[name].notna().to_numpy()
        assert out[name].to_numpy()[seen].tobytes() == (
            table[name].to_numpy()[seen].tobytes()
        )
    assert np.signbit(out["f8"].iloc[2])


def test_holes_get_their_own_values(table):
    layout = WideLayout.learn(table)
    out = filled(layout, table)
    for j, name in enumerate(layout.channel_names):
        for i in np.flatnonzero(table[name].isna()):
            assert out[name].iloc[i] == 0.25 + 9 * i + j


def test_nullable_columns_stay_whole_if_all_that_is_filled_is():
    X = pd.DataFrame(
        {
            "n": pd.array([2**60 + 1, None], dtype="Int64"),
            "i1": pd.array([1, None], dtype="Int8"),
            "b": pd.array([True, None], dtype="boolean"),
        }
    )
    layout = WideLayout.learn(X)
    out = layout.write(X, np.array([[NAN, NAN, NAN], [5.0, -3.0, 0.0]]))
    assert out.dtypes.astype(str).tolist() == ["Int64", "Int8", "boolean"]
    assert out["n"].tolist() == [2**60 + 1, 5]
    assert out["b"].tolist() == [True, False]
    out = layout.write(X, np.array([[NAN, NAN, NAN], [5.0, 300.0, 2.0]]))
    assert out.dtypes.astype(str).tolist() == ["Int64", "Float64", "Float64"]
    assert out["i1"].tolist() == [1, 300]
    with pytest.raises(
        ValueError, match=r"Int64 has holes and integers beyond 2\*\*53"
    ):
        layout.write(X, np.full((2, 3), 0.5))


@pytest.mark.parametrize("dtype", ["f2", "f4", "Float32"])
def test_what_is_filled_is_rounded_to_the_precision_of_its_column(dtype):
    X = pd.DataFrame({"a": pd.Series([1.0, NAN]).astype(dtype)})
    out = WideLayout.learn(X).write(X, np.array([[NAN], [0.1]]))
    assert out["a"].dtype == X["a"].dtype
    assert out["a"][1] == pd.Series([0.1]).astype(dtype)[0]


def test_duplicate_and_unsorted_times_and_labels_are_written_in_place():
    index = pd.MultiIndex.from_tuples([("b", 2), ("a", 1), ("b", 2), ("b", 0)])
    X = pd.DataFrame([[1.0, NAN], [NAN, NAN], [3.0, 4.0], [NAN, 5.0]], index=index)
    X.columns = ["x", "x"]
    layout = WideLayout.learn(X)
    out = filled(layout, X)
    pd.testing.assert_index_equal(out.index, X.index)
    np.testing.assert_array_equal(out, [[1, 1.25], [2.25, 3.25], [3, 4], [6.25, 5]])


def test_columns_may_have_levels():
    X = pd.DataFrame(
        [[1.0, NAN, 2.0]], columns=pd.MultiIndex.from_product([["a"], ["x", "y", "z"]])
    )
    layout = WideLayout.learn(X, covariates=[("a", "z")])
    assert layout.channel_names == [("a", "x"), ("a", "y")]
    out = filled(layout, X)
    pd.testing.assert_index_equal(out.columns, X.columns)
    assert WideLayout.learn(X, covariates=("a", "z")) == layout


def test_new_rows_and_missing_channels_can_be_filled():
    X = pd.DataFrame({"x": [1.0, 2.0], "y": [NAN, NAN]}, index=DATES[:2])
    layout = WideLayout.learn(X)
    future = pd.date_range("2024-02-01", periods=3)
    ahead = X.reindex(future)
    rows = layout.read(ahead)
    np.testing.assert_array_equal(rows.time, (31 + np.arange(3)) * DAY)
    assert np.isnan(rows.values).all()
    assert filled(layout, ahead).notna().all(axis=None)


def test_subclasses_of_frames_stay():
    class Sub(pd.DataFrame):
        @property
        def _constructor(self):
            return Sub

    X = Sub({"x": [1.0, NAN]})
    assert type(filled(WideLayout.learn(X), X)) is Sub


def test_read_only_frames_are_copied():
    values = np.array([[1.0, NAN], [2.0, 3.0]])
    values.flags.writeable = False
    for X in (values, pd.DataFrame(values, copy=False)):
        out = filled(WideLayout.learn(X), X)
        np.testing.assert_array_equal(out, [[1, 1.25], [2, 3]])


# --- covariates -----------------------------------------------------------------------


@pytest.fixture
def weather():
    """Return a table with a covariate that varies and one that does not."""
    return pd.DataFrame(
        {"site": [1, 1, 2], "ozone": [NAN, 3.0, 4.0], "sun": [0.5, 0.7, 0.6]},
        index=DATES.tz_localize("Europe/Berlin"),
    )


def test_covariates_are_known_and_kept(weather):
    layout = WideLayout.learn(weather, covariates=["sun", "site"], calendar="yearday")
    rows = layout.read(weather)
    np.testing.assert_array_equal(rows.covariates[:, :2], weather[["sun", "site"]])
    angle = 2 * np.pi * np.array([1, 0, 3]) / 366
    np.testing.assert_allclose(rows.covariates[:, 2], np.sin(angle), atol=1e-12)
    np.testing.assert_allclose(rows.covariates[:, 3], np.cos(angle), atol=1e-12)
    assert layout.n_covariates == 4 and layout.channel_names == ["ozone"]
    out = filled(layout, weather)
    pd.testing.assert_frame_equal(out[["site", "sun"]], weather[["site", "sun"]])
    assert out["ozone"].tolist() == [0.25, 3, 4]


def test_covariates_must_be_complete_and_known(weather):
    layout = WideLayout.learn(weather, covariates="sun")
    with pytest.raises(ValueError, match="NaN in covariate column 'sun' \\(1 of 3"):
        layout.read(weather.assign(sun=[0.5, NAN, 0.7]))
    with pytest.raises(ValueError, match="covariates='moon' is no column"):
        WideLayout.learn(weather, covariates="moon")
    with pytest.raises(ValueError, match="no channels"):
        WideLayout.learn(weather, covariates=["sun", "site", "ozone"])
    with pytest.raises(ValueError, match="covariate cannot be time or series"):
        WideLayout.learn(weather, covariates="site", series="site")
    with pytest.raises(ValueError, match=r"lacks columns .*'sun' \(covariate\)"):
        layout.read(weather.drop(columns="sun"))


# --- what is wrong --------------------------------------------------------------------


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f4", "f8", "Float64", "object"])
def test_infinite_values_raise_an_error_that_names_the_column(dtype, infinity):
    X = pd.DataFrame({"a": [1.0, 2.0], "b": pd.Series([1.0, infinity]).astype(dtype)})
    layout = WideLayout.learn(X)
    for call in (layout.read, lambda X: layout.write(X, np.zeros((2, 2)))):
        with pytest.raises(ValueError, match="infinity in channel column 'b'"):
            call(X)


@pytest.mark.parametrize(
    "column",
    [["u", "v"], pd.Categorical([1, 2]), DATES[:2], [1j, 2j]],
    ids=["str", "category", "datetime", "complex"],
)
def test_channels_that_are_no_numbers_raise_an_error(column):
    X = pd.DataFrame({"a": [1.0, NAN], "city": column})
    with pytest.raises(ValueError, match="channel column 'city'"):
        WideLayout.learn(X, time="index").read(X)


def test_columns_of_dates_as_strings_are_to_be_converted():
    X = pd.DataFrame({"day": ["2024-01-01", "2024-01-02"], "x": [1.0, NAN]})
    with pytest.raises(ValueError, match=r"'day' .* Convert dates with pd.to_datetime"):
        WideLayout.learn(X).read(X)


def test_missing_times_raise_an_error():
    X = pd.DataFrame({"a": [1.0, 2.0]}, index=pd.DatetimeIndex(["2024-01-01", None]))
    with pytest.raises(ValueError, match="the index contain 1 missing"):
        WideLayout.learn(X)


def test_other_kind_of_time_than_in_training():
    dated = pd.DataFrame({"a": [1.0, NAN]}, index=DATES[:2])
    plain = dated.reset_index(drop=True)
    with pytest.raises(TypeError, match="datetimes without a time zone in fit"):
        WideLayout.learn(dated).read(plain)
    for X in (plain, plain.to_numpy()):
        layout = WideLayout.learn(X)
        with pytest.raises(TypeError, match=r"numbers in fit, but .* holds datetimes"):
            layout.read(dated)
        np.testing.assert_array_equal(layout.read(plain).time, [0, 1])
        np.testing.assert_array_equal(layout.read(plain.to_numpy()).time, [0, 1])
        several = pd.concat({"s": plain})
        with pytest.raises(ValueError, match="several index levels, but had one"):
            layout.read(several)
    with pytest.raises(ValueError, match="0 index levels, but had 1"):
        WideLayout.learn(dated).read(dated.to_numpy())


def test_layouts_survive_pickle_and_skops(table):
    skops = pytest.importorskip("skops.io")
    several = pd.concat({"a": table, "b": table})
    for X in (table, several, np.zeros((2, 2))):
        layout = WideLayout.learn(X)
        assert pickle.loads(pickle.dumps(layout)) == layout
        data = skops.dumps(layout)
        own = skops.get_untrusted_types(data=data)
        assert all(name.startswith("sknode._series.") for name in own)
        assert skops.loads(data, trusted=own) == layout
