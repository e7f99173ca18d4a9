"""Divergences: of sums, of any field, and what they do to a density."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sknode.fields.squash import ConcatSquashField
from sknode.ode.vector_field import DensityNetwork

__all__ = ["DivergenceField", "LogDensityField", "SumField"]


class SumField(nn.Module):
    """The sum of fields with divergences: the divergence is linear.

    Parameters
    ----------
    *fields : torch.nn.Module
        Fields with ``with_divergence(t, y)``.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import ConcatSquashField, PlanarField, SumField
    >>> field = SumField(PlanarField(2, 8), ConcatSquashField(2, (8, 8)))
    >>> field(torch.tensor(0.0), torch.zeros(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, *fields: nn.Module):
        super().__init__()
        if not fields:
            raise ValueError("SumField needs at least one field.")
        self.fields = nn.ModuleList(fields)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the sum.

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
        return sum(field(t, y) for field in self.fields)

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the sum and its divergence.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1).
        y : Tensor of shape (n, dim)
            States.

        Returns
        -------
        slope : Tensor of shape (n, dim)
            Slopes.
        divergence : Tensor of shape (n,)
            Traces of their Jacobians.
        """
        pairs = [field.with_divergence(t, y) for field in self.fields]
        slopes, divergences = zip(*pairs, strict=True)
        return sum(slopes), sum(divergences)


class DivergenceField(nn.Module):
    r"""Any field with its divergence by vector-Jacobian products.

    Parameters
    ----------
    field : torch.nn.Module
        The vector field ``f(t, y)``, row by row, of states (n, dim).
    probes : Tensor of shape (n_probes, dim) or (n_probes, n, dim), optional
        Random signs ``e``. The divergence is then estimated without bias by the mean of
        ``e^T (df/dy) e`` [1]_, at the cost of a product for every probe. They are the
        same for all rows, or a row has its own, with less noise in means over rows:
        solve with ``row_wise=False`` then. Without, it is exact, at the cost of ``dim``
        products.

    References
    ----------
    .. [1] Hutchinson, "A stochastic estimator of the trace of the influence matrix for
       Laplacian smoothing splines", Communications in Statistics 19 (1990).

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import DivergenceField, MLPField
    >>> field = DivergenceField(MLPField(2, (8, 8, 8)))
    >>> field.with_divergence(torch.tensor(0.0), torch.zeros(5, 2))[1].shape
    torch.Size([5])
    """

    def __init__(self, field: nn.Module, probes: Tensor | None = None):
        super().__init__()
        if probes is not None and probes.ndim not in (2, 3):
            raise ValueError(
                "probes must have shape (n_probes, dim) or (n_probes, n, dim). "
                f"Got {tuple(probes.shape)} instead."
            )
        self.field = field
        self.register_buffer("probes", probes)

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
        return self.field(t, y)

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the field and its divergence.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1).
        y : Tensor of shape (n, dim)
            States.

        Returns
        -------
        slope : Tensor of shape (n, dim)
            Slopes.
        divergence : Tensor of shape (n,)
            Traces of their Jacobians.
        """
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            slope = self.field(t, y)
            if self.probes is None:
                vectors = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
                scale = 1.0
            else:
                vectors, scale = self.probes.to(y), 1.0 / len(self.probes)
            divergence = torch.zeros_like(y[:, 0])
            for vector in vectors if slope.requires_grad else ():
                (pulled,) = torch.autograd.grad(
                    slope,
                    y,
                    vector.expand_as(slope),
                    create_graph=differentiable,
                    retain_graph=True,
                    materialize_grads=True,
                )
                divergence = divergence + scale * (pulled * vector).sum(1)
        return (slope if differentiable else slope.detach()), divergence


class LogDensityField(nn.Module):
    """A field and what it does to a log-density, as one field of states (n, dim + 1).

    The last component of the state is the log-density along the path, which changes by
    minus the divergence: the instantaneous change of variables of [1]_.

    Parameters
    ----------
    field : torch.nn.Module
        Field with ``with_divergence(t, y)``.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018, theorem 1.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import LogDensityField, PlanarField
    >>> field = LogDensityField(PlanarField(2, 8))
    >>> field(torch.tensor(0.0), torch.zeros(5, 3)).shape
    torch.Size([5, 3])
    """

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """Evaluate the field and the change of the log-density.

        Parameters
        ----------
        t : Tensor
            Times: a scalar or of shape (n, 1).
        state : Tensor of shape (n, dim + 1)
            States, the log-density last.

        Returns
        -------
        Tensor of shape (n, dim + 1)
            Slopes.
        """
        slope, divergence = self.field.with_divergence(t, state[:, :-1])
        return torch.cat([slope, -divergence[:, None]], 1)

    def density_network(self) -> DensityNetwork | None:
        """Return what a kernel has to know of the field.

        Returns
        -------
        DensityNetwork or None
            Its weights; None if there is no kernel for it.
        """
        if type(self) is LogDensityField and isinstance(self.field, ConcatSquashField):
            return self.field.make_density_network()
        return None
