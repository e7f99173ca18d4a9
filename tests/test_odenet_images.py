"""ODE-Nets for images, as their users use them."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler

import sknode._odenet_base
from sknode import ODENetClassifier, ODENetRegressor
from sknode._images import shift_at_random

# small nets that learn fast
SMALL = {"n_channels": 8, "hidden_layer_sizes": (8,), "learning_rate_init": 2e-2}
GREY = {"image_shape": (1, 8, 8), "n_downsamplings": 1, **SMALL}
COLOUR = {"image_shape": (3, 6, 5), **SMALL}
SHORT = {"max_iter": 3, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(n_class=3, return_X_y=True)
    return X[:200], y[:200]


@pytest.fixture(scope="module")
def fitted(digits):
    return ODENetClassifier(**GREY, max_iter=12, random_state=0).fit(*digits)


@pytest.fixture(scope="module")
def colours():
    """Images that differ in the channel with the larger variation only."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    images = 0.3 * rng.normal(size=(150, 3, 6, 5))
    images[np.arange(150), y] *= 10
    return images.reshape(150, -1), y


def n_parameters(clf):
    return sum(p.numel() for p in clf.module_.parameters())


# --- learning, layout ---------------------------------------------------------------


def test_learns_digits_it_has_not_seen(fitted):
    X, y = load_digits(n_class=3, return_X_y=True)
    assert fitted.score(X[200:], y[200:]) > 0.9


def test_tells_colours_apart(colours):
    clf = ODENetClassifier(**COLOUR, max_iter=12, random_state=0)
    assert clf.fit(*colours).score(*colours) > 0.95


def test_channels_come_first(colours):
    X, y = colours
    clf = ODENetClassifier(**COLOUR, max_iter=1, random_state=0).fit(X, y)
    # the standardisation of a channel is that of the first axis
    images = X.reshape(-1, 3, 6, 5)
    mean, scale = images.mean((0, 2, 3)), images.std((0, 2, 3))
    np.testing.assert_allclose(clf.module_.mean.flatten(), mean, rtol=1e-4)
    np.testing.assert_allclose(clf.module_.scale.flatten(), scale, rtol=1e-4)
    # the first map is a plain convolution of such images
    with torch.no_grad():
        z = torch.from_numpy((images - mean[:, None, None]) / scale[:, None, None])
        expected = clf.module_.input_map(z.float())
    start = clf.trajectory(X, n_times=2)[:, 0]
    np.testing.assert_allclose(start, expected, rtol=1e-4, atol=1e-5)
    channels_last = images.transpose(0, 2, 3, 1).reshape(len(X), -1)
    other = clf.predict_proba(channels_last)
    assert np.abs(other - clf.predict_proba(X)).max() > 1e-3


def test_a_regressor_reads_a_number_off_images():
    rng = np.random.default_rng(0)
    level = rng.uniform(0, 1, 150)
    X = (rng.uniform(size=(150, 64)) < level[:, None]).astype(float)
    Y = np.c_[1000 * level, -level]
    settings = {**GREY, "learning_rate_init": 3e-2, "max_iter": 20}
    reg = ODENetRegressor(**settings, random_state=0).fit(X, Y)
    assert reg.predict(X).shape == (150, 2)
    assert reg.predict(X).dtype == np.float64  # as the targets
    assert reg.score(X, X.mean(1)[:, None] * [1000, -1]) > 0.8


def test_units_of_pixels_do_not_matter(digits):
    X, y = digits
    one = ODENetClassifier(**GREY, dtype="float64", **SHORT).fit(X, y)
    two = ODENetClassifier(**GREY, dtype="float64", **SHORT).fit(1e4 * X - 7, y)
    np.testing.assert_allclose(
        one.predict_proba(X), two.predict_proba(1e4 * X - 7), rtol=1e-6
    )


