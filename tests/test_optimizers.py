"""The optimizers, against torch's own."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sknode import ODENetClassifier
from sknode._base import to_numpy, to_torch
from sknode._optimizers import (
    Adam,
    MuonAndAdam,
    make_optimizer,
    orthogonalize,
    penalize,
)
from sknode.fields import ConcatSquashField


def make_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def draw_gradients(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def take_steps(module, optimizer, seeds):
    for seed in seeds:
        draw_gradients(module, seed)
        optimizer.step()


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def same(one, two):
    return all(map(torch.equal, values(one), values(two)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_is_that_of_torch(dtype):
    ours, theirs = make_network().to(dtype), make_network().to(dtype)
    optimizer = make_optimizer(ours, "adam", 0.01)
    penalize(optimizer, 0.3)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim == 1]},
    ]
    peer = torch.optim.Adam(groups, lr=0.01, fused=True)
    take_steps(ours, optimizer, range(5))
    take_steps(theirs, peer, range(5))
    assert same(ours, theirs)


SHAPES = [(4, 9), (9, 4), (5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_are_made_orthogonal_by_a_polynomial_of_their_singular_values(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    singular = singular / matrix.norm()
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    expected = left @ torch.diag(singular) @ right
    torch.testing.assert_close(orthogonalize(matrix), expected, rtol=1e-9, atol=1e-9)
    assert 0.6 < float(singular.min()) < float(singular.max()) < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_that_of_torch(shape):
    ours = nn.Linear(*shape, bias=False)
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizer = make_optimizer(ours, "muon", 0.01)
    peer = torch.optim.Muon(
        theirs.parameters(), lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    take_steps(ours, optimizer, range(5))
    take_steps(theirs, peer, range(5))
    # that of torch computes with eight bits
    error = (ours.weight - theirs.weight).norm()
    assert error < 0.02 * (ours.weight - before.weight).norm()


def test_penalty_of_muon_is_part_of_the_gradient():
    ours, theirs = make_network(), make_network()
    optimizer = make_optimizer(ours, "muon", 0.01)
    other = make_optimizer(theirs, "muon", 0.01)
    penalize(optimizer, 0.3)
    draw_gradients(ours, 0)
    draw_gradients(theirs, 0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim > 1:
                p.grad += 0.3 * p
    optimizer.step()
    other.step()
    torch.testing.assert_close(values(ours), values(theirs))


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_state_is_all_it_takes_to_go_on(name):
    whole, halves = make_network(), make_network()
    take_steps(whole, make_optimizer(whole, name, 0.01), range(6))
    first = make_optimizer(halves, name, 0.02)
    for group in first.param_groups:
        group["lr"] = 0.01
    take_steps(halves, first, range(3))
    kept = to_torch(to_numpy(first.state_dict()))
    second = make_optimizer(halves, name, 0.01, kept)
    take_steps(halves, second, range(3, 6))
    assert same(whole, halves)
    # what was kept is as it was
    third = make_optimizer(make_network(), name, 0.01, kept)
    steps = [part.state[0][0] for part in getattr(third, "parts", (third,))]
    assert float(steps[-1]) == 3


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_a_state_follows_the_precision_of_the_module(name):
    network = make_network()
    first = make_optimizer(network, name, 0.01)
    take_steps(network, first, range(2))
    second = make_optimizer(network.double(), name, 0.01, first.state_dict())
    take_steps(network, second, range(2, 4))
    assert all(p.dtype is torch.float64 and p.isfinite().all() for p in values(network))


def test_another_optimizer_starts_anew():
    X = np.random.default_rng(0).normal(size=(30, 2))
    y = X[:, 0] > 0
    model = ODENetClassifier(warm_start=True, max_iter=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name in ("adam", "muon", "adam"):
            model.set_params(optimizer=name).fit(X, y)
            model.partial_fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_parameters_without_a_gradient_stay(name):
    network = make_network()
    optimizer = make_optimizer(network, name, 0.01)
    take_steps(network, optimizer, range(2))
    before = values(network)
    draw_gradients(network, 2)
    network[0].weight.grad = network[2].bias.grad = None
    optimizer.step()
    moved = [
        not torch.equal(p, q) for p, q in zip(before, values(network), strict=True)
    ]
    assert moved == [False, True, True, False]
    optimizer.zero_grad()
    assert all(p.grad is None for p in network.parameters())


def test_muon_moves_along_orthogonal_directions_and_adam_moves_the_rest():
    network = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(1, 2, 3))
    optimizer = make_optimizer(network, "muon", 0.01)
    assert isinstance(optimizer, MuonAndAdam)
    muon, adam = optimizer.parts
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(6, 6)]
    assert sum(len(g["params"]) for g in adam.param_groups) == 3
    before = network[0].weight.detach().clone()
    take_steps(network, optimizer, [0])
    singular = torch.linalg.svdvals(network[0].weight.detach() - before)
    # Newton and Schulz' iteration is content with singular values about equal
    assert singular.max() < 2 * singular.min()
    rms = (network[0].weight.detach() - before).square().mean().sqrt()
    assert float(rms) == pytest.approx(0.2 * 0.01, rel=0.3)


def test_muon_leaves_gates_and_biases_of_time_to_adam():
    field = ConcatSquashField(2, (8, 8))
    muon, adam = make_optimizer(field, "muon", 0.01).parts
    assert len(muon.param_groups[0]["params"]) == 3
    (matrix,) = adam.param_groups[0]["params"]
    assert matrix is field.modulation.weight


def test_only_convolutions_leave_nothing_to_muon():
    network = nn.Conv2d(1, 1, 3, bias=False)
    assert isinstance(make_optimizer(network, "muon", 0.01), Adam)


FIT_ALL = """
import sys, warnings
import numpy as np, pandas as pd
from sknode import CNFDensity, LatentODERegressor, ODENetClassifier, ODENetRegressor

warnings.simplefilter("ignore")
X = np.random.default_rng(0).normal(size=(40, 2))
few = {"max_iter": 2, "random_state": 0}
ODENetClassifier(**few).fit(X, X[:, 0] > 0)
ODENetRegressor(optimizer="muon", **few).fit(X, X[:, 0])
CNFDensity(**few).fit(X)
rows = pd.DataFrame({"series": np.arange(40) // 10, "time": np.arange(40.0) % 10})
LatentODERegressor(series="series", time="time", **few).fit(rows, X[:, 0])
assert "torch._dynamo" not in sys.modules
"""


def test_no_fit_waits_for_the_compiler_of_torch():
    done = subprocess.run(
        [sys.executable, "-c", FIT_ALL], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
