"""The trainer of the latent ODE, its masks, and posteriors."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from sknode._network import SolverSettings
from sknode._series.network import LatentODENetwork, Posterior, Series
from sknode._series.panel import Panel
from sknode._series.posterior import (
    normal_points,
    paths_at_rows,
    posterior,
    refinement_helps,
)
from sknode._series.training import Trainer, draw_masks
from sknode._training import History, Recipe
from sknode.ode import SolverError

COARSE = SolverSettings("dopri5", 1e-3, 1e-3, 1000, "discrete", None)
EXACT = SolverSettings("dopri5", 1e-6, 1e-6, 1000, "discrete", None)
NOISE = 0.2


def make_panel(n_series=40, n_times=20, seed=0):
    """Sines of a random phase, irregularly observed, with noise."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.uniform(size=(n_series, n_times)), 1)
    phase = rng.uniform(0, 2 * np.pi, (n_series, 1))
    truth = np.stack([np.sin(5 * time + phase), np.cos(5 * time + phase)], -1)
    values = truth + NOISE * rng.normal(size=truth.shape)
    values[rng.uniform(size=values.shape) < 0.1] = np.nan
    offsets = np.arange(n_series + 1) * n_times
    n = n_series * n_times
    panel = Panel(offsets, time.ravel(), values.reshape(n, 2), np.zeros((n, 0)))
    return panel, truth.reshape(n, 2)


def make_network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatentODENetwork(2, 0, 3, (10,), "tanh", 10, (10,))


