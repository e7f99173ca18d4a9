"""Learning linear processes: likelihoods, periods, units, and bad data."""

import dataclasses

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from sknode._series import covariance
from sknode._series.covariance import fit_process, fit_warped_process
from sknode._series.cycles import find_cycle
from sknode._series.likelihood import Block, Windows, log_likelihood
from sknode._series.panel import Panel
from sknode._series.state_space import LinearProcess
from sknode._series.warp import Warp, find_levels

# Less than by default, for speed.
QUICK = {"n_steps": 60, "window": 64}
BOUNDS = np.array([[-np.inf], [np.inf]])


def make_panel(values, time=None, offsets=None):
    """Return a panel, of one series with steps of one unless told otherwise."""
    n = len(values)
    offsets = np.array([0, n]) if offsets is None else np.asarray(offsets)
    time = np.arange(n) * 1.0 if time is None else time
    return Panel(offsets, time, values, np.empty((n, 0)))


def draw(process, time, seed):
    """Return noisy draws of a process at the times of one series."""
    rng = np.random.default_rng(seed)
    empty = make_panel(np.full((len(time), len(process.mean)), np.nan), time)
    path = process.sample(empty, empty, 1, rng)[0]
    return path + np.sqrt(process.noise_variance) * rng.normal(size=path.shape)


def hide(values, share=0.1, seed=0):
    """Return values with some hidden, and which."""
    hidden = np.random.default_rng(seed).random(values.shape) < share
    return np.where(hidden, np.nan, values), hidden


def make_model(n_channels=2, warped=True):
    """Return a model with all kinds of blocks, away from its start."""
    blocks = [
        *covariance._start_blocks(n_channels, 1.0, 20.0),
        *covariance._cycle_blocks(5.0, 1.0, 20.0, 5 if n_channels <= 8 else 4, 2),
    ]
    generator = torch.Generator().manual_seed(0)
    model = covariance._Model(n_channels, blocks, warped, generator)
    noise = torch.randn(model.parameters.shape, generator=generator)
    model.parameters += 0.3 * noise
    return model


