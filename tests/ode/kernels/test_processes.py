"""The kernels work beside threads, after forks and in worker processes."""

import os
import select
import signal
import sys
import threading

import joblib
import numpy as np
import pytest
import torch

from sknode.ode import kernels, solve_ode

T = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def solve_and_differentiate(field, y0):
    """Return everything that a solve computes, as one array."""
    kernels.THREAD_WORK = 0
    torch.set_num_threads(2)
    start = y0.clone().requires_grad_()
    y = solve_ode(field, start, T).y
    grads = torch.autograd.grad(y.sin().sum(), [start, *field.parameters()])
    return np.concatenate([x.detach().numpy().ravel() for x in (y, *grads)])


@pytest.fixture
def problem(make_field, make_states, monkeypatch):
    monkeypatch.setattr(kernels, "THREAD_WORK", 0)
    return make_field(3, (17, 8), time=True), make_states(150, 3)


def test_threads_do_not_disturb_one_another(problem, make_states):
    field, _ = problem
    batches = [make_states(150, 3, seed=i) for i in range(4)]
    expected = [solve_and_differentiate(field, y0) for y0 in batches]
    found = [[] for _ in batches]

    def work(i):
        for _ in range(5):
            found[i].append(solve_and_differentiate(field, batches[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for values, e in zip(found, expected, strict=True):
        assert len(values) == 5
        assert all(np.array_equal(v, e) for v in values)


@pytest.mark.parametrize("shared", [True, False])
def test_threads_may_be_those_of_torch(shared, problem):
    expected = solve_and_differentiate(*problem)
    found = kernels._native.share_threads(shared)
    assert found == (shared and sys.platform == "linux")
    try:
        for _ in range(3):
            assert np.array_equal(solve_and_differentiate(*problem), expected)
    finally:
        kernels._native.share_threads(True)


def test_a_recording_may_be_read_by_two_threads(problem):
    field, y0 = problem
    y = solve_ode(field, y0, T).y.sum()
    parameters = tuple(field.parameters())
    expected = torch.autograd.grad(y, parameters, retain_graph=True)
    found = []

    def work():
        found.append(torch.autograd.grad(y, parameters, retain_graph=True))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    for grads in found:
        for a, b in zip(grads, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_solves_too(problem):
    expected = solve_and_differentiate(*problem)  # with threads, before the fork
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # never back into the test runner; never longer than a minute
        signal.alarm(60)
        with torch.no_grad():
            y = solve_ode(*problem, T).y
        os.write(writer, y.numpy().tobytes())
        os._exit(0)
    os.close(writer)
    data = b""
    while select.select([reader], [], [], 60)[0] and (part := os.read(reader, 65536)):
        data += part
    assert os.waitpid(child, 0)[1] == 0
    got = np.frombuffer(data)
    assert np.array_equal(got, expected[: len(got)]) and len(got) == 150 * 3 * 3


def test_workers_solve_too(problem):
    expected = solve_and_differentiate(*problem)
    with joblib.parallel_config("loky", n_jobs=2):
        got = joblib.Parallel()(
            joblib.delayed(solve_and_differentiate)(*problem) for _ in range(2)
        )
    for values in got:
        assert np.array_equal(values, expected)
