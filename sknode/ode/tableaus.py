"""Explicit Runge-Kutta methods as data.

Notation: stages ``k_i = f(t + c_i h, y + h sum_j a_ij k_j)``, the step
``y1 = y + h sum_i b_i k_i``, the error estimate ``h sum_i e_i k_i``, the dense output
``y(theta) = y + h sum_i b_i(theta) k_i`` with ``b_i(theta) = sum_m p_im theta^(m+1)``.

Every tableau here ends with the slope at the new point: its last main stage has the
step's own weights as coefficients and no weight itself ("first same as last"). Methods
that lack such a stage get one. It costs nothing, because the next step starts with this
slope, and it lets one loop and one cubic Hermite interpolant serve all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from sknode.ode import dop853

__all__ = ["FURTHER", "METHODS", "Tableau", "get_tableau"]


@dataclass(frozen=True, eq=False)
class Tableau:
    """Butcher tableau of an explicit Runge-Kutta method with dense output.

    Attributes
    ----------
    name : str
        The method's name.
    order : int
        Order of the step that is propagated.
    dense_order : int
        Order of the global error of the dense output.
    a : ndarray of shape (n_stages_extended, n_stages_extended)
        Stage coefficients; rows from ``n_stages`` on belong to the extra stages that
        only the dense output needs.
    b : ndarray of shape (n_stages,)
        Weights of the step. The last one is zero.
    c : ndarray of shape (n_stages_extended,)
        Nodes.
    error : ndarray of shape (n_estimates, n_stages) or None
        Weights of the error estimates, None for methods without (fixed steps only).
        Two rows are combined as in DOP853: ``e5^2 / sqrt(e5^2 + 0.01 e3^2)``.
    error_order : int or None
        Order of the error estimate plus one: the step size is multiplied by
        ``error ** (-1 / error_order)``.
    dense : ndarray of shape (n_stages_extended, degree)
        Coefficients ``p`` of the dense output.
    """

    name: str
    order: int
    dense_order: int
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    error: np.ndarray | None
    error_order: int | None
    dense: np.ndarray
    _cache: dict = field(default_factory=dict, repr=False)

    @property
    def n_stages(self) -> int:
        """Stages of a step, the slope at its end included."""
        return len(self.b)

    @property
    def n_stages_extended(self) -> int:
        """Stages of a step whose inside is looked at."""
        return len(self.a)

    @cached_property
    def rows(self) -> list[tuple[float, ...]]:
        """The coefficients of each stage as numbers."""
        return [tuple(row[:i].tolist()) for i, row in enumerate(self.a)]

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its own error."""
        return self.error is not None

    def tensors(self, dtype: torch.dtype, device: torch.device) -> TableauTensors:
        """Return the coefficients on a device, made once per dtype and device.

        Parameters
        ----------
        dtype : torch.dtype
            Their dtype.
        device : torch.device
            The device.

        Returns
        -------
        TableauTensors
            The coefficients.
        """
        key = (dtype, device)
        if key not in self._cache:
            self._cache[key] = TableauTensors.from_tableau(self, dtype, device)
        return self._cache[key]


@dataclass(frozen=True, eq=False)
class TableauTensors:
    """The coefficients of a tableau as tensors of one dtype on one device."""

    a: tuple[Tensor, ...]  # a[i] has the i coefficients of stage i
    c: tuple[float, ...]  # nodes stay Python floats: no transfer, no kernel
    # backward[i]: how the cotangent of stage i follows from those of y1 and of the
    # later stages, (b_i, a_{s-1,i}, ..., a_{i+1,i}): see gradients.py
    backward: tuple[Tensor, ...]
    backward_extended: tuple[Tensor, ...]
    error: Tensor | None
    dense: Tensor  # (n_stages_extended, degree)

    @classmethod
    def from_tableau(cls, tableau, dtype, device):
        def tensor(values):
            return torch.as_tensor(
                np.ascontiguousarray(values), dtype=dtype, device=device
            )

        a, s = tableau.a, tableau.n_stages
        b = np.zeros(len(a))
        b[:s] = tableau.b

        def backward(n):
            rows = (
                np.concatenate([b[i : i + 1], a[i + 1 : n, i][::-1]]) for i in range(n)
            )
            return tuple(tensor(row) for row in rows)

        return cls(
            a=tuple(tensor(a[i, :i]) for i in range(len(a))),
            c=tuple(float(x) for x in tableau.c),
            backward=backward(s - 1),
            backward_extended=backward(len(a)),
            error=None if tableau.error is None else tensor(tableau.error),
            dense=tensor(tableau.dense),
        )


