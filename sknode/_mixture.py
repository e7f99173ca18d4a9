"""Gaussian mixtures with sample weights, by expectation and maximisation.

`sklearn.mixture.GaussianMixture` takes no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["GaussianMixtureModel", "fit_mixture", "log_sum_exp"]

# A component acts as if it had also seen one row at its mean, whose covariance is this
# times the identity: it cannot collapse onto a row. Data are whitened.
PRIOR_VARIANCE = 1e-4
# Steps of k-means that seed the components, and tries for each seed (k-means++).
SEED_STEPS, SEED_TRIES = 5, 4


@dataclass(frozen=True)
class GaussianMixtureModel:
    """A Gaussian mixture.

    Attributes
    ----------
    weights : ndarray of shape (k,)
        Shares of the components.
    means : ndarray of shape (k, d)
        Their means.
    covariances : ndarray of shape (k, d, d)
        Their covariances.
    n_iter : int
        Iterations that it took to fit.
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    n_iter: int = 1

    @classmethod
    def standard_normal(cls, dim: int):
        """Return the mixture of one standard normal distribution."""
        return cls(np.ones(1), np.zeros((1, dim)), np.eye(dim)[None])

    def joint(self, X):
        """Return the logarithms (n, k) of shares times densities of the components."""
        k, d = self.means.shape
        whiten = np.linalg.inv(np.linalg.cholesky(self.covariances))  # (k, d, d)
        logs = np.log(self.weights) - 0.5 * d * math.log(2 * math.pi)
        logs += np.log(np.diagonal(whiten, axis1=1, axis2=2)).sum(1)
        # one product for all components
        z = X @ whiten.transpose(2, 0, 1).reshape(d, k * d)
        z -= np.einsum("kij,kj->ki", whiten, self.means).ravel()
        return logs - 0.5 * np.square(z, out=z).reshape(len(X), k, d).sum(2)

    def log_density(self, X):
        """Return the log-density (n,) at rows."""
        return log_sum_exp(self.joint(X))


def fit_mixture(X, weight, n_components, rng, *, start=None, max_iter=100, tol=1e-4):
    """Fit a mixture with full covariances to weighted rows.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows, about whitened.
    weight : ndarray of shape (n,)
        Their weights; the sum counts as the number of rows.
    n_components : int
        Number of components.
    rng : RandomState
        Draws the seeds.
    start : GaussianMixtureModel, optional
        Start from here instead of seeds.
    max_iter : int
        Largest number of iterations.
    tol : float
        They end when the mean log-likelihood rises by less.

    Returns
    -------
    GaussianMixtureModel
    """
    if start is None:
        shares = _seed(X, weight, n_components, rng)
        start = _maximise(X, shares * weight[:, None])
    model, last = start, -math.inf
    for n_iter in range(1, max_iter + 1):
        joint = model.joint(X)
        total = log_sum_exp(joint)[:, None]
        likelihood = np.average(total[:, 0], weights=weight)
        if likelihood < last + tol:
            break
        last = likelihood
        model = _maximise(X, np.exp(joint - total) * weight[:, None], n_iter)
    return model


def log_sum_exp(values, weights=1.0):
    """Return the logarithms of weighted sums (n,) of the exponentials of values (n, k).

    As `scipy.special.logsumexp` of the real numbers, of which it takes a quarter of the
    time. A row's result is its own, to the bit.
    """
    # where all are minus infinity so is the result, without differences of them
    most = values.max(1, keepdims=True).clip(np.finfo(values.dtype).min)
    with np.errstate(divide="ignore"):
        return np.log((weights * np.exp(values - most)).sum(1)) + most[:, 0]


def _maximise(X, shares, n_iter=1):
    """Return the mixture of the weighted moments (n, k)."""
    d = X.shape[1]
    count = shares.sum(0) + 1e-10
    means = shares.T @ X / count[:, None]
    covariances = np.empty((len(count), d, d))
    for k, mean in enumerate(means):
        centred = X - mean
        scatter = (centred * shares[:, [k]]).T @ centred
        scatter[np.diag_indices(d)] += PRIOR_VARIANCE
        covariances[k] = scatter / (count[k] + 1.0)
    return GaussianMixtureModel(count / count.sum(), means, covariances, n_iter)


def _seed(X, weight, n_components, rng):
    """Return a partition (n, k) by k-means++ and a few steps of k-means."""
    probability = weight / weight.sum()
    centres = X[[rng.choice(len(X), p=probability)]]
    nearest = _squares(X, centres)[:, 0]
    while len(centres) < n_components:
        mass = np.cumsum(weight * nearest)
        if mass[-1] <= 0:  # fewer different rows than components
            break
        tries = np.searchsorted(mass, rng.uniform(size=SEED_TRIES) * mass[-1])
        tries = np.minimum(tries, len(X) - 1)
        distances = np.minimum(nearest[:, None], _squares(X, X[tries]))
        best = (weight @ distances).argmin()
        nearest = distances[:, best]
        centres = np.vstack([centres, X[tries[best]]])
    for _ in range(SEED_STEPS):
        member = _squares(X, centres).argmin(1)
        shares = np.zeros((len(X), len(centres)))
        shares[np.arange(len(X)), member] = 1.0
        count = weight @ shares
        full = count > 0
        centres = ((shares * weight[:, None]).T @ X)[full] / count[full, None]
        shares = shares[:, full]
    return shares


def _squares(X, centres):
    """Return squared distances, without the rounding that can make them negative."""
    product = X @ centres.T
    squares = (X**2).sum(1)[:, None] - 2 * product + (centres**2).sum(1)
    return np.maximum(squares, 0.0)
