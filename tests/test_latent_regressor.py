"""LatentODERegressor: rows are observations of irregular series."""

import copy
import pickle
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_validate

from sknode import LatentODERegressor
from sknode._series.model import SwitchedModel
from sknode._series.neural import NeuralMean
from sknode._series.training import Trainer
from sknode.model_selection import PanelBlockKFold, PanelTimeSeriesSplit
from sknode.ode import SolverError, SolverWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # series as short as these may be predicted as well by a baseline
    pytest.mark.filterwarnings("ignore:.* is better than LatentODE:UserWarning"),
    pytest.mark.filterwarnings("ignore:Only .* values are observed:UserWarning"),
]

COLUMNS = ["series", "time"]


def quick(**parameters):
    """Return a regressor that trains for a moment."""
    return LatentODERegressor(**{"max_iter": 2, "random_state": 0} | parameters)


@cache
def panel(n_series=12, n_rows=25, seed=0):
    """Return waves of random phase, at irregular times, with holes."""
    rng = np.random.default_rng(seed)
    parts = []
    for i in range(n_series):
        time = np.sort(rng.uniform(0, 10, n_rows))
        phase = rng.uniform(0, 2 * np.pi)
        part = pd.DataFrame({"series": f"s{i}", "time": time})
        part["a"], part["b"] = np.sin(time + phase), np.cos(time + phase) + 3
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    values = table[["a", "b"]] + rng.normal(scale=0.05, size=(len(table), 2))
    return table[COLUMNS], values.mask(rng.uniform(size=values.shape) < 0.2)


@cache
def fitted():
    return quick(series="series").fit(*panel())


def test_predictions_pass_near_the_observations():
    X, y = panel()
    assert fitted().score(X, y) > 0.95
    mean, std = fitted().predict(X, return_std=True)
    assert mean.shape == std.shape == y.shape
    assert (std > 0).all()


def test_uncertainty_grows_with_the_distance_from_observations():
    X, _ = panel()
    end = X.loc[X["series"] == "s0", "time"].max()
    at = pd.DataFrame({"series": "s0", "time": end + np.array([0.0, 0.3, 1.0, 2.0])})
    _, std = fitted().predict(at, return_std=True)
    assert (np.diff(std, axis=0) > 0).all()
    # far away nothing is known but what series have in common
    _, far = fitted().predict(at.assign(time=end + 10), return_std=True)
    assert (far > 3 * std[0]).all()


def test_latent_states_are_told_of_rows():
    X, y = panel()
    model = quick(series="series", residual=None, latent_dim=3).fit(X, y)
    states = model.trajectory(X)
    assert states.shape == (len(X), 3)
    alone = model.trajectory(X[7:9])
    np.testing.assert_allclose(alone, states[7:9], atol=1e-7)
    # they flow: what is near in time is near
    same = X["series"].to_numpy()[1:] == X["series"].to_numpy()[:-1]
    steps = np.abs(np.diff(states, axis=0))[same]
    assert np.median(steps) < 0.3 * states.std()
    without = copy.copy(model)
    without.module_ = None  # as after a fit in which it was no help
    with pytest.raises(ValueError, match="no latent states"):
        without.trajectory(X)


def test_a_prediction_depends_on_its_own_row_and_what_is_known():
    X, _ = panel()
    together = fitted().predict(X)
    some = [3, 40, 170]
    for i in some:
        np.testing.assert_allclose(
            fitted().predict(X.iloc[[i]]), together[[i]], rtol=1e-7, atol=1e-7
        )
    shuffled = X.sample(frac=1, random_state=0)
    np.testing.assert_allclose(
        fitted().predict(shuffled), together[shuffled.index], rtol=1e-9
    )


def test_series_nobody_has_seen_get_the_prior():
    unknown = pd.DataFrame({"series": "new", "time": [1.0, 5.0]})
    mean, std = fitted().predict(unknown, return_std=True)
    _, known = fitted().predict(unknown.assign(series="s0"), return_std=True)
    assert np.isfinite(mean).all()
    assert (std > 2 * known).all()


@pytest.mark.parametrize("length", [1, 2])
def test_many_series_of_a_row_or_two_are_too_short_to_judge_by(length):
    X, y = panel(50, length)
    with pytest.warns(UserWarning, match="Each series has only a few of the"):
        model = quick(series="series", max_iter=1).fit(X, y)
    assert np.isfinite(model.predict(X)).all()


