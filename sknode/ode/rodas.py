"""Rosenbrock methods as data.

Notation: with ``J`` and ``f_t`` the derivatives of ``f`` at the start of the step, the
stages ``U_i`` solve linear systems with one matrix,

``(I / gamma - h J) U_i = h f(t + c_i h, y + sum_j a_ij U_j) + sum_j C_ij U_j
+ h^2 d_i f_t``,

the step is ``y1 = y + sum_i b_i U_i``, the error estimate ``sum_i e_i U_i``, the dense
output ``y(theta) = y + sum_i b_i(theta) U_i`` with
``b_i(theta) = sum_m p_im theta^(m+1)``.

These are the transformed coefficients, which need no product with ``J``. With those of
the literature, ``alpha`` and ``Gamma`` (``gamma`` on its diagonal), they are related by
``C = I / gamma - Gamma^-1`` and ``a = alpha Gamma^-1``.

References
----------
Hairer & Wanner, "Solving Ordinary Differential Equations II", 2nd edition, Springer
1996, section IV.7.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["RODAS5P", "RosenbrockTableau"]


@dataclass(frozen=True, eq=False)
class RosenbrockTableau:
    """Coefficients of a Rosenbrock method with dense output.

    Attributes
    ----------
    name : str
        The method's name.
    order : int
        Order of the step.
    dense_order : int
        Order of the global error of the dense output.
    error_order : int
        Order of the error estimate plus one.
    gamma : float
        The diagonal coefficient.
    a, C : ndarray of shape (n_stages, n_stages)
        Strictly lower triangular coefficients of earlier stages.
    b, error : ndarray of shape (n_stages,)
        Weights of the step and of its error estimate.
    c, d : ndarray of shape (n_stages,)
        Nodes, and coefficients of the derivative by time.
    dense : ndarray of shape (n_stages, degree)
        Coefficients ``p`` of the dense output.
    """

    name: str
    order: int
    dense_order: int
    error_order: int
    gamma: float
    a: np.ndarray
    C: np.ndarray
    b: np.ndarray
    error: np.ndarray
    c: np.ndarray
    d: np.ndarray
    dense: np.ndarray
    _cache: dict = field(default_factory=dict, repr=False)

    @property
    def n_stages(self) -> int:
        """Number of stages."""
        return len(self.b)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> RosenbrockTensors:
        """Return the coefficients on a device, made once per dtype and device."""
        key = (dtype, device)
        if key not in self._cache:

            def tensor(values):
                return torch.as_tensor(values.copy(), dtype=dtype, device=device)

            self._cache[key] = RosenbrockTensors(
                a=[tensor(row[:i]) for i, row in enumerate(self.a)],
                C=[tensor(row[:i]) for i, row in enumerate(self.C)],
                b=tensor(self.b),
                error=tensor(self.error),
                dense=tensor(self.dense),
            )
        return self._cache[key]


@dataclass(frozen=True, eq=False)
class RosenbrockTensors:
    """The coefficients as tensors of one dtype on one device.

    The rows of ``a`` and ``C`` end before the diagonal.
    """

    a: list[Tensor]
    C: list[Tensor]
    b: Tensor
    error: Tensor
    dense: Tensor


def _triangle(*rows: list[float]) -> np.ndarray:
    """Return a strictly lower triangular matrix from its rows, the first left out."""
    matrix = np.zeros((len(rows) + 1, len(rows) + 1))
    for i, row in enumerate(rows, start=1):
        matrix[i, : len(row)] = row
    return matrix


def _make_rodas5p() -> RosenbrockTableau:
    """Return Rodas5P.

    References
    ----------
    Steinebach, "Construction of Rosenbrock-Wanner method Rodas5P and numerical
    benchmarks within the Julia Differential Equations package", BIT Numerical
    Mathematics 63 (2023), 27; digits as in OrdinaryDiffEq.jl.
    """
    gamma = 0.21193756319429014
    sixth = [
        -7.502846399306121,
        2.561846144803919,
        -11.627539656261098,
        -0.18268767659942256,
        0.030198172008377946,
    ]
    a = _triangle(
        [3.0],
        [2.849394379747939, 0.45842242204463923],
        [-6.954028509809101, 2.489845061869568, -10.358996098473584],
        [
            2.8029986275628964,
            0.5072464736228206,
            -0.3988312541770524,
            -0.04721187230404641,
        ],
        sixth,
        [*sixth, 1.0],
        [*sixth, 1.0, 1.0],
    )
    C = _triangle(
        [-14.155112264123755],
        [-17.97296035885952, -2.859693295451294],
        [147.12150275711716, -1.41221402718213, 71.68940251302358],
        [
            165.43517024871676,
            -0.4592823456491126,
            42.90938336958603,
            -5.961986721573306,
        ],
        [
            24.854864614690072,
            -3.0009227002832186,
            47.4931110020768,
            5.5814197821558125,
            -0.6610691825249471,
        ],
        [
            30.91273214028599,
            -3.1208243349937974,
            77.79954646070892,
            34.28646028294783,
            -19.097331116725623,
            -28.087943162872662,
        ],
        [
            37.80277123390563,
            -3.2571969029072276,
            112.26918849496327,
            66.9347231244047,
            -40.06618937091002,
            -54.66780262877968,
            -9.48861652309627,
        ],
    )
    # y(theta) = (1 - theta) y + theta (y1 + (1 - theta) (k1 + theta k2 + theta^2 k3))
    # with k = H U
    H = np.array(
        [
            [
                25.948786856663858,
                -2.5579724845846235,
                10.433815404888879,
                -2.3679251022685204,
                0.524948541321073,
                1.1241088310450404,
                0.4272876194431874,
                -0.17202221070155493,
            ],
            [
                -9.91568850695171,
                -0.9689944594115154,
                3.0438037242978453,
                -24.495224566215796,
                20.176138334709044,
                15.98066361424651,
                -6.789040303419874,
                -6.710236069923372,
            ],
            [
                11.419903575922262,
                2.8879645146136994,
                72.92137995996029,
                80.12511834622643,
                -52.072871366152654,
                -59.78993625266729,
                -0.15582684282751913,
                4.883087185713722,
            ],
        ]
    )
    b = np.array([*sixth, 1.0, 1.0, 1.0])
    return RosenbrockTableau(
        name="rodas5p",
        order=5,
        dense_order=5,
        error_order=5,
        gamma=gamma,
        a=a,
        C=C,
        b=b,
        # the embedded method is the seventh stage's state
        error=np.eye(8)[7],
        c=np.array(
            [
                0.0,
                3 * gamma,
                0.4095798393397535,
                0.9769306725060716,
                0.4288403609558664,
                1.0,
                1.0,
                1.0,
            ]
        ),
        d=np.array(
            [
                gamma,
                -2 * gamma,
                -0.3384627126235924,
                1.8046452872882734,
                2.325825639765069,
                0.0,
                0.0,
                0.0,
            ]
        ),
        dense=np.stack([b + H[0], H[1] - H[0], H[2] - H[1], -H[2]], axis=1),
    )


RODAS5P = _make_rodas5p()
