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
# Beyond this, squares of features have lost what covariances are made of.
LARGEST = 1e3
# Numbers in a block of features.
BLOCK_VALUES = 2**20
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
        Number of components, fewer where there are fewer rows.
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
    iterate = _iterate if np.abs(X).max() > LARGEST else _Moments(*X.shape).iterate
    if start is None:
        shares = _seed(X, weight, n_components, rng)
        start = _maximise(X, shares * weight[:, None])
    model, last = start, -math.inf
    for n_iter in range(1, max_iter + 1):
        likelihood, following = iterate(X, weight, model, n_iter)
        if likelihood < last + tol:
            break
        last, model = likelihood, following
    return model


def _iterate(X, weight, model, n_iter):
    """Return the mean log-density, and the mixture of the next iteration."""
    joint = model.joint(X)
    total = log_sum_exp(joint)[:, None]
    shares = np.exp(joint - total) * weight[:, None]
    return np.average(total[:, 0], weights=weight), _maximise(X, shares, n_iter)


class _Moments:
    """Steps of expectation and maximisation, by two products of matrices each.

    Log-densities of Gaussians are linear in the products of two features, and so are
    the moments that new ones are made from.

    Parameters
    ----------
    n, dim : int
        Number of rows and of features.
    """

    def __init__(self, n, dim):
        self.dim = dim
        self.pairs = np.triu_indices(self.dim)
        rows = max(1, BLOCK_VALUES // (self.dim + len(self.pairs[0])))
        self.blocks = [slice(i, i + rows) for i in range(0, n, rows)]

    def _features(self, X):
        """Return a one, the features and their products (m, p)."""
        first, second = self.pairs
        return np.concatenate(
            [np.ones((len(X), 1)), X, X[:, first] * X[:, second]], axis=1
        )

    def _coefficients(self, model):
        """Return what features are multiplied with (p, k), for the joint logarithms."""
        root = np.linalg.inv(np.linalg.cholesky(model.covariances))
        precisions = root.transpose(0, 2, 1) @ root
        linear = np.einsum("kij,kj->ki", precisions, model.means)
        logs = np.log(model.weights) - 0.5 * self.dim * math.log(2 * math.pi)
        logs += np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)
        logs -= 0.5 * (linear * model.means).sum(1)
        first, second = self.pairs
        # products of different features occur once here, twice in a square
        square = -np.where(first == second, 0.5, 1.0) * precisions[:, first, second]
        return np.concatenate([logs[:, None], linear, square], axis=1).T

    def iterate(self, X, weight, model, n_iter):
        """Return the mean log-density, and the mixture of the next iteration."""
        coefficients, likelihood, sums = self._coefficients(model), 0.0, 0.0
        for block in self.blocks:
            features, mass = self._features(X[block]), weight[block]
            joint = features @ coefficients
            most = joint.max(axis=1, keepdims=True)
            shares = np.exp(joint - most, out=joint)
            total = shares.sum(axis=1, keepdims=True)
            likelihood += mass @ (most + np.log(total))[:, 0]
            shares *= mass[:, None] / total
            sums = sums + shares.T @ features
        return likelihood / weight.sum(), self._model(sums, n_iter)

    def _model(self, sums, n_iter):
        """Return the mixture of sums (k, p) of the features."""
        d = self.dim
        count = sums[:, 0] + 1e-10
        means = sums[:, 1 : d + 1] / count[:, None]
        first, second = self.pairs
        scatter = np.empty((len(count), d, d))
        scatter[:, first, second] = scatter[:, second, first] = (
            sums[:, d + 1 :] - count[:, None] * means[:, first] * means[:, second]
        )
        scatter[:, range(d), range(d)] += PRIOR_VARIANCE
        covariances = scatter / (count + 1.0)[:, None, None]
        return GaussianMixtureModel(count / count.sum(), means, covariances, n_iter)


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
    """Return the mixture of weighted shares (n, k).

    Centred before it is squared: for rows so far out that the other way round nothing
    but rounding would be left.
    """
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
    while len(centres) < min(n_components, len(X)):
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