@pytest.mark.parametrize("residual", [None, "ou"])
def test_solves_that_fail_in_training_are_warned_of_if_the_network_is_used(
    monkeypatch, residual
):
    loss, calls = Trainer._loss, []

    def fails_once(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise SolverError("Too many steps.")
        return loss(self, *args)

    monkeypatch.setattr(Trainer, "_loss", fails_once)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = quick(series="series", residual=residual).fit(*panel())
    warned = [w for w in caught if "failed in training: 1." in str(w.message)]
    assert len(warned) == (model.module_ is not None)
    assert residual == "ou" or warned


def test_condition_takes_in_a_new_series_without_training():
    X, y = panel(2, seed=7)
    X = X.assign(series="new " + X["series"])
    before = fitted().predict(X)
    more = fitted().condition(X.iloc[::2], y.iloc[::2])
    assert more.score(X.iloc[1::2], y.iloc[1::2]) > 0.8
    np.testing.assert_array_equal(fitted().predict(X), before)


def test_conditioning_on_what_is_known_changes_nothing():
    X, y = panel()
    again = fitted().condition(X, y)
    np.testing.assert_allclose(again.predict(X), fitted().predict(X), rtol=1e-9)


def test_context_columns_inform_about_new_series():
    X, y = panel()
    new_X, new_y = panel(2, seed=7)
    new_X = new_X.assign(series="new " + new_X["series"])
    regressor = quick(series="series", context=["known_a", "known_b"])
    regressor.fit(X.assign(known_a=np.nan, known_b=np.nan), y)
    seen = np.arange(len(new_X)) % 2 == 0
    known = new_y.mask(np.repeat(~seen[:, None], 2, axis=1))
    informed = new_X.assign(known_a=known["a"], known_b=known["b"])
    blind = new_X.assign(known_a=np.nan, known_b=np.nan)
    asked = informed[~seen], new_y[~seen]
    # rows with context have to be there to be conditioned on
    mean = regressor.predict(informed)[~seen]
    error = np.nanmean(np.abs(mean - asked[1]))
    prior = np.nanmean(np.abs(regressor.predict(blind)[~seen] - asked[1]))
    assert error < 0.4 * prior


def test_context_that_does_not_fit_the_channels_is_an_error():
    X, y = panel()
    with pytest.raises(ValueError, match="context names 1 column, but y has 2"):
        quick(series="series", context="known").fit(X.assign(known=np.nan), y)


def test_missing_context_column_is_named():
    X, y = panel()
    regressor = quick(series="series", context=["u", "v"])
    regressor.fit(X.assign(u=np.nan, v=np.nan), y)
    with pytest.raises(ValueError, match="v"):
        regressor.predict(X.assign(u=np.nan))


def test_intervals_and_standard_deviations_are_of_the_same_distribution():
    X, _ = panel()
    mean, std = fitted().predict(X, return_std=True)
    lower, upper = fitted().predict_interval(X, coverage=0.6826894921370859)
    np.testing.assert_allclose((upper - lower) / 2, std)
    assert ((lower < mean) & (mean < upper)).all()


def test_densities_integrate_to_one():
    at = pd.DataFrame({"series": "s0", "time": np.full(4001, 12.0)})
    grid = np.linspace(-8, 10, 4001)
    for channel in (0, 1):
        y = np.full((4001, 2), np.nan)
        y[:, channel] = grid
        mass = np.trapezoid(np.exp(fitted().score_samples(at, y)), grid)
        assert abs(mass - 1) < 1e-3


def test_density_of_a_row_is_the_sum_over_its_channels():
    X, y = panel()
    y = y.to_numpy()
    parts = [
        fitted().score_samples(X, np.where(np.arange(2) == c, y, np.nan))
        for c in (0, 1)
    ]
    np.testing.assert_allclose(fitted().score_samples(X, y), sum(parts))
    nothing = np.isnan(y).all(axis=1)
    assert (fitted().score_samples(X, y)[nothing] == 0).all()


def test_intervals_cover_what_they_say_of_values_left_out():
    X, y = panel()
    rng = np.random.default_rng(1)
    left_out = rng.uniform(size=len(X)) < 0.2
    regressor = quick(series="series").fit(X[~left_out], y[~left_out])
    lower, upper = regressor.predict_interval(X[left_out], coverage=0.9)
    truth = y[left_out].to_numpy()
    seen = np.isfinite(truth)
    inside = ((lower < truth) & (truth < upper))[seen].mean()
    assert 0.8 < inside <= 1.0


def test_draws_have_the_predicted_moments_and_are_coherent():
    at = pd.DataFrame({"series": "s0", "time": [5.0, 5.01, 14.0]})
    draws = fitted().sample(at, n_samples=500, random_state=0)
    mean, std = fitted().predict(at, return_std=True)
    assert draws.shape == (500, 3, 2)
    assert (np.abs(draws.mean(0) - mean) < 5 * std / np.sqrt(500)).all()
    np.testing.assert_allclose(draws.std(0), std, rtol=0.15)


def test_forecast_is_a_tidy_table():
    table = fitted().forecast(3, freq=0.5)
    assert list(table) == [
        "series",
        "time",
        "channel",
        "mean",
        "std",
        "lower",
        "upper",
    ]
    assert len(table) == 12 * 3 * 2
    X, _ = panel()
    last = X.groupby("series")["time"].max()
    one = table[(table["series"] == "s3") & (table["channel"] == "a")]
    np.testing.assert_allclose(one["time"] - last["s3"], [0.5, 1.0, 1.5])
    asked = one[["series", "time"]]
    np.testing.assert_allclose(fitted().predict(asked)[:, 0], one["mean"], rtol=1e-7)


def test_forecast_of_dates_at_given_times():
    index = pd.date_range("2026-01-01", periods=60, freq="D", tz="Asia/Tokyo")
    X = pd.DataFrame(index=index.rename("day"))
    y = pd.Series(np.sin(np.arange(60) / 5), index=index, name="level")
    regressor = quick().fit(X, y)
    table = regressor.forecast(2)
    assert list(table["time"]) == list(index[-1] + pd.to_timedelta([1, 2], "D"))
    assert set(table["channel"]) == {"level"}
    times = pd.date_range("2026-04-01", periods=3, freq="h", tz="UTC")
    assert list(regressor.forecast(times)["time"]) == list(times)


def following(index, horizon=3, **options):
    """Return the times that are forecast after those of an index, as strings."""
    y = np.sin(np.arange(len(index)) / 2)
    regressor = quick(max_iter=1).fit(pd.DataFrame({"time": index}), y)
    return [str(time) for time in regressor.forecast(horizon, **options)["time"]]


@pytest.mark.parametrize(
    ("freq", "step", "expected"),
    [
        ("Q", None, ["2026Q1", "2026Q2", "2026Q3"]),
        ("Y", None, ["2044", "2045", "2046"]),
        ("M", None, ["2022-01", "2022-02", "2022-03"]),
        ("2Q", None, ["2032Q1", "2032Q3", "2033Q1"]),
        ("Q", 2, ["2026Q2", "2026Q4", "2027Q2"]),
        ("Q", "Y", ["2026Q4", "2027Q4", "2028Q4"]),
        ("M", pd.offsets.QuarterEnd(), ["2022-03", "2022-06", "2022-09"]),
    ],
)
def test_periods_are_followed_by_periods(freq, step, expected):
    index = pd.period_range("2020", periods=24, freq=freq)
    assert following(index, freq=step) == expected


def zoned(start, periods, freq):
    return pd.date_range(start, periods=periods, freq=freq, tz="Europe/Berlin")


def test_an_hour_that_the_clocks_repeat_does_not_stop_a_forecast():
    index = zoned("2024-10-26", 36, "h")
    assert following(index, 1) == ["2024-10-27 11:00:00+01:00"]
    assert following(index[:26], 2)[1] == "2024-10-27 02:00:00+01:00"


@pytest.mark.parametrize("freq", [None, "D", "1D", pd.Timedelta(1, "D")])
def test_days_follow_at_the_same_time_of_day(freq):
    index = zoned("2024-10-01", 25, "D")
    expected = ["2024-10-26 00:00:00+02:00", "2024-10-27 00:00:00+02:00"]
    assert following(index, freq=freq) == [*expected, "2024-10-28 00:00:00+01:00"]
    # without a frequency, too
    assert following(index.delete(3), freq=freq)[-1] == "2024-10-28 00:00:00+01:00"
    # a time that the clocks leave out
    index = zoned("2025-03-01 02:30", 29, "D")
    expected = ["2025-03-30 03:00:00+02:00", "2025-03-31 02:30:00+02:00"]
    assert following(index, 2, freq=freq) == expected


def test_forecasts_follow_observations_not_rows():
    X = pd.DataFrame({"time": pd.date_range("2024-01-01", periods=30, freq="MS")})
    y = np.sin(np.arange(30) / 2)
    y[[5, 6, 28, 29]] = np.nan
    ahead = quick(max_iter=1).fit(X, y).forecast(2)["time"]
    assert list(ahead) == list(X["time"][28:])
    # the last rows are no steps either
    X = pd.DataFrame({"time": np.r_[np.arange(0.0, 20, 2), np.arange(20, 60)]})
    y = pd.Series(np.arange(50.0)).where(X.index < 10)
    assert quick(max_iter=1).fit(X, y).forecast(2)["time"].tolist() == [20, 22]


def test_forecast_of_a_series_without_a_time_asks_for_times():
    X, y = panel()
    more = fitted().condition(X[:1].assign(series="new"), y[:1] * np.nan)
    with pytest.raises(ValueError, match="horizon must be times: series 'new'"):
        more.forecast(2, series="new")
    assert more.forecast([1.0], series="new")["mean"].notna().all()


def test_what_was_judged_ahead_alone_knows_all_observations_between_them():
    rng, parts = np.random.default_rng(0), []
    for i in range(6):
        time = np.sort(rng.uniform(0, 30, 25))
        y = np.sin(time / 4 + i) + rng.normal(0, 0.1, 25)
        parts.append(pd.DataFrame({"series": i, "time": time, "y": y}))
    table = pd.concat(parts, ignore_index=True)
    options = {"max_iter": 4, "tol": 1.0, "n_iter_no_change": 1}
    regressor = quick(series="series", validation_fraction=1e-9, **options)
    regressor.fit(table[COLUMNS], table["y"])
    assert regressor.score(table[COLUMNS], table["y"]) > 0.9


def test_months_and_weeks_are_those_of_the_calendar():
    index = pd.date_range("2024-01-30", periods=30, freq="D")
    for freq in ("MS", "1MS", pd.offsets.MonthBegin()):
        assert following(index, 2, freq=freq) == [
            f"2024-0{m}-01 00:00:00" for m in (3, 4)
        ]
    assert following(index, 1, freq="1W") == ["2024-03-06 00:00:00"]
    assert following(index, 1, freq="W-FRI") == ["2024-03-01 00:00:00"]


def test_durations_follow_by_names_of_units():
    index = pd.timedelta_range("0h", periods=30, freq="h")
    assert following(index, 1, freq="h") == ["1 days 06:00:00"]
    assert following(index, 1, freq=np.timedelta64(90, "m")) == ["1 days 06:30:00"]


@pytest.mark.parametrize(
    ("index", "steps"),
    [
        (np.arange(30.0), [0, -1, np.nan, np.inf, True, "1D", [1]]),
        (zoned("2024-05-01", 30, "D"), [0, 3, True, "0D", "-1D", "-1MS", "often", []]),
        (zoned("2024-05-01", 30, "D"), [pd.DateOffset(months=-1), pd.NaT, {}]),
        (pd.timedelta_range("0h", periods=30, freq="h"), [0, -1, "-1h", "MS"]),
        (pd.period_range("2020", periods=30, freq="Q"), [0, -1, 2.5, True, "D", "x"]),
    ],
)
def test_steps_that_do_not_lead_ahead_are_an_error(index, steps):
    for freq in steps:
        with pytest.raises(ValueError, match="freq must be"):
            following(index, freq=freq)


def test_forecast_with_covariates_asks_for_rows():
    X, y = panel()
    regressor = quick(series="series").fit(X.assign(dose=1.0 * (X["time"] > 5)), y)
    with pytest.raises(ValueError, match=r"predict\(X\)"):
        regressor.forecast(2)


def test_forecast_of_a_series_that_is_not_known():
    with pytest.raises(ValueError, match="nobody"):
        fitted().forecast(2, series="nobody")


@pytest.mark.parametrize("horizon", [0, -1, 2.5, None, "30D", [], True, [[1.0]]])
def test_horizons_that_are_none_are_named(horizon):
    with pytest.raises(ValueError, match="horizon must be"):
        fitted().forecast(horizon)


def test_labels_may_be_tuples():
    X, y = panel()
    X, y = X.assign(site=1)[:50], y[:50]
    y.columns = pd.MultiIndex.from_tuples([("u", "a"), ("u", "b")])
    regressor = quick(series=["series", "site"], time="time", max_iter=1).fit(X, y)
    one = regressor.forecast(2, series=("s1", 1))
    assert one["series"].tolist() == [("s1", 1)] * 4
    assert one["channel"].tolist() == list(y.columns) * 2
    both = regressor.forecast(2, series=[("s1", 1), ("s0", 1)])
    assert both["series"].nunique() == 2
    for series in ([], ("s1", 2), "s1"):
        with pytest.raises(ValueError, match="series"):
            regressor.forecast(2, series=series)


@pytest.mark.parametrize("n_samples", [0, 1.5, True, None])
def test_number_of_draws_is_checked(n_samples):
    with pytest.raises(ValueError, match="n_samples must be a positive integer"):
        fitted().sample(panel()[0][:2], n_samples)


def test_weights_of_rows_are_checked():
    X, y = panel()
    weights = [2.0] * len(X)
    assert fitted().score(X, y, weights) == pytest.approx(fitted().score(X, y))
    for bad in (weights[1:], np.ones((len(X), 2)), [np.nan, *weights[1:]]):
        with pytest.raises(ValueError, match=r"sample_weight|Sample weights"):
            fitted().score(X, y, bad)


def test_one_series_at_least_is_trained_on():
    X, y = panel()
    options = {"series": "series", "max_iter": 1, "residual": None}
    regressor = quick(validation_fraction=0.97, **options).fit(X, y)
    assert regressor.module_ is not None


@pytest.mark.parametrize(
    ("name", "value"), [("rtol", -1), ("solver", "none"), ("max_steps", 0)]
)
def test_parameters_are_checked_again_at_prediction(name, value):
    X, _ = panel()
    changed = copy.copy(fitted()).set_params(**{name: value})
    for call in (changed.predict, changed.sample, lambda _: changed.forecast(1)):
        with pytest.raises(ValueError, match=f"'{name}' parameter"):
            call(X[:2])


def test_covariates_matter():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"time": np.arange(200.0), "u": rng.normal(size=200)})
    y = 3 * X["u"] + rng.normal(scale=0.1, size=200)
    regressor = quick().fit(X[:150], y[:150])
    assert regressor.score(X[150:], y[150:]) > 0.9


