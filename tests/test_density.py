"""CNFDensity: exact log-densities, whatever the data."""

import copy
import io
import pickle
import time
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_wine
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import CNFDensity
from sknode._warp import Marginals
from sknode.datasets import make_density
from sknode.ode import SolverWarning, kernels

# short trainings are enough for what is tested here
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
SHORT = {"max_iter": 5, "n_components": 3, "random_state": 0}


@pytest.fixture(scope="module")
def moons():
    return make_density("moons", 600, random_state=0)[0]


@pytest.fixture(scope="module")
def fitted(moons):
    """An estimator with both networks: all rows train them, and they are kept."""
    density = CNFDensity(**SHORT, marginals=True, early_stopping=False).fit(moons)
    assert density.module_.residual is not None
    assert density.module_.finish is not None
    return density


# --- the density ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dynamics", ["mlp", pytest.param("planar", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("marginals", [False, True])
def test_density_integrates_to_one_in_the_plane(dynamics, marginals):
    X, _ = make_density("moons", 300, noise=0.3, random_state=0)
    density = CNFDensity(
        **SHORT, dynamics=dynamics, marginals=marginals, early_stopping=False
    ).fit(X)
    x = np.linspace(-3.2, 4.2, 141)
    grid = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    total = np.exp(density.score_samples(grid)).sum() * (x[1] - x[0]) ** 2
    assert total == pytest.approx(1.0, abs=1e-4)


def test_density_integrates_to_one_on_the_line():
    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(size=300), rng.gamma(2.0, size=300) + 3][:, None]
    density = CNFDensity(**SHORT, early_stopping=False).fit(X)
    x = np.linspace(-20, 40, 4001)
    total = np.trapezoid(np.exp(density.score_samples(x[:, None])), x)
    assert total == pytest.approx(1.0, abs=1e-5)


def test_log_density_is_the_jacobian_of_the_transform(fitted, moons):
    # log p(x) = log N(z) + log |dz/dx|, by central differences
    x, h = moons[:8], 1e-5
    fitted = copy.deepcopy(fitted).set_params(rtol=1e-10, atol=1e-10)
    columns = [
        (fitted.transform(x + step) - fitted.transform(x - step)) / (2 * h)
        for step in h * np.eye(2)
    ]
    log_det = np.linalg.slogdet(np.stack(columns, -1))[1]
    base = stats.norm.logpdf(fitted.transform(x)).sum(1)
    np.testing.assert_allclose(fitted.score_samples(x), base + log_det, atol=1e-5)


@pytest.mark.parametrize("n", [10, 199])  # too few for a network
def test_a_single_gaussian_is_that_of_maximum_likelihood(n):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 2)) @ [[2.0, 1.0], [0.0, 0.5]] + [100.0, -3.0]
    density = CNFDensity(n_components=1, marginals=False, max_iter=1, random_state=0)
    density.fit(X)
    covariance = np.cov(X.T, bias=True)
    expected = stats.multivariate_normal(X.mean(0), covariance).logpdf(X)
    np.testing.assert_allclose(density.score_samples(X), expected, rtol=1e-9)
    assert density.n_components_ == 1


def test_a_mixture_of_gaussians_is_found():
    X, exact = make_density("8gaussians", 1000, random_state=0)
    test, exact = make_density("8gaussians", 1000, random_state=1)
    density = CNFDensity(random_state=0, max_iter=5).fit(X)
    assert density.n_components_ == 8
    assert np.mean(exact - density.score_samples(test)) < 0.06


def test_a_network_is_kept_where_a_gaussian_is_wrong():
    X, _ = make_density("circles", 1500, noise=0.15, random_state=0)
    test, _ = make_density("circles", 800, noise=0.15, random_state=1)
    settings = {"n_components": 1, "marginals": False, "random_state": 0}
    gaussian = CNFDensity(max_iter=1, **settings).fit(X)
    density = CNFDensity(max_iter=25, **settings).fit(X)
    assert density.module_.residual or density.module_.finish
    assert density.score(test) > gaussian.score(test) + 0.05
    assert len(density.validation_scores_) == density.n_iter_
    assert density.best_validation_score_ == max(density.validation_scores_)


