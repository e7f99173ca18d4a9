"""Pictures of time series: what is on the axes, and what is refused."""

import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from sknode.datasets import load_co2
from sknode.plotting import SeriesDisplay


class SeriesRegressor(RegressorMixin, BaseEstimator):
    """Predicts something that tells the rows it was given."""

    def __init__(self, time="auto", series=None, interval=False):
        self.time = time
        self.series = series
        self.interval = interval

    def fit(self, X, y):
        self.n_channels_ = 1 if np.ndim(y) == 1 else np.shape(y)[1]
        return self

    def predict(self, X, return_std=False):
        self.seen_ = X
        mean = np.arange(float(len(X)))
        if self.n_channels_ > 1:
            mean = np.stack([mean + 100 * i for i in range(self.n_channels_)], axis=1)
        return (mean, np.ones_like(mean)) if return_std else mean


class IntervalRegressor(SeriesRegressor):
    """Knows an interval that is not symmetric."""

    def predict_interval(self, X, coverage=0.9):
        mean = self.predict(X)
        return mean - coverage, mean + 3.0


class LinearImputer(BaseEstimator):
    """Fills by interpolation in time, and is less sure there."""

    def __init__(self, time="auto", series=None):
        self.time = time
        self.series = series

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def impute(self, X, return_std=True):
        frame = pd.DataFrame(X)
        std = frame.isna().astype(float)
        filled = frame.sort_index().interpolate(limit_direction="both")
        if isinstance(frame.index, pd.DatetimeIndex):
            filled = frame.sort_index().interpolate("time", limit_direction="both")
        filled = filled.loc[frame.index]
        framed = isinstance(X, pd.DataFrame)
        return (filled, std) if framed else (filled.to_numpy(), std.to_numpy())


@pytest.fixture(scope="module")
def process():
    X = np.array([3.0, 0.0, 1.0, 5.0])[:, None]
    return GaussianProcessRegressor(alpha=1e-2).fit(X, np.sin(X[:, 0]))


# --- regressors -----------------------------------------------------------------------


def test_mean_and_band_are_those_of_a_gaussian_process(process):
    X = np.array([3.0, 0.0, 1.0, 5.0, 7.0])[:, None]
    y = np.sin(X[:, 0])
    display = SeriesDisplay.from_estimator(
        process, X, y, held_out=[4], coverage=0.8, n_times=9
    )
    # the nine and one that is not among them
    np.testing.assert_allclose(
        display.time, np.union1d(np.linspace(0, 7, 9), [1.0, 3.0, 5.0])
    )
    mean, std = process.predict(np.asarray(display.time)[:, None], return_std=True)
    z = norm.ppf(0.9)
    (line,), (band,) = display.lines_, display.bands_
    np.testing.assert_allclose(line.get_ydata(), mean)
    np.testing.assert_allclose(display.lower[:, 0], mean - z * std)
    low, high = band.get_datalim(display.ax_.transData).intervaly
    assert low == pytest.approx((mean - z * std).min())
    assert high == pytest.approx((mean + z * std).max())
    assert "80 % band" in [t.get_text() for t in display.ax_.get_legend().texts]


def test_observed_and_held_out_rows_are_dots_at_their_values(process):
    X = np.array([3.0, 0.0, 1.0, 5.0, 7.0])[:, None]
    y = np.array([0.3, np.nan, 0.1, 0.5, 0.7])
    for held_out in ([4, 0], np.array([True, False, False, False, True])):
        display = SeriesDisplay.from_estimator(process, X, y, held_out=held_out)
        dots = []
        for (artist,) in (display.observed_, display.held_out_):
            points = artist.get_xydata()
            dots.append(points[~np.isnan(points[:, 1])].tolist())
        assert dots == [[[1, 0.1], [5, 0.5]], [[3, 0.3], [7, 0.7]]]


def test_frame_has_what_is_drawn(process):
    X = np.array([3.0, 0.0, 1.0])[:, None]
    frame = SeriesDisplay.from_estimator(process, X, n_times=None).frame()
    assert list(frame) == ["channel", "time", "mean", "lower", "upper"]
    assert frame["time"].tolist() == [0, 1, 3]
    y = pd.DataFrame({"a": [3, 0, 1], "b": [30, 0, None]})
    regressor = SeriesRegressor().fit(X, y)
    frame = SeriesDisplay.from_estimator(regressor, X, y, n_times=None).frame()
    assert frame["channel"].tolist() == ["a"] * 3 + ["b"] * 3
    assert frame["time"].tolist() == [0, 1, 3] * 2
    assert frame["mean"].tolist() == [1, 2, 0, 101, 102, 100]
    np.testing.assert_array_equal(frame["observed"], [0, 1, 3, 0, np.nan, 30])


