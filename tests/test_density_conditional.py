"""CNFDensity(conditional=True): the density of X given classes or values y."""

import pickle

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_requires_y_none

from sknode import CNFDensity

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SHORT = {
    "conditional": True,
    "max_iter": 3,
    "n_components": 2,
    "hidden_layer_sizes": (16, 16),
    "early_stopping": False,
    "random_state": 0,
}


def wave(n, seed):
    """Return rows that are normal about sin y, with variance 0.1 + y^2, and y."""
    rng = np.random.default_rng(seed)
    y = rng.uniform(-3, 3, n)
    law = stats.norm(np.sin(y), np.sqrt(0.1 + y**2))
    X = law.rvs(random_state=rng)
    return X[:, None], y, law.logpdf(X)


def blobs(n, seed):
    """Return rows of two classes in the plane, labels, and posteriors of "b"."""
    rng = np.random.default_rng(seed)
    b = rng.uniform(size=n) < 0.3
    laws = [
        stats.multivariate_normal([0, 0], [[1.0, 0.5], [0.5, 1.0]]),
        stats.multivariate_normal([1.5, -1.0], [[0.5, 0.0], [0.0, 2.0]]),
    ]
    X = np.where(b[:, None], laws[1].rvs(n, rng), laws[0].rvs(n, rng))
    densities = [0.7 * laws[0].pdf(X), 0.3 * laws[1].pdf(X)]
    return X, np.where(b, "b", "a"), densities[1] / sum(densities)


@pytest.fixture(scope="module")
def of_values():
    X, y, _ = wave(300, 0)
    return CNFDensity(**SHORT).fit(X, y)


@pytest.fixture(scope="module")
def of_classes():
    X, y, _ = blobs(300, 0)
    return CNFDensity(**SHORT, marginals=True).fit(X, y)


@pytest.fixture(scope="module")
def of_several():
    X, y, _ = blobs(300, 0)
    noise = np.random.default_rng(1).normal(size=(300, 2))
    Y = np.column_stack([X[:, 0], y == "b"]) + noise
    return CNFDensity(**SHORT, dynamics="planar").fit(X, Y)


