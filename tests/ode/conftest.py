"""Problems with known solutions that the solver's tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


class Swirl:
    """Sixteen points on spirals towards the unit circle, starting at different times.

    ``y' = g(t) (1 - |y|^2) y + w(t) J y`` is non-autonomous, nonlinear and coupled, so
    that a wrong coefficient of whatever kind shows, and has a closed form. An error is
    looked at over all rows together, because for a single one the leading term may
    happen to be small.
    """

    rows = 16
    length = 4.0

    def __init__(self):
        self.t0 = torch.linspace(0, 2, self.rows, dtype=torch.float64)
        # the rows in mixed order, so that start and radius are not related
        order = torch.arange(self.rows) * 7 % self.rows
        self.c = torch.linspace(0.2, 3, self.rows, dtype=torch.float64)[order]

    def f(self, t, y):
        growth, turn = 0.5 + torch.sin(2 * t) / 2, 2 + torch.cos(t)
        radius = (y * y).sum(-1, keepdim=True)
        normal = torch.stack([-y[..., 1], y[..., 0]], -1)
        return growth * (1 - radius) * y + turn * normal

    def exact(self, t: Tensor) -> Tensor:
        """Return the states at times of shape (rows, n)."""
        c = self.c[:, None]
        growth, angle = t / 2 - torch.cos(2 * t) / 4, 2 * t + torch.sin(t)
        radius = (1 + c * torch.exp(-2 * growth)) ** -0.5
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)

    @property
    def y0(self) -> Tensor:
        return self.exact(self.t0[:, None])[:, 0]

    def times(self, offsets) -> Tensor:
        """Return every row's times at these distances from its start."""
        return self.t0[:, None] + torch.as_tensor(offsets, dtype=torch.float64)


@pytest.fixture(scope="session")
def swirl() -> Swirl:
    return Swirl()


@dataclass(frozen=True)
class Problem:
    """An initial value problem with its solution in closed form."""

    f: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    t0: float
    t1: float

    def y0(self, dtype=torch.float64) -> Tensor:
        """Return the initial state as a batch of one."""
        start = torch.tensor(self.t0, dtype=torch.float64)
        return self.exact(start)[None].to(dtype)


def _coupled_slope(t, y):
    y1, y2, y3, y4 = y.unbind(-1)
    t = t.reshape(t.shape[: y1.ndim]) if t.ndim else t
    return torch.stack(
        [
            2 * t * y2**0.5 * y4,
            4 * t * torch.exp(2 * (y3 - 1)) * y4,
            2 * t * y4,
            -2 * t * torch.log(y1),
        ],
        dim=-1,
    )


def _coupled_solution(t):
    s, c = torch.sin(t**2), torch.cos(t**2)
    return torch.stack([torch.exp(s), torch.exp(2 * s), s + 1, c], dim=-1)


@pytest.fixture(scope="session")
def coupled() -> Problem:
    """Four coupled equations, non-autonomous and nonlinear."""
    return Problem(_coupled_slope, _coupled_solution, 0.2, 1.4)


@dataclass(frozen=True)
class Riccati:
    """``y' = -2 t y^2``, elementwise, with its solution for any start and end.

    Only products: torch rounds those alike wherever an element lies in memory, so that
    the field itself treats every row of every batch the same, to the bit.
    """

    rate: Tensor | float = 1.0

    def __call__(self, t, y):
        return -2 * self.rate * t * y * y

    def exact(self, t0, y0, t):
        """Return the state at t."""
        return y0 / (1 + self.rate * y0 * (t**2 - t0**2))


@pytest.fixture
def riccati() -> type[Riccati]:
    """The elementwise problem; call it for an instance with a rate."""
    return Riccati


class Recorder:
    """Wrap a field; remember at which times it was called, and how often."""

    def __init__(self, f):
        self.f = f
        self.times: list[Tensor] = []
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def __call__(self, t, y):
        self.times.append(t.detach().clone())
        self.dtypes.add((t.dtype, y.dtype))
        return self.f(t, y)

    @property
    def calls(self) -> int:
        return len(self.times)


@pytest.fixture
def recorder() -> type[Recorder]:
    """Wrap a field to watch its calls."""
    return Recorder


@pytest.fixture
def random():
    """Make reproducible standard normal numbers without the global generator."""

    def make(*shape, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return make


@pytest.fixture
def make_mlp():
    """Make an `MLPField` with reproducible weights, strong enough to need steps."""
    from sknode.fields import MLPField

    def make(dim, hidden, *, dtype=torch.float64, gain=2.0, seed=0, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # in double first, so that both precisions have the same weights
            field = MLPField(dim, hidden, **settings)
        with torch.no_grad():
            for p in field.parameters():
                p.mul_(gain)
        return field.to(dtype)

    return make
