"""Pictures of paths of states: what is on the axes, and what is refused."""

import copy
import sys
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import make_moons
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import CNFDensity, LatentODERegressor, ODENetClassifier, ODENetRegressor
from sknode.plotting import TrajectoryDisplay

SMALL = {"hidden_layer_sizes": 8, "max_iter": 3, "random_state": 0}
FLOW = {**SMALL, "n_components": 2, "early_stopping": False}
show = TrajectoryDisplay.from_estimator


def fit(estimator, *data):
    """Fit for a few epochs, which is too few to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(*data)


@pytest.fixture(scope="module")
def moons():
    return make_moons(60, noise=0.1, random_state=0)


@pytest.fixture(scope="module")
def net(moons):
    return fit(ODENetClassifier(augment_dim=0, **SMALL), *moons)


@pytest.fixture(scope="module")
def density():
    X, _ = make_moons(220, noise=0.1, random_state=1)
    return fit(CNFDensity(marginals=True, bounds={0: (-3, 4)}, **FLOW), X)


@pytest.fixture(scope="module")
def series():
    """Two series of unequal length, in no order of time."""
    t = np.concatenate([np.linspace(0, 10, 30), np.linspace(1, 9, 20)])
    frame = pd.DataFrame({"time": t, "series": ["b"] * 30 + ["a"] * 20})
    frame["y"] = np.sin(t)
    return frame.sample(frac=1, random_state=0)


def fit_latent(frame, latent_dim):
    regressor = LatentODERegressor(
        latent_dim=latent_dim,
        series="series",
        rnn_hidden_size=4,
        early_stopping=False,
        residual=None,
        **SMALL,
    )
    return fit(regressor, frame[["time", "series"]], frame["y"])


def slope_of_paths(paths, i):
    """Return the slopes of paths (n, n_times, n_dims) at a time, by differences."""
    return (paths[:, i + 1] - paths[:, i - 1]) * (paths.shape[1] - 1) / 2


# --- ODE-Nets -------------------------------------------------------------------------


def test_paths_are_the_trajectories(net, moons):
    X, _ = moons
    display = show(net, X, n_times=4)
    np.testing.assert_array_equal(
        display.states.reshape(60, 4, 2), net.trajectory(X, n_times=4)
    )
    (lines,), (ends,) = display.lines_, display.ends_
    assert len(lines.get_segments()) == 60 * 3
    np.testing.assert_allclose(lines.get_segments()[4], display.states[5:7])
    np.testing.assert_allclose(ends.get_offsets(), display.states[3::4])
    assert display.ax_.get_xlabel() == "state 0"
    table = display.frame()
    assert table.columns.tolist() == ["path", "time", "state 0", "state 1"]
    assert table["path"].tolist() == np.repeat(range(60), 4).tolist()
    np.testing.assert_allclose(table["time"][4:8], [0, 1 / 3, 2 / 3, 1])


def test_field_is_what_moves_the_states(net, moons):
    display = show(net, moons[0], field_time=0.25, grid_resolution=5)
    assert display.velocity.shape == (5, 5, 2)
    x, y = display.grid
    with torch.no_grad():
        state = torch.tensor([[x[3], y[1]]])
        exact = net.module_.field(torch.tensor([[0.25]]).double(), state)
    np.testing.assert_allclose(display.velocity[1, 3], exact[0])
    np.testing.assert_allclose([display.field_.U[8], display.field_.V[8]], exact[0])
    accurate = copy.copy(net).set_params(rtol=1e-8, atol=1e-8)
    states = accurate.trajectory(moons[0], 401)
    slope = net._velocity(np.full(60, 0.25), states[:, 100])
    np.testing.assert_allclose(slope, slope_of_paths(states, 100), atol=1e-3)
    assert display.ax_.get_title() == "vector field at t = 0.25"


def test_field_covers_the_paths(net, moons):
    display = show(net, moons[0], margin=0.5, grid_resolution=3)
    low, high = display.states.min(0), display.states.max(0)
    for axis, a, b in zip(display.grid, low, high, strict=True):
        np.testing.assert_allclose(
            axis[[0, -1]], [1.5 * a - 0.5 * b, 1.5 * b - 0.5 * a]
        )


@pytest.mark.parametrize("labels", [[3, 7], [3.0, 7.0], ["no", "yes"]])
def test_classes_have_colours_and_a_legend(net, moons, labels):
    X, y = moons
    display = show(net, X, np.array(labels)[y], n_times=3)
    assert len(display.lines_) == len(display.ends_) == 2
    texts = [text.get_text() for text in display.ax_.get_legend().texts]
    assert texts == [str(label) for label in labels]
    for i, (lines, ends) in enumerate(zip(display.lines_, display.ends_, strict=True)):
        np.testing.assert_allclose(
            ends.get_offsets(), net.trajectory(X[y == i], 3)[:, -1]
        )
        assert len(lines.get_segments()) == 2 * (y == i).sum()
    assert (
        display.frame()["target"].tolist() == np.repeat(np.array(labels)[y], 3).tolist()
    )


def test_numbers_have_a_scale(moons):
    X, _ = moons
    y = X[:, 0].round().astype(int)  # whole numbers, but of a regressor
    net = fit(ODENetRegressor(augment_dim=0, **SMALL), X, y)
    display = show(net, X, y[:, None], n_times=3, cmap="magma")
    (lines,), (ends,) = display.lines_, display.ends_
    np.testing.assert_allclose(lines.get_array(), np.repeat(y, 2))
    np.testing.assert_allclose(ends.get_array(), y)
    assert lines.get_clim() == ends.get_clim() == (y.min(), y.max())
    assert lines.get_cmap().name == "magma"
    assert display.colorbar_ is not None and display.ax_.get_legend() is None


def test_states_of_more_dimensions_are_principal_components(moons):
    X, y = moons
    net = fit(ODENetClassifier(augment_dim=1, **SMALL), X, y)
    display = show(net, X, y, n_times=5)
    states = net.trajectory(X, 5).reshape(-1, 3)
    components = PCA(2).fit(states)
    np.testing.assert_allclose(
        np.abs(display.states), np.abs(components.transform(states))
    )
    assert display.velocity is None and display.field_ is None
    assert display.ax_.get_title() == ""
    share = 100 * components.explained_variance_ratio_[1]
    label = f"component 1 ({share:.0f} % of the variance)"
    assert display.ax_.get_ylabel() == label
    assert display.frame().columns[2] == "component 0"


def test_images_have_principal_components():
    X = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    net = ODENetClassifier(image_shape=(1, 4, 4), n_channels=2, **SMALL)
    display = show(fit(net, X, np.arange(8) % 2), X, n_times=2)
    assert display.states.shape == (16, 2)


def test_a_single_dimension_is_drawn_against_time(moons):
    x = moons[0][:, :1]
    net = fit(ODENetRegressor(augment_dim=0, **SMALL), x, x[:, 0])
    display = show(net, x, n_times=4, grid_resolution=5)
    assert display.ax_.get_xlabel() == "time"
    assert display.ax_.get_ylabel() == "state 0"
    segments = display.lines_[0].get_segments()
    path = net.trajectory(x, 4)[0, :, 0]
    np.testing.assert_allclose(segments[1], [[1 / 3, path[1]], [2 / 3, path[2]]])
    times, states = display.grid
    np.testing.assert_allclose(times, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(display.velocity[..., 0], 1)
    slope = net._velocity(times, np.full((5, 1), states[2]))
    np.testing.assert_allclose(display.velocity[2, :, 1], slope[:, 0])
    assert np.ptp(slope) > 0
    # of all times: no title says of which
    assert display.ax_.get_title() == ""


def test_follows_the_rows_that_a_pipeline_passes_on(moons):
    pipeline = make_pipeline(StandardScaler(), ODENetClassifier(**SMALL))
    pipeline = fit(pipeline, *moons)
    display = show(pipeline, *moons, n_times=2)
    rows = pipeline[0].transform(moons[0])
    expected = show(pipeline[-1], rows, moons[1], n_times=2)
    np.testing.assert_array_equal(display.states, expected.states)
    alone = make_pipeline(pipeline[-1])
    np.testing.assert_array_equal(show(alone, rows, n_times=2).states, display.states)


# --- densities ------------------------------------------------------------------------


@pytest.mark.parametrize("time", [0.25, 0.75])
def test_rows_of_a_density_move_as_its_field_says(density, time):
    # with a refinement, columns that are mapped, and limits
    X, _ = make_moons(20, noise=0.1, random_state=2)
    i = int(400 * time)
    paths = density.trajectory(X, 401)
    slope = density._velocity(time, paths[:, i], np.empty((20, 0)))
    exact = slope_of_paths(paths, i)
    np.testing.assert_allclose(slope, exact, atol=0.02 * np.abs(exact).max())


def test_field_of_a_density_ends_at_its_bounds(density):
    X, _ = make_moons(20, noise=0.1, random_state=2)
    display = show(density, X, margin=2.0, grid_resolution=9)
    inside = (display.grid[0] > -3) & (display.grid[0] < 4)
    assert inside.any() and not inside.all()
    finite = np.isfinite(display.velocity).all(2)
    np.testing.assert_array_equal(finite, np.tile(inside, (9, 1)))
    display.plot(field_method="streamplot")
    assert display.ax_.get_xlabel() == "x0"


def test_density_keeps_the_names_of_columns(moons):
    frame = pd.DataFrame(moons[0], columns=["time", "y"])
    density = CNFDensity(n_components=1).fit(frame)
    display = show(density, frame, moons[0][:, 0], n_times=2)
    columns = display.frame().columns.tolist()
    assert columns == ["path", "time", "time", "y", "target"]
    assert display.ax_.get_ylabel() == "y"
    # numbers of an estimator that is no regressor
    assert display.colorbar_ is not None


def test_conditional_density_has_a_field_if_all_rows_have_the_same_y():
    X, y = make_moons(220, noise=0.1, random_state=1)
    density = fit(CNFDensity(conditional=True, **FLOW), X, y)
    chosen = y == 1
    display = show(density, X[chosen], y[chosen], n_times=2, grid_resolution=3)
    x = [display.grid[0][2], display.grid[1][1]]
    # a class of its own moves it
    one, other = (density._velocity(0.5, np.array([x]), c) for c in np.eye(2)[:, None])
    np.testing.assert_allclose(display.velocity[1, 2], other[0])
    assert not np.allclose(one, other)
    assert show(density, X, y, n_times=2).velocity is None
    with pytest.raises(ValueError, match="y"):
        show(density, X)


# --- series ---------------------------------------------------------------------------


def test_latent_states_are_paths_of_series(series):
    regressor = fit_latent(series, 2)
    X = series[["time", "series"]]
    display = show(regressor, X, series["y"], grid_resolution=4)
    table = display.frame()
    names = ["path", "time", "latent 0", "latent 1", "target"]
    assert table.columns.tolist() == names
    assert sorted(table["path"].value_counts()) == [20, 30]
    assert (
        table.groupby("path")["time"].apply(lambda t: t.is_monotonic_increasing).all()
    )
    np.testing.assert_allclose(table["target"], np.sin(table["time"]))
    asked = table.rename(columns={"path": "series"})[["time", "series"]]
    states = regressor.trajectory(asked)
    np.testing.assert_allclose(table[["latent 0", "latent 1"]], states, atol=1e-9)
    # nothing leads from one series to the other
    assert len(display.lines_[0].get_segments()) == 48
    assert len(display.ends_[0].get_offsets()) == 2
    assert display.ax_.get_title() == ""


def test_field_of_latent_states_is_what_moves_them(series):
    regressor = fit_latent(series, 2)
    t = np.linspace(2, 2.02, 3)
    X = pd.DataFrame({"time": t, "series": "b"})
    states = regressor.trajectory(X)
    slope = regressor._velocity(states[1:2])[0]
    moved = states[2] - states[0]
    cosine = moved @ slope / np.linalg.norm(moved) / np.linalg.norm(slope)
    assert cosine == pytest.approx(1, abs=1e-4)


def test_dates_are_the_axis_of_a_single_latent_state(series):
    start = pd.Timestamp("2024-01-01")
    frame = series.assign(time=start + pd.to_timedelta(series["time"].round(2), "D"))
    regressor = fit_latent(frame, 1)
    target = frame["y"].where(frame["series"] == "b")
    display = show(regressor, frame[["time", "series"]], target)
    assert display.velocity is None
    first = matplotlib.dates.date2num(start)
    assert first <= display.lines_[0].get_segments()[0][0, 0] <= first + 10
    # where a value is unknown the path is there, too
    assert display.lines_[0].get_array().mask.sum() == 19
    assert display.frame()["time"].dtype.kind == "M"


# --- drawing --------------------------------------------------------------------------


def test_draws_again_into_given_axes(net, moons):
    import matplotlib.pyplot as plt

    display = show(net, *moons, n_times=3)
    figure, ax = plt.subplots()
    styles = {
        "line_kwargs": {"linewidth": 3},
        "end_kwargs": {"s": 40},
        "field_kwargs": {"color": "red"},
    }
    assert display.plot(ax, **styles) is display
    assert display.figure_ is figure and display.ax_ is ax
    assert len(display.lines_) == 2
    assert display.lines_[1].get_linewidth() == [3]
    assert display.ends_[0].get_sizes() == [40]
    assert matplotlib.colors.to_hex(display.field_.get_facecolor()[0]) == "#ff0000"
    display.plot(field_method="streamplot")
    assert type(display.field_).__name__ == "StreamplotSet"
    assert display.plot(field_method=None).field_ is None
    assert display.ax_.get_title() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_times": 1}, "n_times must be an integer >= 2. Got 1"),
        ({"field_time": 1.5}, "field_time must be a number from 0 to 1. Got 1.5"),
        ({"field_time": "start"}, "field_time .* 'start'"),
        ({"grid_resolution": 1}, "grid_resolution must be an integer >= 2. Got 1"),
        ({"margin": -1}, "margin must be a number >= 0. Got -1"),
        ({"margin": np.inf}, "margin must be a number >= 0. Got inf"),
        ({"field_method": "arrows"}, "field_method must be 'quiver'.* Got 'arrows'"),
        ({"y": np.zeros(3)}, "inconsistent numbers of samples"),
        ({"y": np.zeros((60, 2))}, "y should be a 1d array"),
    ],
)
def test_refuses_with_clear_words(net, moons, arguments, message):
    with pytest.raises(ValueError, match=message):
        show(net, moons[0], **arguments)


def test_refuses_estimators_that_are_not_fitted_or_have_no_states(moons):
    with pytest.raises(NotFittedError):
        show(ODENetClassifier(), moons[0])
    other = LogisticRegression().fit(*moons)
    with pytest.raises(TypeError, match=r"CNFDensity.* Got LogisticRegression"):
        show(other, moons[0])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, net, moons):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"sknode\[plot\]"):
        show(net, moons[0])
