"""The flow from a standard normal to a Gaussian mixture, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["MixtureField"]


class MixtureField(nn.Module):
    r"""Velocity that carries N(0, I) at t = 0 to a Gaussian mixture at t = 1.

    With independent ``x0 ~ N(0, I)`` and ``x1`` from the mixture, the velocity
    ``E[x1 - x0 | x_t = y]`` of the path ``x_t = (1 - t) x0 + t x1`` is what flow
    matching [1]_ regresses on. For a mixture it is a closed form, and so are its
    divergence and the density of ``x_t``.

    Parameters
    ----------
    weights : Tensor of shape (n_components,)
        Shares of the components, positive. They are divided by their sum.
    means : Tensor of shape (n_components, dim)
        Means of the components.
    covariances : Tensor of shape (n_components, dim, dim)
        Covariances of the components, positive definite.

    Attributes
    ----------
    log_weights : Tensor of shape (n_components,)
        Logarithms of the shares.
    centres : Tensor of shape (n_components, dim)
        Means in the axes of the components.
    variances : Tensor of shape (n_components, dim)
        Variances along these axes.
    axes : Tensor of shape (dim, n_components * dim)
        The principal axes as columns, component by component.

    Notes
    -----
    Given component ``k``, ``x_t`` is normal with mean ``t m_k`` and covariance
    ``C_k(t) = (1 - t)^2 I + t^2 S_k``, and the velocity is affine,
    ``v_k = m_k + (t S_k - (1 - t) I) C_k^-1 (y - t m_k)``; with responsibilities
    ``r_k(t, y)`` the velocity is ``sum_k r_k v_k`` and its divergence
    ``sum_k r_k (tr A_k + v_k . s_k) - v . s`` with the scores ``s_k`` and
    ``s = sum_k r_k s_k``. In the principal axes of ``S_k`` all of it is elementwise,
    for every t.

    References
    ----------
    .. [1] Lipman, Chen, Ben-Hamu, Nickel & Le, "Flow Matching for Generative
       Modeling", ICLR 2023.

    Examples
    --------
    A standard normal stays what it is, on a path that is narrower half way:

    >>> import torch
    >>> from sknode.fields import MixtureField
    >>> field = MixtureField(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    >>> field.with_divergence(torch.tensor(0.0), torch.ones(1, 2))
    (tensor([[-1., -1.]]), tensor([-2.]))
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor):
        super().__init__()
        n, dim = means.shape
        if weights.shape != (n,) or covariances.shape != (n, dim, dim):
            raise ValueError(
                "weights, means and covariances must have shapes (n_components,), "
                "(n_components, dim) and (n_components, dim, dim). Got "
                f"{tuple(weights.shape)}, {tuple(means.shape)} and "
                f"{tuple(covariances.shape)}."
            )
        variances, axes = torch.linalg.eigh(covariances)
        if not bool((variances > 0).all() & (weights > 0).all()):
            raise ValueError(
                "covariances must be positive definite and weights positive."
            )
        self.dim = dim
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("centres", torch.einsum("kij,ki->kj", axes, means))
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes.permute(1, 0, 2).reshape(dim, n * dim))

    def extra_repr(self) -> str:
        """Describe the field in its repr."""
        return f"dim={self.dim}, n_components={len(self.variances)}"

    def replace(self, log_weights: Tensor, centres: Tensor) -> MixtureField:
        """Return the flow to the mixture with other weights and means.

        Parameters
        ----------
        log_weights : Tensor of shape (n_components,) or (n, n_components)
            Logarithms of shares that add up to one, the same for all rows or not.
        centres : Tensor of shape (n_components, dim) or (n, n_components, dim)
            Means in the axes of the components.

        Returns
        -------
        MixtureField
            The flow. It shares the covariances of this one.
        """
        field = MixtureField.__new__(MixtureField)
        nn.Module.__init__(field)
        field.dim = self.dim
        field.register_buffer("log_weights", log_weights)
        field.register_buffer("centres", centres)
        field.register_buffer("variances", self.variances)
        field.register_buffer("axes", self.axes)
        return field

    def _components(self, t: Tensor, y: Tensor):
        """Return what all results are made of, in the axes of the components.

        Time, the distances ``u`` (n, k, dim) and the variances ``c`` of ``x_t``.
        """
        t = torch.as_tensor(t).to(y)
        t = t[..., None] if t.ndim else t
        u = (y @ self.axes).view(len(y), *self.variances.shape) - t * self.centres
        return t, u, (1 - t).square() + t.square() * self.variances

    def _logs(self, u: Tensor, c: Tensor) -> Tensor:
        """Return the logarithms (n, k) of the weights times the densities."""
        logs = (u.square() / c).sum(-1) + c.log().sum(-1)
        normaliser = self.dim * math.log(2 * math.pi)
        return self.log_weights - 0.5 * (logs + normaliser)

    def _shares(self, u: Tensor, c: Tensor) -> Tensor | float:
        """Return the probabilities (n, k, 1) of the components at these points."""
        if len(self.variances) == 1:
            return 1.0  # for which no density is needed: half of the work
        return self._logs(u, c).softmax(-1)[..., None]

    def _combine(self, shares: Tensor | float, values: Tensor) -> Tensor:
        """Return the sum over the components of values (n, k, dim) in their axes."""
        return (shares * values).flatten(1) @ self.axes.T

    def _velocities(self, t, u, c):
        """Return the slopes by which the components flow, and these velocities."""
        slopes = (t * self.variances - (1 - t)) / c
        return slopes, self.centres + slopes * u

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the velocity.

        Parameters
        ----------
        t : Tensor
            Times in [0, 1]: a scalar or of shape (n, 1).
        y : Tensor of shape (n, dim)
            States.

        Returns
        -------
        Tensor of shape (n, dim)
            Slopes.
        """
        t, u, c = self._components(t, y)
        _, velocities = self._velocities(t, u, c)
        return self._combine(self._shares(u, c), velocities)

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the velocity and its divergence.

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
        t, u, c = self._components(t, y)
        shares = self._shares(u, c)
        slopes, velocities = self._velocities(t, u, c)
        scores = -u / c
        slope, score = (self._combine(shares, v) for v in (velocities, scores))
        within = (slopes + velocities * scores).sum(-1, keepdim=True)
        return slope, (shares * within).sum((1, 2)) - (slope * score).sum(-1)

    def log_density(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the log-density of ``x_t``: at t = 1 that of the mixture.

        Parameters
        ----------
        t, y : Tensor
            As in ``forward``.

        Returns
        -------
        Tensor of shape (n,)
            Log-densities.
        """
        _, u, c = self._components(t, y)
        return self._logs(u, c).logsumexp(-1)

    def with_score(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity and the gradient of the log-density.

        Parameters
        ----------
        t, y : Tensor
            As in ``forward``.

        Returns
        -------
        slope, score : Tensor of shape (n, dim)
            Both.
        """
        t, u, c = self._components(t, y)
        shares = self._shares(u, c)
        _, velocities = self._velocities(t, u, c)
        return self._combine(shares, velocities), self._combine(shares, -u / c)
