"""ODENetClassifier as its users use it."""

import copy
import io
import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn import config_context
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_iris, make_classification, make_moons
from sklearn.ensemble import AdaBoostClassifier, BaggingClassifier
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    cross_val_score,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import ODENetClassifier, ODENetRegressor
from sknode._optimizers import Adam
from sknode.ode import METHODS, SolverError, SolverWarning
from sknode.ode.methods import get_method

SHORT = {"max_iter": 8, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def moons():
    return make_moons(200, noise=0.1, random_state=0)


@pytest.fixture(scope="module")
def fitted(moons):
    return ODENetClassifier(random_state=0).fit(*moons)


# --- learning -----------------------------------------------------------------------


def test_learns_a_curved_boundary(moons, fitted):
    assert fitted.score(*moons) > 0.97


def test_string_labels_come_back(moons):
    X, y = moons
    labels = np.array(["lower", "upper"])[y]
    clf = ODENetClassifier(**SHORT).fit(X, labels)
    assert set(clf.predict(X)) <= {"lower", "upper"}
    assert clf.score(X, labels) > 0.8


@pytest.mark.parametrize(
    "solver", [m for m in METHODS if "discrete" in get_method(m).gradients]
)
def test_every_solver_learns(moons, solver):
    clf = ODENetClassifier(solver=solver, max_iter=30, random_state=0)
    assert clf.fit(*moons).score(*moons) > 0.85


@pytest.mark.parametrize("solver", ["rodas5p", "scipy_dop853", "scipy_radau"])
def test_predicts_by_another_solver(moons, fitted, solver):
    X, _ = moons
    exact = copy.deepcopy(fitted).set_params(rtol=1e-6, atol=1e-6)
    other = copy.deepcopy(exact).set_params(solver=solver)
    np.testing.assert_allclose(
        other.predict_proba(X), exact.predict_proba(X), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("activation", ["softplus", "silu", "elu", "sigmoid", "relu"])
def test_every_activation_learns(moons, activation):
    clf = ODENetClassifier(activation=activation, max_iter=30, random_state=0)
    assert clf.fit(*moons).score(*moons) > 0.8


def test_augmented_dimensions_separate_what_a_flow_cannot():
    # nested rings: a flow in the plane cannot move the inner one out
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 300)
    y = rng.integers(0, 2, 300)
    radius = np.where(y == 1, 2.0, 0.5)
    X = np.c_[radius * np.cos(angle), radius * np.sin(angle)]
    clf = ODENetClassifier(augment_dim=2, random_state=0).fit(X, y)
    assert clf.score(X, y) > 0.98
    assert clf.trajectory(X[:3], n_times=5).shape == (3, 5, 4)


@pytest.mark.parametrize(("n_features", "more"), [(1, 2), (16, 2), (17, 0)])
def test_few_features_get_two_dimensions_more(n_features, more):
    X = np.random.default_rng(0).normal(size=(40, n_features))
    clf = ODENetClassifier(max_iter=1).fit(X, X[:, 0] > 0)
    assert clf.trajectory(X[:2], n_times=2).shape == (2, 2, n_features + more)


def test_gradients_through_the_adjoint_and_through_backpropagation_train_alike(moons):
    one = ODENetClassifier(**SHORT).fit(*moons)
    two = ODENetClassifier(gradient="backprop", **SHORT).fit(*moons)
    np.testing.assert_allclose(one.loss_curve_, two.loss_curve_, rtol=1e-6)


def test_the_penalty_shrinks_the_matrices(moons):
    def norm(alpha):
        long = {"max_iter": 100, "n_iter_no_change": 100, "random_state": 0}
        clf = ODENetClassifier(alpha=alpha, **long).fit(*moons)
        weights = [p.detach() for p in clf.module_.parameters() if p.ndim > 1]
        return float(sum(p.square().sum() for p in weights))

    assert norm(10.0) < 0.1 * norm(0.0)


def test_the_penalty_is_divided_by_the_weight_of_all_rows(moons):
    X, y = moons
    one = ODENetClassifier(alpha=1.0, **SHORT).fit(X, y)
    weight = np.full(len(y), 1000.0)
    two = ODENetClassifier(alpha=1000.0, **SHORT).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(
        one.decision_function(X), two.decision_function(X), rtol=1e-6
    )


def test_the_penalty_of_a_stream_is_that_of_all_its_rows(moons):
    # rows in small portions weigh against the penalty as they do together
    X, y = moons
    whole = ODENetClassifier(alpha=1.0, random_state=0)
    stream = ODENetClassifier(alpha=1.0, random_state=0)
    for _ in range(5):
        whole.partial_fit(X, y, classes=[0, 1])
        for rows in np.split(np.arange(200), 4):
            stream.partial_fit(X[rows], y[rows], classes=[0, 1])
    decays = [
        clf._optimizer_state["param_groups"][0]["penalty"] for clf in (whole, stream)
    ]
    np.testing.assert_allclose(decays, 1.0 / 1000)


def test_no_step_follows_a_gradient_longer_than_one(monkeypatch):
    before, after = [], []
    step = Adam.step
    clip = torch.nn.utils.clip_grad_norm_

    def remember_clip(*args, **kwargs):
        before.append(float(clip(*args, **kwargs)))

    def remember_step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        after.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", remember_clip)
    monkeypatch.setattr(Adam, "step", remember_step)
    X, y = load_iris(return_X_y=True)
    ODENetClassifier(max_iter=20, random_state=0).fit(X, y)
    assert max(before) > 1.0 >= max(after) - 1e-9
    np.testing.assert_allclose(np.minimum(before, 1.0), after, rtol=1e-5)


def test_hidden_units_start_with_unit_gain():
    X = np.random.default_rng(0).normal(size=(50, 30))
    clf = ODENetClassifier(max_iter=1, learning_rate_init=1e-9, random_state=0)
    first = clf.fit(X, X[:, 0] > 0).module_.field.layers[0].weight.detach()
    assert float(first.var() * first.shape[1]) == pytest.approx(1.0, rel=0.1)


# --- fitted attributes and methods --------------------------------------------------


def test_curves_have_an_entry_an_epoch(fitted):
    assert len(fitted.loss_curve_) == len(fitted.nfe_curve_) == fitted.n_iter_
    assert fitted.loss_ == fitted.loss_curve_[-1] < fitted.loss_curve_[0]
    # dopri5: two evaluations to start and six a step
    assert min(fitted.nfe_curve_) >= 8
    assert fitted.validation_scores_ is None


def test_outputs_are_consistent(moons, fitted):
    X, _ = moons
    proba = fitted.predict_proba(X)
    np.testing.assert_allclose(proba.sum(1), 1.0)
    np.testing.assert_allclose(fitted.predict_log_proba(X), np.log(proba))
    decision = fitted.decision_function(X)
    assert decision.shape == (200,)
    np.testing.assert_allclose(decision, np.log(proba[:, 1] / proba[:, 0]))
    np.testing.assert_array_equal(fitted.predict(X), (decision > 0).astype(int))


def test_trajectory_starts_at_the_mapped_features_and_ends_where_predict_reads(
    moons, fitted
):
    X, _ = moons
    path = fitted.trajectory(X, n_times=20)
    # two features and two dimensions more
    assert path.shape == (200, 20, 4)
    np.testing.assert_array_equal(path[:, 0, 2:], 0.0)
    with torch.no_grad():
        start = fitted.module_.initial_state(torch.from_numpy(X))
        logits = fitted.module_.output_map(torch.from_numpy(path[:, -1]))
    np.testing.assert_allclose(path[:, 0], start, rtol=1e-12)
    decision = (logits[:, 1] - logits[:, 0]).numpy()
    np.testing.assert_allclose(decision, fitted.decision_function(X), rtol=1e-12)


def test_a_prediction_has_the_same_bits_in_whatever_company(moons, fitted):
    X, _ = moons
    whole = fitted.decision_function(X)
    for n in (1, 2, 7, 33, 150):
        np.testing.assert_array_equal(fitted.decision_function(X[:n]), whole[:n])
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_array_equal(fitted.decision_function(X[order]), whole[order])


def test_solver_settings_are_read_when_predicting(moons, fitted):
    X, _ = moons
    exact = copy.deepcopy(fitted).set_params(rtol=1e-10, atol=1e-10)
    other = copy.deepcopy(fitted).set_params(solver="dopri8", rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        exact.decision_function(X), other.decision_function(X), rtol=1e-7, atol=1e-9
    )
    assert np.abs(exact.decision_function(X) - fitted.decision_function(X)).max() > 1e-8


# --- reproducibility ----------------------------------------------------------------


def test_same_seed_same_model(moons):
    one, two = (ODENetClassifier(**SHORT).fit(*moons) for _ in range(2))
    np.testing.assert_array_equal(
        one.decision_function(moons[0]), two.decision_function(moons[0])
    )


def test_global_random_states_are_left_alone(moons):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    ODENetClassifier(early_stopping=True, **SHORT).fit(*moons).predict(moons[0])
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_parallel_searches_find_what_serial_ones_do(moons):
    scores = [
        cross_val_score(ODENetClassifier(**SHORT), *moons, cv=2, n_jobs=n)
        for n in (None, 2)
    ]
    np.testing.assert_array_equal(*scores)


# --- weights ------------------------------------------------------------------------


def test_weight_one_is_no_weight(moons):
    X, y = moons
    one = ODENetClassifier(**SHORT).fit(X, y)
    two = ODENetClassifier(**SHORT).fit(X, y, sample_weight=np.ones(len(y)))
    np.testing.assert_array_equal(one.decision_function(X), two.decision_function(X))


def test_rows_without_weight_are_as_good_as_absent(moons):
    X, y = moons
    weight = np.ones(len(y))
    weight[50:] = 0
    one = ODENetClassifier(**SHORT).fit(X, y, sample_weight=weight)
    two = ODENetClassifier(**SHORT).fit(X[:50], y[:50])
    np.testing.assert_array_equal(one.decision_function(X), two.decision_function(X))


@pytest.mark.parametrize("weights", ["balanced", {0: 1.0, 1: 5.0}])
def test_class_weights_are_sample_weights(weights):
    X, y = make_classification(60, weights=[0.8], random_state=0)
    counts = np.bincount(y)
    factors = {0: 1.0, 1: 5.0}
    if weights == "balanced":
        factors = dict(enumerate(len(y) / (2 * counts)))
    by_class = ODENetClassifier(class_weight=weights, **SHORT).fit(X, y)
    sample_weight = np.array([factors[label] for label in y])
    by_sample = ODENetClassifier(**SHORT).fit(X, y, sample_weight=sample_weight)
    np.testing.assert_allclose(
        by_class.decision_function(X), by_sample.decision_function(X), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({0: 1.0, 1: -1.0}, r"not negative.*-1\.0 for class 1"),
        ({0: 1.0, 1: np.nan}, "class_weight.*finite"),
        ({0: np.inf}, "class_weight.*finite"),
        ({0: "2"}, "class_weight.*finite"),
        ({0: 0.0, 1: 0.0}, "class_weight.*positive"),
        ({0: 1.0, "1": 50.0}, r"class_weight has keys \['1'\]"),
    ],
)
def test_class_weights_that_are_none_are_refused(moons, weights, message):
    X, y = moons
    clf = ODENetClassifier(class_weight=weights, **SHORT)
    with pytest.raises(ValueError, match=message):
        clf.fit(X, y)
    with pytest.raises(ValueError, match=message):
        clf.partial_fit(X, y, classes=[0, 1])


