"""The gated sum of planar units of the neural ODE paper."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from sknode.fields.squash import time_features

__all__ = ["PlanarField"]


class PlanarField(nn.Module):
    r"""Vector field that is a gated sum of planar units.

    ``sum_n gate_n(t) u_n tanh(w_n . y + b_n)``: the planar continuous normalizing flow
    of [1]_, section 4, with its gates of time in (0, 1).

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
    condition_dim : int, default=0
        Size of a condition, a vector a row on which gates and biases depend too.

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
        condition_dim: int = 0,
    ):
        super().__init__()
        for size in (dim, n_units):
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    "dim and n_units must be positive integers. "
                    f"Got {dim!r} and {n_units!r} instead."
                )
        for name, size in (
            ("n_frequencies", n_frequencies),
            ("condition_dim", condition_dim),
        ):
            if not isinstance(size, Integral) or size < 0:
                raise ValueError(f"{name} must be an integer >= 0. Got {size!r}.")
        self.dim, self.n_units, self.n_frequencies = dim, n_units, n_frequencies
        self.condition_dim = condition_dim
        self.inner = nn.Linear(dim, n_units)
        self.outer = nn.Linear(n_units, dim, bias=False)
        self.gate = nn.Linear(1 + 2 * n_frequencies + condition_dim, n_units)
        if condition_dim:
            self.shift = nn.Linear(condition_dim, n_units, bias=False)
        with torch.no_grad():
            bound = math.sqrt(3.0 / dim)
            self.inner.weight.uniform_(-bound, bound)
            self.inner.bias.uniform_(-1.0, 1.0)
            if zero_init:
                self.outer.weight.zero_()

    def _hidden(self, t: Tensor, y: Tensor, condition: Tensor | None):
        """Return the gates and the units."""
        if (condition is not None) != bool(self.condition_dim):
            raise ValueError(
                f"condition must have shape (n, {self.condition_dim})."
                if self.condition_dim
                else "condition must be None for a field with condition_dim=0."
            )
        features = time_features(torch.as_tensor(t).to(y), self.n_frequencies)
        units = self.inner(y)
        if condition is not None:
            units = units + self.shift(condition)
            features = torch.cat([features.expand(len(y), -1), condition], -1)
        return torch.sigmoid(self.gate(features)), torch.tanh(units)

    def forward(self, t: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Evaluate the field.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1).
        y : Tensor of shape (n, dim)
            States.
        condition : Tensor of shape (n, condition_dim), optional
            What the field depends on beside time and state.

        Returns
        -------
        Tensor of shape (n, dim)
            Slopes.
        """
        gates, h = self._hidden(t, y, condition)
        return self.outer(h * gates)

    def with_divergence(
        self, t: Tensor, y: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the field and its divergence.

        Parameters
        ----------
        t, y, condition : Tensor
            As in ``forward``.

        Returns
        -------
        slope : Tensor of shape (n, dim)
            Slopes.
        divergence : Tensor of shape (n,)
            Traces of their Jacobians, exact.
        """
        gates, h = self._hidden(t, y, condition)
        products = (self.inner.weight * self.outer.weight.T).sum(1)
        return self.outer(h * gates), ((1 - h.square()) * gates) @ products