def make_cells(times="any", n_channels=2, n=24):
    """Return time, channel and value of cells of two windows, one of them padded."""
    rng = np.random.default_rng(0)
    channel = rng.integers(0, n_channels, (2, n))
    time = np.sort(rng.uniform(0, 9, (2, n)))
    if times == "regular":
        time = np.sort(rng.integers(0, 4, (2, n)) * 0.7)
    elif times == "shared":
        time = np.sort(rng.uniform(0, 9, (2, n // 2))).repeat(2, axis=1)
    channel[1, -3:] = -1
    value = np.where(channel >= 0, rng.normal(size=(2, n)), 0.0)
    return np.where(channel >= 0, time, 0.0), channel, value


def plain_log_likelihood(model, parameters, cells):
    """Return the log-likelihood of windows from its formula, for autograd."""
    part, total = model.parts(parameters), 0.0
    rate = part["log_rate"].exp()
    tuning = (model.width * part["shift"]).exp()
    level = part["mixing"] @ part["mixing"].mT
    level = level + torch.diag_embed((2 * part["log_own"]).exp())
    noise = (2 * part["log_noise"]).exp() + covariance.FLOOR**2
    power = 2 * torch.sigmoid(part["power_"]) if model.warped else torch.ones(2, 99)
    for time, channel, value in zip(*map(torch.as_tensor, cells), strict=True):
        time, value, channel = (x[channel >= 0] for x in (time, value, channel))
        lag = (time[:, None] - time).abs()
        K = torch.diag(noise[channel])
        for k, block in enumerate(model.blocks):
            decay, wave = rate[k] * lag, 1.0
            if block.kind == "cycle":
                frequency = block.frequency * tuning[block.first]
                wave = (block.harmonic * frequency * lag).cos()
                decay = rate[block.first] * lag
            elif block.kind == "matern":
                wave = 1 + decay
            elif block.kind == "constant":
                decay = torch.zeros_like(lag)
            K = K + level[k][channel][:, channel] * wave * (-decay).exp()
        p = torch.where(value < 0, power[0, channel], power[1, channel])
        size = (1 + value.abs()) ** p
        warped = value.sign() * (size - 1) / p - part["mean"][channel]
        total = total + torch.distributions.MultivariateNormal(
            torch.zeros_like(value), K
        ).log_prob(warped)
        total = total + ((p - 1) * (1 + value.abs()).log()).sum()
    return total


def test_likelihood_of_windows_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(covariance, "NEGLIGIBLE", 0.0)
    learned, cells = make_model(), make_cells()
    windows = Windows.prepare(*cells, 2, 2)
    warp = Warp(np.zeros(2), np.ones(2), learned.powers(), BOUNDS)
    process = learned.process(np.zeros(2), np.ones(2))
    likelihood = covariance._log_likelihood(learned, windows)[0].numpy()
    for k in range(2):
        time, channel, value = (part[k] for part in cells)
        seen = channel >= 0
        values = np.full((seen.sum(), 2), np.nan)
        values[np.arange(seen.sum()), channel[seen]] = value[seen]
        panel = make_panel(warp.forward(values), time[seen])
        expected = process.log_density(panel)[0] + np.nansum(warp.log_slope(values))
        np.testing.assert_allclose(likelihood[k], expected, rtol=1e-9)


@pytest.mark.parametrize(
    "times, n_channels, warped, one_table, one_pair",
    [
        ("regular", 1, True, True, False),
        ("regular", 2, False, True, False),
        ("shared", 2, True, False, False),
        ("any", 1, True, False, False),
        ("any", 2, True, False, True),
        ("any", 12, True, False, True),
    ],
)
def test_gradient_of_the_likelihood_is_exact(
    times, n_channels, warped, one_table, one_pair
):
    model, cells = make_model(n_channels, warped), make_cells(times, n_channels)
    windows = Windows.prepare(*cells, n_channels, 2)
    # covariances are kept in each of the ways there are
    assert (len(windows.lag) == 1) == one_table
    assert (windows.pair is not None) == one_pair
    leaf = model.parameters.clone().requires_grad_()
    expected = plain_log_likelihood(model, leaf, cells)
    (slope,) = torch.autograd.grad(expected, leaf)
    found, gradient = covariance._log_likelihood(model, windows)
    torch.testing.assert_close(found.sum(), expected.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-10)
    # some of the windows are what they are among others
    for k in range(2):
        alone, _ = covariance._log_likelihood(model, windows[[k]])
        torch.testing.assert_close(alone[0], found[k], rtol=1e-12, atol=0)


def test_gradient_of_the_penalty_is_exact():
    model = make_model(3)
    gradient, at = model.penalty()[1], model.parameters
    for k in range(len(at)):
        values = []
        for step in (-1e-5, 1e-5):
            at[k] += step
            values.append(float(model.penalty()[0]))
            at[k] -= step
        difference = (values[1] - values[0]) / 2e-5
        np.testing.assert_allclose(gradient[k], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), 400.0])
def test_parameters_without_a_likelihood_are_an_error(bad):
    model = make_model()
    model.log_own[0, 0] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        covariance._log_likelihood(model, Windows.prepare(*make_cells(), 2, 2))


@pytest.mark.parametrize("level, noise", [(1.0, -0.5), (1.0, 0.0), (-2.0, 1.0)])
def test_a_covariance_that_is_none_is_an_error(level, noise):
    windows = Windows.prepare(*make_cells("regular", 1), 1, 2)
    level = torch.full((1, 1), level).double()
    noise, rates = torch.full_like(windows.value, noise), torch.zeros(2, 1).double()
    blocks = [Block("constant", 1.0)]
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        log_likelihood(windows, windows.value, noise, blocks, level, *rates)


def test_learned_process_is_as_likely_as_the_true_one():
    true = LinearProcess.from_blocks(
        [0.0, 0.0], [0.05, 0.1], [("ou", [[1.0, 0.0], [0.8, 0.6]], 0.1, 0.0)]
    )
    rng = np.random.default_rng(0)
    time = np.sort(rng.uniform(0, 300, 300))
    train, test = (make_panel(draw(true, time, seed), time) for seed in (0, 1))
    process = fit_process(train, rng=np.random.default_rng(0), **QUICK)
    loss = true.log_density(test)[0] - process.log_density(test)[0]
    # A hundredth of a nat per cell.
    assert loss < 0.02 * test.values.size


@pytest.mark.parametrize("irregular", [False, True])
def test_period_is_found_and_carried_over_gaps(irregular):
    rng = np.random.default_rng(0)
    time = np.arange(400) * 1.0
    if irregular:
        time = np.sort(rng.uniform(0, 400, 400))
    wave = np.sin(2 * np.pi * time / 23.0) + 0.5 * np.cos(4 * np.pi * time / 23.0)
    values = (wave + 0.1 * rng.normal(size=400))[:, None]
    values[200:260] = np.nan
    panel = make_panel(values, time)
    process = fit_process(panel, rng=rng, **QUICK)
    assert np.isclose(process.frequency, 2 * np.pi / 23, rtol=0.01).any()
    mean, _ = process.posterior(panel, panel)
    assert np.abs(mean[200:260, 0] - wave[200:260]).mean() < 0.1


def test_no_period_is_found_in_noise_with_memory():
    process = LinearProcess.from_blocks([0.0], [0.1], [("ou", [[1.0]], 0.05, 0.0)])
    for seed in range(3):
        panel = make_panel(draw(process, np.arange(500) * 1.0, seed))
        learned = fit_process(panel, rng=np.random.default_rng(0), **QUICK)
        assert not learned.frequency.any()


def test_channels_inform_each_other():
    true = LinearProcess.from_blocks(
        [0.0, 0.0], [0.02, 0.02], [("ou", [[1.0], [-1.0]], 2.0, 0.0)]
    )
    values = draw(true, np.arange(300) * 1.0, 0)
    seen, hidden = hide(values)
    panel = make_panel(seen)
    process = fit_process(panel, rng=np.random.default_rng(0), **QUICK)
    error = np.abs(process.posterior(panel, panel)[0] - values)[hidden].mean()
    assert error < 0.5 * np.abs(values)[hidden].mean()


def test_same_generator_same_process():
    values = np.cumsum(np.random.default_rng(0).normal(size=(100, 2)), axis=0)
    one, two = (
        fit_process(make_panel(values), rng=np.random.default_rng(3), **QUICK)
        for _ in range(2)
    )
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(two, name))