def test_class_weights_may_be_of_classes_that_a_part_lacks(moons):
    X, y = moons
    clf = ODENetClassifier(class_weight={0: 1.0, 1: 2.0, 2: 3.0}, **SHORT).fit(X, y)
    assert clf.classes_.tolist() == [0, 1]


def test_class_weights_may_be_of_classes_that_a_batch_lacks(moons):
    X, y = moons
    clf = ODENetClassifier(class_weight={0: 5.0}, warm_start=True, max_iter=1)
    clf.partial_fit(X, y, classes=[0, 1]).partial_fit(X[y == 1], y[y == 1])
    clf.fit(X[y == 1], y[y == 1])
    assert clf.classes_.tolist() == [0, 1]


# --- stopping, continuing -----------------------------------------------------------


def test_early_stopping_names_the_fraction_where_rows_are_too_few():
    X = np.random.default_rng(0).normal(size=(100, 2))
    for n, n_classes in ((100, 50), (1, 1), (2, 2)):
        clf = ODENetClassifier(early_stopping=True, validation_fraction=0.1)
        y = np.arange(n) % n_classes
        if n_classes == 1:
            clf = ODENetRegressor(early_stopping=True)
        with pytest.raises(ValueError, match="validation_fraction"):
            clf.fit(X[:n], y)


