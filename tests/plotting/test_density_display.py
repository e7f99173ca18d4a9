"""Pictures of densities: what is on the axes, and what is refused."""

import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import CNFDensity
from sknode.datasets import make_density
from sknode.plotting import DensityDisplay


@pytest.fixture(scope="module")
def moons():
    return make_density("moons", 300, random_state=0)[0]


@pytest.fixture(scope="module")
def density(moons):
    estimator = CNFDensity(8, max_iter=2, early_stopping=False, random_state=0)
    with pytest.warns(match="max_iter"):
        return estimator.fit(moons)


def test_contours_are_the_density_at_the_grid(density, moons):
    display = DensityDisplay.from_estimator(density, moons, grid_resolution=7)
    x, y = display.grid
    assert display.log_density.shape == (7, 7)
    exact = density.score_samples([[x[2], y[5]], [x[6], y[0]]])
    np.testing.assert_allclose(display.log_density[[5, 0], [2, 6]], exact)
    assert x[0] < moons[:, 0].min() and y[-1] > moons[:, 1].max()
    assert display.surface_.axes is display.ax_
    assert display.ax_.get_xlabel() == "x0" and display.ax_.get_ylabel() == "x1"
    np.testing.assert_allclose(display.ax_.get_xlim(), x[[0, -1]])


def test_panels_lead_from_the_normal_distribution_to_the_data(density, moons):
    display = DensityDisplay.from_estimator(density, moons, n_times=5)
    assert display.axes_.shape == (5,)
    assert display.ax_ is display.axes_[-1]
    first, *_, before_last = (a.lines[0].get_xydata() for a in display.axes_[:-1])
    path = density.trajectory(moons, n_times=5)
    np.testing.assert_allclose(first, path[:, 0])
    np.testing.assert_allclose(before_last, path[:, 3])
    titles = [ax.get_title() for ax in display.axes_]
    assert titles == ["t = 0", "t = 0.25", "t = 0.5", "t = 0.75", "t = 1"]
    assert len({ax.get_xlim() for ax in display.axes_}) == 1


def test_one_feature_is_a_line_over_a_histogram(moons):
    estimator = CNFDensity(n_components=2, max_iter=1, random_state=0)
    estimator.fit(moons[:100, :1])
    display = DensityDisplay.from_estimator(estimator, moons[:, :1], color="C3")
    x, y = display.line_.get_data()
    np.testing.assert_allclose(np.log(y), estimator.score_samples(x[:, None]))
    assert display.line_.get_color() == "C3"
    areas = [bar.get_width() * bar.get_height() for bar in display.ax_.patches]
    assert sum(areas) == pytest.approx(1)
    display = DensityDisplay.from_estimator(estimator, moons[:, :1], n_times=3)
    assert all(ax.patches for ax in display.axes_)


def test_names_of_columns_are_labels(moons):
    frame = pd.DataFrame(moons[:100], columns=["width", "height"])
    density = CNFDensity(n_components=1).fit(frame)
    display = DensityDisplay.from_estimator(density, frame, n_times=2)
    assert display.axes_[0].get_ylabel() == "height"
    assert [ax.get_xlabel() for ax in display.axes_] == ["width", "width"]
    assert DensityDisplay.from_estimator(density).feature_names == ["width", "height"]


def test_rows_are_drawn_where_none_are_given(density):
    display = DensityDisplay.from_estimator(density, n_samples=20, random_state=3)
    np.testing.assert_array_equal(display.rows, density.sample(20, random_state=3))


@pytest.mark.parametrize(
    "other",
    [
        KernelDensity(),
        GaussianMixture(),
        make_pipeline(StandardScaler(), CNFDensity(n_components=1)),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_shows_other_estimators(moons, other):
    other.fit(moons[:50])
    display = DensityDisplay.from_estimator(other, moons[:50], grid_resolution=5)
    assert np.isfinite(display.log_density).all()
    with pytest.raises(TypeError, match="trajectory"):
        DensityDisplay.from_estimator(other, moons, n_times=2)


def test_draws_again_into_given_axes(density, moons):
    import matplotlib.pyplot as plt

    display = DensityDisplay.from_estimator(density, moons, n_times=2)
    figure, axes = plt.subplots(1, 2)
    assert display.plot(axes, plot_method="contour", colors="k") is display
    assert display.figure_ is figure and display.axes_[0] is axes[0]
    assert display.plot(axes, plot_method="pcolormesh", cmap="Blues") is display
    assert display.surface_.get_cmap().name == "Blues"
    with pytest.raises(ValueError, match="2 axes"):
        display.plot(axes[0])


def test_constant_rows_still_have_a_neighbourhood(density):
    display = DensityDisplay.from_estimator(density, [[0.0, 1.0]], margin=0.2)
    np.testing.assert_allclose(display.grid[0][[0, -1]], [-0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"X": np.zeros((3, 5))}, ValueError, "one or two features. X has 5"),
        ({"grid_resolution": 1}, ValueError, "grid_resolution"),
        ({"margin": -1}, ValueError, "margin"),
        ({"margin": np.nan}, ValueError, "margin"),
        ({"plot_method": "surface"}, ValueError, "plot_method .* 'surface'"),
        ({"n_times": 1}, ValueError, "n_times"),
        ({"n_samples": 0}, ValueError, "n_samples"),
    ],
)
def test_refuses_with_clear_words(density, arguments, error, message):
    with pytest.raises(error, match=message):
        DensityDisplay.from_estimator(density, **arguments)


def test_refuses_estimators_that_are_not_fitted_or_know_no_density(moons):
    with pytest.raises(NotFittedError):
        DensityDisplay.from_estimator(CNFDensity(), moons)
    with pytest.raises(TypeError, match="score_samples"):
        DensityDisplay.from_estimator(StandardScaler().fit(moons), moons)
    pipeline = make_pipeline(StandardScaler(), CNFDensity(n_components=1))
    with pytest.raises(ValueError, match="X is needed"):
        DensityDisplay.from_estimator(pipeline.fit(moons[:50]))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, density, moons):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"sknode\[plot\]"):
        DensityDisplay.from_estimator(density, moons)