def test_an_interval_is_preferred_and_without_any_there_is_no_band():
    X, y = np.arange(5.0)[:, None], np.arange(5.0)
    regressor = IntervalRegressor().fit(X, y)
    display = SeriesDisplay.from_estimator(regressor, X, n_times=None, coverage=0.5)
    np.testing.assert_allclose(display.lower[:, 0], y - 0.5)
    np.testing.assert_allclose(display.upper[:, 0], y + 3.0)
    display = SeriesDisplay.from_estimator(LinearRegression().fit(X, y), X, y)
    assert display.lower is None and display.bands_ == []
    np.testing.assert_allclose(display.lines_[0].get_ydata(), display.time, atol=1e-12)


def test_pipelines_are_drawn_with_their_bands():
    X = np.linspace(0, 4, 9)[:, None]
    pipeline = make_pipeline(StandardScaler(), GaussianProcessRegressor(alpha=0.1))
    display = SeriesDisplay.from_estimator(pipeline.fit(X, np.sin(X[:, 0])), X)
    assert (display.lower < display.mean).all()


def test_only_one_series_of_a_panel_is_drawn_at_its_own_times():
    X = pd.DataFrame(
        {"who": ["b", "a", "b", "a"], "dose": [1.0, 2.0, 3.0, 4.0]},
        index=pd.to_datetime(["2024-01-05", "2024-01-01", "2024-01-01", "2024-01-03"]),
    )
    y = pd.Series([50.0, 1.0, 10.0, 3.0], index=X.index, name="pulse")
    regressor = SeriesRegressor(series="who").fit(X, y)
    display = SeriesDisplay.from_estimator(regressor, X, y, series="b", n_times=5)
    assert display.ax_.get_title() == "b" and display.ax_.get_ylabel() == "pulse"
    assert list(display.time) == list(pd.date_range("2024-01-01", "2024-01-05"))
    np.testing.assert_array_equal(display.observed[:, 0], [10] + [np.nan] * 3 + [50])
    # covariates hold until the next row
    seen = regressor.seen_.sort_index()
    assert seen["who"].tolist() == ["b"] * 5
    assert seen["dose"].tolist() == [3, 3, 3, 3, 1]
    assert seen.index.dtype == X.index.dtype
    first = SeriesDisplay.from_estimator(regressor, X, y)
    assert first.series_name == "b"
    assert SeriesDisplay.from_estimator(regressor, X, y, series="a").series_name == "a"


