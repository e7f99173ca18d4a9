"""LatentODEImputer: tables of irregular series in, the same without holes out."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import LatentODEImputer

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # series as short as these may be predicted as well by a baseline
    pytest.mark.filterwarnings("ignore:.* is better than LatentODE:UserWarning"),
    pytest.mark.filterwarnings("ignore:Only .* values are observed:UserWarning"),
]


def quick(**parameters):
    """Return an imputer that trains for a moment."""
    return LatentODEImputer(**{"max_iter": 2, "random_state": 0} | parameters)


def numpy_state():
    """Return NumPy's global random state."""
    return np.random.get_state()[1]  # noqa: NPY002


def waves(n=120, seed=0, freq="D", start="2026-01-01"):
    """Return two noisy waves with holes at irregular times."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(2 * n, n, replace=False))
    index = pd.Timestamp(start) + steps * pd.Timedelta(1, freq)
    table = pd.DataFrame(
        {"one": np.sin(steps / 10), "two": 5 + 2 * np.cos(steps / 10)}, index=index
    )
    table += rng.normal(scale=0.05, size=table.shape)
    truth = table.copy()
    table = table.mask(rng.uniform(size=table.shape) < 0.15)
    return table, truth


@pytest.fixture(scope="module")
def table():
    return waves(seed=1)[0]


@pytest.fixture(scope="module")
def fitted(table):
    return quick().fit(table)


def test_holes_are_filled_and_nothing_else_changes(table, fitted):
    filled = fitted.transform(table)
    pd.testing.assert_index_equal(filled.index, table.index)
    assert list(filled.columns) == list(table.columns)
    assert (filled.dtypes == table.dtypes).all()
    assert not filled.isna().any().any()
    seen = table.notna().to_numpy()
    assert np.array_equal(filled.to_numpy()[seen], table.to_numpy()[seen])


def test_filled_values_are_closer_to_the_truth_than_interpolated_ones(fitted):
    table, truth = waves(seed=1)
    holes = table.isna().to_numpy()
    ours = np.abs(fitted.transform(table) - truth).to_numpy()[holes].mean()
    linear = table.interpolate("time", limit_direction="both")
    assert ours < np.abs(linear - truth).to_numpy()[holes].mean()


def test_fit_transform_is_transform_after_fit(table, fitted):
    pd.testing.assert_frame_equal(quick().fit_transform(table), fitted.transform(table))


def forecast(imputer, table, n=40):
    """Return what an imputer fills in at times after those of a table."""
    ahead = pd.date_range(table.index[-1], periods=n, freq="2D")[1:]
    filled, std = imputer.impute(table.reindex(table.index.union(ahead)), True)
    assert not filled.isna().any().any()
    assert (std.to_numpy()[: len(table)][table.notna().to_numpy()] == 0).all()
    return filled.loc[ahead], std.loc[ahead]


def test_rows_that_lie_ahead_are_forecast(table, fitted):
    # of waves the period is found, and with it all that there is to know
    filled, std = forecast(fitted, table)
    phase = (filled.index - pd.Timestamp("2026-01-01")) / pd.Timedelta("10D")
    truth = np.stack([np.sin(phase), 5 + 2 * np.cos(phase)], axis=1)
    assert np.abs(filled - truth).to_numpy().max() < 0.2
    assert std.to_numpy().max() < 0.1


def test_what_lies_ahead_of_a_random_walk_is_more_and_more_uncertain(table):
    steps = np.random.default_rng(0).normal(size=table.shape)
    walk = pd.DataFrame(steps.cumsum(0), table.index, table.columns)
    _, std = forecast(quick().fit(walk), walk)
    assert (std.iloc[-1] > 2 * std.iloc[0]).all()


def test_transform_knows_what_it_is_given_and_no_other_rows(table, fitted):
    """What is asked does not change answers: only observations do."""
    ahead = pd.date_range(table.index[-1], periods=5, freq="D")[1:]
    longer = fitted.transform(table.reindex(table.index.union(ahead)))
    np.testing.assert_allclose(
        longer.loc[table.index], fitted.transform(table), rtol=1e-9
    )


def test_other_series_can_be_transformed(fitted):
    other, truth = waves(seed=5, start="2031-03-01")
    filled = fitted.transform(other)
    holes = other.isna().to_numpy()
    assert np.abs(filled - truth).to_numpy()[holes].mean() < 0.5


def test_panel_of_series_in_an_index_of_two_levels():
    tables = {name: waves(60, seed)[0] for seed, name in enumerate("abc")}
    panel = pd.concat(tables, names=["site", "time"])
    imputer = quick().fit(panel)
    filled = imputer.transform(panel)
    pd.testing.assert_index_equal(filled.index, panel.index)
    assert not filled.isna().any().any()
    # a series is filled by its own observations
    alone = imputer.transform(panel.loc[["b"]])
    np.testing.assert_allclose(filled.loc[["b"]], alone, rtol=1e-9)


def test_long_table_with_series_and_time_in_columns():
    parts = [waves(50, seed)[0].assign(site=seed) for seed in range(3)]
    long = pd.concat(parts).rename_axis("when").reset_index()
    long = long.sample(frac=1, random_state=0)  # unsorted
    filled = quick(series="site", time="when").fit_transform(long)
    pd.testing.assert_frame_equal(filled[["site", "when"]], long[["site", "when"]])
    assert not filled.isna().any().any()


@pytest.mark.slow
def test_unit_and_zone_of_times_do_not_matter(table, fitted):
    expected = fitted.transform(table).to_numpy()
    for index in (
        table.index.as_unit("ns"),
        table.index.as_unit("s"),
        table.index.tz_localize("Europe/Paris"),
        table.index - table.index[0],
    ):
        filled = quick().fit_transform(table.set_axis(index))
        assert filled.index.equals(index)
        # an hour of summer time moves some times by a twenty-fourth of a step
        np.testing.assert_allclose(filled, expected, atol=0.02)


@pytest.mark.parametrize("unit", [1e-9, 3e9])
def test_scale_of_numeric_times_does_not_matter(unit):
    table = waves(60)[0]
    steps = np.arange(60.0)
    expected = quick().fit_transform(table.set_axis(steps)).to_numpy()
    filled = quick().fit_transform(table.set_axis(steps * unit)).to_numpy()
    np.testing.assert_allclose(filled, expected, rtol=1e-5)


@pytest.mark.slow
def test_arrays_are_equally_spaced_steps(table):
    steps = table.set_axis(np.arange(float(len(table))))
    filled = quick().fit_transform(table.to_numpy())
    assert isinstance(filled, np.ndarray)
    np.testing.assert_allclose(filled, quick().fit_transform(steps), rtol=1e-9)


def test_channel_that_is_never_observed_and_series_of_one_row():
    table = waves(60)[0]
    lonely = pd.DataFrame({"one": [0.3], "two": [np.nan]}, index=table.index[:1])
    panel = pd.concat({"a": table.assign(two=np.nan), "b": table, "c": lonely})
    filled = quick().fit_transform(panel)
    assert np.isfinite(filled.to_numpy()).all()


def test_a_single_short_series_works_and_says_how_far_it_can_be_trusted():
    table = pd.DataFrame({"x": [1.0, np.nan, 1.2, 1.1, np.nan, 0.9]})
    with pytest.warns(UserWarning, match="Only 4 values are observed"):
        filled = quick().fit_transform(table)
    assert filled["x"].between(0.5, 1.6).all()


def test_nothing_observed_is_an_error():
    with pytest.raises(ValueError, match="nothing to learn from"):
        quick().fit(pd.DataFrame({"x": [np.nan, np.nan]}))


def test_channels_without_any_observation_are_named(table):
    with pytest.raises(ValueError, match=r"No value .*\['empty'\]"):
        quick().fit(table.assign(empty=np.nan))


def test_infinite_values_name_their_column(table):
    bad = table.copy()
    bad.iloc[3, 1] = np.inf
    with pytest.raises(ValueError, match="two"):
        quick().fit(bad)


def test_a_nonsense_value_does_not_spoil_its_neighbours(table, fitted):
    row = int(np.flatnonzero(table.notna().all(axis=1))[50])
    spoilt = table.copy()
    spoilt.iloc[row, 0] = 1e6
    filled = fitted.transform(spoilt).drop(index=table.index[row])
    assert (filled.abs() < 30).all(axis=None)


def test_missing_times_are_an_error(table):
    index = table.index.to_series().reset_index(drop=True)
    index[4] = pd.NaT
    with pytest.raises(ValueError, match=r"missing|NaT"):
        quick().fit(table.set_axis(pd.DatetimeIndex(index)))


def test_draws_are_coherent_and_leave_what_is_observed(table, fitted):
    draws = fitted.sample(table, n_samples=3, random_state=0)
    seen = table.notna().to_numpy()
    for draw in draws:
        assert np.array_equal(draw.to_numpy()[seen], table.to_numpy()[seen])
    assert not draws[0].equals(draws[1])
    again = fitted.sample(table, n_samples=3, random_state=0)
    pd.testing.assert_frame_equal(draws[2], again[2])


def test_draws_of_channels_with_few_values_are_among_these():
    rng, n = np.random.default_rng(0), 120
    table = pd.DataFrame(
        {
            "on": pd.array(np.sin(np.arange(n) / 9) > 0, dtype="boolean"),
            "count": pd.array(rng.integers(0, 4, n), dtype="Int64"),
            "sign": rng.choice([-1.0, 1.0], n),
            "free": rng.normal(size=n),
        },
        index=pd.date_range("2026-01-01", periods=n),
    ).mask(rng.uniform(size=(n, 4)) < 0.15)
    draws = quick(max_iter=1).fit(table).sample(table, 20, random_state=0)
    for draw in draws:
        assert draw.dtypes.tolist() == table.dtypes.tolist()
        for name in ("count", "sign"):
            assert set(draw[name].unique()) <= set(table[name].dropna().unique())
    holes = table["on"].isna()
    assert len({tuple(draw.loc[holes, "on"]) for draw in draws}) > 1


def test_draws_spread_as_the_standard_deviations_say(table, fitted):
    _, std = fitted.impute(table, return_std=True)
    draws = np.stack(fitted.sample(table, n_samples=400, random_state=1))
    holes = table.isna().to_numpy()
    ratio = draws.std(0)[holes] / std.to_numpy()[holes]
    assert 0.9 < ratio.mean() < 1.1


def test_baselines_are_judged_on_the_same_hidden_values(fitted):
    assert set(fitted.baseline_scores_) == {
        "linear interpolation",
        "last value",
        "series mean",
    }
    assert fitted.validation_errors_["all"] > 0
    assert fitted.baseline_scores_["series mean"]["all"] > 0.3


def test_better_baseline_is_named():
    """A latent ODE alone does not learn a random walk in two epochs."""
    walk = np.random.default_rng(0).normal(size=1000).cumsum()
    with pytest.warns(UserWarning, match="linear interpolation is better than Latent"):
        quick(residual=None).fit(pd.DataFrame({"x": walk}))


def test_without_residual_it_is_the_model_of_the_paper(table):
    pure = quick(residual=None, latent_dim=4, rnn_hidden_size=25).fit(table)
    assert pure.module_ is not None
    assert not pure.transform(table).isna().any().any()


def test_same_seed_same_result_and_global_state_untouched(table, fitted):
    import torch

    before, numpy_before = torch.get_rng_state(), numpy_state().copy()
    again = quick().fit(table).transform(table)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, numpy_state())
    pd.testing.assert_frame_equal(again, fitted.transform(table))


def test_pickled_it_fills_the_same(table, fitted):
    again = pickle.loads(pickle.dumps(fitted))
    pd.testing.assert_frame_equal(again.transform(table), fitted.transform(table))


def test_in_a_pipeline_and_with_pandas_output(table):
    pipeline = make_pipeline(
        StandardScaler().set_output(transform="pandas"), quick()
    ).set_output(transform="pandas")
    filled = pipeline.fit_transform(table)
    assert filled.index.equals(table.index)
    assert list(filled.columns) == list(pipeline.get_feature_names_out())


@pytest.mark.slow
def test_grid_search_by_a_score_of_ones_own(table):
    rng = np.random.default_rng(0)
    hidden = table.notna().to_numpy() & (rng.uniform(size=table.shape) < 0.1)
    seen = table.mask(hidden)

    def score(imputer, X, y=None):
        filled = imputer.transform(seen).to_numpy()
        return -np.abs(filled - table.to_numpy())[hidden].mean()

    everything = [(np.arange(len(table)), np.arange(len(table)))]
    grid = {"residual": ["ou", None]}
    search = GridSearchCV(quick(), grid, scoring=score, cv=everything, n_jobs=2)
    assert search.fit(seen).best_params_ == {"residual": "ou"}


def test_unfitted_it_says_so(table):
    with pytest.raises(NotFittedError):
        clone(quick()).transform(table)