def test_early_stopping_restores_the_best_weights(moons):
    X, y = moons
    clf = ODENetClassifier(early_stopping=True, max_iter=60, random_state=0)
    clf.fit(X[:150], y[:150], X_val=X[150:], y_val=y[150:])
    assert len(clf.validation_scores_) == clf.n_iter_
    assert clf.best_validation_score_ == max(clf.validation_scores_)
    assert clf.score(X[150:], y[150:]) == clf.best_validation_score_


def test_early_stopping_holds_out_a_part_by_itself(moons):
    clf = ODENetClassifier(early_stopping=True, max_iter=60, random_state=0)
    clf.fit(*moons)
    # twenty samples were held out: scores are multiples of a twentieth
    np.testing.assert_allclose(np.array(clf.validation_scores_) * 20 % 1, 0, atol=1e-9)


def test_training_stops_when_the_loss_does_not_fall(moons):
    clf = ODENetClassifier(tol=10.0, n_iter_no_change=3, random_state=0).fit(*moons)
    # the first counts as progress, then more than three without, then the ending
    assert clf.n_iter_ == 5 + 3


def test_the_learning_rate_falls_before_max_iter(moons):
    X, y = moons
    settings = {"batch_size": 200, "tol": 0.0, "max_iter": 9, "random_state": 0}
    # with warm_start it does not: training may go on
    on = ODENetClassifier(warm_start=True, **settings).fit(X, y)
    end = ODENetClassifier(**settings).fit(X, y)
    # a third of the epochs, and a loss is that before a step
    assert end.loss_curve_[:7] == on.loss_curve_[:7]
    assert end.loss_curve_[7] != on.loss_curve_[7]
    rates = [e._optimizer_state["param_groups"][0]["lr"] for e in (on, end)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2 / 4])


