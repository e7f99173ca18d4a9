"""ODE-Nets with a vector field of the user's own."""

import copy
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_moons
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from torch import nn

from sknode import ODENetClassifier, ODENetRegressor
from sknode.fields import MLPField

SHORT = {"max_iter": 6, "random_state": 0}
IMAGE = {"image_shape": (2, 4, 3), "n_channels": 4, "max_iter": 2, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


class Damped(nn.Module):
    """Differs from the built-in field: no time, a damping, a gain of its own."""

    def __init__(self, shape):
        super().__init__()
        (n,) = shape
        self.inner, self.outer = nn.Linear(n, 12), nn.Linear(12, n)
        self.gain = nn.Parameter(torch.ones(n))

    def forward(self, t, y):
        return self.gain * self.outer(torch.sin(self.inner(y))) - 0.1 * y


class Timed(Damped):
    """Depends on time."""

    def forward(self, t, y):
        return super().forward(t, y) * torch.cos(3 * t)


class Local(nn.Module):
    """A convolution, for images."""

    def __init__(self, shape):
        super().__init__()
        self.convolution = nn.Conv2d(shape[0], shape[0], 3, padding=1)

    def forward(self, t, y):
        return torch.tanh(self.convolution(y)) * (1 - t)


class Decay(nn.Module):
    """Has no parameters."""

    def forward(self, t, y):
        return -y


class Chosen(nn.Module):
    """Returns what a function makes of the state."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, t, y):
        return self.function(y)


def make_decay(shape):
    return Decay()


def make_wide(shape):
    return MLPField(shape[0], (24, 24), "tanh")


@pytest.fixture(scope="module")
def moons():
    return make_moons(120, noise=0.1, random_state=0)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 24)), rng.integers(0, 2, 40)


# --- making and training ------------------------------------------------------------


@pytest.mark.parametrize("factory", [Damped, Timed, make_wide])
def test_learns_with_classes_and_functions(moons, factory):
    clf = ODENetClassifier(vector_field=factory, max_iter=40, random_state=0)
    assert clf.fit(*moons).score(*moons) > 0.85
    assert isinstance(clf.module_.field, MLPField if factory is make_wide else factory)


def test_trains_on_images(images):
    clf = ODENetClassifier(vector_field=Local, **IMAGE).fit(*images)
    assert isinstance(clf.module_.field, Local)
    assert clf.trajectory(images[0], n_times=3).shape == (40, 3, 4, 4, 3)
    assert clf.loss_curve_[1] < clf.loss_curve_[0]


def test_a_regressor_takes_one_too(moons):
    X, y = moons
    # patience to leave the straight boundary, where this field starts
    settings = {"alpha": 0.0, "n_iter_no_change": 50, "max_iter": 60}
    reg = ODENetRegressor(vector_field=Damped, **settings, random_state=0)
    linear = LinearRegression().fit(X, y).score(X, y)
    assert reg.fit(X, y).score(X, y) > max(0.8, linear + 0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, (4,)), ({"augment_dim": 0}, (2,)), ({"augment_dim": 3}, (5,))],
)
def test_the_factory_gets_the_shape_of_a_row_of_states(moons, settings, expected):
    seen = []

    def factory(shape):
        seen.append(shape)
        return Decay()

    clf = ODENetClassifier(vector_field=factory, max_iter=1, **settings)
    clf.fit(*moons)
    assert seen == [expected]
    assert type(seen[0]) is tuple
    assert clf.trajectory(moons[0], 2).shape[2:] == expected


@pytest.mark.parametrize("augment_dim", [0, 2])
def test_the_factory_gets_the_shape_of_an_image_inside(augment_dim):
    seen = []

    def factory(shape):
        seen.append(shape)
        return Local(shape)

    X = np.random.default_rng(0).normal(size=(6, 3 * 18 * 11))
    clf = ODENetClassifier(
        image_shape=(3, 18, 11),
        n_channels=4,
        augment_dim=augment_dim,
        vector_field=factory,
        max_iter=1,
    )
    clf.fit(X, np.arange(6) % 2)
    assert seen == [(4 + augment_dim, 9, 6)]


def test_every_parameter_of_the_field_is_trained(moons):
    start = ODENetClassifier(
        vector_field=Timed, max_iter=1, learning_rate_init=1e-30, random_state=0
    ).fit(*moons)
    trained = ODENetClassifier(vector_field=Timed, **SHORT).fit(*moons)
    for one, two in zip(
        start.module_.field.parameters(),
        trained.module_.field.parameters(),
        strict=True,
    ):
        assert ((one - two).abs() > 1e-4).any()


@pytest.mark.parametrize("factory", [Damped, Timed, make_wide, make_decay])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_every_gradient_trains_alike(moons, factory, penalty):
    X, y = moons
    losses = [
        ODENetClassifier(
            vector_field=factory,
            gradient=gradient,
            kinetic_penalty=penalty,
            jacobian_penalty=penalty,
            rtol=1e-6,
            atol=1e-6,
            max_iter=2,
            random_state=0,
        )
        .fit(X[:64], y[:64])
        .loss_curve_
        for gradient in ("backprop", "discrete", "continuous")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-8)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_a_field_written_out_trains_as_the_built_in_one(moons):
    class Wrapped(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.field = MLPField(shape[0], (16,), "silu", time_dependent=True)
            first = self.field.layers[0]
            with torch.no_grad():
                for p in first.parameters():
                    # as the built-in one starts
                    p.mul_(3**0.5 * (8 / first.in_features))

        def forward(self, t, y):
            return self.field(t, y)

    one = ODENetClassifier((16,), "silu", **SHORT).fit(*moons)
    two = ODENetClassifier(vector_field=Wrapped, **SHORT).fit(*moons)
    np.testing.assert_allclose(one.loss_curve_, two.loss_curve_, rtol=1e-9)


def test_a_field_without_parameters_is_solved_exactly(moons):
    X, _ = moons
    clf = ODENetClassifier(vector_field=make_decay, rtol=1e-9, atol=1e-9, **SHORT)
    path = clf.fit(*moons).trajectory(X, n_times=3)
    times = np.exp(-np.array([0.0, 0.5, 1.0]))[:, None]
    np.testing.assert_allclose(path, path[:, :1] * times, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_field_takes_the_precision_of_the_network(moons, dtype):
    X, y = moons
    for factory in (lambda shape: Damped(shape).double(), Damped):
        clf = ODENetClassifier(vector_field=factory, **SHORT).fit(X.astype(dtype), y)
        assert {p.dtype for p in clf.module_.parameters()} == {getattr(torch, dtype)}
        assert clf.predict_proba(X).dtype == dtype


def test_a_prediction_has_the_same_bits_in_whatever_company(moons):
    X, y = moons
    clf = ODENetClassifier(vector_field=Timed, **SHORT).fit(X, y)
    whole = clf.decision_function(X)
    for n in (1, 2, 7, 33):
        np.testing.assert_array_equal(clf.decision_function(X[:n]), whole[:n])


# --- reproducible, one more parameter -----------------------------------------------


def test_random_state_decides_the_start_of_the_field(moons):
    one, two, three = (
        ODENetClassifier(vector_field=Damped, max_iter=2, random_state=seed)
        .fit(*moons)
        .predict_proba(moons[0])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()


def test_the_global_random_state_of_torch_is_left_alone(moons):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    clf = ODENetClassifier(vector_field=Damped, **SHORT).fit(*moons)
    copy.deepcopy(clf).predict(moons[0])
    assert torch.rand(1) == expected


def make_slowly(shape):
    time.sleep(0.01)
    return Damped(shape)


def test_threads_do_not_share_their_random_numbers(moons):
    def fit(seed):
        clf = ODENetClassifier(vector_field=make_slowly, max_iter=1, random_state=seed)
        return clf.fit(*moons).predict_proba(moons[0])

    expected, before = [fit(seed) for seed in range(4)], torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(fit, range(4)))
    np.testing.assert_array_equal(results, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("factory", [Timed, make_wide, make_decay])
def test_survives_pickle_joblib_and_deepcopy(tmp_path, moons, factory):
    X, y = moons
    clf = ODENetClassifier(vector_field=factory, **SHORT).fit(X, y)
    joblib.dump(clf, tmp_path / "clf")
    for again in (
        pickle.loads(pickle.dumps(clf)),
        joblib.load(tmp_path / "clf"),
        copy.deepcopy(clf),
    ):
        assert again.vector_field is factory
        np.testing.assert_array_equal(again.predict_proba(X), clf.predict_proba(X))
        again.partial_fit(X, y)


def test_skops_asks_for_trust_in_the_factory_and_loads(moons):
    skops = pytest.importorskip("skops.io")
    clf = ODENetClassifier(vector_field=Timed, **SHORT).fit(*moons)
    data = skops.dumps(clf)
    untrusted = skops.get_untrusted_types(data=data)
    assert f"{__name__}.Timed" in untrusted
    again = skops.loads(data, trusted=untrusted)
    np.testing.assert_array_equal(
        again.predict_proba(moons[0]), clf.predict_proba(moons[0])
    )


def test_clones_share_the_factory_and_train_the_same(moons):
    clf = ODENetClassifier(vector_field=Damped, **SHORT)
    again = clone(clf)
    assert again.vector_field is Damped
    assert "Damped" in repr(clf)
    np.testing.assert_array_equal(
        clf.fit(*moons).predict_proba(moons[0]),
        again.fit(*moons).predict_proba(moons[0]),
    )


def test_grid_search_over_factories(moons):
    clf = ODENetClassifier(max_iter=20, random_state=0)
    grid = {"vector_field": [None, Damped, make_decay]}
    search = GridSearchCV(clf, grid, cv=2, n_jobs=2).fit(*moons)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all()
    assert search.best_params_["vector_field"] is not make_decay
    alone = GridSearchCV(clf, grid, cv=2).fit(*moons)
    np.testing.assert_array_equal(alone.cv_results_["mean_test_score"], scores)


def test_a_lambda_fits_but_does_not_pickle(moons):
    clf = ODENetClassifier(vector_field=lambda shape: Damped(shape), **SHORT)
    assert clone(clf).fit(*moons).score(*moons) > 0.7
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(clf.fit(*moons))


# --- errors -------------------------------------------------------------------------


def test_a_module_is_no_factory(moons):
    for module in (Damped((2,)), MLPField(2, (4,)), Decay()):
        with pytest.raises(TypeError, match=r"vector_field must be a factory.*class"):
            ODENetClassifier(vector_field=module).fit(*moons)


@pytest.mark.parametrize("factory", [lambda: Decay(), Decay, lambda a, b: Decay()])
def test_a_factory_that_takes_other_arguments_is_refused(moons, factory):
    with pytest.raises(TypeError, match="vector_field is called with the shape"):
        ODENetClassifier(vector_field=factory).fit(*moons)


def test_an_error_of_the_factory_itself_comes_through(moons):
    def factory(shape):
        raise TypeError("my own mistake")

    with pytest.raises(TypeError, match="my own mistake"):
        ODENetClassifier(vector_field=factory).fit(*moons)


@pytest.mark.parametrize("result", ["a", None, lambda t, y: y, Damped])
def test_a_factory_that_makes_no_module_is_refused(moons, result):
    with pytest.raises(TypeError, match=r"vector_field must return a torch.nn.Module"):
        ODENetClassifier(vector_field=lambda shape: result).fit(*moons)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y[:, :1],
        lambda y: y.sum(1),
        lambda y: y[:1],
        lambda y: (y,),
        lambda y: y.numpy(),
    ],
)
def test_slopes_of_another_shape_are_refused(moons, function):
    clf = ODENetClassifier(vector_field=lambda shape: Chosen(function))
    with pytest.raises(ValueError, match=r"vector_field .* must return slopes"):
        clf.fit(*moons)


def test_a_field_that_fails_is_named_with_the_shapes(moons):
    clf = ODENetClassifier(vector_field=lambda shape: Damped((3,)))
    with pytest.raises(
        ValueError, match=r"vector_field made fails.*\(16, 1\).*\(16, 4\)"
    ):
        clf.fit(*moons)
    clf = ODENetClassifier(vector_field=lambda shape: nn.Linear(2, 2))
    with pytest.raises(ValueError, match="vector_field made fails"):
        clf.fit(*moons)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(2),
        nn.SyncBatchNorm(2),
        nn.Dropout(0.5),
        nn.AlphaDropout(0.5),
        nn.RReLU(),
        nn.InstanceNorm2d(2, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_mix_rows_or_draw_numbers_are_refused(moons, layer):
    clf = ODENetClassifier(vector_field=lambda shape: Chosen(nn.Sequential(layer)))
    with pytest.raises(ValueError, match=type(layer).__name__):
        clf.fit(*moons)


@pytest.mark.parametrize(
    "function", [lambda y: y - y.mean(0), nn.functional.dropout, torch.rand_like]
)
def test_functions_that_mix_rows_or_draw_numbers_are_refused(moons, function):
    clf = ODENetClassifier(vector_field=lambda shape: Chosen(function))
    with pytest.raises(ValueError, match="depends on other rows or on chance"):
        clf.fit(*moons)


def test_normalisation_within_a_row_is_accepted(moons, images):
    def across_features(shape):
        return Chosen(nn.Sequential(nn.LayerNorm(shape), nn.Linear(*shape, *shape)))

    clf = ODENetClassifier(vector_field=across_features, augment_dim=2, **SHORT)
    assert clf.fit(*moons).score(*moons) > 0.7
    clf = ODENetClassifier(
        vector_field=lambda shape: Chosen(nn.InstanceNorm2d(shape[0])), **IMAGE
    )
    assert np.isfinite(clf.fit(*images).predict_proba(images[0])).all()


def test_what_is_not_callable_is_refused(moons):
    with pytest.raises(ValueError, match="vector_field"):
        ODENetClassifier(vector_field="mlp").fit(*moons)


def test_a_field_that_blows_up_is_said_so(moons):
    clf = ODENetClassifier(
        vector_field=lambda shape: Chosen(lambda y: 100 * y.square() + 100), **SHORT
    )
    with pytest.raises(ValueError, match=r"epoch 1 .*blow up"):
        clf.fit(*moons)


def test_nothing_warns_in_ordinary_use(moons):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf = ODENetClassifier(vector_field=Timed, tol=1.0, random_state=0)
        clf.fit(*moons).predict_proba(moons[0])