@pytest.mark.slow
def test_cross_validation_of_imputation_and_forecasts():
    X, y = panel()
    splitters = {
        "points": KFold(3, shuffle=True, random_state=0),
        "blocks": PanelBlockKFold(3, series="series"),
        "forecasts": PanelTimeSeriesSplit(3, series="series"),
    }
    scores = {
        name: cross_validate(quick(series="series"), X, y, cv=cv, error_score="raise")[
            "test_score"
        ].mean()
        for name, cv in splitters.items()
    }
    assert scores["points"] > 0.8
    assert scores["points"] >= scores["blocks"] > scores["forecasts"]


def test_cross_validation_of_series_that_fit_did_not_see():
    X, y = panel()
    known = y.copy()
    known.iloc[1::2] = np.nan
    X = X.assign(known_a=known["a"], known_b=known["b"])
    regressor = quick(series="series", context=["known_a", "known_b"])
    scores = cross_validate(
        regressor, X, y, cv=GroupKFold(3), groups=X["series"], error_score="raise"
    )
    assert scores["test_score"].min() > 0.7


def test_grid_search_in_parallel_gives_the_same():
    X, y = panel()
    grid = {"latent_dim": [2, 3]}
    cv = PanelBlockKFold(2, series="series")
    searches = [
        GridSearchCV(quick(series="series"), grid, cv=cv, n_jobs=n).fit(X, y)
        for n in (1, 2)
    ]
    one, two = (s.cv_results_["mean_test_score"] for s in searches)
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_it_is_level_with_a_gaussian_process_on_one_series():
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 30, 150))[:, None]
    y = np.sin(t[:, 0]) + rng.normal(scale=0.1, size=150)
    left_out = rng.uniform(size=150) < 0.2
    ours = quick().fit(t[~left_out], y[~left_out]).score(t[left_out], y[left_out])
    process = GaussianProcessRegressor(alpha=0.01, normalize_y=True)
    theirs = process.fit(t[~left_out], y[~left_out]).score(t[left_out], y[left_out])
    assert ours > theirs - 0.02