# --- densities ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-3.0, 0.0, 2.5, 6.0])
def test_density_given_a_value_integrates_to_one(of_values, value):
    assert of_values.module_.residual and of_values.module_.finish
    x = np.linspace(-40, 40, 4001)
    logs = of_values.score_samples(x[:, None], np.full(len(x), value))
    assert np.exp(logs).sum() * (x[1] - x[0]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("y", ["a", "b"])
def test_density_given_a_class_integrates_to_one(of_classes, y):
    x = np.linspace(-9, 9, 121)
    grid = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    logs = of_classes.score_samples(grid, [y] * len(grid))
    assert np.exp(logs).sum() * (x[1] - x[0]) ** 2 == pytest.approx(1.0, abs=1e-3)


def test_density_given_several_values_integrates_to_one(of_several):
    x = np.linspace(-9, 9, 121)
    grid = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    logs = of_several.score_samples(grid, np.tile([0.5, -1.0], (len(grid), 1)))
    assert np.exp(logs).sum() * (x[1] - x[0]) ** 2 == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_a_known_conditional_density_is_found():
    X, y, _ = wave(1000, 0)
    test_X, test_y, exact = wave(2000, 1)
    density = CNFDensity(
        conditional=True, n_components=8, marginals=False, max_iter=20, random_state=0
    ).fit(X, y)
    assert np.mean(exact - density.score_samples(test_X, test_y)) < 0.08
    marginal = CNFDensity(max_iter=3, random_state=0).fit(X)
    assert density.score(test_X, test_y) > marginal.score(test_X) + 0.2


def test_a_linear_regression_is_one_component():
    rng = np.random.default_rng(0)
    Y = rng.normal(size=(150, 2)) * [3.0, 0.1] + 5
    X = Y @ [[1.0, -2.0], [3.0, 0.5]] + rng.normal(size=(150, 2)) @ [[1, 1], [0, 0.3]]
    density = CNFDensity(
        conditional=True, n_components=1, marginals=False, random_state=0
    ).fit(X, Y)
    assert density.module_.residual is None and density.module_.finish is None
    # that of least squares, whose residuals have the covariance
    design = np.column_stack([Y, np.ones(150)])
    residual = X - design @ np.linalg.lstsq(design, X)[0]
    law = stats.multivariate_normal([0, 0], np.cov(residual.T, bias=True))
    np.testing.assert_allclose(density.score_samples(X, Y), law.logpdf(residual))


@pytest.mark.slow
def test_posteriors_are_those_of_bayes_rule():
    X, y, _ = blobs(1500, 0)
    test_X, _, posterior = blobs(500, 1)
    density = CNFDensity(conditional=True, max_iter=5, random_state=0).fit(X, y)
    np.testing.assert_array_equal(density.classes_, ["a", "b"])
    np.testing.assert_allclose(density.class_prior_[1], np.mean(y == "b"))
    proba = density.predict_proba(test_X)
    np.testing.assert_allclose(proba.sum(1), 1.0)
    assert np.abs(proba[:, 1] - posterior).mean() < 0.03
    joint = [
        density.score_samples(test_X, [c] * 500) + np.log(p)
        for c, p in zip(density.classes_, density.class_prior_, strict=True)
    ]
    expected = np.exp(joint[1]) / np.exp(joint).sum(0)
    np.testing.assert_allclose(proba[:, 1], expected, rtol=1e-9)
    np.testing.assert_allclose(np.exp(density.predict_log_proba(test_X)), proba)
    labels = density.predict(test_X)
    assert (labels == np.where(proba[:, 1] > 0.5, "b", "a")).all()


def test_iris_is_classified():
    X, y = load_iris(return_X_y=True)
    density = CNFDensity(
        conditional=True, dequantize=dict.fromkeys(range(4), 0.1), random_state=0
    )
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    assert cross_val_score(density, X, y, cv=folds, scoring="accuracy").mean() > 0.95
    assert cross_val_score(density, X, y, cv=folds).mean() > -2.0


def test_a_class_of_a_row_borrows_the_covariance_of_others():
    X, y, _ = blobs(250, 0)
    X, y = np.r_[X, [[9.0, 9.0]]], np.r_[y, ["c"]]
    density = CNFDensity(conditional=True, max_iter=1, random_state=0).fit(X, y)
    assert density.predict([[9.0, 9.0]]) == ["c"]
    sample = density.sample(500, random_state=0, y="c")
    np.testing.assert_allclose(sample.mean(0), [9, 9], atol=0.5)
    assert (np.abs(sample.std(0) - 1) < 0.5).all()


@pytest.mark.parametrize("n_features", [5, 40])
def test_more_columns_than_rows_of_a_class(n_features):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, n_features)), np.arange(30) % 3
    density = CNFDensity(conditional=True, random_state=0).fit(X, y)
    assert np.isfinite(density.score_samples(X + 1, y)).all()
    density.fit(X, y + rng.normal(size=30))
    assert np.isfinite(density.score_samples(X + 1, y)).all()


def test_columns_that_y_determines_are_named():
    X, y, _ = wave(100, 0)
    X = pd.DataFrame({"free": X[:, 0], "double": 2 * y})
    with pytest.warns(UserWarning, match="of each other or of y.* among double"):
        density = CNFDensity(conditional=True, max_iter=1, random_state=0).fit(X, y)
    assert np.isfinite(density.score_samples(X, y)).all()


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "backprop"])
def test_likelihood_through_the_solver_depends_on_y(gradient):
    X, y, _ = wave(200, 0)
    density = CNFDensity(
        **SHORT | {"n_components": 1, "learning_rate_init": 0.02},
        objective="likelihood",
        gradient=gradient,
        refine=False,
    ).fit(X, y)
    assert density.loss_curve_[-1] < density.loss_curve_[0] - 0.01


# --- samples and transforms -----------------------------------------------------------