@pytest.mark.filterwarnings("default")
def test_reaching_max_iter_warns(moons):
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        ODENetClassifier(max_iter=3).fit(*moons)


def test_warm_start_goes_on_with_the_optimizer(moons):
    X, y = moons
    # one batch, so that the order of rows does not matter
    settings = {"batch_size": 200, "tol": 0.0, "random_state": 0}
    once = ODENetClassifier(max_iter=12, warm_start=True, **settings).fit(X, y)
    twice = ODENetClassifier(max_iter=6, warm_start=True, **settings).fit(X, y)
    pickled = pickle.loads(pickle.dumps(twice)).fit(X, y)
    twice.fit(X, y)
    expected = once.decision_function(X)
    np.testing.assert_allclose(twice.decision_function(X), expected, rtol=1e-9)
    np.testing.assert_allclose(pickled.decision_function(X), expected, rtol=1e-9)


def test_partial_fit_learns(moons):
    X, y = moons
    clf = ODENetClassifier(random_state=0)
    for _ in range(40):
        clf.partial_fit(X, y, classes=[0, 1])
    assert clf.n_iter_ == len(clf.loss_curve_) == 40
    assert clf.score(X, y) > 0.9


def test_partial_fit_knows_classes_that_come_later(moons):
    X, y = moons
    clf = ODENetClassifier(random_state=0)
    clf.partial_fit(X[y == 0], y[y == 0], classes=[0, 1])
    clf.partial_fit(X, y)
    assert clf.predict_proba(X).shape == (200, 2)


