"""The network of the latent ODE: what it sees, and what it must not see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sknode._network import SolverSettings
from sknode._series.network import LatentODENetwork, Posterior, Series
from sknode._series.panel import Panel
from sknode._series.recurrent import last_state
from sknode.ode import SolverError

SETTINGS = SolverSettings("dopri5", 1e-6, 1e-6, 1000, "discrete", None)


def make_network(n_channels=2, n_covariates=1, latent_dim=3, hidden=(8,), rnn=6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LatentODENetwork(
            n_channels, n_covariates, latent_dim, hidden, "tanh", rnn, (7,)
        )
    return network.double()


def make_panel(lengths=(5, 1, 0, 9), n_channels=2, n_covariates=1, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    n = offsets[-1]
    time = np.concatenate([np.sort(rng.uniform(size=k)) for k in lengths])
    values = rng.normal(size=(n, n_channels))
    values[rng.uniform(size=values.shape) < 0.3] = np.nan
    values[:, 0] = np.where(np.isnan(values).all(1), 0.5, values[:, 0])
    return Panel(offsets, time, values, rng.normal(size=(n, n_covariates)))


def make_series(panel=None, dtype=torch.float64):
    return Series.of(panel or make_panel(), torch.zeros((), dtype=dtype))


def means_of(network, series):
    q = network.encode(series)
    return network(q.mean[None], q.start, series, SETTINGS)[0][0]


def test_series_have_the_rows_of_the_panel_and_repeat_the_last_time():
    panel = make_panel()
    series = make_series(panel)
    assert series.time.shape == (4, 9)
    assert series.lengths.tolist() == [5, 1, 0, 9]
    np.testing.assert_array_equal(series.time[0, :5], panel.time[:5])
    assert (series.time[0, 5:] == panel.time[4]).all()
    seen = np.isfinite(panel.values)
    np.testing.assert_array_equal(series.seen[3], seen[6:])
    assert not series.seen[0, 5:].any() and not series.seen[2].any()
    np.testing.assert_array_equal(
        series.values[3], np.where(seen, panel.values, 0.0)[6:]
    )


def test_panel_without_rows_gives_empty_series():
    series = make_series(make_panel((0, 0)))
    assert series.time.shape == (2, 1) and not series.seen.any()


def test_sizes_of_the_paper_and_output_shapes():
    network = LatentODENetwork(2, 0, 4, (20,), "tanh", 25, (20,)).double()
    assert network.encoder.hidden_size == 25
    assert [tuple(x.weight.shape) for x in network.field.layers] == [(20, 4), (4, 20)]
    assert [tuple(x.weight.shape) for x in network.decoder] == [(20, 4), (2, 20)]
    series = make_series(make_panel(n_covariates=0))
    q = network.encode(series)
    assert q.mean.shape == q.scale.shape == (4, 4)
    noise = torch.zeros(5, 1, 4, dtype=torch.float64)
    means, n_f_evals = network(q.states(noise), q.start, series, SETTINGS)
    assert means.shape == (5, 4, 9, 2) and n_f_evals.shape == (4,)


def test_gradients_reach_every_parameter():
    network, series = make_network(), make_series()
    q = network.encode(series)
    noise = torch.full((2, 1, 3), 0.3, dtype=torch.float64)
    means, _ = network(q.states(noise), q.start, series, SETTINGS)
    loss = q.kl().sum() - network.log_likelihood(means, series).sum()
    loss.backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_recurrence_is_that_of_torch_and_its_gradient_exact():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell = nn.GRUCell(3, 5).double()
        inputs = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([7, 5, 1, 0])
    state = torch.zeros(4, 5, dtype=torch.float64)
    for t in range(6, -1, -1):
        read = cell(inputs[:, t], state)
        state = torch.where((t < lengths)[:, None], read, state)
    weight = torch.arange(5.0, dtype=torch.float64)
    own = last_state(cell, inputs, lengths)
    torch.testing.assert_close(own, state, rtol=1e-13, atol=1e-13)
    sources = [inputs, *cell.parameters()]
    expected = torch.autograd.grad((state**2 * weight).sum(), sources)
    found = torch.autograd.grad((own**2 * weight).sum(), sources)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_encoder_does_not_see_hidden_cells_or_padding():
    network, series = make_network(), make_series()
    keep = torch.ones_like(series.seen)
    keep[3, 2:6, 1] = False
    keep[0, 1] = False
    before = network.encode(series.hide(keep))
    other = torch.where(series.seen & keep, series.values, 77.0)
    after = network.encode(replace(series, values=other).hide(keep))
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.scale, after.scale)
    # rows without any value are as if they were not there
    padded = Series(
        torch.cat([series.time, series.time[:, -1:]], 1),
        torch.cat([series.values, torch.full((4, 1, 2), 5.0)], 1),
        torch.cat([series.seen, torch.zeros(4, 1, 2, dtype=torch.bool)], 1),
        torch.cat([series.covariates, torch.ones(4, 1, 1)], 1),
        series.lengths,
    )
    assert torch.equal(network.encode(padded).mean, network.encode(series).mean)


def test_encoder_sees_what_it_is_shown():
    network, series = make_network(), make_series()
    q = network.encode(series)
    for name in ("values", "covariates", "time"):
        x = getattr(series, name).clone()
        x[3, 4:] += 0.01  # later rows: the first one is that of the state
        changed = network.encode(replace(series, **{name: x}))
        assert not torch.equal(changed.mean[3], q.mean[3]), name
        torch.testing.assert_close(changed.mean[0], q.mean[0], rtol=0, atol=0)


def test_series_without_a_value_has_the_prior():
    network = make_network()
    q = network.encode(make_series())
    assert (q.mean[2] == 0).all() and (q.scale[2] == 1).all()
    assert q.kl()[2].abs().max() == 0


def test_series_does_not_depend_on_batch_or_order():
    network, panel = make_network(), make_panel()
    series = make_series(panel)
    rows = torch.tensor([3, 0])
    together = means_of(network, series)
    some = means_of(network, series[rows])
    torch.testing.assert_close(some[0], together[3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some[1, :5], together[0, :5], rtol=1e-12, atol=1e-12)


def test_latent_states_flow_forwards_and_backwards_from_the_start():
    network = make_network(n_covariates=0)
    start = torch.tensor([0.4], dtype=torch.float64)
    time = torch.tensor([[0.0, 0.1, 0.4, 0.4, 0.9]], dtype=torch.float64)
    state = torch.tensor([[[0.3, -0.2, 0.8]]], dtype=torch.float64)
    z, _ = network.flow(state, start, time, SETTINGS)
    torch.testing.assert_close(z[0, 0, 2:4], state[0].expand(2, 3))
    # from the earliest state the same path leads through all others
    again, _ = network.flow(z[:, :, 0], time[:, 0], time, SETTINGS)
    torch.testing.assert_close(again, z, rtol=1e-4, atol=1e-5)
    assert (z[0, 0, 0] - state).abs().max() > 1e-3


def test_divergence_is_that_of_torch_distributions():
    mean = torch.tensor([[0.0, 1.0, -2.0]])
    scale = torch.tensor([[1.0, 0.1, 3.0]])
    q = Posterior(torch.zeros(1), mean, scale)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, scale), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(q.kl(), expected)


def test_log_likelihood_is_that_of_the_seen_values():
    network, series = make_network(), make_series()
    with torch.no_grad():
        network.log_noise.copy_(torch.tensor([-1.0, -30.0]))
    # below the floor noise is the floor
    assert network.noise[1] == 1e-3
    means = means_of(network, series)
    normal = torch.distributions.Normal(means, network.noise.expand_as(means))
    expected = torch.where(series.seen, normal.log_prob(series.values), 0.0)
    torch.testing.assert_close(
        network.log_likelihood(means, series), expected.sum((1, 2))
    )


def test_part_keeps_what_is_between_shares_of_the_time_of_each_series():
    series = make_series()
    n = len(series)
    first, last = series.time[:, :1], series.time[:, -1:]
    begin = torch.linspace(0, 0.5, n, dtype=torch.float64)[:, None]
    low, high = (first + x * (last - first) for x in (begin, begin + 0.4))
    part = series.part(begin, begin + 0.4)
    kept = (series.time >= low) & (series.time <= high) & series.seen.any(-1)
    assert part.lengths.tolist() == kept.sum(1).tolist()
    assert part.seen.sum() == (series.seen & kept[..., None]).sum()
    whole = series.part(torch.zeros(n, 1), torch.full((n, 1), 2.0))
    assert torch.equal(whole.seen.sum((1, 2)), series.seen.sum((1, 2)))


def test_rows_without_a_value_are_dropped_in_order():
    series = make_series(make_panel((7, 1, 0, 9, 4)))
    keep = torch.rand(series.seen.shape, generator=torch.Generator().manual_seed(0))
    hidden = series.hide(keep < 0.4)
    assert not hidden.dense
    dropped = hidden.drop_empty_rows()
    assert dropped.dense and dropped.drop_empty_rows() is dropped
    assert dropped.time.shape[1] == int(dropped.lengths.max()) < 9
    for i, n in enumerate(dropped.lengths.tolist()):
        rows = hidden.seen[i].any(-1).nonzero()[:, 0]
        assert len(rows) == n
        for name in ("time", "values", "seen", "covariates"):
            kept = getattr(dropped, name)[i]
            assert torch.equal(kept[:n], getattr(hidden, name)[i, rows]), name
        assert not dropped.seen[i, n:].any() and not dropped.values[i, n:].any()
        assert (dropped.time[i, n:] == dropped.time[i, max(n - 1, 0)]).all()
    # where there is none to drop, the rows stay as they are
    full = series.drop_empty_rows()
    assert full.dense and torch.equal(full.values, series.values)


def test_failing_solve_raises_and_says_which_series():
    network, series = make_network(), make_series()
    with torch.no_grad():
        network.field.layers[0].weight.mul_(1e4)
        network.field.layers[1].weight.mul_(1e6)
    few = replace(SETTINGS, max_steps=5)
    q = network.encode(series)
    with pytest.raises(SolverError, match="max_steps"):
        network(q.mean[None], q.start, series, few)


def test_same_as_saved_and_loaded():
    network, series = make_network(), make_series()
    other = make_network()
    other.load_state_dict(network.state_dict())
    assert torch.equal(means_of(network, series), means_of(other, series))


def test_series_without_rows_are_not_solved_for():
    network = make_network()
    panel = make_panel((5, 6, 7))
    q = network.encode(make_series(panel))
    # the first has none, and would take the times of the next one
    asked = Panel(
        np.array([0, 0, 6, 13]), panel.time[5:], panel.values[5:], panel.covariates[5:]
    )
    started = replace(q, start=torch.tensor([100.0, 0.0, 0.0]).double())
    _, n_f_evals = network(q.mean[None], started.start, make_series(asked), SETTINGS)
    assert n_f_evals[0] <= 2 < n_f_evals[1]
