"""Initial value problems from the literature, with end states to compare against.

The fields are torch callables ``f(t, y)`` in float64 that work on whole batches:
``y`` has shape (batch, n) and ``t`` shape (batch, 1), or no dimension at all.

`DETEST` holds the 25 non-stiff problems of Hull et al., five in each class: A, single
equations; B, small systems; C, moderate systems; D, Kepler orbits; E, equations of
second order. Beside them stand an orbit with close encounters, oscillators whose
stiffness can be chosen row by row, a stiff reaction, a chaotic system and a network.

References
----------
Hull, Enright, Fellen & Sedgwick, "Comparing numerical methods for ordinary differential
equations", SIAM Journal on Numerical Analysis 9 (1972), 603-637.
Enright & Pryce, "Two FORTRAN packages for assessing initial value methods", ACM
Transactions on Mathematical Software 13 (1987), 1-27.
Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", 2nd edition,
Springer 1993, and Hairer & Wanner, volume II, 2nd edition, Springer 1996.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

__all__ = [
    "ARENSTORF",
    "DETEST",
    "GRAVITY",
    "LORENZ",
    "PLANETS",
    "PUBLISHED_END_STATES",
    "ROBERTSON",
    "ROBERTSON_STATES",
    "Problem",
    "RowByRow",
    "SUN",
    "mlp_problem",
    "scaled_error",
    "tanh_network",
    "van_der_pol",
    "van_der_pol_problem",
]

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """An initial value problem.

    Attributes
    ----------
    name : str
    f : callable
        The field, for batches.
    start : tuple of float
        The initial state.
    t_end : float, default=20
        End of the interval, which begins at 0.
    """

    name: str
    f: Field = field(repr=False)
    start: tuple[float, ...] = field(repr=False)
    t_end: float = 20.0

    @property
    def y0(self) -> Tensor:
        """The initial state as a batch of one, float64."""
        return torch.tensor([self.start], dtype=torch.float64)

    @property
    def t(self) -> Tensor:
        """Both ends of the interval, float64."""
        return torch.tensor([0.0, self.t_end], dtype=torch.float64)

    def numpy_f(self, t: float, y: np.ndarray) -> np.ndarray:
        """The field for a single state, for scipy's solvers."""
        time = torch.tensor(t, dtype=torch.float64)
        return self.f(time, torch.from_numpy(y)[None])[0].numpy()

    @cached_property
    def reference(self) -> Tensor:
        """The end state of shape (n,), by scipy's DOP853 at rtol=1e-13, atol=1e-15."""
        solution = solve_ivp(
            self.numpy_f,
            (0.0, self.t_end),
            np.array(self.start),
            method="DOP853",
            rtol=1e-13,
            atol=1e-15,
        )
        if not solution.success:
            raise RuntimeError(f"{self.name}: {solution.message}")
        return torch.from_numpy(solution.y[:, -1])


class RowByRow:
    """Problems of one dimension as one batch: row i is the state of problem i.

    For measuring many problems in one solve. The rows must not be taken apart.
    """

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        self.y0 = torch.cat([p.y0 for p in problems])
        self.t = torch.stack([p.t for p in problems])
        self.reference = torch.stack([p.reference for p in problems])

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        rows = zip(self.problems, t.split(1), y.split(1), strict=True)
        return torch.cat([p.f(t, y) for p, t, y in rows])

    @classmethod
    def by_dimension(cls, problems) -> list[RowByRow]:
        """Collect problems into as few batches as there are dimensions."""
        groups: dict[int, list[Problem]] = {}
        for problem in problems:
            groups.setdefault(len(problem.start), []).append(problem)
        return [cls(group) for group in groups.values()]


def scaled_error(y: Tensor, reference: Tensor) -> Tensor:
    """Return the largest ``|y - reference| / (1 + |reference|)`` of the last dimension.

    In this scale a tolerance ``rtol = atol = tol`` is the number ``tol``.
    """
    return ((y - reference).abs() / (1 + reference.abs())).amax(-1)


def _columns(*columns: Tensor) -> Tensor:
    return torch.cat(columns, dim=-1)


# --- A: single equations -------------------------------------------------------------


def _a1(t, y):
    return -y


def _a2(t, y):
    return -(y**3) / 2


def _a3(t, y):
    return y * torch.cos(t)


def _a4(t, y):
    return y / 4 * (1 - y / 20)


def _a5(t, y):
    return (y - t) / (y + t)