def test_samples_follow_y():
    X, y, _ = wave(1000, 0)
    density = CNFDensity(
        conditional=True, n_components=8, max_iter=3, random_state=0
    ).fit(X, y)
    for value in (-2.0, 1.0, 2.0):
        x = density.sample(2000, random_state=0, y=value)[:, 0]
        assert abs(x.mean() - np.sin(value)) < 0.3 * np.sqrt(0.1 + value**2)
        assert x.std() == pytest.approx(np.sqrt(0.1 + value**2), rel=0.25)


def test_samples_of_classes_follow_them(of_classes):
    X = of_classes.sample(400, random_state=0, y=["a", "b"] * 200)
    np.testing.assert_array_equal(
        X[1::2], of_classes.sample(400, random_state=0, y="b")[1::2]
    )
    np.testing.assert_allclose(X[::2].mean(0), [0, 0], atol=0.3)
    np.testing.assert_allclose(X[1::2].mean(0), [1.5, -1], atol=0.4)


def test_a_value_for_all_samples_or_one_each(of_values, of_several):
    one = of_values.sample(3, random_state=0, y=1.0)
    for y in ([1.0], [1.0] * 3, [[1.0]] * 3):
        np.testing.assert_array_equal(of_values.sample(3, random_state=0, y=y), one)
    one = of_several.sample(2, random_state=0, y=[1.0, 2.0])
    several = of_several.sample(2, random_state=0, y=[[1.0, 2.0], [1.0, 2.0]])
    np.testing.assert_array_equal(several, one)


@pytest.mark.parametrize("name", ["of_values", "of_classes", "of_several"])
def test_inverse_undoes_the_transform(name, request):
    density = request.getfixturevalue(name)
    X, y = wave(40, 5)[:2] if name == "of_values" else blobs(40, 5)[:2]
    if name == "of_several":
        y = X + 1
    Z = density.transform(X, y)
    np.testing.assert_allclose(density.inverse_transform(Z, y), X, atol=1e-5)
    assert (np.abs(density.transform(X, y[::-1]) - Z).max(1) > 1e-3).any()


def test_transform_makes_rows_normal_given_y(of_values):
    X, y, _ = wave(300, 0)
    Z = CNFDensity(**SHORT).fit_transform(X, y)
    np.testing.assert_array_equal(Z, of_values.transform(X, y))
    assert stats.kstest(Z[y < 0, 0], "norm").pvalue > 0.01
    assert stats.kstest(Z[y > 0, 0], "norm").pvalue > 0.01


def test_results_do_not_depend_on_other_rows(of_values, of_classes):
    for density, (X, y, _) in ((of_values, wave(100, 0)), (of_classes, blobs(100, 0))):
        logs, Z = density.score_samples(X, y), density.transform(X, y)
        for rows in (slice(1), slice(3, 20), slice(40, 100, 7)):
            part = density.score_samples(X[rows], y[rows])
            np.testing.assert_allclose(part, logs[rows], rtol=1e-11)
            part = density.transform(X[rows], y[rows])
            np.testing.assert_allclose(part, Z[rows], rtol=1e-11)


# --- weights, draws, persistence ------------------------------------------------------


@pytest.mark.parametrize("data", [wave, blobs])
def test_weights_are_repetitions_and_the_order_does_not_matter(data):
    X, y, _ = data(250, 0)
    weight = np.random.default_rng(0).integers(0, 4, len(X))
    weighted = CNFDensity(**SHORT).fit(X, y, sample_weight=weight)
    rows = np.repeat(np.arange(250), weight)[::-1]
    repeated = CNFDensity(**SHORT).fit(X[rows], y[rows])
    np.testing.assert_allclose(
        weighted.score_samples(X, y), repeated.score_samples(X, y), rtol=1e-6
    )
    logs = weighted.score_samples(X, y)
    mean = weighted.score(X, y, sample_weight=weight)
    assert mean == pytest.approx(np.average(logs, weights=weight))


def roundtrip_skops(density):
    skops = pytest.importorskip("skops.io")
    data = skops.dumps(density)
    return skops.loads(data, trusted=skops.get_untrusted_types(data=data))