def test_a_constant_channel_does_no_harm(digits):
    X, y = digits
    X = np.c_[X, np.full(X.shape, 255.0)]
    settings = {**GREY, "image_shape": (2, 8, 8), "random_shift": 0}
    clf = ODENetClassifier(**settings, max_iter=20, random_state=0).fit(X, y)
    assert clf.module_.scale.flatten()[1] == 1.0
    assert clf.score(X, y) > 0.9


def test_weights_count_for_the_standardisation(colours):
    X, y = colours
    weight = np.random.default_rng(0).integers(0, 3, len(y))
    one = ODENetClassifier(**COLOUR, max_iter=1).fit(X, y, sample_weight=weight)
    two = ODENetClassifier(**COLOUR, max_iter=1)
    two.fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    torch.testing.assert_close(one.module_.mean, two.module_.mean)
    torch.testing.assert_close(one.module_.scale, two.module_.scale)


# --- precision ----------------------------------------------------------------------


def test_images_are_single_precision_unless_asked_otherwise(digits, fitted):
    X, y = digits
    assert X.dtype == np.float64
    assert fitted.predict_proba(X).dtype == np.float32
    assert next(fitted.module_.parameters()).dtype == torch.float32
    double = ODENetClassifier(**GREY, dtype="float64", **SHORT).fit(X, y)
    assert double.predict_proba(X).dtype == np.float64
    assert next(double.module_.parameters()).dtype == torch.float64


def test_precision_of_the_data_makes_no_difference(digits):
    X, y = digits
    one = ODENetClassifier(**GREY, **SHORT).fit(X, y)
    two = ODENetClassifier(**GREY, **SHORT).fit(X.astype(np.float32), y)
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))


# --- sizes --------------------------------------------------------------------------


def test_parameters_are_those_of_the_description():
    X = np.random.default_rng(0).normal(size=(4, 784)).astype(np.float32)
    clf = ODENetClassifier(image_shape=(1, 28, 28), max_iter=1, solver="euler")
    clf.fit(X, np.arange(10)[[0, 1, 2, 2]])
    first = 64 * 9 + 64
    halving = 2 * 64 + 64 * 64 * 9 + 64  # norm and convolution
    field = 3 * 2 * 64 + 2 * (65 * 64 * 9 + 64)
    end = 2 * 64 + 3 * 64 + 3  # norm and linear map to three classes
    assert n_parameters(clf) == first + 2 * halving + field + end
    assert clf.trajectory(X, n_times=2).shape == (4, 2, 64, 7, 7)


@pytest.mark.parametrize(
    ("size", "inside"),
    [
        ((8, 8), (8, 8)),
        ((9, 9), (5, 5)),
        ((28, 28), (7, 7)),
        ((32, 32), (8, 8)),
        ((33, 17), (9, 5)),
        ((5, 40), (5, 40)),
        ((11, 30), (6, 15)),
        ((1, 12), (1, 12)),
    ],
)
def test_images_are_halved_until_the_shorter_side_is_at_most_eight(size, inside):
    X = np.random.default_rng(0).normal(size=(4, size[0] * size[1]))
    clf = ODENetClassifier(
        image_shape=(1, *size), n_channels=2, hidden_layer_sizes=2, max_iter=1
    )
    clf.fit(X, [0, 1, 0, 1])
    assert clf.trajectory(X, n_times=3).shape == (4, 3, 2, *inside)
    assert np.isfinite(clf.predict_proba(X)).all()


@pytest.mark.parametrize(
    ("n_downsamplings", "inside"), [(0, (8, 8)), (1, (4, 4)), (2, (2, 2))]
)
def test_the_number_of_halvings_can_be_chosen(digits, n_downsamplings, inside):
    X, y = digits
    settings = {**GREY, "n_downsamplings": n_downsamplings}
    clf = ODENetClassifier(**settings, max_iter=1)
    assert clf.fit(X, y).trajectory(X[:2], n_times=2).shape == (2, 2, 8, *inside)


