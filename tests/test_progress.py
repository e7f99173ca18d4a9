"""Progress of long fits: lines an epoch, and scikit-learn's callbacks."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_moons
from sklearn.exceptions import ConvergenceWarning

from sknode import (
    CNFDensity,
    LatentODEImputer,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
    _compat,
)
from sknode._training import History, Recipe, format_duration, report

RECIPE = Recipe(
    max_iter=120,
    batch_size=8,
    learning_rate=0.01,
    alpha=0.0,
    tol=0.0,
    n_iter_no_change=5,
    verbose=True,
)


def quietly(fit, *data):
    """Fit for a few epochs, which is too few to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit(*data)


@pytest.fixture(scope="module")
def moons():
    return make_moons(220, noise=0.1, random_state=0)


@pytest.fixture(scope="module")
def series():
    t = np.linspace(0, 10, 60)
    return t[:, None], np.sin(t)


SMALL = {"hidden_layer_sizes": 4, "max_iter": 3, "random_state": 0}
LATENT = {**SMALL, "latent_dim": 2, "rnn_hidden_size": 4}
ESTIMATORS = [
    ODENetClassifier(**SMALL),
    ODENetRegressor(**SMALL),
    CNFDensity(n_components=1, early_stopping=False, **SMALL),
    LatentODERegressor(early_stopping=False, **LATENT),
    LatentODEImputer(early_stopping=False, **LATENT),
]


def data_for(estimator, moons, series):
    if isinstance(estimator, LatentODERegressor):
        return series
    if isinstance(estimator, LatentODEImputer):
        t, x = series
        x = np.where(np.arange(len(x)) % 5 == 0, np.nan, x)
        return (np.column_stack([t, x]),)
    return moons


# --- lines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3660, "1 h 01 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text


def test_line_has_loss_score_evaluations_and_the_time_left(capsys):
    history = History([0.9, 0.5], [20.0, 26.5], [0.7, 0.8], seconds=[3.0, 1.0])
    report(RECIPE, history)
    assert capsys.readouterr().out == (
        "epoch   2/120  loss 0.500000  evaluations 26.5  validation score 0.8000"
        "  1.00 s  at most 3 min 56 s left\n"
    )


def test_time_left_is_estimated_by_epochs_of_late(capsys):
    history = History([0.5] * 20, [20.0] * 20, seconds=[100.0] * 10 + [0.1] * 10)
    report(RECIPE, history)
    assert capsys.readouterr().out.endswith("  0.10 s  at most 10 s left\n")


def test_time_left_is_certain_once_the_learning_rate_falls(capsys):
    history = History([0.5] * 9, [20.0] * 9, seconds=[2.0] * 9, fall=7, fallen=1)
    report(RECIPE, history)
    assert capsys.readouterr().out.endswith("2.00 s  12 s left\n")


@pytest.mark.parametrize("fall", [0, 3])
def test_nothing_is_left_after_the_last_epoch(capsys, fall):
    history = History([0.5] * 5, [20.0] * 5, seconds=[2.0] * 5, fall=fall, fallen=fall)
    report(replace(RECIPE, max_iter=5), history)
    assert capsys.readouterr().out.endswith("2.00 s\n")


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_estimators_count_epochs_down(estimator, moons, series, capsys):
    estimator = clone(estimator).set_params(verbose=True)
    quietly(estimator.fit, *data_for(estimator, moons, series))
    lines = capsys.readouterr().out.splitlines()
    parts = ["refine: ", "flow: "] if isinstance(estimator, CNFDensity) else [""]
    expected = [f"{part}epoch {i}/3" for part in parts for i in (1, 2, 3)]
    assert [re.match(r".*epoch \d/3", line).group() for line in lines] == expected
    # what follows max_iter is nothing, and before there is always something
    left = [line.endswith(" left") for line in lines]
    assert left == [True, True, False] * len(parts)


def test_nothing_is_printed_unless_asked_for(moons, capsys):
    quietly(ODENetClassifier(**SMALL).fit, *moons)
    assert capsys.readouterr().out == ""


# --- callbacks ------------------------------------------------------------------------


class Recorder:
    """Keeps what scikit-learn tells of a fit."""

    def setup(self, estimator, context):
        self.n_epochs, self.metadata, self.ended = None, [], []

    def teardown(self, estimator, context):
        self.ended.append("torn down")

    def on_fit_task_begin(self, estimator, context):
        if context.parent is None:
            self.n_epochs = context.max_subtasks

    def on_fit_task_end(self, estimator, context, *, metadata):
        if context.task_name == "epoch":
            self.metadata.append(metadata)
        else:
            self.ended.append(context.task_name)


@pytest.fixture
def callbacks():
    return pytest.importorskip("sklearn.callback", reason="callbacks came with 1.9")


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_callbacks_are_told_of_every_epoch(callbacks, estimator, moons, series):
    recorder = Recorder()
    estimator = clone(estimator).set_callbacks(recorder)
    quietly(estimator.fit, *data_for(estimator, moons, series))
    # the bar is full when all parts have had all their epochs
    assert recorder.n_epochs == len(recorder.metadata) == len(estimator.loss_curve_)
    assert [m["loss"] for m in recorder.metadata] == estimator.loss_curve_
    assert [m["nfe"] for m in recorder.metadata] == estimator.nfe_curve_
    assert recorder.ended == ["fit", "torn down"]


def test_callbacks_are_told_the_validation_score(callbacks, moons):
    recorder = Recorder()
    clf = ODENetClassifier(early_stopping=True, **SMALL).set_callbacks(recorder)
    quietly(clf.fit, *moons)
    scores = [m["validation_score"] for m in recorder.metadata]
    assert scores == clf.validation_scores_
    quietly(clf.set_params(early_stopping=False).fit, *moons)
    assert [m["validation_score"] for m in recorder.metadata] == [None] * 3


def test_density_without_a_refinement_has_half_of_the_epochs(callbacks, moons):
    recorder = Recorder()
    density = CNFDensity(n_components=1, early_stopping=False, refine=False, **SMALL)
    quietly(density.set_callbacks(recorder).fit, moons[0])
    assert recorder.n_epochs == len(recorder.metadata) == 3


def test_progress_bar_of_scikit_learn_gets_full(callbacks, moons, capsys):
    clf = ODENetClassifier(**SMALL).set_callbacks(callbacks.ProgressBar())
    quietly(clf.fit, *moons)
    out = capsys.readouterr().out
    assert "ODENetClassifier - fit" in out and "100%" in out


def test_fit_works_where_scikit_learn_has_no_callbacks(moons):
    source = Path(_compat.__file__).read_text(encoding="utf-8")
    # as with a version that lacks the module
    source = source.replace("sklearn.callback", "sklearn.no_such_module")
    names = {}
    exec(compile(source, _compat.__file__, "exec"), names)

    class Old(names["CallbackSupportMixin"], ODENetClassifier):
        pass

    clf = quietly(Old(**SMALL).fit, *moons)
    assert clf.n_iter_ == 3
    assert Old._init_callback_context.__module__ != "sklearn.callback"
    assert not hasattr(clf, "_callback_fit_ctx")