def test_partial_fit_refuses_what_it_cannot_do(moons):
    X, y = moons
    with pytest.raises(ValueError, match="classes must be passed"):
        ODENetClassifier().partial_fit(X, y)
    with pytest.raises(ValueError, match="early_stopping"):
        ODENetClassifier(early_stopping=True).partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="balanced"):
        ODENetClassifier(class_weight="balanced").partial_fit(X, y, classes=[0, 1])
    clf = ODENetClassifier().partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="not seen before"):
        clf.partial_fit(X, y + 1)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_layer_sizes": 8},
        {"activation": "elu"},
        {"augment_dim": 1},
        {"dtype": "float32"},
        {"image_shape": (1, 2, 1)},
    ],
)
def test_going_on_with_another_network_is_refused(moons, change):
    clf = ODENetClassifier(warm_start=True, **SHORT).fit(*moons)
    clf.set_params(**change)
    for method in (clf.fit, clf.partial_fit):
        with pytest.raises(ValueError, match=f"another value of {next(iter(change))}"):
            method(*moons)
    # the same in other words, and what may change
    clf.set_params(hidden_layer_sizes=[64], activation="silu", augment_dim=2)
    clf.set_params(dtype="float64", image_shape=None, alpha=0.1).fit(*moons)


def test_verbose_prints_a_line_an_epoch(moons, capsys):
    ODENetClassifier(verbose=True, **SHORT).fit(*moons)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all("loss" in line and "evaluations" in line for line in lines)


def test_scikit_learn_callbacks_see_epochs_and_can_stop(moons):
    pytest.importorskip("sklearn.callback", reason="callbacks came with 1.9")

    class StopAfter:
        def __init__(self, n):
            self.n, self.seen, self.losses = n, 0, []

        def setup(self, estimator, context):
            pass

        def teardown(self, estimator, context):
            pass

        def on_fit_task_begin(self, estimator, context):
            pass

        def on_fit_task_end(self, estimator, context, *, metadata, fitted_estimator):
            if context.task_name != "epoch":
                return False
            self.seen += 1
            self.losses.append(metadata["loss"])
            assert fitted_estimator.predict(moons[0]).shape == (200,)
            return self.seen >= self.n

    callback = StopAfter(4)
    clf = ODENetClassifier(random_state=0).set_callbacks(callback).fit(*moons)
    assert clf.n_iter_ == callback.seen == 4
    assert callback.losses == clf.loss_curve_


# --- input --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_precision_follows_the_data(moons, dtype):
    X, y = moons
    clf = ODENetClassifier(**SHORT).fit(X.astype(dtype), y)
    assert clf.predict_proba(X).dtype == dtype
    assert next(clf.module_.parameters()).dtype == getattr(torch, dtype)


def test_precision_can_be_chosen(moons):
    clf = ODENetClassifier(dtype="float32", **SHORT).fit(*moons)
    assert clf.predict_proba(moons[0]).dtype == np.float32


def test_data_frames_bring_feature_names():
    X, y = load_iris(return_X_y=True, as_frame=True)
    clf = ODENetClassifier(**SHORT).fit(X, y)
    assert list(clf.feature_names_in_) == list(X.columns)
    with pytest.raises(ValueError, match="feature names"):
        clf.predict(X[X.columns[::-1]])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_and_offsets_do_not_matter(moons, scale):
    X, y = moons
    one = ODENetClassifier(**SHORT).fit(X, y)
    two = ODENetClassifier(**SHORT).fit(X * scale + 3 * scale, y)
    np.testing.assert_allclose(
        one.decision_function(X),
        two.decision_function(X * scale + 3 * scale),
        rtol=1e-5,
        atol=1e-7,
    )


