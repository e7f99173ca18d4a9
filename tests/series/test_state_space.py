"""Linear processes against dense algebra of Gaussian processes."""

import dataclasses
import pickle

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from sknode._series import state_space
from sknode._series.panel import Panel
from sknode._series.state_space import LinearProcess

N_CHANNELS = 3


def make_process(unit=1.0, seed=0):
    """Return a process with every kind of part; times come in ``unit``."""
    rng = np.random.default_rng(seed)
    blocks = [
        ("ou", rng.normal(size=(N_CHANNELS, 2)), 0.0, 0.0),
        ("matern", rng.normal(size=(N_CHANNELS, 2)), 0.7 / unit, 0.0),
        ("ou", rng.normal(size=(N_CHANNELS, 3)), 2.0 / unit, 0.0),
        ("cycle", rng.normal(size=(N_CHANNELS, 1)), 0.1 / unit, 3.0 / unit),
    ]
    return LinearProcess.from_blocks(
        rng.normal(size=N_CHANNELS), [0.1, 0.02, 0.3], blocks
    )


def make_panel(lengths, seed=0, share=0.6, low=0.0, high=4.0):
    """Return a panel with holes and with repeated times."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    time = [np.sort(np.round(rng.uniform(low, high, n), 1)) for n in lengths]
    values = rng.normal(size=(offsets[-1], N_CHANNELS))
    values[rng.random(values.shape) > share] = np.nan
    covariates = np.empty((offsets[-1], 0))
    return Panel(offsets, np.concatenate(time), values, covariates)


def part_of(panel, series):
    """Return a panel of chosen series."""
    rows = [np.arange(panel.offsets[s], panel.offsets[s + 1]) for s in series]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    rows = np.concatenate(rows)
    return Panel(offsets, panel.time[rows], panel.values[rows], panel.covariates[rows])


def covariance(process, time, channel, other_time, other_channel):
    """Return the covariance of the channels at two sets of times, from its formula."""
    lag = np.abs(time[:, None] - other_time)
    total = np.zeros(lag.shape)
    for k, rate in enumerate(process.rate):
        # The second of a pair does not reach the channels.
        decay = rate * lag
        wave = np.cos(process.frequency[k] * lag) + process.smooth[k] * decay
        column = process.loadings[:, k]
        level = column[channel][:, None] * column[other_channel]
        total += level * np.exp(-decay) * wave
    return total


def dense(process, panel, query, series):
    """Return log-density, gradient, and posterior mean and covariance of one series."""
    rows = slice(panel.offsets[series], panel.offsets[series + 1])
    row, channel = np.nonzero(~np.isnan(panel.values[rows]))
    time, value = panel.time[rows][row], panel.values[rows][row, channel]
    K = covariance(process, time, channel, time, channel)
    K += np.diag(process.noise_variance[channel])
    asked = query.time[query.offsets[series] : query.offsets[series + 1]]
    at = np.repeat(asked, N_CHANNELS)
    which = np.tile(np.arange(N_CHANNELS), len(asked))
    across = covariance(process, at, which, time, channel)
    error = value - process.mean[channel]
    weight = np.linalg.solve(K, error)
    gain = np.linalg.solve(K, across.T).T
    mean = process.mean[which] + across @ weight
    spread = covariance(process, at, which, at, which) - gain @ across.T
    log_density = multivariate_normal.logpdf(error, cov=K) if len(value) else 0.0
    return log_density, -weight, mean.reshape(-1, N_CHANNELS), spread


LENGTHS = [5, 0, 1, 12, 7]
QUERIES = [4, 3, 2, 6, 9]


@pytest.fixture
def case():
    """A process, a panel, and times to ask for, before, within and after the data."""
    query = make_panel(QUERIES, seed=1, share=0.7, low=-2.0, high=7.0)
    return make_process(), make_panel(LENGTHS), query


def test_mean_and_variance_are_those_of_dense_algebra(case):
    process, panel, query = case
    mean, variance = process.posterior(panel, query)
    for series in range(len(LENGTHS)):
        rows = slice(query.offsets[series], query.offsets[series + 1])
        _, _, expected, spread = dense(process, panel, query, series)
        np.testing.assert_allclose(mean[rows], expected, atol=1e-9)
        np.testing.assert_allclose(variance[rows].ravel(), np.diag(spread), atol=1e-9)


def test_log_density_and_gradient_are_those_of_dense_algebra(case):
    process, panel, query = case
    log_density, gradient = process.log_density_and_gradient(panel)
    np.testing.assert_array_equal(log_density, process.log_density(panel))
    for series in range(len(LENGTHS)):
        rows = slice(panel.offsets[series], panel.offsets[series + 1])
        expected, slope, _, _ = dense(process, panel, query, series)
        np.testing.assert_allclose(log_density[series], expected, atol=1e-9)
        seen = ~np.isnan(panel.values[rows])
        np.testing.assert_allclose(gradient[rows][seen], slope, atol=1e-9)
        assert not gradient[rows][~seen].any()


def test_gradient_is_that_of_finite_differences(case):
    process, panel, _ = case
    gradient = process.log_density_and_gradient(panel)[1]
    for row, channel in np.argwhere(~np.isnan(panel.values))[::5]:
        density = []
        for step in (-1e-4, 1e-4):
            values = panel.values.copy()
            values[row, channel] += step
            moved = dataclasses.replace(panel, values=values)
            density.append(process.log_density(moved).sum())
        slope = (density[1] - density[0]) / 2e-4
        np.testing.assert_allclose(gradient[row, channel], slope, rtol=1e-6, atol=1e-7)


def test_predictive_density_is_joint_over_the_channels_of_a_row(case):
    process, panel, query = case
    score = process.predictive_log_density(panel, query)
    for series in range(len(LENGTHS)):
        _, _, mean, spread = dense(process, panel, query, series)
        for k, row in enumerate(
            range(query.offsets[series], query.offsets[series + 1])
        ):
            seen = ~np.isnan(query.values[row])
            if not seen.any():
                assert score[row] == 0
                continue
            block = slice(k * N_CHANNELS, (k + 1) * N_CHANNELS)
            cov = spread[block, block] + np.diag(process.noise_variance)
            expected = multivariate_normal.logpdf(
                query.values[row][seen], mean[k][seen], cov[np.ix_(seen, seen)]
            )
            np.testing.assert_allclose(score[row], expected, atol=1e-9)


def test_a_series_without_observations_has_the_prior(case):
    process, panel, query = case
    mean, variance = process.posterior(panel, query)
    rows = slice(query.offsets[1], query.offsets[2])
    np.testing.assert_array_equal(mean[rows], np.tile(process.mean, (3, 1)))
    prior = (process.loadings**2 @ (process.smooth + process.sign >= 0)).ravel()
    np.testing.assert_allclose(variance[rows], np.tile(prior, (3, 1)))
    assert process.log_density(panel)[1] == 0


def test_a_channel_never_observed_is_known_from_the_others():
    process, panel = make_process(), make_panel([30])
    values = panel.values.copy()
    values[:, 2] = np.nan
    panel = dataclasses.replace(panel, values=values)
    _, variance = process.posterior(panel, panel)
    prior = process.loadings[2] ** 2 @ (process.smooth + process.sign >= 0)
    assert np.isfinite(variance).all()
    assert (variance[:, 2] < 0.95 * prior).all()


@pytest.mark.parametrize("memory", [1, 2**28])
def test_a_series_does_not_feel_the_others(case, memory, monkeypatch):
    process, panel, query = case
    mean, variance = process.posterior(panel, query)
    draws = process.sample(panel, query, 2, np.random.default_rng(0))
    monkeypatch.setattr(state_space, "MEMORY", memory)
    order = [3, 0, 4]
    part = process.posterior(part_of(panel, order), part_of(query, order))
    rows = np.concatenate(
        [np.arange(query.offsets[s], query.offsets[s + 1]) for s in order]
    )
    np.testing.assert_allclose(part[0], mean[rows], rtol=0, atol=1e-12)
    np.testing.assert_allclose(part[1], variance[rows], rtol=0, atol=1e-12)
    again = process.sample(panel, query, 2, np.random.default_rng(0))
    np.testing.assert_allclose(again, draws, rtol=0, atol=1e-12)


@pytest.mark.parametrize("unit", [1e9, 1e-9])
def test_units_of_time_do_not_matter(case, unit):
    process, panel, query = case
    scaled = make_process(unit)
    panels = [dataclasses.replace(p, time=unit * p.time) for p in (panel, query)]
    expected = process.posterior(panel, query)
    for one, other in zip(scaled.posterior(*panels), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def test_rows_without_observations_change_nothing(case):
    process, panel, query = case
    keep = ~np.isnan(panel.values).all(axis=1)
    series = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[keep]
    offsets = np.searchsorted(series, np.arange(len(LENGTHS) + 1))
    short = Panel(offsets, panel.time[keep], panel.values[keep], panel.covariates[keep])
    for one, other in zip(
        process.posterior(short, query), process.posterior(panel, query), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_steps_far_below_the_time_scale_lose_no_precision():
    n = 200
    column = np.ones((N_CHANNELS, 1))
    blocks = [("matern", column, 1e-2, 0.0), ("cycle", 0.1 * column, 0.0, 1.0)]
    process = LinearProcess.from_blocks(np.zeros(N_CHANNELS), [1e-4] * 3, blocks)
    time = np.arange(n) * 1e-3
    values = np.full((n, N_CHANNELS), np.nan)
    values[:, 0] = np.sin(time)
    panel = Panel(np.array([0, n]), time, values, np.empty((n, 0)))
    mean, variance = process.posterior(panel, panel)
    _, _, expected, spread = dense(process, panel, panel, 0)
    np.testing.assert_allclose(mean, expected, atol=1e-8)
    np.testing.assert_allclose(variance.ravel(), np.diag(spread), atol=1e-8)


def test_samples_have_the_moments_of_the_posterior(case):
    process, panel, query = case
    draws = process.sample(panel, query, 20000, np.random.default_rng(3))
    for series in range(len(LENGTHS)):
        rows = slice(query.offsets[series], query.offsets[series + 1])
        _, _, mean, spread = dense(process, panel, query, series)
        part = draws[:, rows].reshape(len(draws), -1)
        error = np.sqrt(np.diag(spread) / len(draws))
        assert (np.abs(part.mean(0) - mean.ravel()) < 5 * error).all()
        scale = np.sqrt(np.outer(np.diag(spread), np.diag(spread)))
        assert (np.abs(np.cov(part.T) - spread) < 5 * scale / 100).all()


def test_samples_are_those_of_the_generator(case):
    process, panel, query = case
    one, two, other = (
        process.sample(panel, query, 3, np.random.default_rng(k)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).all()


def test_pickled_process_is_plain_numpy(case):
    process, panel, query = case
    copy = pickle.loads(pickle.dumps(process))
    assert all(type(value) is np.ndarray for value in vars(copy).values())
    np.testing.assert_array_equal(
        copy.posterior(panel, query)[0], process.posterior(panel, query)[0]
    )


def test_several_sets_of_values_are_smoothed_as_each_alone():
    process, panel = make_process(), make_panel([6, 1, 9])
    query = make_panel([4, 2, 3], seed=1)
    rng = np.random.default_rng(0)
    values = panel.values + rng.normal(size=(3, *panel.values.shape))
    means, variance = process.posteriors(panel, values, query)
    for one, mean in zip(values, means, strict=True):
        alone = process.posterior(dataclasses.replace(panel, values=one), query)
        np.testing.assert_allclose(mean, alone[0], atol=1e-12)
        np.testing.assert_allclose(variance, alone[1], atol=1e-12)