@pytest.mark.parametrize("seed", range(3))
def test_small_data_are_never_much_worse_than_a_gaussian(seed):
    rng = np.random.default_rng(seed)
    X = load_wine().data
    order = rng.permutation(len(X))
    train, test = X[order[:120]], X[order[120:]]
    covariance = np.cov(train.T, bias=True)
    gaussian = stats.multivariate_normal(train.mean(0), covariance).logpdf(test)
    with pytest.warns(UserWarning, match="X has columns in which a value occurs"):
        density = CNFDensity(random_state=0).fit(train)
    assert density.score(test) > gaussian.mean() - 0.02 * X.shape[1]


def test_normal_data_stay_normal():
    rng = np.random.default_rng(0)
    X, test = rng.normal(size=(400, 3)), rng.normal(size=(2000, 3))
    density = CNFDensity(random_state=0, max_iter=20).fit(X)
    covariance = np.cov(X.T, bias=True)
    gaussian = stats.multivariate_normal(X.mean(0), covariance).logpdf(test)
    assert density.score(test) > gaussian.mean() - 0.02 * 3


def test_heavy_tails_are_no_trouble():
    law = stats.t(3)
    X, test = (law.rvs(size=(500, 2), random_state=s) for s in (0, 1))
    density = CNFDensity(random_state=0, max_iter=3).fit(X)
    assert density.score(test) > law.logpdf(test).sum(1).mean() - 0.2
    cauchy = stats.cauchy.rvs(size=(500, 2), random_state=0)
    density = CNFDensity(random_state=0, max_iter=3).fit(cauchy)
    exact = stats.cauchy.logpdf(cauchy).sum(1)
    assert np.median(density.score_samples(cauchy) - exact) > -0.3
    far = density.score_samples([[1e12, -1e12]])
    assert np.isfinite(far).all()


# --- the flow -------------------------------------------------------------------------


def test_inverse_undoes_the_transform(fitted, moons):
    Z = fitted.transform(moons)
    np.testing.assert_allclose(fitted.inverse_transform(Z), moons, atol=1e-5)


def test_maps_of_columns_with_gaps_are_inverted_without_overflow():
    # between its parts the density of the column is smaller than any number
    scale = np.repeat([1.0, 1e4], [190, 9])[:, None]
    x = np.random.default_rng(0).normal(size=(199, 1)) * scale
    warp = Marginals.fit(x, np.ones(199), 8, np.random.RandomState(0))
    z = np.linspace(-5, 5, 2000)[:, None]
    np.testing.assert_allclose(warp.forward(warp.inverse(z))[0], z, atol=1e-6)


@pytest.mark.parametrize("name", ["moons", "rings"])
def test_inverse_undoes_the_transform_of_a_mixture(name):
    # its log-density needs no solve, and says nothing about the errors of its flow
    X, _ = make_density(name, 600, random_state=0)
    density = CNFDensity(max_iter=2, random_state=0).fit(X)
    assert density.module_.residual is None
    assert density.module_.finish is None
    assert density.n_components_ > 1
    for rows in (X, density.sample(2000, random_state=0)):
        back = density.inverse_transform(density.transform(rows))
        np.testing.assert_allclose(back, rows, atol=1e-5)


def test_transform_makes_data_normal(moons):
    Z = CNFDensity(random_state=0, max_iter=5).fit(moons).transform(moons)
    for column in Z.T:
        assert stats.kstest(column, "norm").pvalue > 0.01
    assert abs(np.corrcoef(Z.T)[0, 1]) < 0.1


def test_samples_are_seeded_and_like_the_data(fitted):
    X = fitted.sample(500, random_state=1)
    np.testing.assert_array_equal(X, fitted.sample(500, random_state=1))
    assert (X != fitted.sample(500, random_state=2)).any()
    # the mean log-density of samples is minus the entropy, as on a grid
    x = np.linspace(-2, 3, 71)
    grid = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    logs = fitted.score_samples(grid)
    entropy = -np.sum(np.exp(logs) * logs) * (x[1] - x[0]) ** 2
    own = fitted.score_samples(X)
    assert abs(own.mean() + entropy) < 4 * own.std() / np.sqrt(len(X))


def test_kernels_draw_the_same_samples(fitted):
    with kernels.reference():
        plain = fitted.sample(100, random_state=0)
    np.testing.assert_allclose(fitted.sample(100, random_state=0), plain, atol=1e-5)


