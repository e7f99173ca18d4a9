"""The gated sum of planar units of the neural ODE paper."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from sknode.fields.squash import time_features

__all__ = ["PlanarField"]


class PlanarField(nn.Module):
    r"""Vector field ``sum_n gate_n(t) u_n tanh(w_n . y + b_n)``.

    The planar continuous normalizing flow of [1]_, section 4, with its gates of time in
    (0, 1).

    Parameters
    ----------
    dim : int
        Size of the state.
    n_units : int, default=64
        Number of planar units.
    n_frequencies : int, default=3
        Number of frequencies of time in the gates.
    zero_init : bool, default=False
        Whether the slopes start as zero.

    Notes
    -----
    The trace of a sum is the sum of the traces [1]_, equation 10, so the divergence is
    ``sum_n gate_n (1 - tanh^2) (u_n . w_n)`` and costs next to nothing.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import PlanarField
    >>> field = PlanarField(2, n_units=8)
    >>> field(torch.tensor(0.0), torch.zeros(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        n_units: int = 64,
        n_frequencies: int = 3,
        zero_init: bool = False,
    ):
        super().__init__()
        for size in (dim, n_units):
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    "dim and n_units must be positive integers. "
                    f"Got {dim!r} and {n_units!r} instead."
                )
        if not isinstance(n_frequencies, Integral) or n_frequencies < 0:
            raise ValueError(
                f"n_frequencies must be an integer >= 0. Got {n_frequencies!r}."
            )
        self.dim, self.n_units, self.n_frequencies = dim, n_units, n_frequencies
        self.inner = nn.Linear(dim, n_units)
        self.outer = nn.Linear(n_units, dim, bias=False)
        self.gate = nn.Linear(1 + 2 * n_frequencies, n_units)
        with torch.no_grad():
            bound = math.sqrt(3.0 / dim)
            self.inner.weight.uniform_(-bound, bound)
            self.inner.bias.uniform_(-1.0, 1.0)
            if zero_init:
                self.outer.weight.zero_()

    def _gates(self, t: Tensor, y: Tensor) -> Tensor:
        t = torch.as_tensor(t).to(y)
        return torch.sigmoid(self.gate(time_features(t, self.n_frequencies)))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the field.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1).
        y : Tensor of shape (n, dim)
            States.

        Returns
        -------
        Tensor of shape (n, dim)
            Slopes.
        """
        return self.outer(torch.tanh(self.inner(y)) * self._gates(t, y))

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the field and its divergence.

        Parameters
        ----------
        t, y : Tensor
            As in ``forward``.

        Returns
        -------
        slope : Tensor of shape (n, dim)
            Slopes.
        divergence : Tensor of shape (n,)
            Traces of their Jacobians, exact.
        """
        gates, h = self._gates(t, y), torch.tanh(self.inner(y))
        products = (self.inner.weight * self.outer.weight.T).sum(1)
        return self.outer(h * gates), ((1 - h.square()) * gates) @ products