def test_constant_columns_do_no_harm(moons):
    X, y = moons
    X = np.c_[X, np.full(len(y), 0.1), np.zeros(len(y))]
    assert ODENetClassifier(max_iter=40, random_state=0).fit(X, y).score(X, y) > 0.85


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"solver": "adam"}, "solver"),
        ({"activation": "identity"}, "activation"),
        ({"rtol": -1e-3}, "rtol"),
        ({"rtol": 0}, "rtol"),
        ({"atol": -1e-3}, "atol"),
        ({"max_steps": 0}, "max_steps"),
        ({"gradient": "magic"}, "gradient"),
        ({"hidden_layer_sizes": (0,)}, "hidden_layer_sizes"),
        ({"hidden_layer_sizes": ()}, "hidden_layer_sizes"),
        ({"hidden_layer_sizes": (2.5,)}, "hidden_layer_sizes"),
        ({"learning_rate_init": 0}, "learning_rate_init"),
        ({"batch_size": 0}, "batch_size"),
        ({"augment_dim": -1}, "augment_dim"),
        ({"device": "abacus"}, "device"),
        ({"dtype": "float16"}, "dtype"),
        ({"class_weight": {"a": 1.0}}, "class_weight"),
    ],
)
def test_bad_parameters_are_named(moons, parameters, name):
    with pytest.raises(ValueError, match=name):
        ODENetClassifier(**parameters).fit(*moons)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["x"] * 200, r"'d' \((object|str)\).*OneHotEncoder"),
        (pd.array(["x"] * 200, dtype="string"), r"'d' \(string\).*OneHotEncoder"),
        (pd.Categorical(["x", "y"] * 100), r"'d' \(category\).*OneHotEncoder"),
        (pd.date_range("2020", periods=200), r"'d' \(datetime64.*dates into numbers"),
        (pd.to_timedelta(np.arange(200), "D"), r"'d' \(timedelta64"),
    ],
)
def test_columns_that_are_not_numbers_are_named(moons, fitted, column, message):
    X, y = moons
    frame = pd.DataFrame(X, columns=["a", "b"]).assign(d=column)
    for call in (
        lambda: ODENetClassifier(**SHORT).fit(frame, y),
        lambda: ODENetClassifier(**SHORT).fit(frame[["d"]], y),
        lambda: copy.deepcopy(fitted).predict(frame[["d", "a"]]),
    ):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(ValueError, match=message),
        ):
            call()


@pytest.mark.parametrize(
    "column", [[True, False] * 100, pd.Categorical([1, 2] * 100), [1] * 200]
)
def test_columns_of_other_kinds_of_numbers_are_taken(moons, column):
    X, y = moons
    frame = pd.DataFrame(X, columns=["a", "b"]).assign(d=column).astype({"a": object})
    expected = ODENetClassifier(**SHORT).fit(frame.astype(float), y)
    clf = ODENetClassifier(**SHORT).fit(frame, y)
    np.testing.assert_array_equal(
        clf.predict_proba(frame), expected.predict_proba(frame.astype(float))
    )


@pytest.mark.parametrize("dtype", ["string", "Int64", "category", object])
def test_missing_labels_of_pandas_are_refused(moons, dtype):
    X, y = moons
    labels = pd.Series(y).astype("string" if dtype == "string" else "Int64")
    labels[3] = pd.NA
    with pytest.raises(ValueError, match="y contains NaN"):
        ODENetClassifier(**SHORT).fit(X, labels.astype(dtype))