@pytest.mark.parametrize("unit", [2.0**30, 2.0**-30])
def test_units_of_time_do_not_matter(unit):
    rng = np.random.default_rng(0)
    panel = make_panel(np.cumsum(rng.normal(size=(100, 1)), axis=0))
    scaled = dataclasses.replace(panel, time=panel.time * unit)
    means = [
        fit_process(p, rng=np.random.default_rng(0), **QUICK).posterior(p, p)[0]
        for p in (panel, scaled)
    ]
    np.testing.assert_allclose(*means, atol=1e-6)


def test_nonsense_values_do_not_spoil_the_rest():
    rng = np.random.default_rng(0)
    time = np.arange(300) * 1.0
    values = np.sin(time / 20)[:, None] + 0.05 * rng.normal(size=(300, 1))
    seen, hidden = hide(values)
    bad = seen.copy()
    bad[[50, 180]] = 1e4
    panel = make_panel(bad)
    warp, process = fit_warped_process(panel, rng=np.random.default_rng(0), **QUICK)
    warped = dataclasses.replace(panel, values=warp.forward(warp.limit(bad)))
    mean = warp.inverse(process.posterior(warped, warped)[0])
    far = hidden & (np.abs(time - 50) > 5)[:, None] & (np.abs(time - 180) > 5)[:, None]
    assert np.abs(mean - values)[far].mean() < 0.15


def fit_warped(panel, **options):
    """Return the process of a warped panel."""
    return fit_warped_process(panel, **options)[1]


@pytest.mark.parametrize("fit", [fit_process, fit_warped])
@pytest.mark.parametrize("case", ["one", "constant", "never", "empty", "same time"])
def test_little_data_gives_a_finite_process(fit, case):
    values, offsets, time = np.random.default_rng(0).normal(size=(6, 2)), None, None
    if case == "one":
        values = np.array([[1.0, np.nan]])
    elif case == "constant":
        values[:, 1] = 3.0
    elif case == "never":
        values[:, 1] = np.nan
    elif case == "empty":
        offsets = [0, 0, 4, 4, 6, 6]
    else:
        time = np.zeros(6)
    panel = make_panel(values, time, offsets)
    process = fit(panel, rng=np.random.default_rng(0), **QUICK)
    mean, variance = process.posterior(panel, panel)
    assert np.isfinite(mean).all() and np.isfinite(variance).all()
    assert (process.noise_variance > 0).all()


def test_channels_of_few_values_are_snapped_to_them():
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(0, 3, 300) * 1.0, rng.normal(size=300)], axis=1)
    levels = find_levels(values)
    np.testing.assert_array_equal(levels[0], [0.0, 1.0, 2.0])
    assert len(levels[1]) == 0
    warp = Warp(np.zeros(2), np.ones(2), np.ones((2, 2)), BOUNDS, levels)
    guess = np.array([[0.4, 0.4], [1.6, 1.6], [-9.0, -9.0]])
    np.testing.assert_array_equal(
        warp.snap(guess), [[0.0, 0.4], [2.0, 1.6], [0.0, -9.0]]
    )