def test_a_single_pixel_is_too_little(digits):
    clf = ODENetClassifier(**{**GREY, "n_downsamplings": 3}, max_iter=1)
    with pytest.raises(ValueError, match="n_downsamplings=3 leaves a single pixel"):
        clf.fit(*digits)


@pytest.mark.parametrize("augment_dim", [0, 1, 3])
def test_trajectories_start_at_the_mapped_image_and_end_where_predict_reads(
    digits, augment_dim
):
    X, y = digits
    clf = ODENetClassifier(**GREY, augment_dim=augment_dim, **SHORT).fit(X, y)
    path = clf.trajectory(X[:40], n_times=5)
    assert path.shape == (40, 5, 8 + augment_dim, 4, 4)
    assert (path[:, 0, 8:] == 0).all()
    with torch.no_grad():
        logits = clf.module_.output_map(torch.from_numpy(path[:, -1]))
    np.testing.assert_allclose(logits, clf.decision_function(X[:40]), atol=1e-5)
    if augment_dim:
        assert np.abs(path[:, -1, 8:]).max() > 1e-3


def test_hidden_channels_and_activation_reach_the_field(digits):
    X, y = digits
    settings = {**GREY, "hidden_layer_sizes": (5, 6)}
    clf = ODENetClassifier(**settings, activation="tanh", max_iter=1).fit(X, y)
    widths = [c.out_channels for c in clf.module_.field.convolutions]
    assert widths == [5, 6, 8]
    assert clf.module_.field.activation == "tanh"


# --- a prediction is of its own row only --------------------------------------------


@pytest.mark.parametrize("rows", [1, 16, 48])
def test_bits_do_not_depend_on_the_size_of_blocks(monkeypatch, fitted, digits, rows):
    X, _ = digits
    whole = [fitted.predict_proba(X), fitted.trajectory(X, 4)]
    count = fitted.count_evaluations(X)
    monkeypatch.setattr(sknode._odenet_base, "CHUNK_ROWS", rows)
    np.testing.assert_array_equal(fitted.predict_proba(X), whole[0])
    np.testing.assert_array_equal(fitted.trajectory(X, 4), whole[1])
    np.testing.assert_array_equal(fitted.count_evaluations(X), count)
    monkeypatch.undo()
    monkeypatch.setattr(sknode._odenet_base, "CHUNK_VALUES", rows * 8 * 16)
    np.testing.assert_array_equal(fitted.predict_proba(X), whole[0])
    np.testing.assert_array_equal(fitted.trajectory(X, 4), whole[1])


@pytest.mark.parametrize("rows", [1, 16, 48])
def test_bits_of_tabular_data_do_not_depend_on_it_either(monkeypatch, digits, rows):
    X, y = digits
    reg = ODENetRegressor(augment_dim=1, **SHORT).fit(X, y)
    whole = [reg.predict(X), reg.trajectory(X, 4), reg.count_evaluations(X)]
    monkeypatch.setattr(sknode._odenet_base, "CHUNK_ROWS", rows)
    np.testing.assert_array_equal(reg.predict(X), whole[0])
    np.testing.assert_array_equal(reg.trajectory(X, 4), whole[1])
    np.testing.assert_array_equal(reg.count_evaluations(X), whole[2])


def test_a_prediction_has_the_same_bits_in_whatever_company(fitted, digits):
    X, _ = digits
    whole = fitted.decision_function(X)
    for n in (1, 2, 17, 33):
        np.testing.assert_array_equal(fitted.decision_function(X[:n]), whole[:n])
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_array_equal(fitted.decision_function(X[order]), whole[order])


def test_a_prediction_of_a_wider_network_has_the_same_bits_too(colours):
    X, y = colours
    clf = ODENetClassifier(
        image_shape=(3, 6, 5), n_channels=33, augment_dim=1, max_iter=1, solver="rk4"
    )
    whole = clf.fit(X, y).decision_function(X)
    for n in (1, 5, 18, 70):
        np.testing.assert_array_equal(clf.decision_function(X[:n]), whole[:n])