def test_samples_take_not_much_longer_than_their_log_densities(fitted):
    def seconds(call):
        start = time.process_time()
        call()
        return time.process_time() - start

    X = fitted.sample(1024, random_state=0)
    scoring = min(seconds(lambda: fitted.score_samples(X)) for _ in range(3))
    sampling = min(seconds(lambda: fitted.sample(1024)) for _ in range(3))
    assert sampling < 2 * scoring


def test_a_tighter_tolerance_changes_little(fitted, moons):
    loose = fitted.score_samples(moons)
    tight = copy.deepcopy(fitted).set_params(rtol=1e-11, atol=1e-11, solver="dopri8")
    np.testing.assert_allclose(loose, tight.score_samples(moons), atol=1e-5)


def test_results_have_the_same_bits_in_whatever_company(fitted, moons):
    logs, Z = fitted.score_samples(moons), fitted.transform(moons)
    for rows in (slice(1), slice(3, 20), slice(100, 600, 7)):
        np.testing.assert_array_equal(fitted.score_samples(moons[rows]), logs[rows])
        np.testing.assert_array_equal(fitted.transform(moons[rows]), Z[rows])


def test_solver_that_fails_is_reported(fitted, moons):
    short = copy.deepcopy(fitted).set_params(max_steps=1)
    with pytest.warns(SolverWarning, match="did not reach the end for some rows"):
        short.score_samples(moons)
    with pytest.warns(SolverWarning, match=r" 3 of 3 samples \(0, 1, 2\) "):
        short.transform(moons[:3])


# --- weights and draws ----------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", [True, False])
def test_weights_are_repetitions_and_the_order_does_not_matter(moons, early_stopping):
    weight = np.random.default_rng(0).integers(0, 4, len(moons))
    density = CNFDensity(**SHORT, early_stopping=early_stopping)
    weighted = copy.deepcopy(density).fit(moons, sample_weight=weight)
    repeated = density.fit(np.repeat(moons, weight, axis=0)[::-1])
    np.testing.assert_array_equal(
        weighted.score_samples(moons), repeated.score_samples(moons)
    )


def test_only_ratios_of_weights_matter(moons):
    weight = np.random.default_rng(0).uniform(size=len(moons))
    one = CNFDensity(**SHORT).fit(moons, sample_weight=weight)
    two = CNFDensity(**SHORT).fit(moons, sample_weight=4 * weight)
    np.testing.assert_allclose(
        one.score_samples(moons), two.score_samples(moons), rtol=1e-12
    )
    assert one.score(moons, sample_weight=weight) == pytest.approx(
        np.average(one.score_samples(moons), weights=weight)
    )


@pytest.mark.parametrize("size", [1e-310, 1e-160, 1e160, 1e308])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_size_of_weights_does_not_matter(moons, size, conditional):
    X, y = moons[:100], (moons[:100, 0] > 0).astype(int)
    density = CNFDensity(conditional=conditional, random_state=0)
    expected = density.fit(X, y).score(X, y)
    weight = np.full(len(X), size)
    density.fit(X, y, sample_weight=weight)
    found = density.score(X, y, sample_weight=weight)
    assert found == pytest.approx(expected, rel=1e-12)


def test_seeds_decide_and_global_state_is_left_alone(moons):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two, other = (
        CNFDensity(**SHORT | {"random_state": s, "early_stopping": False}).fit(moons)
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.score_samples(moons), two.score_samples(moons))
    assert (one.score_samples(moons) != other.score_samples(moons)).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_warm_start_goes_on(moons):
    density = CNFDensity(**SHORT, early_stopping=False, warm_start=True).fit(moons)
    loss = density.loss_curve_[0]
    density.fit(moons)
    assert density.loss_curve_[0] < loss


def test_warm_start_keeps_networks_that_get_no_better():
    X, _ = make_density("checkerboard", 1000, random_state=0)
    density = CNFDensity(max_iter=15, random_state=0, warm_start=True).fit(X)
    assert density.module_.finish is not None
    expected, best = density.score_samples(X), density.best_validation_score_
    density.set_params(max_iter=1, learning_rate_init=1e-9).fit(X)
    np.testing.assert_allclose(density.score_samples(X), expected, atol=1e-4)
    assert density.best_validation_score_ == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize(
    "change", [{"hidden_layer_sizes": 8}, {"dynamics": "planar"}, {"activation": "elu"}]
)
def test_warm_start_refuses_other_networks(moons, change):
    density = CNFDensity(**SHORT, early_stopping=False, warm_start=True).fit(moons)
    density.set_params(**change)
    with pytest.raises(ValueError, match=f"another value of {next(iter(change))}"):
        density.fit(moons)