def test_latent_ode_learns_what_a_process_cannot_forecast():
    """Decay to zero from any height: the process alone reverts to a mean."""
    rng = np.random.default_rng(0)
    parts, values = [], []
    for i in range(60):
        time = np.sort(rng.uniform(0, 4, 30))
        parts.append(pd.DataFrame({"series": i, "time": time}))
        values.append(rng.uniform(1, 5) * np.exp(-time) * np.cos(3 * time))
    X, y = pd.concat(parts, ignore_index=True), np.concatenate(values)
    late = (X["series"] >= 50) & (X["time"] > 1.5)
    regressor = quick(series="series", max_iter=60).fit(X[~late], y[~late])
    assert regressor.module_ is not None
    # R2 of the process alone is far below zero
    assert regressor.score(X[late], y[late]) > 0.4


def test_dtypes_of_ids_and_unsorted_duplicates():
    X, y = panel()
    for ids in (X["series"].astype("category"), X["series"].str[1:].astype(int)):
        regressor = quick(series="series").fit(X.assign(series=ids), y)
        twice = pd.concat([X.assign(series=ids)] * 2).sample(frac=1, random_state=0)
        assert np.isfinite(regressor.predict(twice)).all()


def test_bad_input_is_named():
    X, y = panel()
    with pytest.raises(ValueError, match="all are NaN"):
        quick(series="series").fit(X, y * np.nan)
    with pytest.raises(ValueError, match=r"No value .*\['b'\]"):
        quick(series="series").fit(X, y.assign(b=np.nan))
    for huge in (1e160, 5e307):
        with pytest.raises(ValueError, match=r"\['b'\] are too large for float64"):
            quick(series="series").fit(X, y.assign(b=huge * np.sin(y["b"])))
    with pytest.raises(ValueError, match="infinity"):
        quick(series="series").fit(X, y.replace(y.iloc[0, 0], np.inf))
    with pytest.raises(ValueError, match="nowhere"):
        quick(series="nowhere").fit(X, y)
    with pytest.raises(ValueError, match="time"):
        quick(series="series").fit(X.assign(time=X["time"].where(X.index != 3)), y)
    with pytest.raises(TypeError, match="numbers"):
        fitted().predict(X.assign(time=pd.Timestamp("2026-01-01")))
    with pytest.raises(ValueError, match="coverage"):
        fitted().predict_interval(X, coverage=90)
    with pytest.raises(ValueError, match="y has 1 columns"):
        fitted().score(X, y["a"])
    with pytest.raises(NotFittedError):
        quick().predict(X)