@pytest.mark.parametrize("name", ["of_values", "of_classes", "of_several"])
def test_survives(name, request):
    density = request.getfixturevalue(name)
    y = {"of_values": 0.5, "of_classes": "b", "of_several": [0.5, 1.0]}[name]
    X, y = density.sample(20, random_state=0, y=y), [y] * 20
    for again in (pickle.loads(pickle.dumps(density)), roundtrip_skops(density)):
        np.testing.assert_array_equal(
            again.score_samples(X, y), density.score_samples(X, y)
        )


def test_seeds_decide(of_values):
    X, y, _ = wave(300, 0)
    again = CNFDensity(**SHORT).fit(X, y)
    np.testing.assert_array_equal(
        again.score_samples(X, y), of_values.score_samples(X, y)
    )


def test_units_of_y_do_not_matter(of_values):
    X, y, _ = wave(300, 0)
    again = CNFDensity(**SHORT).fit(X, 1024 * y)
    np.testing.assert_allclose(
        again.score_samples(X, 1024 * y), of_values.score_samples(X, y), atol=1e-5
    )


def test_warm_start_goes_on():
    X, y, _ = blobs(300, 0)
    density = CNFDensity(**SHORT, warm_start=True).fit(X, y)
    loss = density.loss_curve_[0]
    density.fit(X, y)
    assert density.loss_curve_[0] < loss
    density.set_params(conditional=False)
    with pytest.raises(ValueError, match="warm_start=True cannot go on"):
        density.fit(X)


def test_bounds_and_rounded_columns_work_with_classes():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    X = np.column_stack([rng.poisson(2 + 3 * y), rng.gamma(2.0, 1 + y)])
    density = CNFDensity(**SHORT, bounds=[(0, None), (0, None)], dequantize=[0]).fit(
        X, y
    )
    sample = density.sample(500, random_state=0, y=1)
    assert (sample[:, 0] == sample[:, 0].round()).all() and (sample >= 0).all()
    assert sample[:, 0].mean() == pytest.approx(5, abs=0.6)
    assert density.predict_proba([[9.0, 1.0]])[0, 1] > 0.8
    with pytest.raises(ValueError, match="on or beyond the limits"):
        density.predict([[0.0, -1.0]])


# --- as an estimator ------------------------------------------------------------------


@pytest.mark.slow
def test_grid_search_by_held_out_likelihood():
    X, y, _ = wave(250, 0)
    search = GridSearchCV(
        CNFDensity(**SHORT | {"max_iter": 1, "refine": False}),
        {"n_components": [1, 6]},
        cv=2,
    ).fit(X, y)
    assert search.best_params_ == {"n_components": 6}
    pipeline = make_pipeline(StandardScaler(), clone(search.best_estimator_))
    assert np.isfinite(cross_val_score(pipeline, X, y, cv=2)).all()


def test_y_is_required_as_scikit_learn_has_it():
    check_requires_y_none("CNFDensity", CNFDensity(conditional=True))
    assert get_tags(CNFDensity(conditional=True)).target_tags.required
    assert not get_tags(CNFDensity()).target_tags.required


def test_single_precision_and_frames_come_back():
    X, y, _ = blobs(300, 0)
    frame = pd.DataFrame(X.astype("f4"), columns=["u", "v"])
    density = CNFDensity(**SHORT, dtype="float32").set_output(transform="pandas")
    Z = density.fit_transform(frame, y)
    assert list(Z.columns) == ["cnfdensity0", "cnfdensity1"]
    assert set(Z.dtypes) == {np.dtype("f4")}
    assert density.score_samples(frame, y).dtype == np.float32
    assert density.predict_proba(frame).dtype == np.float32
    assert np.abs(density.inverse_transform(Z, y) - X).max() < 0.01


def test_methods_of_classifiers_are_there_only_for_classes(of_values, of_classes):
    for method in ("predict", "predict_proba", "predict_log_proba"):
        assert hasattr(of_classes, method)
        assert hasattr(CNFDensity(conditional=True), method)
        assert not hasattr(of_values, method)
        assert not hasattr(CNFDensity(), method)
    with pytest.raises(NotFittedError):
        CNFDensity(conditional=True).predict([[0.0]])


