"""Densities are those of the samples; series are what their docstrings promise."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sknode.datasets import load_co2, log_density, make_density, make_spirals

NAMES = (
    "moons",
    "circles",
    "8gaussians",
    "checkerboard",
    "pinwheel",
    "spirals",
    "rings",
)


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one_and_predicts_where_samples_fall(name):
    # a grid whose cells fit the checkerboard
    edges = np.linspace(-6, 6, 241)
    centres = (edges[1:] + edges[:-1]) / 2
    grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1)
    density = np.exp(log_density(name, grid.reshape(-1, 2))).reshape(240, 240)
    share = density * (edges[1] - edges[0]) ** 2
    np.testing.assert_allclose(share.sum(), 1.0, atol=1e-6)
    # coarse cells against samples
    X, logs = make_density(name, 20_000, random_state=0)
    coarse = share.reshape(16, 15, 16, 15).sum((1, 3)).ravel()
    counts = np.histogram2d(*X.T, bins=[edges[::15]] * 2)[0].ravel()
    kept = coarse * len(X) > 5
    observed = np.r_[counts[kept], len(X) - counts[kept].sum()]
    expected = np.r_[coarse[kept], 1 - coarse[kept].sum()] * len(X)
    few = expected[-1] < 1  # the rest may be nothing at all
    observed, expected = (x[:-1] if few else x for x in (observed, expected))
    expected *= observed.sum() / expected.sum()
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # the mean of the log-density is minus the entropy
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(share * np.log(density))
    assert abs(logs.mean() + entropy) < 4 * logs.std() / np.sqrt(len(X)) + 1e-6


@pytest.mark.parametrize("name", ["moons", "spirals"])
def test_quadrature_agrees_with_a_much_finer_one(name, monkeypatch):
    X = np.random.default_rng(0).uniform(-3, 3, size=(200, 2))
    coarse = log_density(name, X)
    monkeypatch.setattr("sknode.datasets.density.PANEL_LENGTH", 0.5)
    np.testing.assert_allclose(coarse, log_density(name, X), rtol=1e-10)


def test_seeds_and_noise():
    X, logs = make_density("circles", 50, noise=0.3, random_state=1)
    again, _ = make_density("circles", 50, noise=0.3, random_state=1)
    np.testing.assert_array_equal(X, again)
    np.testing.assert_array_equal(logs, log_density("circles", X, noise=0.3))
    assert (make_density("circles", 50, random_state=2)[0] != X).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "squares"}, "name must be one of 'moons'"),
        ({"name": "moons", "noise": 0}, "noise must be a positive number"),
        ({"name": "checkerboard", "noise": 0.1}, "noise must be None"),
        ({"name": "moons", "n_samples": 0}, "n_samples must be a positive integer"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_density(**arguments)


def test_points_must_be_in_the_plane():
    with pytest.raises(ValueError, match="2 features"):
        log_density("moons", np.zeros((3, 3)))


def test_co2_is_weekly_with_its_gaps():
    co2 = load_co2()
    assert list(co2) == ["co2"] and co2["co2"].dtype == np.float64
    assert isinstance(co2.index, pd.DatetimeIndex) and co2.index.name == "date"
    every_week = pd.date_range("1958-03-29", "2001-12-29", freq="W-SAT", name="date")
    assert co2.index.equals(every_week)
    assert co2["co2"].isna().sum() == 59
    assert co2.loc["1964-01-25":"1964-05-23", "co2"].isna().all()
    # parts per million, as the yearly means have been published
    assert co2.loc["2000", "co2"].mean() == pytest.approx(369.5, abs=0.5)
    assert co2.loc["1959", "co2"].mean() == pytest.approx(316.0, abs=0.5)


def test_spirals_are_those_of_the_example_of_torchdiffeq():
    spirals = make_spirals(40, n_future=100, noise=0.0, random_state=0)
    assert (spirals["x1"] == spirals["x1_true"]).all()
    assert spirals.groupby("series")["clockwise"].first().sum() == 20
    for clockwise, part in spirals.groupby("clockwise"):
        x1, x2 = part["x1"] + (5 if clockwise else -5), part["x2"]
        radius = np.hypot(x1, x2)
        # what is left of the angle once the radius has told its turns
        angle = 15 / radius if clockwise else radius / 0.3
        np.testing.assert_allclose(np.cos(angle), x1 / radius, atol=1e-9)
        np.testing.assert_allclose(np.sin(angle), x2 / radius, atol=1e-9)
        # at unit speed, in opposite directions
        steps = part.assign(angle=angle).groupby("series")[["time", "angle"]].diff()
        speed = (steps["angle"] / steps["time"]).dropna()
        np.testing.assert_allclose(speed, -1.0 if clockwise else 1.0, rtol=1e-6)


def test_spirals_are_observed_as_asked():
    spirals = make_spirals(50, n_observed=30, n_future=20, noise=0.1, random_state=1)
    counts = spirals.groupby(["series", "future"]).size().unstack()
    assert (counts[False] == 30).all() and (counts[True] == 20).all()
    assert spirals.equals(spirals.sort_values(["series", "time"]))
    assert spirals.groupby("series")["time"].apply(tuple).nunique() == 50
    error = spirals[["x1", "x2"]].to_numpy() - spirals[["x1_true", "x2_true"]]
    np.testing.assert_allclose(error.std(), 0.1, rtol=0.05)
    again = make_spirals(50, n_observed=30, n_future=20, noise=0.1, random_state=1)
    assert spirals.equals(again)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_series", 0),
        ("n_times", 2.5),
        ("n_future", -1),
        ("n_future", 101),
        ("n_observed", 101),
        ("noise", -1.0),
    ],
)
def test_spirals_say_which_parameter_is_wrong(name, value):
    with pytest.raises(ValueError, match=name):
        make_spirals(**{"n_series": 5, name: value})