def test_a_refit_that_fails_leaves_the_model_as_it_was(moons):
    X = moons[:100]
    density = CNFDensity(random_state=0).fit(X)
    before = dict(vars(density))
    with pytest.raises(ValueError, match="constant columns"):
        density.fit(X * [1, 0])
    with pytest.raises(ValueError, match="log_density"):
        density.fit_target(lambda x: x.sum(1) * torch.nan, 3)
    assert vars(density) == before


def test_single_precision_gives_single_precision(moons):
    density = CNFDensity(**SHORT, early_stopping=False)
    double = copy.deepcopy(density).fit(moons).score_samples(moons)
    single = density.fit(moons.astype("f4")).score_samples(moons.astype("f4"))
    assert double.dtype == np.float64 and single.dtype == np.float32
    assert density.transform(moons[:2].astype("f4")).dtype == np.float32


# --- objectives -----------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "backprop"])
def test_likelihood_through_the_solver_improves_on_the_gaussian(gradient):
    X, _ = make_density("circles", 300, noise=0.2, random_state=0)
    density = CNFDensity(
        (16, 16),
        objective="likelihood",
        gradient=gradient,
        refine=False,
        n_components=1,
        marginals=False,
        learning_rate_init=0.02,
        max_iter=4,
        early_stopping=False,
        random_state=0,
    ).fit(X)
    assert density.loss_curve_[-1] < density.loss_curve_[0] - 0.01
    # dopri5: two evaluations to start and six a step
    assert min(density.nfe_curve_) >= 8


def test_fit_target_finds_a_known_density():
    def target(x):
        # a banana: y is normal about x^2 / 2
        return -0.5 * (x[:, 0] ** 2 + (x[:, 1] - x[:, 0] ** 2 / 2) ** 2 / 0.25) + 3.0

    density = CNFDensity(
        (16, 16), max_iter=6, learning_rate_init=0.01, random_state=0
    ).fit_target(target, 2)
    X = density.sample(2000, random_state=0)
    # what it integrates to is known: 2 pi * 0.5 * e^3
    exact = target(torch.from_numpy(X)).numpy() - np.log(np.pi) - 3.0
    divergence = np.mean(density.score_samples(X) - exact)
    assert -0.01 < divergence < 0.1
    assert density.n_features_in_ == 2
    assert density.loss_ == pytest.approx(-np.log(np.pi) - 3.0, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0, 2), TypeError, "log_density must be callable"),
        ((len, 0), ValueError, "n_features must be a positive integer"),
        ((len, True), ValueError, "n_features must be a positive integer"),
        ((lambda x: x, 2), ValueError, r"shape \(n,\). For n = 5 its shape is \(5, 2"),
        ((lambda x: x.sum(), 2), ValueError, r"For n = 5 its shape is \(\)"),
        ((lambda x: np.sum(x, axis=1), 2), ValueError, "by operations of torch"),
        ((lambda x: x[:, 2], 2), ValueError, r"tensor of shape \(n, 2\)"),
        ((lambda x: np.zeros(len(x)), 2), TypeError, "Got ndarray instead"),
        ((lambda x: x.detach()[:, 0], 2), ValueError, "does not depend on the rows"),
        ((lambda x: x[:, 0].log(), 2), ValueError, "must be finite wherever"),
    ],
)
def test_fit_target_names_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        CNFDensity().fit_target(*arguments)


def test_fit_target_takes_densities_in_double_precision():
    mean = torch.tensor([1.0, 2.0], dtype=torch.float64)
    density = CNFDensity((8,), max_iter=4, learning_rate_init=0.05, random_state=0)
    density.fit_target(lambda x: -0.5 * (x - mean).square().sum(1), 2)
    assert np.abs(density.sample(500, random_state=0).mean(0) - mean.numpy()).max() < 1


# --- as an estimator ------------------------------------------------------------------


def roundtrip_skops(density):
    skops = pytest.importorskip("skops.io")
    data = skops.dumps(density)
    untrusted = skops.get_untrusted_types(data=data)
    assert all(name.startswith("sknode.") for name in untrusted)
    return skops.loads(data, trusted=untrusted)