def test_bad_data_is_refused(moons):
    X, y = moons
    clf = ODENetClassifier(**SHORT)
    for bad in (np.nan, np.inf):
        holed = X.copy()
        holed[3, 1] = bad
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            clf.fit(holed, y)
    with pytest.raises(ValueError, match="Complex data"):
        clf.fit(X + 1j, y)
    with pytest.raises(TypeError, match="TruncatedSVD"):
        clf.fit(sparse.csr_matrix(X), y)
    with pytest.raises(ValueError, match="could not convert"):
        clf.fit(np.full(X.shape, "a", dtype=object), y)
    with pytest.raises(ValueError, match="one class"):
        clf.fit(X, np.zeros(len(y)))
    with pytest.raises(ValueError, match="inconsistent numbers"):
        clf.fit(X, y[:-1])
    with pytest.raises(ValueError, match="Negative"):
        clf.fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match="y_val"):
        clf.fit(X, y, X_val=X)
    with pytest.raises(NotFittedError):
        ODENetClassifier().predict(X)
    with pytest.raises(ValueError, match="n_times"):
        clf.fit(X, y).trajectory(X, n_times=1)


def test_a_tolerance_below_the_precision_is_raised_with_a_warning(moons):
    X, y = moons
    clf = ODENetClassifier(rtol=1e-9, max_iter=2)
    with pytest.warns(UserWarning, match="rtol=1e-09 is below"):
        clf.fit(X.astype("float32"), y)


def test_running_out_of_steps_in_fit_names_the_setting(moons):
    with pytest.raises(SolverError, match="max_steps"):
        ODENetClassifier(max_steps=1, rtol=1e-8, atol=1e-8).fit(*moons)
    # so that a search can go on
    search = GridSearchCV(
        ODENetClassifier(rtol=1e-6, atol=1e-6, **SHORT), {"max_steps": [1, 1000]}, cv=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search tells of the failed fits
        search.fit(*moons)
    assert search.best_params_ == {"max_steps": 1000}


def test_a_refit_that_fails_leaves_the_model_as_it_was(moons):
    X, y = moons
    clf = ODENetClassifier(**SHORT).fit(X, y)
    expected = clf.predict(X)
    with pytest.raises(ValueError, match="only one class"):
        clf.fit(np.hstack([X, X]), np.zeros(len(X)))
    np.testing.assert_array_equal(clf.predict(X), expected)
    clf.set_params(hidden_layer_sizes=())
    with pytest.raises(ValueError, match="hidden_layer_sizes"):
        clf.fit(X, np.array(["a", "b"])[y])
    np.testing.assert_array_equal(clf.predict(X), expected)


def test_a_first_fit_that_fails_leaves_nothing(moons):
    clf = ODENetClassifier(hidden_layer_sizes=())
    parameters = clf.get_params()
    with pytest.raises(ValueError, match="hidden_layer_sizes"):
        clf.fit(*moons)
    assert vars(clf) == parameters


def test_running_out_of_steps_in_predict_warns(fitted, moons):
    X, _ = moons
    clf = copy.deepcopy(fitted)
    expected = clf.decision_function(X)
    clf.set_params(max_steps=1, rtol=1e-8, atol=1e-8)
    with pytest.warns(SolverWarning, match="max_steps"):
        assert np.isfinite(clf.decision_function(X)).all()
    # no more than there are, and by their places in X
    with pytest.warns(SolverWarning, match=r" 1 of 1 samples \(0\) "):
        clf.predict(X[:1])
    many = np.tile(X, (21, 1))
    with pytest.warns(SolverWarning, match=r" 4200 of 4200 samples \(0, 1, 2, 3, 4"):
        clf.predict(many)
    clf.set_params(max_steps=1000, rtol=fitted.rtol, atol=fitted.atol)
    np.testing.assert_array_equal(clf.decision_function(X), expected)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("rtol", -1.0), ("atol", "1"), ("max_steps", 0), ("solver", "euclid")],
)
def test_parameters_are_checked_when_they_are_read_again(
    fitted, moons, parameter, value
):
    clf = copy.deepcopy(fitted).set_params(**{parameter: value})
    with pytest.raises(ValueError, match=f"'{parameter}' parameter of ODENetC"):
        clf.predict(moons[0])


# --- persistence --------------------------------------------------------------------


