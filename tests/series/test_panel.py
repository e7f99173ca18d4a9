"""Panel: rows sorted by series and time, subsets, hidden cells, merged rows."""

import numpy as np
import pytest

from sknode._series.panel import Panel

NAN = np.nan


@pytest.fixture
def rows():
    """Return codes, times, values and covariates of 60 rows of 5 series, unsorted."""
    rng = np.random.default_rng(0)
    codes, time = rng.integers(0, 5, 60), rng.integers(0, 6, 60).astype(float)
    values = np.where(rng.random((60, 3)) < 0.3, NAN, rng.normal(size=(60, 3)))
    return codes, time, values, rng.integers(0, 2, (60, 2)).astype(float)


def test_rows_are_sorted_by_series_and_time(rows):
    panel, order = Panel.from_rows(*rows)
    parts = panel.series_of_rows(), panel.time, panel.values, panel.covariates
    for found, part in zip(parts, rows, strict=True):
        np.testing.assert_array_equal(found, part[order])
    for i in range(panel.n_series):
        time = panel.time[panel.offsets[i] : panel.offsets[i + 1]]
        assert (np.diff(time) >= 0).all()
    np.testing.assert_array_equal(panel.lengths, np.bincount(rows[0]))
    assert panel.offsets.dtype == np.int64


def test_rows_of_the_same_time_keep_their_order():
    values = np.array([[1.0], [2.0], [3.0], [4.0]])
    panel, order = Panel.from_rows([0, 0, 0, 0], np.array([1.0, 0, 1, 0]), values)
    np.testing.assert_array_equal(order, [1, 3, 0, 2])
    np.testing.assert_array_equal(panel.values.ravel(), [2, 4, 1, 3])


def test_series_without_rows_and_of_one_row():
    panel, _ = Panel.from_rows([2, 0], np.zeros(2), np.zeros((2, 1)), n_series=4)
    assert panel.n_series == 4
    np.testing.assert_array_equal(panel.lengths, [1, 0, 1, 0])
    assert panel.covariates.shape == (2, 0)


@pytest.mark.parametrize("merge", [False, True])
def test_no_rows_at_all(merge):
    panel, order = Panel.from_rows([], np.empty(0), np.empty((0, 2)), merge=merge)
    assert panel.n_series == 0 and len(order) == 0
    assert panel.values.shape == (0, 2)


def test_merged_rows_are_means_of_what_was_observed():
    time = np.array([1.0, 1.0, 0.0, 1.0])
    values = np.array([[1.0, NAN], [3.0, NAN], [7.0, 8.0], [NAN, 5.0]])
    panel, group = Panel.from_rows([0, 0, 0, 0], time, values, merge=True)
    np.testing.assert_array_equal(group, [1, 1, 0, 1])
    np.testing.assert_array_equal(panel.values, [[7.0, 8.0], [2.0, 5.0]])
    np.testing.assert_array_equal(panel.offsets, [0, 2])


def test_merged_channels_without_observations_stay_missing():
    values = np.full((2, 1), NAN)
    panel, _ = Panel.from_rows([0, 0], np.zeros(2), values, merge=True)
    assert panel.values.shape == (1, 1) and np.isnan(panel.values).all()


def test_rows_with_other_covariates_or_series_are_not_merged():
    covariates = np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 1.0], [0.0, 1.0]])
    values = np.array([[1.0], [2.0], [5.0], [9.0]])
    panel, group = Panel.from_rows(
        [0, 0, 0, 1], np.zeros(4), values, covariates, merge=True
    )
    np.testing.assert_array_equal(group, [0, 1, 0, 2])
    np.testing.assert_array_equal(panel.values.ravel(), [3, 2, 9])
    np.testing.assert_array_equal(panel.covariates[:, 1], [1, 2, 1])


def test_merged_panel_does_not_depend_on_the_order_of_rows(rows):
    codes, time, values, covariates = rows
    panel, group = Panel.from_rows(*rows, merge=True)
    other = np.random.default_rng(1).permutation(60)
    again, group_again = Panel.from_rows(*(part[other] for part in rows), merge=True)
    np.testing.assert_array_equal(group_again, group[other])
    np.testing.assert_array_equal(again.time, panel.time)
    np.testing.assert_array_equal(again.covariates, panel.covariates)
    np.testing.assert_allclose(again.values, panel.values, rtol=1e-14)
    np.testing.assert_array_equal(panel.series_of_rows()[group], codes)
    np.testing.assert_array_equal(panel.time[group], time)
    np.testing.assert_array_equal(panel.covariates[group], covariates)
    keys = np.column_stack([panel.series_of_rows(), panel.time, panel.covariates])
    assert len(np.unique(keys, axis=0)) == len(keys) < 60
    for j in range(3):
        seen = ~np.isnan(values[:, j])
        sums = np.bincount(group[seen], values[seen, j], len(keys))
        counts = np.bincount(group[seen], minlength=len(keys))
        expected = np.where(counts > 0, sums / np.maximum(counts, 1), NAN)
        np.testing.assert_allclose(panel.values[:, j], expected, atol=1e-14)


def test_merging_different_rows_changes_nothing():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 2))
    args = rng.integers(0, 3, 20), rng.normal(size=20), values
    panel, order = Panel.from_rows(*args)
    merged, group = Panel.from_rows(*args, merge=True)
    np.testing.assert_array_equal(merged.values, panel.values)
    np.testing.assert_array_equal(order[group], np.arange(20))


def test_take_returns_series_in_the_order_given(rows):
    panel, _ = Panel.from_rows(*rows)
    some = panel.take([3, 0, 3])
    np.testing.assert_array_equal(some.lengths, panel.lengths[[3, 0, 3]])
    for i, series in enumerate([3, 0, 3]):
        here = slice(*some.offsets[i : i + 2])
        there = slice(*panel.offsets[series : series + 2])
        np.testing.assert_array_equal(some.time[here], panel.time[there])
        np.testing.assert_array_equal(some.values[here], panel.values[there])
        np.testing.assert_array_equal(some.covariates[here], panel.covariates[there])


def test_take_of_no_series_and_of_empty_series():
    panel, _ = Panel.from_rows([0, 2], np.zeros(2), np.zeros((2, 1)))
    assert panel.take([]).n_series == 0
    np.testing.assert_array_equal(panel.take([1, 2, 1]).offsets, [0, 0, 1, 1])


def test_hide_removes_cells_and_leaves_the_panel_alone(rows):
    panel, _ = Panel.from_rows(*rows)
    before = panel.values.copy()
    mask = np.random.default_rng(1).random(panel.values.shape) < 0.5
    hidden = panel.hide(mask)
    np.testing.assert_array_equal(hidden.observed, panel.observed & ~mask)
    np.testing.assert_array_equal(hidden.values[~mask], before[~mask])
    np.testing.assert_array_equal(panel.values, before)
    assert not panel.hide(np.ones((60, 1), dtype=bool)).observed.any()