def test_images_are_shifted_in_training_only(digits):
    X, y = digits
    settings = {**GREY, "max_iter": 2, "random_state": 0}
    still = ODENetClassifier(**settings, random_shift=0).fit(X, y)
    shifted = ODENetClassifier(**settings, random_shift=2).fit(X, y)
    assert not np.allclose(still.loss_curve_, shifted.loss_curve_, rtol=1e-3)
    first = shifted.predict_proba(X)
    np.testing.assert_array_equal(shifted.predict_proba(X), first)
    again = ODENetClassifier(**settings, random_shift=2).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), first)


def test_shifts_move_whole_images_by_whole_pixels():
    images = torch.arange(2 * 5 * 6, dtype=torch.float32).view(1, 2, 5, 6)
    rows = images.flatten(1).repeat(200, 1)
    generator = torch.Generator().manual_seed(0)
    shifted = shift_at_random(rows, (2, 5, 6), 2, generator).view(200, 2, 5, 6)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    moves = {
        (i, j): padded[0, :, i : i + 5, j : j + 6] for i in range(5) for j in range(5)
    }
    seen = set()
    for image in shifted:
        matches = [at for at, moved in moves.items() if torch.equal(image, moved)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 25


# --- as one more estimator ----------------------------------------------------------


def test_penalties_apply_to_images(digits):
    X, y = digits
    plain = ODENetClassifier(**GREY, **SHORT).fit(X, y)
    settings = {**GREY, **SHORT, "kinetic_penalty": 0.5, "jacobian_penalty": 0.5}
    straight = ODENetClassifier(**settings).fit(X, y)
    assert straight.loss_ > plain.loss_
    again = ODENetClassifier(**settings).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), straight.predict_proba(X))


@pytest.mark.parametrize("gradient", ["continuous", "backprop"])
def test_every_gradient_trains_alike(digits, gradient):
    X, y = digits
    settings = {**GREY, **SHORT, "dtype": "float64", "rtol": 1e-6, "atol": 1e-6}
    one = ODENetClassifier(**settings).fit(X[:60], y[:60])
    two = ODENetClassifier(gradient=gradient, **settings).fit(X[:60], y[:60])
    np.testing.assert_allclose(one.loss_curve_, two.loss_curve_, rtol=1e-4)


@pytest.mark.parametrize(
    "copy_of", [lambda clf: pickle.loads(pickle.dumps(clf)), copy.deepcopy]
)
def test_survives(copy_of, fitted, digits):
    again = copy_of(fitted)
    X, y = digits
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    assert again.partial_fit(X, y).n_iter_ == fitted.n_iter_ + 1


def test_clones_train_the_same(digits):
    X, y = digits
    clf = ODENetClassifier(**GREY, **SHORT).fit(X, y)
    again = clone(clf).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), clf.predict_proba(X))


def test_warm_start_goes_on(digits):
    X, y = digits
    # one batch, so that the order of rows does not matter
    settings = {**GREY, "batch_size": 200, "random_shift": 0, "tol": 0.0}
    settings["random_state"] = 0
    once = ODENetClassifier(max_iter=4, warm_start=True, **settings).fit(X, y)
    twice = ODENetClassifier(max_iter=2, warm_start=True, **settings).fit(X, y)
    np.testing.assert_allclose(
        twice.fit(X, y).predict_proba(X), once.predict_proba(X), atol=1e-5
    )


def test_grid_search_over_channels(digits):
    clf = ODENetClassifier(image_shape=(1, 8, 8), max_iter=2, random_state=0)
    grid = {"n_channels": [1, 3], "n_downsamplings": [1, 2]}
    search = GridSearchCV(clf, grid, cv=2).fit(*digits)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    best = search.best_estimator_
    assert best.module_.state_shape[0] == search.best_params_["n_channels"]


