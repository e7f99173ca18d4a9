"""Steps on a given grid."""

import math

import pytest
import torch

from sknode.ode.march import march


class Growth(torch.nn.Module):
    """A field of time and state whose flow is known."""

    def forward(self, t, y):
        return torch.cos(t) * y


def exact(y0, start, end):
    return y0 * math.exp(math.sin(end) - math.sin(start))


@pytest.mark.parametrize(("start", "end"), [(0.0, 2.0), (2.0, 0.0)])
def test_order_on_an_uneven_grid(start, end):
    y0, errors = torch.ones(1, 1, dtype=torch.float64), []
    for n in (32, 64, 128):
        cuts = [((i / n) + 0.05 * math.sin(2 * math.pi * i / n)) for i in range(n + 1)]
        grid = [start + (end - start) * s for s in cuts]
        errors.append(abs(march(Growth(), y0, grid) - exact(y0, start, end)).item())
    assert errors[0] > 12 * errors[1] > 144 * errors[2] > 0


def test_only_the_ends_of_steps_are_seen():
    times = []

    def field(t, y):
        times.append(t.item())
        return torch.zeros_like(y)

    march(field, torch.ones(2, 1, dtype=torch.float64), [1.0, 0.7, 0.0])
    assert times[0] == 1.0 and times[3] == times[4] == 0.7 and times[7] == 0.0
    assert len(times) == 8


def test_a_grid_of_one_time_changes_nothing():
    y0 = torch.ones(2, 1)
    assert torch.equal(march(Growth(), y0, [0.5]), y0)