def test_context_is_known_at_its_own_time_only():
    X = pd.DataFrame({"t": [0.0, 2.0, 4.0], "known": [1, 2, 3]})
    regressor = SeriesRegressor().fit(X, X["t"])
    regressor.context = "known"
    SeriesDisplay.from_estimator(regressor, X, n_times=5)
    seen = regressor.seen_.sort_values("t")
    np.testing.assert_array_equal(seen["t"], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(seen["known"], [1, np.nan, 2, np.nan, 3])


PLACES = {
    "column": lambda t: (pd.DataFrame({"v": 1.0, "t": t}), {"time": "t"}),
    "index": lambda t: (pd.DataFrame({"v": 1.0}, index=t), {"time": "index"}),
    "level": lambda t: (
        pd.DataFrame(
            {"v": 1.0},
            index=pd.MultiIndex.from_arrays([["a"] * len(t), t], names=["who", "t"]),
        ),
        {"time": "t", "series": "who"},
    ),
}
NUMBERS = np.array([4, 0, 9])
KINDS = {
    "int": pd.Index(NUMBERS),
    "float": pd.Index(NUMBERS / 2),
    "s": pd.to_datetime(NUMBERS, unit="D").as_unit("s"),
    "ns": pd.to_datetime(NUMBERS, unit="D").as_unit("ns"),
    "zone": pd.to_datetime(NUMBERS, unit="D", utc=True).tz_convert("Asia/Tokyo"),
    "timedelta": pd.to_timedelta(NUMBERS, unit="D"),
    "period": pd.to_datetime(NUMBERS, unit="D").to_period("D"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_times_of_any_kind_anywhere_are_drawn_in_order(kind, place):
    X, where = PLACES[place](KINDS[kind])
    regressor = SeriesRegressor(**where).fit(X, NUMBERS)
    display = SeriesDisplay.from_estimator(regressor, X, 1.0 * NUMBERS, n_times=7)
    # a period is no point between others
    assert len(display.time) == (3 if kind == "period" else 8)
    x, y = display.observed_[0].get_data()
    np.testing.assert_array_equal(y[~np.isnan(y)], [0, 4, 9])
    display.figure_.canvas.draw()
    if kind in ("s", "ns", "zone", "period"):
        labels = [text.get_text() for text in display.ax_.get_xticklabels()]
        assert any("1970-01" in text for text in labels)
    if kind == "timedelta":
        assert display.ax_.get_xlabel() == "time, days"
        np.testing.assert_allclose(x[[0, -1]], [0, 9])


def test_the_axis_is_in_the_local_time_of_the_data():
    days = pd.date_range("2024-06-01", periods=3, freq="D", tz="Asia/Tokyo")
    X = pd.DataFrame({"day": days})
    regressor = SeriesRegressor().fit(X, np.zeros(3))
    display = SeriesDisplay.from_estimator(regressor, X)
    assert len(display.time) == 200 + 1
    assert str(display.ax_.xaxis.get_major_formatter()._tz) == "Asia/Tokyo"


# --- imputers -------------------------------------------------------------------------


def test_gaps_are_drawn_with_their_band_and_the_truth():
    co2 = load_co2().loc["1963":"1965"]
    seen = co2.copy()
    seen.loc["1963-06":"1963-08"] = np.nan
    imputer = LinearImputer().fit(seen)
    assert SeriesDisplay.from_estimator(imputer, seen).time.equals(seen.index)
    display = SeriesDisplay.from_estimator(imputer, seen, co2, n_times=200)
    frame = display.frame().set_index("time")
    assert frame.index.is_monotonic_increasing and display.ax_.get_ylabel() == "co2"
    assert set(co2.index) < set(frame.index)
    own = frame.loc[co2.index]
    pd.testing.assert_series_equal(own["observed"], seen["co2"], check_names=False)
    expected = co2["co2"].where(seen["co2"].isna())
    pd.testing.assert_series_equal(own["held_out"], expected, check_names=False)
    assert own["held_out"].notna().sum() == len(co2.loc["1963-06":"1963-08"].dropna())
    filled = seen["co2"].interpolate("time")
    np.testing.assert_allclose(own["mean"], filled)
    # no band where the value is known
    width = own["upper"] - own["lower"]
    z = norm.ppf(0.95)
    np.testing.assert_allclose(width, np.where(own["observed"].isna(), 2 * z, 0))


def test_an_imputer_draws_the_channels_that_are_chosen():
    index = pd.MultiIndex.from_product([[7, 8], [0.0, 1.0, 3.0]], names=["who", "t"])
    X = pd.DataFrame({"a": 1.0, "b": [0, 1, None, 5, None, 9], "c": 2}, index=index)
    imputer = LinearImputer(time="t").fit(X)
    display = SeriesDisplay.from_estimator(imputer, X, series=8, n_times=4)
    assert display.mean.shape == (4, 3) and len(display.axes_) == 3
    assert display.series_name == 8
    for channels in ("b", ["b"], 1, [-2]):
        display = SeriesDisplay.from_estimator(
            imputer, X, series=8, channels=channels, n_times=None
        )
        assert display.channel_names == ["b"]
        np.testing.assert_array_equal(display.observed[:, 0], [5, np.nan, 9])
        np.testing.assert_array_equal(display.mean[:, 0], [5, 7, 9])


def test_rows_of_arrays_are_steps_with_nothing_between():
    X = np.array([[0.0, 1.0], [np.nan, 3.0], [4.0, np.nan]])
    display = SeriesDisplay.from_estimator(LinearImputer().fit(X), X)
    assert list(display.time) == [0, 1, 2]
    np.testing.assert_array_equal(display.mean, [[0, 1], [2, 3], [4, 3]])
    assert display.held_out_ == []


# --- axes -----------------------------------------------------------------------------


def test_draws_again_into_given_axes_in_another_style(process):
    import matplotlib.pyplot as plt

    display = SeriesDisplay.from_estimator(process, [[0.0], [1.0]], [0, 1])
    figure, ax = plt.subplots()
    styles = {
        "line_kwargs": {"color": "k"},
        "band_kwargs": {"alpha": 0.5},
        "observed_kwargs": {"marker": "x"},
    }
    assert display.plot(ax, **styles) is display
    assert display.figure_ is figure and display.ax_ is ax
    assert display.lines_[0].get_color() == "k"
    assert display.bands_[0].get_alpha() == 0.5
    assert display.observed_[0].get_marker() == "x"
    with pytest.raises(ValueError, match="1 axes"):
        display.plot(plt.subplots(1, 2)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coverage": 90}, "coverage must be a number between 0 and 1"),
        ({"n_times": "x"}, "n_times must be"),
        ({"n_times": 1}, "n_times must be an integer >= 2"),
        ({"series": "d"}, "X has no series 'd'"),
        ({"channels": "z"}, "no channel 'z', but there are"),
        ({"channels": 1}, "no channel 1"),
        ({"held_out": [0]}, "held_out needs y"),
        ({"y": [1.0]}, "inconsistent numbers"),
        ({"y": np.zeros((3, 2))}, "y must have a column a channel, 1"),
    ],
)
def test_refuses_with_clear_words(process, arguments, message):
    with pytest.raises(ValueError, match=message):
        SeriesDisplay.from_estimator(process, np.arange(3.0)[:, None], **arguments)


def test_refuses_what_is_not_fitted_or_draws_nothing():
    X = np.arange(3.0)[:, None]
    with pytest.raises(NotFittedError):
        SeriesDisplay.from_estimator(SeriesRegressor(), X)
    with pytest.raises(TypeError, match="predict or impute"):
        SeriesDisplay.from_estimator(MinMaxScaler().fit(X), X)
    with pytest.raises(ValueError, match="Of an imputer, y has the values"):
        SeriesDisplay.from_estimator(LinearImputer().fit(X), X, held_out=[0])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, process):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"sknode\[plot\]"):
        SeriesDisplay.from_estimator(process, [[0.0], [1.0]])