@pytest.mark.parametrize("power", [0.0, 0.4, 1.0, 1.7])
def test_warp_has_an_inverse_and_a_slope(power):
    powers = np.array([[power], [1.0 - power / 2]])
    everything = np.array([[-np.inf], [np.inf]])
    warp = Warp(np.array([1.0]), np.array([2.0]), powers, everything)
    values = np.linspace(-30, 40, 101)[:, None]
    warped = warp.forward(values)
    assert (np.diff(warped, axis=0) > 0).all()
    np.testing.assert_allclose(warp.inverse(warped), values, rtol=1e-10, atol=1e-10)
    slope = (warp.forward(values + 1e-6) - warp.forward(values - 1e-6)) / 2e-6
    np.testing.assert_allclose(np.exp(warp.log_slope(values)), slope, rtol=1e-6)


def test_a_refused_period_makes_way_for_the_next():
    time = np.arange(2000) * 1.0
    rng = np.random.default_rng(0)
    values = 2 * np.sin(2 * np.pi * time / 31) + np.sin(2 * np.pi * time / 100)
    panel = make_panel((values + rng.normal(size=2000))[:, None], time)
    found = []
    for _ in range(2):
        found.append(find_cycle(panel, lambda some: some.values, 1.0, rng, found))
    # or small multiples of them
    multiples = np.array(found) / [31, 100]
    np.testing.assert_allclose(multiples, np.rint(multiples), rtol=0.01)
    assert (multiples > 0.5).all()


def test_series_that_are_not_looked_at_are_not_weighed():
    values = np.random.default_rng(0).normal(size=(5 * 40, 1))
    panel = make_panel(values, np.tile(np.arange(40.0), 5), 40 * np.arange(6))
    weighed = []

    def weigh(some):
        weighed.append(some.n_series)
        return some.values

    find_cycle(panel, weigh, 1.0, np.random.default_rng(0), most_series=3)
    assert weighed == [3]


def test_small_matrices_are_not_shared_among_threads(monkeypatch):
    learn, seen = covariance._learn, []

    def watched(*args):
        seen.extend(x for x in threadpool_info() if x["user_api"] == "blas")
        return learn(*args)

    monkeypatch.setattr(covariance, "_learn", watched)
    panel = make_panel(np.random.default_rng(0).normal(size=(20, 1)))
    with threadpool_limits(2, user_api="blas"):
        fit_process(panel, rng=np.random.default_rng(0), n_steps=2)
    assert {x["num_threads"] for x in seen} == {1}


def test_rows_longer_than_a_window_are_read_in_part():
    values = np.random.default_rng(0).normal(size=(12, 9))
    values[::3, 4:] = np.nan
    rng = np.random.default_rng(0)
    windows = covariance._draw_windows(make_panel(values), values, 6, 40, 16, rng)
    count = (windows.channel >= 0).sum(1)
    assert count.min() >= 1 and count.max() == 6
    process = fit_process(make_panel(values), rng=rng, window=6, n_steps=5)
    assert np.isfinite(process.log_density_and_gradient(make_panel(values))[0]).all()


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_short_lags_beside_long_ones_are_not_rounded(unit):
    near = unit * np.arange(6.0)
    for time in (
        np.stack([near, near * 1e12]),
        np.stack([np.r_[near[:3], 1e12 * unit + near[:3]]] * 2),
        np.stack([near, near + 0.5 * unit]),
    ):
        channel = np.zeros(time.shape, np.int64)
        windows = Windows.prepare(time, channel, np.zeros(time.shape), 1, 2)
        for k in range(2):
            lag = windows.lag[min(k, len(windows.lag) - 1)].numpy()
            found = lag[windows.place[k].numpy()]
            expected = np.abs(time[k][:, None] - time[k])
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("n_series, noise", [(1, 0.1), (3, 0.5)])
def test_a_period_that_is_seen_four_times_is_found(n_series, noise):
    rng = np.random.default_rng(0)
    codes, month = np.divmod(np.arange(48 * n_series), 48)
    season = np.sin(2 * np.pi * month / 12 + 0.3 * codes)
    values = season + noise * rng.normal(size=len(codes))
    panel = Panel.from_rows(codes, month / 48, values[:, None])[0]
    _, process = fit_warped_process(panel, rng=rng)
    slowest = process.frequency[process.frequency > 0].min()
    np.testing.assert_allclose(2 * np.pi / slowest * 48, 12, rtol=0.03)


def test_no_period_is_seen_in_a_random_walk():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 4)).cumsum(0)
    for column in values.T:
        panel = make_panel(column[:, None], np.arange(60) / 60)
        _, process = fit_warped_process(panel, rng=rng)
        assert not process.frequency.any()