def roundtrip_joblib(density):
    buffer = io.BytesIO()
    joblib.dump(density, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


@pytest.mark.parametrize(
    "roundtrip",
    [
        lambda density: pickle.loads(pickle.dumps(density)),
        roundtrip_joblib,
        roundtrip_skops,
        copy.deepcopy,
    ],
    ids=["pickle", "joblib", "skops", "deepcopy"],
)
def test_survives(roundtrip, fitted, moons):
    again = roundtrip(fitted)
    np.testing.assert_array_equal(
        again.score_samples(moons), fitted.score_samples(moons)
    )


def test_grid_search_by_score(moons):
    search = GridSearchCV(
        CNFDensity(max_iter=2, random_state=0), {"n_components": [1, 6]}, n_jobs=2, cv=3
    ).fit(moons)
    assert search.best_params_ == {"n_components": 6}
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_last_step_of_a_pipeline(moons):
    pipeline = make_pipeline(StandardScaler(), CNFDensity(**SHORT))
    assert np.isfinite(cross_val_score(pipeline, moons, cv=2)).all()
    assert pipeline.fit(moons).transform(moons).shape == moons.shape


def test_frames_keep_their_names(moons):
    frame = pd.DataFrame(moons, columns=["a", "b"])
    density = CNFDensity(**SHORT).set_output(transform="pandas").fit(frame)
    Z = density.transform(frame)
    assert list(Z.columns) == ["cnfdensity0", "cnfdensity1"]
    assert list(density.feature_names_in_) == ["a", "b"]


def test_outliers_have_the_lowest_density(fitted, moons):
    logs = fitted.score_samples(np.r_[moons, [[0.5, 4.0], [-3.0, -1.0]]])
    assert set(np.argsort(logs)[:2]) == {600, 601}


# --- unsuitable data ------------------------------------------------------------------


def frame_of(X):
    return pd.DataFrame(X, columns=["width", "height", "depth"])


def test_constant_columns_are_named():
    X = np.random.default_rng(0).normal(size=(30, 3))
    X[:, 1] = 0.1
    with pytest.raises(ValueError, match=r"constant columns.*: height"):
        CNFDensity().fit(frame_of(X))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_columns_that_cannot_be_whitened_are_named(moons, size):
    with pytest.raises(ValueError, match=r"X must .* columns 1: use other units"):
        CNFDensity().fit(moons * [1, size])
    with pytest.raises(ValueError, match=r"y must .* columns 0: use other units"):
        CNFDensity(conditional="values").fit(moons, size * moons[:, 0])


def test_collinear_columns_are_named_and_get_a_little_noise():
    X = np.random.default_rng(0).normal(size=(30, 3))
    X[:, 2] = 2 * X[:, 0]
    with pytest.warns(UserWarning, match="among width, depth"):
        density = CNFDensity(random_state=0).fit(frame_of(X))
    assert np.isfinite(density.score_samples(frame_of(X))).all()


def test_discrete_columns_are_named():
    X = np.random.default_rng(0).normal(size=(100, 3))
    X[:, 0] = X[:, 0].round()
    with pytest.warns(UserWarning, match=r"again and again: width\. .* dequantize"):
        CNFDensity(random_state=0).fit(frame_of(X))


def test_a_few_rows_of_many_columns():
    X = np.random.default_rng(0).normal(size=(10, 30))
    density = CNFDensity(random_state=0).fit(X)
    assert density.n_components_ == 1
    assert np.isfinite(density.score_samples(X + 1)).all()


@pytest.mark.parametrize(
    ("X", "weight", "message"),
    [
        ([[1.0, np.nan], [2.0, 3.0]], None, "NaN"),
        ([[1.0, 2.0], [1.0, 2.0]], None, "n_samples = 1"),
        ([[1.0, 2.0], [2.0, 1.0]], [0.0, 0.0], "at least one non-zero"),
        ([[1.0, 2.0], [2.0, 1.0]], [-1.0, 1.0], "sample_weight"),
    ],
)
def test_unsuitable_rows_are_rejected(X, weight, message):
    with pytest.raises(ValueError, match=message):
        CNFDensity().fit(X, sample_weight=weight)


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.score_samples([[0.0]]),
        lambda d: d.transform([[0.0]]),
        lambda d: d.inverse_transform([[0.0]]),
        lambda d: d.sample(),
        lambda d: d.count_evaluations([[0.0]]),
    ],
)
def test_methods_want_a_fitted_estimator(call):
    with pytest.raises(NotFittedError):
        call(CNFDensity())