def test_solver_settings_are_read_again():
    X, y = panel()
    pure = quick(series="series", residual=None).fit(X, y)
    loose = pure.predict(X)
    tight = pickle.loads(pickle.dumps(pure)).set_params(rtol=1e-11, atol=1e-11)
    difference = np.abs(tight.predict(X) - loose).max()
    assert 0 < difference < 1e-2


@pytest.mark.parametrize("fraction", [0.1, 1e-9])
def test_where_the_network_cannot_be_solved_the_process_serves(monkeypatch, fraction):
    def fails(*_):
        raise SolverError("Not finite.")

    monkeypatch.setattr(NeuralMean, "paths", fails)
    X, y = panel()
    options = {"series": "series", "max_iter": 1, "validation_fraction": fraction}
    regressor = quick(**options).fit(X, y)
    assert regressor.module_ is None and regressor.score(X, y) > 0.9
    with pytest.raises(SolverError, match=r"Not finite.* raise max_steps"):
        quick(residual=None, **options).fit(X, y)


def test_training_that_diverges_says_what_to_change():
    X, y = panel()
    with pytest.raises(SolverError, match=r"learning_rate_init .* max_steps"):
        quick(series="series", max_iter=4, learning_rate_init=1e6).fit(X, y)


def test_a_fit_that_fails_leaves_the_one_before():
    X, y = panel()
    regressor = quick(series="series", max_iter=4).fit(X, y)
    before = regressor.predict(X)
    regressor.set_params(learning_rate_init=1e6)
    with pytest.raises(SolverError, match=r"in epoch 1 of"):
        regressor.fit(X, 1e3 * y)
    np.testing.assert_array_equal(regressor.predict(X), before)
    with pytest.raises(SolverError):
        regressor = quick(series="series", max_iter=4, learning_rate_init=1e6)
        regressor.fit(X, y)
    with pytest.raises(NotFittedError):
        regressor.predict(X)