def train(epochs, panel=None, held_out=None, settings=COARSE, on_epoch=None, **changes):
    network, history = make_network(), History()
    recipe = Recipe(
        max_iter=epochs,
        batch_size=20,
        learning_rate=2e-2,
        alpha=0.0,
        tol=0.0,
        n_iter_no_change=epochs,
        gradient_bound=None,
        optimizer="muon",
        decays=True,
    )
    recipe = replace(recipe, **changes)
    generator = torch.Generator().manual_seed(0)
    trainer = Trainer(network, settings, recipe, generator, history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        trainer.fit(panel or make_panel()[0], held_out, on_epoch)
    return network, history


@pytest.fixture(scope="module")
def trained():
    return train(300)[0].double()


def as_query(panel):
    return replace(panel, values=np.full_like(panel.values, np.nan))


def draw(network, q, query, n_draws, generator):
    """Return sample paths without noise, (n_draws, n_rows, n_channels)."""
    shape = n_draws, *q.mean.shape
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return paths_at_rows(network, q, query, EXACT, noise).numpy()


def predict_mean(network, q, query, n_draws=16):
    """Return mean and variance of the channels, both (n_rows, n_channels)."""
    noise = normal_points(n_draws, network.latent_dim, 0, q.mean)
    paths = paths_at_rows(network, q, query, EXACT, noise)
    return paths.mean(0).numpy(), paths.var(0, correction=0).numpy()


def first_half(panel):
    """Return the panel with the values of the first half of its times only."""
    values = np.where(panel.time[:, None] < 0.5, panel.values, np.nan)
    return replace(panel, values=values)


def test_masks_hide_points_blocks_and_ends_but_never_the_first_row():
    panel, _ = make_panel(600, 40)
    series = Series.of(panel, torch.zeros(()))
    keep = draw_masks(series, torch.Generator().manual_seed(0))
    shown = (series.seen & keep).any(-1)
    assert (series.first_rows() <= shown).all()
    hidden = ~keep.all(-1)
    share = hidden.float().mean(1)
    assert (share == 0).float().mean() > 0.05  # some series are whole
    # nothing is shown of ends, and of blocks that are no ends
    dark = ~shown
    assert dark[:, -8:].all(1).float().mean() > 0.1
    inner = dark[:, 1:-8].unfold(1, 8, 1).all(-1).any(1) & shown[:, -8:].any(1)
    assert inner.float().mean() > 0.1
    # of some rows one channel only
    assert (keep.any(-1) & ~keep.all(-1)).float().mean() > 0.05
    again = draw_masks(series, torch.Generator().manual_seed(0))
    assert torch.equal(keep, again)


def test_noise_is_recovered_and_forecasts_follow_the_curve(trained):
    np.testing.assert_allclose(trained.noise.detach(), NOISE, rtol=0.3)
    panel, truth = make_panel(30, seed=1)
    q = posterior(trained, first_half(panel), EXACT)
    mean, variance = predict_mean(trained, q, as_query(panel))
    late = panel.time > 0.5
    rmse = np.sqrt(((mean - truth)[late] ** 2).mean())
    assert rmse < 0.3  # predicting the mean has 0.7
    # what it says of its error is what it is, about
    z = ((mean - truth) ** 2)[late].mean() / variance[late].mean()
    assert 0.3 < z < 5


def log_volume(q):
    return q.factor.diagonal(dim1=1, dim2=2).abs().log().sum(1)


def test_posterior_narrows_with_more_values(trained):
    panel, _ = make_panel(30, seed=1)
    values = np.where(panel.time[:, None] < 0.2, panel.values, np.nan)
    few = posterior(trained, replace(panel, values=values), EXACT)
    many = posterior(trained, panel, EXACT)
    assert (log_volume(many) < log_volume(few)).double().mean() > 0.9


def test_refined_states_are_modes_with_the_curvature_there(trained):
    panel, _ = make_panel(30, seed=1)
    series = Series.of(panel, trained.log_noise)
    q = posterior(trained, panel, EXACT)

    def errors(z):
        means, _ = trained(z[None], q.start, series, EXACT)
        scaled = (means[0] - series.values) / trained.noise
        return torch.where(series.seen, scaled, torch.zeros_like(scaled)).flatten(1)

    def minus_log_posterior(z):
        return 0.5 * (errors(z).square().sum(1) + z.square().sum(1))

    z = q.mean.clone().requires_grad_()
    loss = minus_log_posterior(z)
    encoded = posterior(trained, panel, EXACT, refine=False)
    with torch.no_grad():
        assert (loss < minus_log_posterior(encoded.mean)).all()
    (slope,) = torch.autograd.grad(loss.sum(), z)
    covariance = q.factor @ q.factor.mT
    # in units of what is left open the mode is near; bent valleys take many steps
    left = (slope[:, None] @ covariance @ slope[..., None]).flatten()
    assert (left < 1e-2).double().mean() > 0.9
    assert left.max() < 0.5
    jacobian = torch.stack(
        [
            torch.autograd.grad(errors(z)[:, k].sum(), z)[0]
            for k in range(series.seen[0].numel())
        ],
        1,
    )
    precision = jacobian.mT @ jacobian + torch.eye(3)
    product = (covariance @ precision).detach()
    torch.testing.assert_close(
        product, torch.eye(3).double().expand_as(product), rtol=0, atol=0.02
    )


def test_states_that_cannot_be_solved_for_keep_the_prior(trained):
    wild = copy.deepcopy(trained)
    with torch.no_grad():
        wild.field.layers[-1].weight.fill_(1e30)
    panel, _ = make_panel(3, seed=1)
    q = posterior(wild, panel, EXACT)
    encoded = posterior(wild, panel, EXACT, refine=False)
    torch.testing.assert_close(q.mean, encoded.mean)
    torch.testing.assert_close(q.factor, torch.eye(3).double().expand(3, 3, 3))


def test_a_series_without_values_has_the_prior(trained):
    panel, _ = make_panel(3, seed=1)
    q = posterior(trained, as_query(panel), EXACT)
    assert not q.mean.any()
    torch.testing.assert_close(q.factor, torch.eye(3).double().expand(3, 3, 3))


def test_refinement_is_chosen_where_hidden_values_are_predicted_better(trained):
    panel, _ = make_panel(30, seed=1)
    generator = torch.Generator()
    # an encoder that says nothing leaves all to refinement
    mute = copy.deepcopy(trained)
    with torch.no_grad():
        for p in mute.posterior_map.parameters():
            p.zero_()
    assert refinement_helps(mute, panel, EXACT, generator.manual_seed(0))
    # a model that takes signal for noise makes refinement forget what is seen
    deaf = copy.deepcopy(trained)
    with torch.no_grad():
        deaf.log_noise.fill_(3.0)
    assert not refinement_helps(deaf, panel, EXACT, generator.manual_seed(0))


def test_predictions_of_a_series_depend_on_it_alone(trained):
    panel, _ = make_panel(7, seed=2)
    seen, query = first_half(panel), as_query(panel)

    def predict(rows):
        parts = [np.arange(20 * i, 20 * i + 20) for i in rows]
        take = np.concatenate(parts)
        offsets = np.arange(len(rows) + 1) * 20
        given, asked = (
            Panel(offsets, x.time[take], x.values[take], x.covariates[take])
            for x in (seen, query)
        )
        q = posterior(trained, given, EXACT)
        mean, variance = predict_mean(trained, q, asked)
        return mean.reshape(len(rows), 20, 2), variance.reshape(len(rows), 20, 2)

    order = [4, 0, 6, 2, 1, 3, 5]
    everything, some, alone = predict(range(7)), predict(order), predict([4])
    for all_of_them, shuffled, one in zip(everything, some, alone, strict=True):
        np.testing.assert_allclose(shuffled, all_of_them[order], atol=1e-9)
        np.testing.assert_allclose(one[0], all_of_them[4], atol=1e-9)


def test_draws_are_coherent_paths_around_the_mean(trained):
    panel, _ = make_panel(5, seed=3)
    q = posterior(trained, first_half(panel), EXACT)
    generator = torch.Generator().manual_seed(0)
    paths = draw(trained, q, as_query(panel), 400, generator)
    mean, variance = predict_mean(trained, q, as_query(panel), n_draws=256)
    assert paths.shape == (400, 100, 2)
    error = (paths.mean(0) - mean) / np.sqrt(variance / 400)
    assert np.abs(error).max() < 6
    np.testing.assert_allclose(paths.var(0), variance, rtol=0.5)
    # neighbours in time move together
    steps = np.diff(paths[:, :20], axis=1)
    assert (steps.var(0) < paths[:, 1:20].var(0)).mean() > 0.8


def test_normal_points_are_standard_normal_and_the_same_for_all_series():
    points = normal_points(256, 5, 0, torch.zeros((), dtype=torch.float64))
    assert points.shape == (256, 1, 5)
    np.testing.assert_allclose(points.mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose(points.std(0), 1.0, atol=0.05)
    assert torch.equal(points, normal_points(256, 5, 0, points))
    assert not torch.equal(points, normal_points(256, 5, 1, points))


def test_same_seed_same_network_and_global_state_untouched():
    torch_state = torch.get_rng_state()
    one, first = train(3)
    two, second = train(3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert first.loss == second.loss and len(first.loss) == 3
    assert min(first.nfe) > 0
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_loss_is_the_lower_bound_over_the_cells_once_encoders_are_asked_nothing():
    panel, _ = make_panel(6)
    network = make_network()
    trainer = Trainer(network, EXACT, None, torch.Generator().manual_seed(3), History())
    series = Series.of(panel, network.log_noise)
    trainer._lack = lambda *args: 0.0
    with torch.no_grad():
        losses, _ = trainer._loss(series, 0.7, 10.0)
        q = network.encode(series)
        noise = torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(3))
        means, _ = network(q.states(noise)[None], q.start, series, EXACT)
        fit = network.log_likelihood(means, series)[0]
        # the divergence is that of the batch, and far from free here
        assert (q.kl().mean(0) > 0.05).all()
        expected = (0.7 * q.kl().mean(0).sum() - fit) / 10.0
    torch.testing.assert_close(losses, expected)


def test_what_parts_lack_is_least_for_the_posterior_of_the_whole():
    series = Series.of(make_panel()[0], torch.zeros(()))
    network = make_network()
    trainer = Trainer(network, EXACT, None, torch.Generator(), History())
    whole = network.encode(series).detach()
    means = torch.zeros_like(series.values)

    def lack(mean, scale):
        network.encode = lambda part: Posterior(whole.start, mean, scale)
        trainer.generator.manual_seed(0)
        return trainer._lack(series, whole, whole.mean, means)

    least = lack(whole.mean, whole.scale)
    assert (lack(whole.mean + 0.1, whole.scale) > least).all()
    # twice as wide: the divergence of Gaussians, or the density at what was dreamt of
    further = lack(whole.mean, 2 * whole.scale) - least
    divergence = torch.full_like(further, 3 * (np.log(2) + 0.5 * (0.25 - 1)))
    density = torch.full_like(further, 3 * np.log(2))
    found = further.isclose(divergence, 1e-4), further.isclose(density, 1e-4)
    assert (found[0] | found[1]).all()
    assert found[0].any() and found[1].any()


def test_held_out_series_end_training_and_the_best_average_is_kept():
    held_out, _ = make_panel(10, seed=5)
    _, history = train(20, held_out=held_out)
    assert len(history.validation) == 20
    assert history.validation[-1] > history.validation[0]
    # without patience it ends early, but not while the horizon still grows
    _, history = train(20, held_out=held_out, n_iter_no_change=1, tol=10.0)
    assert 8 < len(history.loss) < 20


def test_callback_ends_training():
    _, history = train(10, on_epoch=lambda epoch: epoch == 1)
    assert len(history.loss) == 2


def test_series_of_any_length_can_be_trained_on():
    rng = np.random.default_rng(0)
    lengths = np.array([1, 0, 30, 2, 7])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    time = np.concatenate([np.sort(rng.uniform(size=k)) for k in lengths])
    time[-7:] = 0.5  # all at the same time
    values = rng.normal(size=(40, 2))
    values[3:8] = np.nan
    _, history = train(2, Panel(offsets, time, values, np.zeros((40, 0))))
    assert np.isfinite(history.loss).all()


def test_failing_solve_ends_training_with_advice():
    few = replace(COARSE, max_steps=1)
    with pytest.raises(SolverError, match="max_steps"):
        train(3, settings=few)
