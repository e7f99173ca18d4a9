"""ODENetRegressor as its users use it."""

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
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import make_friedman1
from sklearn.ensemble import AdaBoostRegressor, BaggingRegressor, StackingRegressor
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sknode import ODENetRegressor
from sknode.ode import SolverError, SolverWarning

SHORT = {"max_iter": 8, "random_state": 0}
# Flows on a line are monotone, a sine is not: it takes more dimensions.
WIDE = {
    "augment_dim": 2,
    "learning_rate_init": 3e-2,
    "max_iter": 40,
    "tol": 1e-4,
    "random_state": 0,
}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def sine():
    X = np.random.default_rng(0).uniform(-3, 3, (120, 1))
    return X, np.sin(X[:, 0])


@pytest.fixture(scope="module")
def plane():
    X = np.random.default_rng(1).normal(size=(100, 3))
    return X, X @ [1.0, -2.0, 0.5]


@pytest.fixture(scope="module")
def fitted(sine):
    return ODENetRegressor(**WIDE).fit(*sine)


# --- learning -----------------------------------------------------------------------


def test_a_flow_on_a_line_learns_only_what_is_monotone(sine):
    X = np.sort(sine[0], axis=0)
    reg = ODENetRegressor(augment_dim=0, max_iter=40, random_state=0)
    reg.fit(X, np.sin(X[:, 0]))
    # as the flow is, not its solution by the loose steps of the training
    reg.set_params(rtol=1e-8, atol=1e-8)
    slopes = np.diff(reg.predict(X))
    assert (slopes >= -1e-6).all() or (slopes <= 1e-6).all()


def test_learns_a_sine_and_interpolates_it(fitted):
    between = np.linspace(-2.8, 2.8, 50)[:, None]
    assert fitted.score(between, np.sin(between[:, 0])) > 0.98


def test_learns_friedmans_function_beyond_its_linear_part():
    X, y = make_friedman1(400, noise=0.5, random_state=0)
    reg = ODENetRegressor(max_iter=60, random_state=0).fit(X[:300], y[:300])
    linear = Ridge().fit(X[:300], y[:300]).score(X[300:], y[300:])
    assert reg.score(X[300:], y[300:]) > max(0.85, linear + 0.05)


def test_the_loss_is_half_the_mean_square_of_standardised_residuals(sine):
    X, y = sine
    reg = ODENetRegressor(learning_rate_init=1e-12, max_iter=1, random_state=0)
    reg.fit(X, y)
    residuals = (reg.predict(X) - y) / y.std()
    assert reg.loss_ == pytest.approx(0.5 * np.mean(residuals**2), rel=1e-6)


# --- shapes and units of targets ----------------------------------------------------