@pytest.mark.parametrize("dtype", ["Float64", "Int64", "boolean", object])
def test_values_may_miss_in_any_way_that_pandas_has(dtype):
    X = panel()[0][:38]
    plain = pd.DataFrame({"a": np.arange(len(X)) % 2.0}).mask(X["time"] < 2)
    y = plain.astype(dtype)
    if dtype is object:
        y = y.where(plain.notna(), None)
        y.iloc[np.flatnonzero(plain["a"].isna())[0], 0] = pd.NA
    options = {"series": "series", "max_iter": 1}
    for truth, target in ((plain, y), (plain["a"], y["a"])):
        expected = quick(**options).fit(X, truth)
        ours = quick(**options).fit(X, target)
        np.testing.assert_array_equal(ours.predict(X), expected.predict(X))
        assert ours.score(X, target) == expected.score(X, truth)
        assert set(ours.forecast(1, freq=1.0)["channel"]) == {"a"}


def test_rows_that_cannot_be_solved_up_to_stop_no_others():
    X, y = panel()
    model = quick(series="series", residual=None, max_steps=300).fit(X, y)
    at = pd.DataFrame({"series": ["s0", "s1", "s0"], "time": [1e6, 3.0, 3.0]})
    near = at.iloc[1:]
    message = "cannot be solved up to 1 of 3 rows.* at time 1000000.0"
    with pytest.warns(SolverWarning, match=message):
        mean, std = model.predict(at, return_std=True)
    assert np.isnan(mean[0]).all() and np.isnan(std[0]).all()
    np.testing.assert_allclose(mean[1:], model.predict(near), rtol=1e-7)
    with pytest.warns(SolverWarning, match=message):
        draws = model.sample(at, random_state=0)
    assert np.isnan(draws[:, 0]).all() and np.isfinite(draws[:, 1:]).all()
    with pytest.warns(SolverWarning, match=message):
        states = model.trajectory(at)
    np.testing.assert_allclose(states[1:], model.trajectory(near), atol=1e-7)
    # an observation that cannot be solved up to is left out
    more = model.condition(at.iloc[:1], [[0.0, 0.0]])
    assert np.isfinite(more.predict(near)).all()