# --- B: small systems ----------------------------------------------------------------


def _b1(t, y):
    """Predator and prey."""
    y1, y2 = y.split(1, -1)
    return _columns(2 * (y1 - y1 * y2), y1 * y2 - y2)


def _b2(t, y):
    """A linear chemical reaction."""
    y1, y2, y3 = y.split(1, -1)
    return _columns(y2 - y1, y1 - 2 * y2 + y3, y2 - y3)


def _b3(t, y):
    """A nonlinear chemical reaction."""
    y1, y2, _ = y.split(1, -1)
    return _columns(-y1, y1 - y2**2, y2**2)


def _b4(t, y):
    """The integral surface of a torus."""
    y1, y2, y3 = y.split(1, -1)
    r = torch.hypot(y1, y2)
    return _columns(-y2 - y1 * y3 / r, y1 - y2 * y3 / r, y1 / r)


def _b5(t, y):
    """Euler's equations of a rigid body without external forces."""
    y1, y2, y3 = y.split(1, -1)
    return _columns(y2 * y3, -y1 * y3, -0.51 * y1 * y2)


# --- C: moderate systems -------------------------------------------------------------


def _linear(matrix: np.ndarray) -> Field:
    transposed = torch.from_numpy(matrix.T.copy())
    return lambda t, y: y @ transposed


def _decay(rates: np.ndarray) -> Field:
    """A chain of radioactive decays."""
    return _linear(np.diag(np.append(-rates, 0.0)) + np.diag(rates, -1))


def _diffusion(n: int) -> Field:
    """The heat equation by the method of lines."""
    beside = np.diag(np.ones(n - 1), 1)
    return _linear(beside + beside.T - 2 * np.eye(n))


# masses of the sun (with the four inner planets) and of the outer planets from Jupiter
# to Pluto, in solar masses; the gravitational constant in AU and 100 days
SUN = 1.00000597682
PLANETS = (
    *(0.000954786104043, 0.000285583733151, 0.0000437273164546),
    *(0.0000517759138449, 0.00000277777777778),
)
GRAVITY = 2.95912208286
_PLANET_POSITIONS = (
    *(3.42947415189, 3.35386959711, 1.35494901715),
    *(6.64145542550, 5.97156957878, 2.18231499728),
    *(11.2630437207, 14.6952576794, 6.27960525067),
    *(-30.1552268759, 1.65699966404, 1.43785752721),
    *(-21.1238353380, 28.4465098142, 15.3882659679),
)
_PLANET_VELOCITIES = (
    *(-0.557160570446, 0.505696783289, 0.230578543901),
    *(-0.415570776342, 0.365682722812, 0.169143213293),
    *(-0.325325669158, 0.189706021964, 0.0877265322780),
    *(-0.0240476254170, -0.287659532608, -0.117219543175),
    *(-0.176860753121, -0.216393453025, -0.0148647893090),
)


def _c5(t, y):
    """Five planets around the sun, in coordinates that move with the sun."""
    x = y[..., :15].unflatten(-1, (5, 3))
    mass = y.new_tensor(PLANETS)
    # the pull of planet k on planet j, less its pull on the sun
    apart = x[..., None, :, :] - x[..., :, None, :]
    distance = torch.linalg.vector_norm(apart, dim=-1) + torch.eye(5, dtype=y.dtype)
    from_sun = torch.linalg.vector_norm(x, dim=-1)[..., None] ** 3
    planets = mass[:, None] * (apart / distance[..., None] ** 3)
    pull = planets.sum(-2) - (mass[:, None] * x / from_sun).sum(-2, keepdim=True)
    # the planet's own share of the last sum makes the sun heavier by its mass
    slope = GRAVITY * (pull - SUN * x / from_sun)
    return torch.cat([y[..., 15:], slope.flatten(-2)], dim=-1)


# --- D: two bodies -------------------------------------------------------------------


def _kepler(t, y):
    x, v = y.split(2, -1)
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.cat([v, -x / r**3], dim=-1)


def _orbit(eccentricity: float) -> tuple[float, ...]:
    e = eccentricity
    return (1 - e, 0.0, 0.0, ((1 + e) / (1 - e)) ** 0.5)


# --- E: equations of second order ----------------------------------------------------


def _e1(t, y):
    """Bessel's equation of order 1/2, shifted by one."""
    y1, y2 = y.split(1, -1)
    return _columns(y2, -(y2 / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y1))


