"""Pictures of what tolerances cost and gain: numbers, axes, and what is refused."""

import copy
import pickle
import sys
import warnings

import numpy as np
import pytest
from sklearn.datasets import make_moons
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import CNFDensity, LatentODERegressor, ODENetClassifier, ODENetRegressor
from sknode.ode import SolverWarning
from sknode.plotting import ToleranceDisplay, tolerance

SMALL = {"hidden_layer_sizes": 8, "max_iter": 3, "random_state": 0}
FLOW = {**SMALL, "n_components": 2, "early_stopping": False}
RTOLS = (1e-2, 1e-4, 1e-6)
COLUMNS = ["rtol", "atol", "evaluations", "seconds", "error", "max_error", "score"]
show = ToleranceDisplay.from_estimator


def fit(estimator, *data):
    """Fit for a few epochs, which is too few to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(*data)


@pytest.fixture(scope="module")
def moons():
    return make_moons(220, noise=0.1, random_state=0)


@pytest.fixture(scope="module")
def net(moons):
    return fit(ODENetClassifier(rtol=1e-3, atol=1e-5, **SMALL), *moons)


def with_tolerance(estimator, rtol, atol):
    return copy.deepcopy(estimator).set_params(rtol=rtol, atol=atol)


def test_table_is_what_the_estimator_says_at_every_tolerance(net, moons):
    X, y = moons
    table = show(net, X, y, rtols=RTOLS).frame()
    assert table.columns.tolist() == COLUMNS
    # in whatever order they come; the ratio is that of the estimator
    np.testing.assert_allclose(table["rtol"], RTOLS[::-1])
    np.testing.assert_allclose(table["atol"], np.array(RTOLS[::-1]) / 100)
    exact = with_tolerance(net, 1e-11, 1e-13).predict_proba(X)
    for row in table.itertuples():
        same = with_tolerance(net, row.rtol, row.atol)
        assert row.evaluations == same.count_evaluations(X).mean()
        assert row.score == same.score(X, y)
        error = same.predict_proba(X) - exact
        assert row.error == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-2)
        assert row.max_error == pytest.approx(np.abs(error).max(), rel=1e-2)
    assert (table["seconds"] > 0).all()
    assert (np.diff(table["evaluations"]) < 0).all()
    assert (np.diff(table["error"]) > 0).all()


def test_estimator_stays_as_it_is(net, moons):
    before, module = pickle.dumps(net), net.module_
    show(net, *moons, rtols=RTOLS[:1])
    assert pickle.dumps(net) == before and net.module_ is module


def test_regressor_is_judged_by_its_predictions(moons):
    X, y = moons
    net = fit(ODENetRegressor(**SMALL), X, 100.0 * y)
    table = show(net, X, rtols=[1e-2, 1e-6]).frame()
    assert "score" not in table
    loose = with_tolerance(net, 1e-2, 1e-2 * net.atol / net.rtol).predict(X)
    exact = with_tolerance(net, 1e-12, 1e-12).predict(X)
    error = np.abs(loose - exact).max()
    assert table["max_error"].iloc[-1] == pytest.approx(error, rel=1e-2)


def test_density_is_judged_by_its_logarithm(moons):
    X, _ = moons
    density = fit(CNFDensity(bounds={0: (X[:, 0].min() - 1e-9, None)}, **FLOW), X)
    X = np.vstack([X, [[-9.0, 0.0]]])  # where there is no density
    display = show(density, X, rtols=RTOLS)
    table = display.frame()
    loose = with_tolerance(density, 1e-2, 1e-2 * density.atol / density.rtol)
    assert table["evaluations"].iloc[-1] == loose.count_evaluations(X).mean()
    gap = loose.score_samples(X[:-1]) - with_tolerance(
        density, 1e-11, 1e-11
    ).score_samples(X[:-1])
    assert table["max_error"].iloc[-1] == pytest.approx(np.abs(gap).max(), rel=1e-2)
    assert (np.diff(table["error"]) > 0).all()
    assert (table["score"] == -np.inf).all()


def test_conditional_density_needs_y(moons):
    X, y = moons
    density = fit(CNFDensity(conditional=True, **FLOW), X, y)
    table = show(density, X, y, rtols=RTOLS).frame()
    np.testing.assert_allclose(table["score"], density.score(X, y), atol=0.05)
    assert (np.diff(table["evaluations"]) < 0).all()
    with pytest.raises(ValueError, match="y"):
        show(density, X)


def test_density_without_networks_costs_nothing(moons):
    density = CNFDensity(n_components=1).fit(moons[0][:50])
    display = show(density, moons[0], rtols=RTOLS)
    assert not display.evaluations.any() and not display.error.any()
    # no logarithm of nothing
    scales = [ax.get_yscale() for ax in display.axes_]
    assert scales == ["linear", "log", "linear", "linear"]
    assert not display.lines_["error"].get_ydata().any()
    display.figure_.canvas.draw()


def test_single_precision_is_judged_by_double_precision(moons):
    X, y = moons
    net = fit(ODENetRegressor(dtype="float32", **SMALL), X, y)
    table = show(net, X, rtols=[1e-6]).frame()
    # with a reference of its own precision, the error would be less
    assert 1e-9 < table["max_error"][0] < 1e-4
    with pytest.warns(match="below what torch.float32 can carry"):
        show(net, X, rtols=[1e-9], n_repeats=1)


def test_series_have_no_evaluations_but_all_else():
    t = np.linspace(0, 10, 60)
    regressor = LatentODERegressor(
        latent_dim=2, rnn_hidden_size=4, early_stopping=False, residual=None, **SMALL
    )
    regressor = fit(regressor, t[:, None], np.sin(t))
    display = show(regressor, t[:, None], np.sin(t), rtols=[1e-1, 1e-6], n_repeats=1)
    columns = [name for name in COLUMNS if name != "evaluations"]
    assert display.frame().columns.tolist() == columns
    assert display.max_error[0] < display.max_error[1]
    assert len(display.axes_) == 3


def test_last_step_of_a_pipeline(moons):
    X, y = moons
    pipeline = make_pipeline(StandardScaler(), ODENetClassifier(**SMALL))
    pipeline = fit(pipeline, X, y)
    table = show(pipeline, X, y, rtols=RTOLS).frame()
    rows = pipeline[0].transform(X)
    expected = show(pipeline[-1], rows, y, rtols=RTOLS).frame()
    assert table.drop(columns="seconds").equals(expected.drop(columns="seconds"))


def test_seconds_are_the_median(net, moons, monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 8.0, 8.0, 10.0])
    monkeypatch.setattr(tolerance.time, "perf_counter", lambda: next(clock))
    assert show(net, moons[0], rtols=[1e-3], n_repeats=3).seconds == [2.0]


def test_reference_may_take_more_steps(net, moons):
    # as many as the loose tolerance needs, and too few for the reference
    few = copy.deepcopy(net).set_params(max_steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SolverWarning)
        assert show(few, moons[0], rtols=[1e-2]).error < 1e-1
    with pytest.warns(SolverWarning):
        show(few.set_params(max_steps=1), moons[0], rtols=[1e-2])


def test_lines_are_on_logarithmic_axes(net, moons):
    display = show(net, *moons, rtols=RTOLS, linewidth=3)
    assert [ax.get_ylabel() for ax in display.axes_] == [
        "evaluations",
        "seconds",
        "error",
        "score",
    ]
    assert [ax.get_yscale() for ax in display.axes_] == ["log"] * 3 + ["linear"]
    assert {ax.get_xscale() for ax in display.axes_} == {"log"}
    assert list(display.lines_) == COLUMNS[2:]
    for name, line in display.lines_.items():
        np.testing.assert_array_equal(line.get_xdata(), display.rtol)
        np.testing.assert_array_equal(line.get_ydata(), display.frame()[name])
        assert line.get_linewidth() == 3
    dotted = display.axes_[0].lines[-1]
    assert dotted.get_xdata() == [1e-3, 1e-3]


def test_draws_again_into_given_axes(net, moons):
    import matplotlib.pyplot as plt

    display = show(net, moons[0], rtols=RTOLS)
    figure, axes = plt.subplots(1, 3)
    assert display.plot(axes) is display
    assert display.figure_ is figure and display.ax_ is axes[-1]
    with pytest.raises(
        ValueError, match=r"3 axes: evaluations, seconds, error\. Got 1"
    ):
        display.plot(axes[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtols": []}, r"rtols must be one or more positive numbers. Got \[\]"),
        ({"rtols": [1e-3, 0]}, "rtols must be .* Got"),
        ({"rtols": [np.nan]}, r"rtols must be .*\[nan\]"),
        ({"rtols": ["tight"]}, "rtols must be .*'tight'"),
        ({"rtols": 1e-3}, "rtols must be .* Got 0.001"),
        ({"n_repeats": 0}, "n_repeats must be an integer >= 1. Got 0"),
    ],
)
def test_refuses_with_clear_words(net, moons, arguments, message):
    with pytest.raises(ValueError, match=message):
        show(net, moons[0], **arguments)


def test_refuses_estimators_without_tolerances(net, moons):
    with pytest.raises(NotFittedError):
        show(ODENetClassifier(), moons[0])
    other = LogisticRegression().fit(*moons)
    with pytest.raises(TypeError, match=r"CNFDensity.* Got LogisticRegression"):
        show(other, moons[0])
    constant = copy.deepcopy(net).set_params(solver="rk4")
    with pytest.raises(ValueError, match="'rk4' is a matter of step_size"):
        show(constant, moons[0])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, net, moons):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"sknode\[plot\]"):
        show(net, moons[0])