def roundtrip_skops(clf):
    skops = pytest.importorskip("skops.io")
    data = skops.dumps(clf)
    untrusted = skops.get_untrusted_types(data=data)
    assert all(name.startswith("sknode.") for name in untrusted)
    return skops.loads(data, trusted=untrusted)


def roundtrip_joblib(clf):
    buffer = io.BytesIO()
    joblib.dump(clf, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


@pytest.mark.parametrize(
    "roundtrip",
    [
        lambda clf: pickle.loads(pickle.dumps(clf)),
        roundtrip_joblib,
        roundtrip_skops,
        copy.deepcopy,
    ],
    ids=["pickle", "joblib", "skops", "deepcopy"],
)
def test_survives(roundtrip, fitted, moons):
    again = roundtrip(fitted)
    np.testing.assert_array_equal(
        again.decision_function(moons[0]), fitted.decision_function(moons[0])
    )
    assert joblib.hash(again) == joblib.hash(fitted)


def test_pickles_hold_no_tensors(fitted):
    assert b"torch" not in pickle.dumps(fitted)


# --- meta-estimators ----------------------------------------------------------------


def test_grid_search_over_solver_tolerance_and_size(moons):
    pipeline = Pipeline(
        [("scale", StandardScaler()), ("net", ODENetClassifier(**SHORT))]
    )
    grid = {
        "net__rtol": [1e-2, 1e-4],
        "net__solver": ["tsit5", "rk4"],
        "net__hidden_layer_sizes": [(8,), (16, 16)],
    }
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(*moons)
    assert len(search.cv_results_["params"]) == 8
    assert search.best_score_ > 0.8


def test_successive_halving_over_epochs(moons):
    search = HalvingGridSearchCV(
        ODENetClassifier(random_state=0),
        {"hidden_layer_sizes": [(8,), (16,), (32,)]},
        resource="max_iter",
        min_resources=2,
        max_resources=18,
        cv=2,
        random_state=0,
    )
    assert search.fit(*moons).best_score_ > 0.8


@pytest.mark.parametrize(
    "meta",
    [
        lambda clf: CalibratedClassifierCV(clf, cv=2),
        lambda clf: AdaBoostClassifier(clf, n_estimators=2, random_state=0),
        lambda clf: BaggingClassifier(clf, n_estimators=2, random_state=0),
    ],
    ids=["CalibratedClassifierCV", "AdaBoostClassifier", "BaggingClassifier"],
)
def test_works_inside(meta, moons):
    model = meta(ODENetClassifier(**SHORT)).fit(*moons)
    assert model.score(*moons) > 0.8


def test_works_frozen(fitted, moons):
    calibrated = CalibratedClassifierCV(FrozenEstimator(fitted)).fit(*moons)
    assert calibrated.score(*moons) > 0.95


def test_validation_data_and_weights_are_routed(moons):
    X, y = moons
    with config_context(enable_metadata_routing=True):
        clf = ODENetClassifier(**SHORT).set_fit_request(
            sample_weight=True, X_val=True, y_val=True
        )
        pipeline = Pipeline(
            [
                ("scale", StandardScaler().set_fit_request(sample_weight=True)),
                ("net", clf),
            ],
            transform_input=["X_val"],
        )
        pipeline.fit(
            X[:150],
            y[:150],
            sample_weight=np.ones(150),
            X_val=X[150:],
            y_val=y[150:],
        )
    assert len(pipeline["net"].validation_scores_) == 8
    score = pipeline.score(X[150:], y[150:])
    assert score == pipeline["net"].best_validation_score_


def test_output_of_a_pipeline_can_be_pandas(moons):
    X = pd.DataFrame(moons[0], columns=["one", "two"])
    model = make_pipeline(StandardScaler(), ODENetClassifier(**SHORT))
    model.set_output(transform="pandas").fit(X, moons[1])
    assert list(model[-1].feature_names_in_) == ["one", "two"]


def test_nothing_warns_in_ordinary_use(moons):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ODENetClassifier(random_state=0).fit(*moons).predict_proba(moons[0])
