"""What a flow spends on its way: kinetic energy and size of the Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EnergyField"]


class EnergyField(nn.Module):
    """A vector field that also integrates its own kinetic energy and Jacobian norm.

    Adding the two to a training loss favours flows that are straight and smooth, which
    a solver follows in few steps [1]_.

    Parameters
    ----------
    field : torch.nn.Module
        The vector field ``f(t, y)``, row by row.
    state_shape : tuple of int
        Shape of a state ``y``, without the batch.
    probe : Tensor of shape state_shape, optional
        Random signs ``e``. With them, the mean of ``(e^T df/dy)^2`` over the state is
        integrated, whose expectation is the squared Frobenius norm of the Jacobian
        over the size of the state. Without, only the kinetic energy is.

    Notes
    -----
    The state is flat: that of ``field``, then the mean of ``f^2`` over the state
    integrated so far and, with ``probe``, the integral for the Jacobian. Means instead
    of sums make the strength of a penalty independent of the size of the state.

    References
    ----------
    .. [1] Finlay, Jacobsen, Nurbekyan & Oberman, "How to train your neural ODE: the
       world of Jacobian and kinetic regularization", ICML 2020.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import EnergyField, MLPField
    >>> field = EnergyField(MLPField(2, (16,)), (2,))
    >>> field(torch.tensor(0.0), field.start(torch.zeros(5, 2))).shape
    torch.Size([5, 3])
    """

    def __init__(self, field: nn.Module, state_shape, probe: Tensor | None = None):
        super().__init__()
        self.field = field
        self.state_shape = torch.Size(state_shape)
        self.register_buffer("probe", probe)

    def start(self, y: Tensor) -> Tensor:
        """Return the flat state of states without any history.

        Parameters
        ----------
        y : Tensor of shape (n, \\*state_shape)
            States of the field.

        Returns
        -------
        Tensor of shape (n, size)
            Flat states.
        """
        n_integrals = 1 if self.probe is None else 2
        return nn.functional.pad(y.flatten(1), (0, n_integrals))

    def split(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the states, the kinetic energies and the integrals for the Jacobian.

        Parameters
        ----------
        state : Tensor of shape (n, size)
            Flat states.

        Returns
        -------
        y : Tensor of shape (n, \\*state_shape)
            States of the field.
        kinetic : Tensor of shape (n,)
            Integral of the mean of ``f^2``.
        jacobian : Tensor of shape (n,) or None
            Integral for the Jacobian; None without ``probe``.
        """
        size = self.state_shape.numel()
        y = state[:, :size].unflatten(1, self.state_shape)
        jacobian = None if self.probe is None else state[:, size + 1]
        return y, state[:, size], jacobian

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """Evaluate the field and what it spends.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1).
        state : Tensor of shape (n, size)
            Flat states.

        Returns
        -------
        Tensor of shape (n, size)
            Slopes.
        """
        y, _, _ = self.split(state)
        t = t.view(-1, *(1 for _ in self.state_shape)) if t.ndim else t
        if self.probe is None:
            slope = self.field(t, y)
            parts = []
        else:
            slope, pulled = self._pull(t, y)
            parts = [pulled.flatten(1).square().mean(1, keepdim=True)]
        slope = slope.flatten(1)
        return torch.cat([slope, slope.square().mean(1, keepdim=True), *parts], 1)

    def _pull(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slopes and the probe times their Jacobians."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            slope = self.field(t, y)
            if not slope.requires_grad:  # nor does it depend on the state
                return slope, torch.zeros_like(y)
            (pulled,) = torch.autograd.grad(
                slope,
                y,
                self.probe.expand_as(slope),
                create_graph=differentiable,
                materialize_grads=True,
            )
        return (slope, pulled) if differentiable else (slope.detach(), pulled)
