"""Fields that depend on a condition, and flows to conditional mixtures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sknode.fields.mixture import MixtureField

__all__ = ["ClassMixtureField", "GivenField", "JointMixtureField"]


class GivenField(nn.Module):
    """A field with the conditions of its rows filled in.

    It holds a condition for every row: solve with ``row_wise=False``.

    Parameters
    ----------
    field : torch.nn.Module
        Field ``f(t, y, condition)``, with ``with_divergence``.
    condition : Tensor of shape (n, condition_dim)
        Conditions.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import ConcatSquashField, GivenField
    >>> field = ConcatSquashField(2, (8, 8), condition_dim=1)
    >>> given = GivenField(field, torch.linspace(0, 1, 5)[:, None])
    >>> given(torch.tensor(0.0), torch.zeros(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, field: nn.Module, condition: Tensor):
        super().__init__()
        self.field, self.condition = field, condition

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
        return self.field(t, y, self.condition)

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
        return self.field.with_divergence(t, y, self.condition)


class ClassMixtureField(nn.Module):
    """Flows to the mixtures of classes, which have components of their own.

    Parameters
    ----------
    weights : Tensor of shape (n_components, n_classes)
        Shares of the components in the classes, not negative. They are divided by their
        sums.
    means : Tensor of shape (n_components, dim)
        Means of the components.
    covariances : Tensor of shape (n_components, dim, dim)
        Covariances of the components, positive definite.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import ClassMixtureField
    >>> means, covariances = torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1)
    >>> field = ClassMixtureField(torch.eye(2), means, covariances)
    >>> flow = field.given(torch.eye(2))  # a row of either class
    >>> flow(torch.tensor(0.0), torch.zeros(2, 1))
    tensor([[-1.],
            [ 1.]])
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor):
        super().__init__()
        if weights.ndim != 2 or len(weights) != len(means):
            raise ValueError(
                "weights must have shape (n_components, n_classes). "
                f"Got {tuple(weights.shape)} for {len(means)} components."
            )
        if not bool((weights >= 0).all() & (weights.sum(0) > 0).all()):
            raise ValueError("weights must not be negative, nor all zero in a class.")
        self.components = MixtureField(
            torch.ones_like(weights[:, 0]), means, covariances
        )
        self.register_buffer("log_weights", (weights / weights.sum(0)).log())

    @property
    def axes(self) -> Tensor:
        """The principal axes of the components, as `MixtureField` has them."""
        return self.components.axes

    @property
    def variances(self) -> Tensor:
        """The variances (n_components, dim) along these axes."""
        return self.components.variances

    def given(self, condition: Tensor) -> MixtureField:
        """Return the flow for rows of given classes.

        Parameters
        ----------
        condition : Tensor of shape (n, n_classes)
            Indicators of their classes.

        Returns
        -------
        MixtureField
            The flow, with weights for every row.
        """
        log_weights = self.log_weights.T[condition.argmax(1)]
        return self.components.replace(log_weights, self.components.centres)


class JointMixtureField(nn.Module):
    r"""Flows to a Gaussian mixture of (x, y), conditioned on y.

    Given ``y``, component ``k`` of the mixture of ``x`` has the mean
    ``m_x + S_xy S_yy^-1 (y - m_y)``, the covariance ``S_xx - S_xy S_yy^-1 S_yx`` and
    the weight ``w_k N(y; m_y, S_yy)`` over the sum of these.

    Parameters
    ----------
    dim : int
        Size of x.
    weights : Tensor of shape (n_components,)
        Shares of the components, positive.
    means : Tensor of shape (n_components, dim + condition_dim)
        Means of x and y.
    covariances : Tensor of shape (n_components, dim_all, dim_all)
        Their covariances, positive definite; ``dim_all = dim + condition_dim``.

    Examples
    --------
    >>> import torch
    >>> from sknode.fields import JointMixtureField
    >>> covariance = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    >>> field = JointMixtureField(1, torch.ones(1), torch.zeros(1, 2), covariance)
    >>> flow = field.given(torch.tensor([[3.0]]))  # x is normal about y
    >>> flow(torch.tensor(0.0), torch.zeros(1, 1))
    tensor([[3.]])
    """

    def __init__(self, dim: int, weights: Tensor, means: Tensor, covariances: Tensor):
        super().__init__()
        if not 0 < dim < means.shape[1]:
            raise ValueError(
                f"dim must be positive and less than the columns of means, "
                f"{means.shape[1]}. Got {dim}."
            )
        cross, condition = covariances[:, :dim, dim:], covariances[:, dim:, dim:]
        factor = torch.linalg.cholesky(condition)
        gain = torch.cholesky_solve(cross.mT, factor).mT  # (k, dim, condition_dim)
        within = covariances[:, :dim, :dim] - gain @ cross.mT
        within = (within + within.mT) / 2
        self.components = MixtureField(weights, means[:, :dim], within)
        n = len(weights)
        axes = self.components.axes.reshape(dim, n, dim)
        eye = torch.eye(condition.shape[1]).to(factor).expand_as(factor)
        whiten = torch.linalg.solve_triangular(factor, eye, upper=False)
        self.register_buffer("slopes", torch.einsum("ikj,kiq->kjq", axes, gain))
        self.register_buffer("condition_means", means[:, dim:])
        self.register_buffer("whiten", whiten)

    @property
    def axes(self) -> Tensor:
        """The principal axes of the components, as `MixtureField` has them."""
        return self.components.axes

    @property
    def variances(self) -> Tensor:
        """The variances (n_components, dim) along these axes."""
        return self.components.variances

    def given(self, condition: Tensor) -> MixtureField:
        """Return the flow for rows of given values.

        Parameters
        ----------
        condition : Tensor of shape (n, condition_dim)
            Values of y.

        Returns
        -------
        MixtureField
            The flow, with weights and means for every row.
        """
        u = condition[:, None, :] - self.condition_means  # (n, k, condition_dim)
        z = torch.einsum("kqr,nkr->nkq", self.whiten, u)
        logs = self.whiten.diagonal(dim1=1, dim2=2).log().sum(-1)
        logs = self.components.log_weights + logs - 0.5 * z.square().sum(-1)
        shift = torch.einsum("kjq,nkq->nkj", self.slopes, u)
        centres = self.components.centres + shift
        return self.components.replace(logs.log_softmax(-1), centres)