@pytest.mark.parametrize(
    "first",
    [MinMaxScaler(), FunctionTransformer(lambda X: X.reshape(len(X), -1) / 16)],
    ids=["MinMaxScaler", "FunctionTransformer"],
)
def test_works_behind_a_transformer(digits, first):
    clf = ODENetClassifier(**GREY, max_iter=12, random_state=0)
    assert make_pipeline(first, clf).fit(*digits).score(*digits) > 0.9


def test_images_in_four_dimensions_can_be_reshaped_by_the_pipeline(digits):
    X, y = digits
    flat = FunctionTransformer(lambda X: X.reshape(len(X), -1))
    model = make_pipeline(flat, ODENetClassifier(**GREY, **SHORT))
    images = X.reshape(-1, 1, 8, 8)
    alone = ODENetClassifier(**GREY, **SHORT).fit(X, y)
    np.testing.assert_array_equal(
        model.fit(images, y).predict_proba(images), alone.predict_proba(X)
    )


def test_data_frames_of_pixels(digits):
    X, y = digits
    frame = pd.DataFrame(X, columns=[f"pixel_{i}" for i in range(64)])
    clf = ODENetClassifier(**GREY, **SHORT).fit(frame, y)
    alone = ODENetClassifier(**GREY, **SHORT).fit(X, y)
    assert list(clf.feature_names_in_) == list(frame.columns)
    np.testing.assert_array_equal(clf.predict_proba(frame), alone.predict_proba(X))


@pytest.mark.parametrize("shape", [[1, 8, 8], np.array([1, 8, 8])])
def test_the_shape_can_be_a_list_or_an_array(digits, shape):
    X, y = digits
    clf = ODENetClassifier(**{**GREY, "image_shape": shape}, **SHORT).fit(X, y)
    alone = ODENetClassifier(**GREY, **SHORT).fit(X, y)
    np.testing.assert_array_equal(clf.predict_proba(X), alone.predict_proba(X))


# --- errors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 8), (1, 1, 8, 8), (1, -8, -8), (0, 8, 8), (1, 8.0, 8), (), "188", 64]
)
def test_a_shape_that_is_none_is_refused(digits, shape):
    with pytest.raises(ValueError, match="image_shape"):
        ODENetClassifier(image_shape=shape, max_iter=1).fit(*digits)


def test_a_shape_for_other_features_is_refused(digits):
    with pytest.raises(ValueError, match=r"image_shape=\(1, 7, 8\) makes 56 .*has 64"):
        ODENetClassifier(image_shape=(1, 7, 8), max_iter=1).fit(*digits)


@pytest.mark.parametrize("shape", [(8, 8, 1), (6, 6, 3)])
def test_channels_last_are_told(shape):
    X = np.random.default_rng(0).normal(size=(6, np.prod(shape)))
    clf = ODENetClassifier(image_shape=shape, n_channels=2, max_iter=1)
    first = (shape[2], *shape[:2])
    with pytest.warns(UserWarning, match=r"channels come first.*transpose") as caught:
        clf.fit(X, np.arange(6) % 2)
    assert str(first) in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("method", ["fit", "predict"])
@pytest.mark.parametrize("shape", [(-1, 1, 8, 8), (-1, 8, 8)])
def test_images_that_are_not_flat_are_told_how_to_be(fitted, digits, method, shape):
    X, y = digits
    arguments = (X.reshape(shape), y)[: 2 if method == "fit" else 1]
    with pytest.raises(ValueError, match=r"X\.reshape\(n_samples, -1\).*image_shape"):
        getattr(copy.deepcopy(fitted), method)(*arguments)


@pytest.mark.parametrize(
    "parameters", [{"n_channels": 0}, {"n_downsamplings": -1}, {"n_channels": 2.5}]
)
def test_bad_parameters_are_named(digits, parameters):
    settings = {**GREY, **parameters}
    with pytest.raises(ValueError, match=next(iter(parameters))):
        ODENetClassifier(**settings).fit(*digits)
