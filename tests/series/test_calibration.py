"""Factors of intervals by distance, and what is hidden to learn them."""

import numpy as np

from sknode._series.calibration import Cells, Inflation, distances, typical_steps
from sknode._series.hidden import hide_ends
from sknode._series.panel import Panel

NAN = np.nan


def make_panel(codes, time, values):
    return Panel.from_rows(codes, np.array(time), np.array(values))[0]


def test_distances_are_those_to_the_nearest_observation_of_a_channel():
    context = make_panel(
        [0, 0, 0, 1],
        [0.0, 1.0, 5.0, 2.0],
        [[1.0, NAN], [NAN, 1.0], [1.0, NAN], [1.0, NAN]],
    )
    query = make_panel([0, 0, 0, 1, 1], [-1.0, 2.0, 9.0, 2.0, 0.5], [[NAN, NAN]] * 5)
    found = distances(context, query)
    np.testing.assert_allclose(found[:, 0], [1, 2, 4, 1.5, 0])
    np.testing.assert_allclose(found[:, 1], [2, 1, 8, np.inf, np.inf])


def test_distances_of_many_series_are_those_of_each_alone():
    rng = np.random.default_rng(0)
    codes = np.sort(rng.integers(30, size=400))
    time = rng.uniform(0, 1e6, 400)
    values = rng.normal(size=(400, 2))
    values[rng.uniform(size=values.shape) < 0.5] = NAN
    panel = make_panel(codes, time, values)
    found = distances(panel, panel)
    for i in range(30):
        rows = slice(*panel.offsets[i : i + 2])
        for c in range(2):
            seen = panel.time[rows][panel.observed[rows, c]]
            lag = np.abs(panel.time[rows][:, None] - seen[None])
            expected = lag.min(1, initial=np.inf)
            np.testing.assert_allclose(found[rows, c], expected)


def test_intervals_get_their_coverage_near_and_far():
    rng = np.random.default_rng(0)
    n = 20_000
    distance = np.exp(rng.uniform(0, np.log(32), n))
    channel = rng.integers(2, size=n)
    # what is far is less certain than was thought, and one channel more so
    true = np.where(distance < 3, 1.0, 1.8) * np.where(channel == 1, 1.6, 1.1)
    deviation = np.abs(rng.normal(size=n)) * true
    cells = Cells(deviation, distance, channel)
    inflation = Inflation.learn(np.ones(2), cells, cells)
    context = make_panel([0], [0.0], [[0.0, 0.0]])
    for x, expected in ((1.0, 1.0), (16.0, 1.8), (1e3, 1.8)):
        found = inflation.at(context, make_panel([0], [x], [[NAN, NAN]]))
        np.testing.assert_allclose(found, [[1.1 * expected, 1.6 * expected]], rtol=0.1)


def test_the_profile_is_of_many_cells_and_the_size_of_those_that_were_hidden():
    rng = np.random.default_rng(0)
    n = 20_000
    distance = np.where(rng.uniform(size=n) < 0.5, 1.0, 16.0)
    deviation = np.abs(rng.normal(size=n)) * np.where(distance < 3, 1.0, 1.6)
    profile = Cells(deviation, distance, np.zeros(n, int))
    few = Cells(1.2 * deviation[:400], distance[:400], np.zeros(400, int))
    factors = Inflation.learn(np.ones(1), profile, few).factors
    np.testing.assert_allclose(factors[[0, 2], 0], [1.2, 1.92], rtol=0.15)


def test_few_cells_change_little_and_none_nothing():
    few = Cells(np.full(1, 50.0), np.ones(1), np.zeros(1, int))
    assert (Inflation.learn(np.ones(1), few, few).factors < 1.3).all()
    none = Cells(np.zeros(0), np.zeros(0), np.zeros(0, int))
    factors = Inflation.learn(np.ones(2), none, none).factors
    np.testing.assert_array_equal(factors, 1.0)


def test_steps_are_those_between_observations_of_a_channel():
    panel = make_panel(
        [0, 0, 0, 0, 1, 1],
        [0.0, 1.0, 2.0, 4.0, 0.0, 100.0],
        [[1.0, 1.0], [1.0, NAN], [1.0, NAN], [1.0, 1.0], [1.0, NAN], [NAN, 1.0]],
    )
    np.testing.assert_allclose(typical_steps(panel), [1.0, 4.0])


def test_ends_are_hidden_and_what_is_far_is_told():
    rng = np.random.default_rng(0)
    panel = make_panel(
        np.repeat([0, 1], 100), np.tile(np.arange(100.0), 2), np.ones((200, 1))
    )
    hidden, far = hide_ends(panel, rng)
    assert hidden.shape == far.shape == (200, 1)
    assert not (far & ~hidden).any()
    for i in (0, 1):
        mine = hidden[100 * i : 100 * i + 100, 0]
        assert 4 <= mine.sum() <= 51
        assert (np.diff(mine.astype(int)) >= 0).all()
        assert (mine & ~far[100 * i : 100 * i + 100, 0]).sum() <= 31