def _hermite(b: np.ndarray) -> np.ndarray:
    """Cubic Hermite interpolant through both ends, as stage weights (s, 3)."""
    dense = b[:, None] * np.array([0.0, 3.0, -2.0])
    dense[0] += [1.0, -2.0, 1.0]  # theta (1 - theta)^2
    dense[-1] += [0.0, -1.0, 1.0]  # theta^2 (theta - 1)
    return dense


def _make(name, order, rows, b, *, embedded=None, error_order=None, dense=None):
    """Build a tableau from the rows of a method, adding the slope at the end."""
    b = np.array([*b, 0.0])
    s = len(b)
    a = np.zeros((s, s))
    for i, row in enumerate(rows, start=1):
        a[i, : len(row)] = row
    a[-1] = b
    c = a.sum(1)
    c[-1] = 1.0  # not only up to rounding
    error = None if embedded is None else (b - np.array(embedded))[None]
    if dense is None:
        dense, dense_order = _hermite(b), min(order, 4)
    else:
        dense_order = order
    return Tableau(
        name=name,
        order=order,
        dense_order=dense_order,
        a=a,
        b=b,
        c=c,
        error=error,
        error_order=error_order,
        dense=dense,
    )


def _euler():
    return _make("euler", 1, [], [1.0])


def _midpoint():
    return _make("midpoint", 2, [[1 / 2]], [0.0, 1.0])


def _heun():
    # Euler's method is embedded for the error.
    return _make(
        "heun", 2, [[1.0]], [1 / 2, 1 / 2], embedded=[1.0, 0.0, 0.0], error_order=2
    )


def _fehlberg2():
    """Fehlberg, NASA Technical Report R-315 (1969): order 2 with Euler's embedded."""
    return _make(
        "fehlberg2",
        2,
        [[1 / 2], [1 / 256, 255 / 256]],
        [1 / 512, 255 / 256, 1 / 512],
        embedded=[1 / 256, 255 / 256, 0.0, 0.0],
        error_order=2,
    )


def _heun3():
    """Heun, Z. Math. Phys. 45 (1900), 23-38."""
    return _make("heun3", 3, [[1 / 3], [0.0, 2 / 3]], [1 / 4, 0.0, 3 / 4])


def _rk4():
    # Kutta's 3/8 rule, as torchdiffeq's "rk4": a little more accurate than the
    # classical one at the same four evaluations.
    rows = [[1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]]
    return _make("rk4", 4, rows, [1 / 8, 3 / 8, 3 / 8, 1 / 8])


def _bosh3():
    """Bogacki & Shampine, Applied Mathematics Letters 2 (1989), 321-325."""
    return _make(
        "bosh3",
        3,
        [[1 / 2], [0.0, 3 / 4]],
        [2 / 9, 1 / 3, 4 / 9],
        embedded=[7 / 24, 1 / 4, 1 / 3, 1 / 8],
        error_order=3,
    )


def _dopri5():
    """Dormand & Prince, J. Comp. Appl. Math. 6 (1980), 19-26.

    Dense output: Shampine, Math. Comp. 46 (1986), 135-150.
    """
    rows = [
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    ]
    b = [35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]
    embedded = [
        *(5179 / 57600, 0.0, 7571 / 16695, 393 / 640),
        *(-92097 / 339200, 187 / 2100, 1 / 40),
    ]
    dense = np.array(
        [
            [
                1.0,
                -8048581381 / 2820520608,
                8663915743 / 2820520608,
                -12715105075 / 11282082432,
            ],
            [0.0, 0.0, 0.0, 0.0],
            [
                0.0,
                131558114200 / 32700410799,
                -68118460800 / 10900136933,
                87487479700 / 32700410799,
            ],
            [
                0.0,
                -1754552775 / 470086768,
                14199869525 / 1410260304,
                -10690763975 / 1880347072,
            ],
            [
                0.0,
                127303824393 / 49829197408,
                -318862633887 / 49829197408,
                701980252875 / 199316789632,
            ],
            [
                0.0,
                -282668133 / 205662961,
                2019193451 / 616988883,
                -1453857185 / 822651844,
            ],
            [0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423],
        ]
    )
    return _make("dopri5", 5, rows, b, embedded=embedded, error_order=5, dense=dense)