def _e2(t, y):
    """Van der Pol's equation."""
    y1, y2 = y.split(1, -1)
    return _columns(y2, (1 - y1**2) * y2 - y1)


def _e3(t, y):
    """Duffing's equation."""
    y1, y2 = y.split(1, -1)
    return _columns(y2, y1**3 / 6 - y1 + 2 * torch.sin(2.78535 * t))


def _e4(t, y):
    """A falling body with resistance."""
    _, y2 = y.split(1, -1)
    return _columns(y2, 0.032 - 0.4 * y2**2)


def _e5(t, y):
    """Linear pursuit."""
    _, y2 = y.split(1, -1)
    return _columns(y2, torch.sqrt(1 + y2**2) / (25 - t))


# J_1/2(1) and its derivative
_BESSEL = (0.6713967071418030, 0.09540051444747446)

DETEST: dict[str, Problem] = {
    p.name: p
    for p in [
        Problem("A1", _a1, (1.0,)),
        Problem("A2", _a2, (1.0,)),
        Problem("A3", _a3, (1.0,)),
        Problem("A4", _a4, (1.0,)),
        Problem("A5", _a5, (4.0,)),
        Problem("B1", _b1, (1.0, 3.0)),
        Problem("B2", _b2, (2.0, 0.0, 1.0)),
        Problem("B3", _b3, (1.0, 0.0, 0.0)),
        Problem("B4", _b4, (3.0, 0.0, 0.0)),
        Problem("B5", _b5, (0.0, 1.0, 1.0)),
        Problem("C1", _decay(np.ones(9)), (1.0, *[0.0] * 9)),
        Problem("C2", _decay(np.arange(1.0, 10.0)), (1.0, *[0.0] * 9)),
        Problem("C3", _diffusion(10), (1.0, *[0.0] * 9)),
        Problem("C4", _diffusion(51), (1.0, *[0.0] * 50)),
        Problem("C5", _c5, (*_PLANET_POSITIONS, *_PLANET_VELOCITIES)),
        *(Problem(f"D{i}", _kepler, _orbit(0.2 * i - 0.1)) for i in range(1, 6)),
        Problem("E1", _e1, _BESSEL),
        Problem("E2", _e2, (2.0, 0.0)),
        Problem("E3", _e3, (0.0, 0.0)),
        Problem("E4", _e4, (30.0, 0.0)),
        Problem("E5", _e5, (0.0, 0.0)),
    ]
}

# The first components at t = 20 as Enright & Pryce give them: they stand for the
# problems' statements, whatever was typed above. Those of A1, A3 and E5 are
# elementary, exp(-20), exp(sin 20) and 2.4.
PUBLISHED_END_STATES: dict[str, tuple[float, ...]] = {
    "A1": (2.061153622438558e-09,),
    "A2": (0.2182178902359887,),
    "A3": (2.491650271850414,),
    "A4": (17.73016648131483,),
    "A5": (-0.7887826688964196,),
    "B1": (0.6761876008576667, 0.1860816099640036),
    "B2": (1.000000001030576, 1.0, 0.9999999989694235),
    "B3": (2.061153488557776e-09, 5.257228022048349e-02, 0.9474277177183630),
    "B4": (0.9826950928005993, 2.198447081694832, 0.9129452507276399),
    "B5": (-0.9396570798729192, -0.3421177754000779, 0.7414126596199957),
    "C1": (2.061153622240064e-09, 4.122307244619555e-08, 4.122307244716968e-07),
    "C2": (2.061153577984930e-09, 2.061153573736588e-09, 2.061153569488245e-09),
    "C3": (2.948119211022058e-03, 5.635380154844266e-03, 7.829072515926013e-03),
    "C4": (3.124111453721466e-03, 6.015416842150318e-03, 8.470021834842650e-03),
    "C5": (-4.792730224323733, -2.420550725448973, -9.212509306014886e-01),
    "D1": (0.2198835352008397, 0.9427076846341813, -0.9787659841058176),
    "D2": (-0.1777027357140412, 0.9467784719905892, -1.030294163192969),
    "D3": (-0.5780432953035361, 0.8633840009194193, -0.9595083730380727),
    "D4": (-0.9538990293416394, 0.6907409024219432, -0.8212674270877433),
    "D5": (-1.295266250987574, 0.4003938963792321, -0.6775390924707566),
    "E1": (0.1456723600728308, -9.883500195574063e-02),
    "E2": (2.008149762174948, -4.250887527320057e-02),
    "E3": (-0.1004178858647128, 0.2411400132095954),
    "E4": (33.95091444646555, 0.2767822659672869),
    "E5": (14.11797390542629, 2.4),
}