@pytest.mark.parametrize("shape", [(120,), (120, 1), (120, 3)])
def test_predictions_have_the_shape_of_the_targets(sine, shape):
    X, y = sine
    y = y.reshape(-1, 1) * [1.0, 2.0, 3.0] if shape[-1] == 3 else y.reshape(shape)
    reg = ODENetRegressor(**SHORT).fit(X, y)
    assert reg.predict(X).shape == shape
    assert reg.y_mean_.shape == reg.y_scale_.shape == shape[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reg.predict(X[:1]).shape == (1, *shape[1:])


def test_a_column_is_the_same_as_a_vector(sine):
    X, y = sine
    one = ODENetRegressor(**SHORT).fit(X, y)
    two = ODENetRegressor(**SHORT).fit(X, y[:, None])
    np.testing.assert_array_equal(one.predict(X), two.predict(X)[:, 0])


def test_several_targets_are_not_confused(sine):
    X, y = sine
    targets = np.c_[y, 100 + 50 * np.cos(X[:, 0]), np.abs(X[:, 0])]
    predicted = ODENetRegressor(**WIDE).fit(X, targets).predict(X)
    scores = r2_score(targets, predicted, multioutput="raw_values")
    assert scores.min() > 0.9


def test_targets_in_a_data_frame(sine):
    X, y = sine
    frame = pd.DataFrame({"a": y, "b": -y})
    one = ODENetRegressor(**SHORT).fit(X, frame).predict(X)
    two = ODENetRegressor(**SHORT).fit(X, frame.to_numpy()).predict(X)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("offset", "scale"), [(0.0, 1e-6), (1e6, 1.0), (-3e-6, 1e-6), (5.0, 1e6)]
)
def test_units_of_the_targets_do_not_matter(sine, offset, scale):
    X, y = sine
    plain = ODENetRegressor(**SHORT).fit(X, y).predict(X)
    other = ODENetRegressor(**SHORT).fit(X, offset + scale * y).predict(X)
    np.testing.assert_allclose((other - offset) / scale, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
def test_a_constant_target_is_predicted(plane, constant):
    X, _ = plane
    y = np.full(len(X), constant)
    reg = ODENetRegressor(random_state=0).fit(X, y)
    assert reg.y_scale_ == 1.0
    np.testing.assert_allclose(reg.predict(X), y, rtol=1e-12)


def test_a_constant_target_leaves_the_others_alone(sine):
    X, y = sine
    reg = ODENetRegressor(**WIDE).fit(X, np.c_[np.full(len(y), 0.1), 1e6 * y])
    assert r2_score(1e6 * y, reg.predict(X)[:, 1]) > 0.9
    assert reg.y_scale_[0] == 1.0


def test_constants_are_recognised_in_many_rows():
    rng = np.random.default_rng(0)
    X = np.c_[rng.normal(size=20_000), np.full(20_000, 0.1)]
    reg = ODENetRegressor(hidden_layer_sizes=2, max_iter=1, solver="euler")
    reg.fit(X, X)
    assert reg.y_scale_[1] == 1.0
    assert reg.module_.scale[1] == 1.0
    # and what varies a little in single precision is not taken for one
    X = (1e3 + rng.normal(size=(20_000, 1))).astype(np.float32)
    reg.fit(X, X)
    assert reg.module_.scale[0] == pytest.approx(1.0, rel=0.05)
    assert reg.module_.scale[0] != 1.0


def test_integers_and_booleans_are_targets_too(plane):
    X, y = plane
    for dtype in (int, bool):
        counts = (3 * y).astype(dtype)
        one = ODENetRegressor(**SHORT).fit(X, counts).predict(X)
        two = ODENetRegressor(**SHORT).fit(X, counts.astype(float)).predict(X)
        np.testing.assert_array_equal(one, two)


# --- weights ------------------------------------------------------------------------


def test_weight_one_is_no_weight(sine):
    X, y = sine
    one = ODENetRegressor(**SHORT).fit(X, y)
    two = ODENetRegressor(**SHORT).fit(X, y, sample_weight=np.ones(len(y)))
    np.testing.assert_array_equal(one.predict(X), two.predict(X))


@pytest.mark.parametrize("size", [1e-310, 1e-50, 1e50, 1e308])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_may_be_tiny_or_huge(sine, size, dtype):
    X, y = sine
    weight = np.full(len(y), size)
    reg = ODENetRegressor(dtype=dtype, early_stopping=True, **SHORT)
    reg.fit(X, y, sample_weight=weight)
    # alpha counts against the sum of the losses
    unpenalised = copy.deepcopy(reg).set_params(alpha=0.0).fit(X, y)
    expected = np.full(len(y), y.mean()) if size < 1 else unpenalised.predict(X)
    np.testing.assert_allclose(reg.predict(X), expected, atol=0.3 if size < 1 else 1e-3)


def test_rows_without_weight_are_as_good_as_absent(sine):
    X, y = sine
    weight = np.ones(len(y))
    weight[50:] = 0
    y = np.where(weight > 0, y, 1e9)
    one = ODENetRegressor(**SHORT).fit(X, y, sample_weight=weight)
    two = ODENetRegressor(**SHORT).fit(X[:50], y[:50])
    np.testing.assert_array_equal(one.predict(X), two.predict(X))


@pytest.mark.parametrize(
    "penalties", [{}, {"kinetic_penalty": 0.1, "jacobian_penalty": 0.1}]
)
def test_a_weight_of_two_is_a_row_twice(penalties):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    weight = rng.integers(1, 3, 20)
    settings = {"max_iter": 20, "tol": 0.0, "random_state": 0, **penalties}
    one = ODENetRegressor(batch_size=20, **settings)
    one.fit(X, y, sample_weight=weight)
    two = ODENetRegressor(batch_size=weight.sum(), **settings)
    two.fit(np.repeat(X, weight, 0), np.repeat(y, weight, 0))
    np.testing.assert_allclose(one.predict(X), two.predict(X), rtol=1e-7)
    np.testing.assert_allclose(one.loss_curve_, two.loss_curve_, rtol=1e-9)
    unweighted = ODENetRegressor(batch_size=20, **settings).fit(X, y)
    assert np.abs(one.predict(X) - unweighted.predict(X)).max() > 1e-3


# --- stopping, continuing -----------------------------------------------------------


def test_early_stopping_keeps_the_weights_with_the_best_r2(sine):
    X, y = sine
    reg = ODENetRegressor(early_stopping=True, max_iter=30, random_state=0)
    reg.fit(X[:80], y[:80], X_val=X[80:], y_val=y[80:])
    assert len(reg.validation_scores_) == reg.n_iter_
    assert reg.best_validation_score_ == max(reg.validation_scores_)
    assert reg.score(X[80:], y[80:]) == reg.best_validation_score_


def test_validation_data_are_named_in_errors(sine):
    X, y = sine
    reg, hole = ODENetRegressor(**SHORT), np.full(1, np.nan)
    for X_val, y_val, message in [
        (np.vstack([X, [hole]]), np.append(y, 0), "X_val contains NaN"),
        (np.vstack([X, [[0]]]), np.append(y, hole), "y_val contains NaN"),
        (np.hstack([X, X]), y, "X_val has 2 features"),
        (pd.DataFrame({"a": ["x"] * len(X)}), y, "X_val must have columns of numbers"),
        (X, np.stack([y, y], 1), r"y_val must have shape \(n_samples,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            reg.fit(X, y, X_val=X_val, y_val=y_val)


def test_validation_weights_count(sine):
    X, y = sine
    weight = np.random.default_rng(0).uniform(0, 2, 40)
    reg = ODENetRegressor(**SHORT).fit(
        X[:80], y[:80], X_val=X[80:], y_val=y[80:], sample_weight_val=weight
    )
    assert reg.score(X[80:], y[80:], weight) == reg.best_validation_score_
    assert reg.score(X[80:], y[80:]) != reg.best_validation_score_


def test_early_stopping_holds_out_a_part_by_itself(sine):
    X, y = sine
    one = ODENetRegressor(early_stopping=True, **SHORT).fit(X, y)
    assert len(one.validation_scores_) == one.n_iter_
    # a tenth of the rows is not in the training: the standardisation tells
    assert one.y_mean_ != y.mean()


def test_one_row_is_too_little_for_r2(sine):
    X, y = sine
    with pytest.raises(ValueError, match="validation_fraction"):
        ODENetRegressor(early_stopping=True, **SHORT).fit(X[:10], y[:10])
    with pytest.raises(ValueError, match="X_val"):
        ODENetRegressor(**SHORT).fit(X, y, X_val=X[:1], y_val=y[:1])
    weight = np.eye(3)[0]
    with pytest.raises(ValueError, match="X_val"):
        ODENetRegressor(**SHORT).fit(
            X, y, X_val=X[:3], y_val=y[:3], sample_weight_val=weight
        )


def test_warm_start_goes_on_with_the_optimizer(sine):
    X, y = sine
    # one batch, so that the order of rows does not matter
    settings = {"batch_size": len(y), "tol": 0.0, "random_state": 0}
    once = ODENetRegressor(max_iter=12, warm_start=True, **settings).fit(X, y)
    twice = ODENetRegressor(max_iter=6, warm_start=True, **settings).fit(X, y)
    again = pickle.loads(pickle.dumps(twice)).fit(X, y)
    twice.fit(X, y)
    np.testing.assert_allclose(twice.predict(X), once.predict(X), rtol=1e-9)
    np.testing.assert_allclose(again.predict(X), once.predict(X), rtol=1e-9)


def test_the_first_call_decides_the_units_of_the_targets(sine):
    X, y = sine
    for method in ("fit", "partial_fit"):
        reg = ODENetRegressor(warm_start=True, **SHORT)
        getattr(reg, method)(X, y)
        mean, scale = reg.y_mean_.copy(), reg.y_scale_.copy()
        getattr(reg, method)(X, 10 + 5 * y)
        assert (reg.y_mean_, reg.y_scale_) == (mean, scale)


def test_partial_fit_follows_a_shift_of_the_targets(sine):
    X, y = sine
    reg = ODENetRegressor(random_state=0)
    for _ in range(30):
        reg.partial_fit(X, y)
    assert reg.n_iter_ == len(reg.loss_curve_) == len(reg.nfe_curve_) == 30
    assert reg.score(X, y) > 0.8
    before = reg.score(X, y + 1)
    for _ in range(30):
        reg.partial_fit(X, y + 1)
    assert reg.score(X, y + 1) > max(before, 0.8)


@pytest.mark.parametrize("shapes", [((40,), (40, 2)), ((40, 2), (40, 3))])
def test_targets_of_another_shape_are_refused(plane, shapes):
    X = plane[0][:40]
    first, second = (np.random.default_rng(0).normal(size=s) for s in shapes)
    expected = "y must have shape"
    with pytest.raises(ValueError, match=expected):
        ODENetRegressor(warm_start=True, **SHORT).fit(X, first).fit(X, second)
    reg = ODENetRegressor(**SHORT).partial_fit(X, first)
    with pytest.raises(ValueError, match=expected):
        reg.partial_fit(X, second)
    with pytest.raises(ValueError, match="y_val must have shape"):
        ODENetRegressor(**SHORT).fit(X, first, X_val=X, y_val=second)
    # a new fit starts anew
    assert reg.fit(X, second).predict(X).shape == second.shape


# --- reproducibility and precision --------------------------------------------------


def test_same_seed_same_model_and_another_seed_another(sine):
    X, y = sine
    one, two, three = (
        ODENetRegressor(max_iter=3, random_state=seed).fit(X, y).predict(X)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_global_random_states_are_left_alone(sine, penalty):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    reg = ODENetRegressor(early_stopping=True, jacobian_penalty=penalty, **SHORT)
    pickle.loads(pickle.dumps(reg.fit(*sine))).predict(sine[0])
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", [(), (2,)])
def test_precision_follows_the_data(sine, dtype, columns):
    X, y = sine
    y = np.broadcast_to(y.reshape(-1, *(1 for _ in columns)), (len(y), *columns))
    reg = ODENetRegressor(**SHORT).fit(X.astype(dtype), y.astype(dtype))
    assert reg.predict(X).dtype == reg.predict(X.astype("float32")).dtype == dtype


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_single_precision_sees_what_is_far_from_zero(plane, penalty):
    X, y = plane
    reg = ODENetRegressor(max_iter=20, random_state=0, kinetic_penalty=penalty)
    near = reg.set_params(dtype="float32").fit(X, y).predict(X)
    for copied in (reg.fit(X + 1e9, 1e9 + 10 * y), pickle.loads(pickle.dumps(reg))):
        far = copied.predict(X + 1e9)
        assert far.dtype == np.float64
        np.testing.assert_allclose((far - 1e9) / 10, near, atol=1e-3)


def test_a_prediction_has_the_same_bits_in_whatever_company(fitted, sine):
    X, _ = sine
    whole = fitted.predict(X)
    for n in (1, 2, 7, 33):
        np.testing.assert_array_equal(fitted.predict(X[:n]), whole[:n])


def test_the_tolerance_is_read_when_predicting(fitted, sine):
    X, _ = sine
    loose = fitted.predict(X)
    exact, other = (
        copy.deepcopy(fitted).set_params(solver=solver, rtol=1e-10, atol=1e-10)
        for solver in ("dopri5", "dopri8")
    )
    exact = exact.predict(X)
    np.testing.assert_allclose(other.predict(X), exact, rtol=1e-7, atol=1e-9)
    tight = copy.deepcopy(fitted).set_params(rtol=1e-5, atol=1e-5).predict(X)
    assert 0 < np.abs(tight - exact).max() < np.abs(loose - exact).max()


# --- evaluations --------------------------------------------------------------------


def test_evaluations_are_counted_by_sample_and_fall_with_the_tolerance(fitted, sine):
    X, _ = sine
    counts = []
    for tol in (1e-2, 1e-5, 1e-8):
        reg = copy.deepcopy(fitted).set_params(rtol=tol, atol=tol)
        count = reg.count_evaluations(X)
        assert count.shape == (len(X),)
        assert np.issubdtype(count.dtype, np.integer)
        # by sample: not a matter of the company
        np.testing.assert_array_equal(reg.count_evaluations(X[7:10]), count[7:10])
        counts.append(count)
    assert (counts[0] <= counts[1]).all()
    assert (counts[1] < counts[2]).all()
    assert len(set(counts[2])) > 1
    rk4 = copy.deepcopy(fitted).set_params(solver="rk4", step_size=0.25)
    assert set(rk4.count_evaluations(X)) == {1 + 4 * 4}


def test_the_curve_of_evaluations_is_their_mean(sine):
    X, y = sine
    # weights that stay as they are: what was solved can be solved again
    reg = ODENetRegressor(
        learning_rate_init=1e-14, alpha=0, rtol=1e-5, atol=1e-5, max_iter=2
    )
    reg.fit(X, y)
    expected = reg.count_evaluations(X).mean()
    # training and prediction round their steps differently
    np.testing.assert_allclose(reg.nfe_curve_, expected, rtol=0.02)


# --- failures -----------------------------------------------------------------------


def test_a_solve_that_fails_in_fit_names_the_settings(sine):
    reg = ODENetRegressor(max_steps=1, rtol=1e-8, atol=1e-8, **SHORT)
    with pytest.raises(SolverError, match=r"epoch 1 .*max_steps.*rtol"):
        reg.fit(*sine)


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
@pytest.mark.parametrize("rate", [1e3, 1e30])
@pytest.mark.parametrize("max_iter", [1, 4])
def test_a_training_that_diverges_does_not_end_in_nan(sine, solver, rate, max_iter):
    X, y = sine
    reg = ODENetRegressor(
        solver=solver, learning_rate_init=rate, max_iter=max_iter, random_state=0
    )
    try:
        reg.fit(X, y)
    except ValueError as error:
        assert "learning_rate_init" in str(error)
        with pytest.raises(NotFittedError):
            reg.predict(X)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolverWarning)
            assert np.isfinite(reg.predict(X)).all()


def test_a_continuation_that_fails_leaves_the_model_as_it_was(sine):
    X, y = sine
    reg = ODENetRegressor(warm_start=True, **SHORT).fit(X, y)
    expected = reg.predict(X)
    for method in (reg.fit, reg.partial_fit):
        reg.set_params(learning_rate_init=1e3)
        with pytest.raises(SolverError, match="learning_rate_init"):
            method(X, y)
        np.testing.assert_array_equal(reg.predict(X), expected)
    reg.set_params(learning_rate_init=1e-2).fit(X, y)
    assert np.isfinite(reg.predict(X)).all()


@pytest.mark.parametrize("bad", ["layers", "rate", "shape"])
def test_a_refit_that_fails_leaves_the_model_as_it_was(sine, bad):
    X, y = sine
    reg = ODENetRegressor(**SHORT).fit(X, y)
    expected, before = reg.predict(X), dict(vars(reg))
    if bad == "layers":
        reg.set_params(hidden_layer_sizes=())
    elif bad == "rate":
        reg.set_params(learning_rate_init=1e3)
    else:
        reg.set_params(image_shape=(1, 2, 2))
    with pytest.raises(ValueError, match=r"hidden_layer|learning_rate|image_shape"):
        reg.fit(np.hstack([X, X]), 1e6 * y)
    reg.set_params(**{k: before[k] for k in reg.get_params()})
    assert vars(reg) == before
    np.testing.assert_array_equal(reg.predict(X), expected)


def test_warnings_point_to_the_line_of_the_user(sine, fitted):
    X, y = sine
    hurried = copy.deepcopy(fitted).set_params(max_steps=1, rtol=1e-9, atol=1e-9)
    short = ODENetRegressor(max_iter=2, batch_size=500, dtype="float32", rtol=1e-9)
    pipeline = Pipeline([("scale", StandardScaler()), ("net", short)])
    for call, expected in [
        (lambda: short.fit(X, y), 3),
        (lambda: pipeline.fit(X, y), 3),
        (lambda: hurried.predict(X), 1),
        (lambda: hurried.score(X, y), 1),
        (lambda: hurried.trajectory(X), 1),
        (lambda: hurried.count_evaluations(X), 1),
    ]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert len(caught) == expected
        assert {w.filename for w in caught} == {__file__}
        assert {w.lineno for w in caught} == {call.__code__.co_firstlineno}


@pytest.mark.filterwarnings("default")
def test_reaching_max_iter_warns(sine):
    with pytest.warns(ConvergenceWarning, match=r"ODENetRegressor: max_iter=3"):
        ODENetRegressor(max_iter=3).fit(*sine)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e200, 1e308, 1e-200])
def test_columns_that_cannot_be_standardised_are_named(plane, size):
    X, y = plane
    X = X / np.abs(X).max()
    frame = pd.DataFrame(X, columns=["a", "b", "c"]).assign(b=size * X[:, 1])
    reg = ODENetRegressor(max_iter=1)
    with pytest.raises(ValueError, match=r"X must .* columns 'b': use other units"):
        reg.fit(frame, y)
    with pytest.raises(ValueError, match=r"y must .* columns 1: use other units"):
        reg.fit(X, np.stack([y, size * X[:, 0]], axis=1))


def test_tiny_constants_are_constants(plane):
    X, y = plane
    for constant in (1e-200, 1e100, 0.0):
        padded = np.hstack([X, np.full((len(X), 1), constant)])
        ODENetRegressor(max_iter=2).fit(padded, np.full(len(y), constant))


def test_bad_data_is_refused(sine):
    X, y = sine
    reg = ODENetRegressor(**SHORT)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"Input y contains"):
            reg.fit(X, np.where(y > 0.5, bad, y))
        with pytest.raises(ValueError, match=r"Input y contains"):
            reg.fit(X, np.c_[y, np.where(y > 0.5, bad, y)])
        with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
            reg.fit(X, y, X_val=X, y_val=np.where(y > 0.5, bad, y))
    for strings in (np.full(len(y), "high"), np.full(len(y), "high", dtype=object)):
        with pytest.raises(ValueError, match="could not convert string to float"):
            reg.fit(X, strings)
    with pytest.raises(ValueError, match="Complex data"):
        reg.fit(X, y + 1j)
    with pytest.raises(TypeError, match=r"y must be dense"):
        reg.fit(X, sparse.csr_array(y[:, None]))
    with pytest.raises(ValueError, match="dim 3"):
        reg.fit(X, y[:, None, None])
    with pytest.raises(ValueError, match="inconsistent numbers"):
        reg.fit(X, y[:-1])
    with pytest.raises(ValueError, match="sample_weight"):
        reg.fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match=r"sample_weight_val.*Negative"):
        reg.fit(X, y, X_val=X, y_val=y, sample_weight_val=-np.ones(len(y)))
    with pytest.raises(ValueError, match="sample_weight_val"):
        reg.fit(X, y, X_val=X, y_val=y, sample_weight_val=np.zeros(len(y)))
    with pytest.raises(ValueError, match="X_val needs y_val"):
        reg.fit(X, y, X_val=X)
    with pytest.raises(ValueError, match="need X_val"):
        reg.fit(X, y, y_val=y)
    with pytest.raises(ValueError, match="early_stopping"):
        ODENetRegressor(early_stopping=True).partial_fit(X, y)
    for method in ("predict", "trajectory", "count_evaluations"):
        with pytest.raises(NotFittedError):
            getattr(reg, method)(X)


