"""The solver on a GPU: the same numbers as on the CPU, and few synchronisations."""

import warnings

import pytest
import torch

from sknode.fields import MLPField
from sknode.ode import Event, solve_ode
from sknode.ode.tableaus import METHODS, get_tableau

T = torch.linspace(0, 1, 7, dtype=torch.float64)


def make_problem(device, dtype=torch.float64, batch=100):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MLPField(3, (32, 32), time_dependent=True)
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(2)
    y0 = torch.randn(batch, 3, generator=generator, dtype=dtype)
    return field.to(device, dtype), y0.to(device)


def settings(method):
    return {} if get_tableau(method).adaptive else {"step_size": 0.1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step_control", ["per_sample", "shared"])
def test_equals_the_cpu(method, step_control, cuda):
    results = []
    for device in ("cpu", cuda):
        field, y0 = make_problem(device)
        y0.requires_grad_()
        t = T.to(device).requires_grad_()
        solution = solve_ode(
            field, y0, t, method=method, step_control=step_control, **settings(method)
        )
        solution.y.pow(2).sum().backward()
        grads = [p.grad for p in field.parameters()]
        results.append([solution.y, y0.grad, t.grad, *grads])
        assert solution.y.device.type == solution.status.device.type
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-8, atol=1e-8)


def test_any_callable(cuda):
    rate = torch.tensor(0.5, device=cuda, dtype=torch.float64, requires_grad=True)
    _, y0 = make_problem(cuda)
    solution = solve_ode(lambda t, y: -rate * y, y0, T.to(cuda), rtol=1e-10, atol=1e-10)
    exact = y0[:, None] * torch.exp(-rate * T.to(cuda))[:, None]
    torch.testing.assert_close(solution.y, exact, rtol=1e-8, atol=1e-8)
    solution.y.sum().backward()
    assert rate.grad.device.type == "cuda"


def test_one_synchronisation_a_step(cuda):
    field, y0 = make_problem(cuda, torch.float32)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solve_ode(field, y0, t, rtol=1e-5)  # makes the coefficients

    def count(rtol):
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                solution = solve_ode(field, y0, t, rtol=rtol, atol=rtol)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        syncs = sum("synchronizing" in str(w.message) for w in caught)
        return syncs, int(solution.stats["n_steps"].max())

    loose, tight = count(1e-3), count(1e-6)
    assert tight[1] > loose[1]
    assert tight[0] - loose[0] <= tight[1] - loose[1]


def test_events(cuda):
    def circle(t, y):
        return torch.stack([-y[:, 1], y[:, 0]], 1)

    angle = torch.tensor([0.1, 1.0, 2.0], device=cuda, dtype=torch.float64)
    y0 = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    event = Event(lambda t, y: y[:, 1])
    solution = solve_ode(circle, y0, [0.0, 9.0], event=event, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        solution.events[0].t, torch.pi - angle, rtol=0, atol=1e-8
    )