# --- beyond DETEST -------------------------------------------------------------------


def _three_bodies(t, y):
    """A satellite of earth and moon, in coordinates that turn with both."""
    moon = 0.012277471
    earth = 1 - moon
    x1, x2, v1, v2 = y.split(1, -1)
    d1 = ((x1 + moon) ** 2 + x2**2) ** 1.5
    d2 = ((x1 - earth) ** 2 + x2**2) ** 1.5
    return _columns(
        v1,
        v2,
        x1 + 2 * v2 - earth * (x1 + moon) / d1 - moon * (x1 - earth) / d2,
        x2 - 2 * v1 - earth * x2 / d1 - moon * x2 / d2,
    )


ARENSTORF = Problem(
    "Arenstorf",
    _three_bodies,
    (0.994, 0.0, 0.0, -2.00158510637908252240537862224),
    t_end=17.0652165601579625588917206249,
)
"""A periodic orbit of three bodies, from HNW I, section II.0.

The end state is the initial one. The orbit is so sensitive that rounding in the last
place of the initial state moves the end by 1e-10.
"""


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    """Van der Pol's oscillator ``x'' = mu (1 - x^2) x' - x`` with mu in the state.

    The state is (x, x', mu). With mu constant in time but a part of the row, every row
    can have its own, and rows can be taken apart.
    """
    x, v, mu = y.split(1, -1)
    return _columns(v, mu * (1 - x**2) * v - x, torch.zeros_like(mu))


def van_der_pol_problem(mu: float, t_end: float = 20.0) -> Problem:
    """Return the oscillator from (2, 0)."""
    return Problem(f"Van der Pol, mu={mu:g}", van_der_pol, (2.0, 0.0, mu), t_end)


def _robertson(t, y):
    y1, y2, y3 = y.split(1, -1)
    slow, back, fast = 0.04 * y1, 1e4 * y2 * y3, 3e7 * y2**2
    return _columns(back - slow, slow - back - fast, fast)


ROBERTSON = Problem("Robertson", _robertson, (1.0, 0.0, 0.0), t_end=40.0)
"""Three reactions with rates nine orders of magnitude apart: very stiff."""

# The last one is that of the Test Set for IVP Solvers (Mazzia & Magherini, release
# 2.4, 2008). The others are the customary times, to the digits on which scipy's Radau
# agrees with itself at rtol = 1e-12 and 3e-13.
ROBERTSON_STATES: dict[float, tuple[float, float, float]] = {
    0.4: (0.98517211386099, 3.3863953789749e-05, 0.014794022185220),
    4.0: (0.90551867858425, 2.2404756875602e-05, 0.094458916658870),
    40.0: (0.71582706871940, 9.1855347645578e-06, 0.28416374574583),
    400.0: (0.45051866847110, 3.2229014416746e-06, 0.54947810862746),
    4e3: (0.18320225777671, 8.9423712527759e-07, 0.81679684798617),
    4e4: (0.038983377085483, 1.6217683159097e-07, 0.96101646073769),
    1e11: (0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050),
}


def _lorenz(t, y):
    x, y, z = y.split(1, -1)
    return _columns(10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z)


LORENZ = Problem("Lorenz", _lorenz, (-8.0, 8.0, 27.0), t_end=5.0)
"""A chaotic system; on this interval an error grows by a few orders of magnitude."""


def tanh_network(
    dim: int = 2, hidden: int = 64, gain: float = 3.0, seed: int = 0
) -> list[nn.Linear]:
    """Return the layers of a perceptron with two hidden layers, in float64.

    The weights are torch's default initialisation times ``gain``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (dim, hidden, hidden, dim)
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    for layer in layers:
        layer.double().requires_grad_(False)
        layer.weight.mul_(gain)
        layer.bias.mul_(gain)
    return layers


def mlp_problem(layers: list[nn.Linear] | None = None, t_end: float = 1.0) -> Problem:
    """Return the problem with the tanh network of these layers as its field."""
    first, second, third = layers or tanh_network()

    def f(t, y):
        return third(torch.tanh(second(torch.tanh(first(y)))))

    start = torch.linspace(-1, 1, first.in_features, dtype=torch.float64)
    return Problem("MLP", f, tuple(start.tolist()), t_end)