# --- persistence --------------------------------------------------------------------


def roundtrip_skops(reg):
    skops = pytest.importorskip("skops.io")
    data = skops.dumps(reg)
    untrusted = skops.get_untrusted_types(data=data)
    assert all(name.startswith("sknode.") for name in untrusted)
    return skops.loads(data, trusted=untrusted)


def roundtrip_joblib(reg):
    buffer = io.BytesIO()
    joblib.dump(reg, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


@pytest.mark.parametrize(
    "roundtrip",
    [
        lambda reg: pickle.loads(pickle.dumps(reg)),
        roundtrip_joblib,
        roundtrip_skops,
        copy.deepcopy,
    ],
    ids=["pickle", "joblib", "skops", "deepcopy"],
)
@pytest.mark.parametrize("columns", [(), (2,)])
def test_survives(roundtrip, sine, columns):
    X, y = sine
    y = np.broadcast_to(y.reshape(-1, *(1 for _ in columns)), (len(y), *columns))
    reg = ODENetRegressor(**SHORT).fit(X, y)
    again = roundtrip(reg)
    np.testing.assert_array_equal(again.predict(X), reg.predict(X))
    assert joblib.hash(again) == joblib.hash(reg)
    np.testing.assert_array_equal(
        again.partial_fit(X, y).predict(X), reg.partial_fit(X, y).predict(X)
    )


def test_pickles_hold_no_tensors(fitted):
    assert b"torch" not in pickle.dumps(fitted)


# --- meta-estimators ----------------------------------------------------------------


def test_grid_search_over_tolerance_solver_and_gradient(sine):
    grid = {
        "rtol": [1e-2, 1e-4],
        "solver": ["tsit5", "rk4"],
        "gradient": ["discrete", "continuous"],
    }
    reg = ODENetRegressor(augment_dim=1, max_iter=10, random_state=0)
    search = GridSearchCV(reg, grid, cv=2, n_jobs=2).fit(*sine)
    assert len(search.cv_results_["params"]) == 8
    assert search.cv_results_["mean_test_score"].min() > 0.5
    alone = clone(reg).set_params(**search.best_params_).fit(*sine)
    np.testing.assert_array_equal(search.predict(sine[0]), alone.predict(sine[0]))


@pytest.mark.parametrize(
    "meta",
    [
        lambda reg: TransformedTargetRegressor(reg, transformer=StandardScaler()),
        lambda reg: TransformedTargetRegressor(reg, func=np.exp, inverse_func=np.log),
        lambda reg: AdaBoostRegressor(reg, n_estimators=2, random_state=0),
        lambda reg: BaggingRegressor(reg, n_estimators=2, random_state=0),
        lambda reg: StackingRegressor([("net", reg), ("ridge", Ridge())], cv=2),
    ],
    ids=["standardised target", "exp of the target", "AdaBoost", "Bagging", "Stacking"],
)
def test_works_inside(meta, sine):
    X, y = sine
    model = meta(ODENetRegressor(**WIDE)).fit(X, y)
    assert model.predict(X).shape == y.shape
    assert model.score(X, y) > 0.7


def test_one_net_for_every_target_predicts_as_each_alone(sine):
    X, y = sine
    model = MultiOutputRegressor(ODENetRegressor(**SHORT)).fit(X, np.c_[y, y**2])
    alone = ODENetRegressor(**SHORT).fit(X, y**2).predict(X)
    np.testing.assert_array_equal(model.predict(X)[:, 1], alone)


def test_validation_data_and_weights_are_routed(sine):
    X, y = sine
    with config_context(enable_metadata_routing=True):
        reg = ODENetRegressor(**SHORT).set_fit_request(
            sample_weight=True, X_val=True, y_val=True
        )
        pipeline = Pipeline(
            [
                ("scale", StandardScaler().set_fit_request(sample_weight=True)),
                ("net", reg),
            ],
            transform_input=["X_val"],
        )
        pipeline.fit(
            X[:80],
            y[:80],
            sample_weight=np.linspace(0, 1, 80),
            X_val=X[80:],
            y_val=y[80:],
        )
    net = pipeline["net"]
    assert pipeline.score(X[80:], y[80:]) == net.best_validation_score_
    expected = np.average(y[:80], weights=np.linspace(0, 1, 80))
    assert net.y_mean_ == pytest.approx(expected)


def test_nothing_warns_in_ordinary_use(sine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ODENetRegressor(random_state=0).fit(*sine).predict(sine[0])