def _tsit5():
    """Tsitouras, Computers & Mathematics with Applications 62 (2011), 770-775."""
    rows = [
        [0.161],
        [-0.008480655492356989, 0.335480655492357],
        [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
        [
            *(5.325864828439257, -11.748883564062828),
            *(7.4955393428898365, -0.09249506636175525),
        ],
        [
            *(5.86145544294642, -12.92096931784711),
            *(8.159367898576159, -0.071584973281401, -0.028269050394068383),
        ],
    ]
    b = [
        *(0.09646076681806523, 0.01, 0.4798896504144996),
        *(1.379008574103742, -3.290069515436081, 2.324710524099774),
    ]
    # the paper gives the difference b - b_hat
    difference = [
        *(-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995),
        *(-0.1447110071732629, 0.5823571654525552, -0.45808210592918697, 1 / 66),
    ]
    poly = np.polynomial.Polynomial
    theta = poly([0.0, 1.0])
    interpolant = [
        -1.0530884977290216
        * theta
        * (theta - 1.3299890189751412)
        * (theta**2 - 1.4364028541716351 * theta + 0.7139816917074209),
        0.1017
        * theta**2
        * (theta**2 - 2.1966568338249754 * theta + 1.2949852507374631),
        2.490627285651252793
        * theta**2
        * (theta**2 - 2.38535645472061657 * theta + 1.57803468208092486),
        -16.54810288924490272
        * (theta - 1.21712927295533244)
        * (theta - 0.61620406037800089)
        * theta**2,
        47.37952196281928122
        * (theta - 1.203071208372362603)
        * (theta - 0.658047292653547382)
        * theta**2,
        -34.87065786149660974 * (theta - 1.2) * (theta - 2 / 3) * theta**2,
        2.5 * (theta - 1) * (theta - 0.6) * theta**2,
    ]
    return _make(
        "tsit5",
        5,
        rows,
        b,
        embedded=np.array([*b, 0.0]) - np.array(difference),
        error_order=5,
        dense=np.array([p.coef[1:] for p in interpolant]),
    )


def _dopri8():
    """Hairer, Norsett & Wanner's DOP853, with its seventh-order dense output."""

    def dense_rows(rows, width):
        out = np.zeros((len(rows), width))
        for i, row in enumerate(rows):
            for j, value in row.items():
                out[i, j] = value
        return out

    extended = len(dop853.STAGES)
    a = dense_rows(dop853.STAGES, extended)
    s = 13
    b = a[12, :s].copy()
    b_extended = np.zeros(extended)
    b_extended[:s] = b
    first, last = np.eye(extended)[0], np.eye(extended)[12]
    # Hairer's interpolant alternates factors theta and (1 - theta) around these
    # seven combinations of the stages (contd8 in dop853.f).
    combinations = np.vstack(
        [
            b_extended,
            first - b_extended,
            2 * b_extended - last - first,
            dense_rows(dop853.DENSE, extended),
        ]
    )
    poly = np.polynomial.Polynomial
    theta, rest = poly([0.0, 1.0]), poly([1.0, -1.0])
    dense = np.zeros((extended, 7))
    basis = poly([1.0])
    for m, combination in enumerate(combinations):
        basis = basis * (theta if m % 2 == 0 else rest)
        dense[:, : len(basis.coef) - 1] += np.outer(combination, basis.coef[1:])
    return Tableau(
        name="dopri8",
        order=8,
        dense_order=8,
        a=a,
        b=b,
        c=np.array(dop853.NODES),
        error=dense_rows(dop853.ERRORS, s),
        error_order=8,
        dense=dense,
    )


_BUILDERS = {
    "euler": _euler,
    "midpoint": _midpoint,
    "heun": _heun,
    "rk4": _rk4,
    "bosh3": _bosh3,
    "dopri5": _dopri5,
    "tsit5": _tsit5,
    "dopri8": _dopri8,
}

METHODS = tuple(_BUILDERS)

# Methods that torchdiffeq has, with better ones of the same order above.
_BUILDERS |= {"heun3": _heun3, "fehlberg2": _fehlberg2}

FURTHER = tuple(_BUILDERS)[len(METHODS) :]


@cache
def get_tableau(method: str) -> Tableau:
    """Return the tableau of a method by name.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if method not in _BUILDERS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}. Got {method!r} instead."
        )
    return _BUILDERS[method]()