def test_sample_and_inverse_check_their_arguments(fitted):
    with pytest.raises(ValueError, match="n_samples must be a positive integer"):
        fitted.sample(0)
    with pytest.raises(ValueError, match="Z has 3 features"):
        fitted.inverse_transform(np.zeros((2, 3)))


@pytest.mark.parametrize("rtol", [1e-4, 1e-5, 1e-7])
def test_numerical_error_is_estimated_and_bounded_by_the_tolerance(fitted, moons, rtol):
    density = clone_fitted(fitted, rtol=rtol, atol=rtol)
    exact = clone_fitted(fitted, rtol=1e-12, atol=1e-12).score_samples(moons)
    error = np.abs(density.score_samples(moons) - exact)
    estimate = density.estimate_error(moons)
    assert error.max() > 0
    np.testing.assert_allclose(estimate, error, rtol=0.1, atol=rtol)
    # the errors of the two legs, and of the many steps in each, add up
    assert np.sqrt(np.mean(estimate**2)) < 10 * rtol
    assert estimate.max() < 100 * rtol


def test_numerical_error_of_constant_steps_and_of_single_precision(fitted, moons):
    density = clone_fitted(fitted, solver="rk4", step_size=0.1)
    coarse = density.estimate_error(moons)
    fine = density.set_params(step_size=0.05).estimate_error(moons)
    assert np.median(coarse / fine) > 8  # of fourth order
    single = CNFDensity(
        dtype="float32", max_iter=2, tol=1.0, n_iter_no_change=1, random_state=0
    ).fit(moons)
    assert 0 < single.estimate_error(moons).max() < 1e-2


def test_evaluations_are_counted_by_row_and_fall_with_the_tolerance(fitted, moons):
    loose, tight = (
        clone_fitted(fitted, rtol=tol, atol=tol).count_evaluations(moons)
        for tol in (1e-3, 1e-8)
    )
    assert loose.shape == (len(moons),) and np.issubdtype(loose.dtype, np.integer)
    assert (0 < loose).all() and (loose < tight).all()
    again = fitted.count_evaluations(moons[3:5])
    np.testing.assert_array_equal(fitted.count_evaluations(moons)[3:5], again)
    # four stages of four steps and a first slope, in each of the two legs
    density = clone_fitted(fitted, solver="rk4", step_size=0.25)
    assert set(density.count_evaluations(moons)) == {2 * 17}
    # a closed form, and rows that have no density
    mixture = CNFDensity(n_components=1, bounds={0: (0, None)}).fit(np.abs(moons[:100]))
    assert set(mixture.count_evaluations(moons)) == {0}


def clone_fitted(density, **parameters):
    """Return the same fitted estimator with other parameters."""
    return copy.deepcopy(density).set_params(**parameters)


def test_networks_are_dropped_where_the_mixture_is_better():
    X, _ = make_density("8gaussians", 1000, random_state=0)
    density = CNFDensity(max_iter=2, random_state=0).fit(X)
    assert density.module_.finish is None
    assert density.n_components_ == 8
    # not that of what was dropped
    assert density.best_validation_score_ > max(density.validation_scores_)
    assert density.best_validation_score_ == pytest.approx(density.score(X), abs=0.3)


def test_networks_start_from_few_components():
    X, _ = make_density("checkerboard", 2000, random_state=0)
    density = CNFDensity(max_iter=15, random_state=0).fit(X)
    assert density.module_.finish is not None
    assert density.n_components_ <= 4
    many = CNFDensity(n_components=32, max_iter=1, random_state=0).fit(X)
    assert many.n_components_ == 32
    assert density.score(X) > many.score(X)


@pytest.mark.parametrize("of_use", [True, False])
def test_a_limit_of_epochs_is_warned_of_where_networks_are_used(of_use):
    # of normal rows a mixture knows all there is to know
    X = np.random.default_rng(0).normal(size=(200, 2))
    model = CNFDensity(max_iter=2, early_stopping=not of_use, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X)
    assert (model.module_.residual is not None) == of_use
    found = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    expected = "CNFDensity: max_iter=2 was reached and the training had not converged"
    assert [text.startswith(expected) for text in found] == [True] * of_use