def test_paths_beyond_all_bounds_are_no_predictions(monkeypatch):
    X, _ = panel()
    predict = SwitchedModel.predict

    def blow_up(*args):
        mean, std = predict(*args)
        mean[0] = np.inf
        return mean, std

    monkeypatch.setattr(SwitchedModel, "predict", blow_up)
    with pytest.warns(SolverWarning, match="1 of 2 rows"):
        mean, std = fitted().predict(X[:2], return_std=True)
    assert np.isnan(mean[0]).all() and np.isnan(std[0]).all()
    assert np.isfinite(mean[1]).all() and np.isfinite(std[1]).all()


def test_warm_start_goes_on_from_the_weights():
    X, y = panel()
    once = quick(series="series", residual=None, warm_start=True).fit(X, y)
    first = once.loss_curve_
    twice = once.fit(X, y)
    fresh = quick(series="series", residual=None).fit(X, y)
    assert fresh.loss_curve_ == first
    assert twice.loss_curve_[0] < first[0]
    with pytest.raises(ValueError, match="warm_start=True cannot go on"):
        twice.set_params(latent_dim=3).fit(X, y)


def test_pickled_it_predicts_the_same():
    X, _ = panel()
    again = pickle.loads(pickle.dumps(fitted()))
    np.testing.assert_array_equal(again.predict(X), fitted().predict(X))