@pytest.mark.slow
def test_whole_numbers_are_classes_unless_said_otherwise():
    X, y, _ = wave(120, 0)
    whole = y.round()
    settings = SHORT | {"max_iter": 1}
    assert len(CNFDensity(**settings).fit(X, whole).classes_) == 7
    density = CNFDensity(**settings | {"conditional": "values"}).fit(X, whole)
    assert not hasattr(density, "classes_")
    assert np.isfinite(density.score_samples(X, y)).all()
    density.set_params(conditional="classes").fit(X, y.round(0) / 2)
    np.testing.assert_array_equal(density.classes_, np.arange(-3, 4) / 2)
    assert not hasattr(CNFDensity(conditional="values"), "predict")


def test_without_conditional_y_is_ignored():
    X, y, _ = blobs(60, 0)
    density = CNFDensity(random_state=0, n_components=1).fit(X, y)
    logs = density.score_samples(X)
    np.testing.assert_array_equal(density.score_samples(X, "nonsense"), logs)
    assert density.score(X, y) == logs.mean()
    assert not hasattr(density, "classes_")
    with pytest.raises(ValueError, match="y must be None without conditional=True"):
        density.sample(2, y="a")


def test_classes_are_forgotten_by_the_next_fit():
    X, y, _ = blobs(60, 0)
    density = CNFDensity(random_state=0, n_components=1, conditional=True).fit(X, y)
    density.fit(X, np.random.default_rng(0).normal(size=60))
    assert not hasattr(density, "classes_")
    assert not hasattr(density, "predict")


def test_frames_and_series_are_accepted(of_classes):
    X, y, _ = blobs(300, 0)
    frame, labels = pd.DataFrame(X, columns=["u", "v"]), pd.Series(y, dtype="category")
    density = CNFDensity(**SHORT, marginals=True).fit(frame, labels)
    expected = of_classes.score_samples(X, y)
    np.testing.assert_array_equal(density.score_samples(frame, labels), expected)
    assert set(density.predict(frame)) == {"a", "b"}
    again = roundtrip_skops(density)
    np.testing.assert_array_equal(again.score_samples(frame, list(y)), expected)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "requires y to be passed"),
        ([0.5] * 299, "inconsistent numbers of samples"),
        ([0.5] * 299 + [np.nan], "Input y contains NaN"),
        (pd.Series(["a", pd.NA, "b"] * 100, dtype="string"), "Input y contains NaN"),
        (np.full(300, 0.5), "y has constant columns: 0"),
        (np.eye(300, 3, dtype=int), "multilabel-indicator target"),
    ],
)
def test_unsuitable_targets_are_rejected(y, message):
    with pytest.raises(ValueError, match=message):
        CNFDensity(conditional=True).fit(wave(300, 0)[0], y)


@pytest.mark.parametrize(
    ("name", "y", "message"),
    [
        ("of_values", None, "requires y to be passed"),
        ("of_values", [1.0], "inconsistent numbers of samples"),
        ("of_values", [1.0, np.nan], "Input y contains NaN"),
        ("of_values", [[1.0, 2.0]] * 2, "y has 2 columns, but had 1 in fit"),
        ("of_several", [1.0, 2.0], "y has 1 columns, but had 2 in fit"),
        ("of_classes", ["a", "z"], r"not seen in fit: \['z'\]. Known are \['a', 'b'\]"),
        ("of_classes", [1, 2], r"not seen in fit: \[1, 2\]"),
        ("of_classes", None, "requires y to be passed"),
    ],
)
def test_unsuitable_conditions_are_rejected(name, y, message, request):
    density = request.getfixturevalue(name)
    rows = np.zeros((2, density.n_features_in_))
    for method in (density.score_samples, density.transform, density.inverse_transform):
        with pytest.raises(ValueError, match=message):
            method(rows, y)


@pytest.mark.parametrize(
    ("name", "y", "message"),
    [
        ("of_values", None, "requires y to be passed"),
        ("of_values", [1.0, 2.0], "one entry for all samples, or n_samples = 3. Got 2"),
        ("of_several", 1.0, "y has 1 columns, but had 2"),
        ("of_classes", "z", "not seen in fit"),
    ],
)
def test_unsuitable_conditions_of_samples_are_rejected(name, y, message, request):
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(name).sample(3, y=y)
