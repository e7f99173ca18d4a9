"""From the units of X to whitened rows, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import log_ndtr, ndtri_exp

from sknode._mixture import fit_mixture, log_sum_exp

__all__ = [
    "Marginals",
    "Whitening",
    "check_spread",
    "find_collinear",
    "find_constant",
    "kish",
]

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
# Eigenvalues of a correlation matrix below the first mean columns that determine each
# other; they are raised to the second.
COLLINEAR, FLOOR = 1e-10, 1e-6
# Spreads of columns whose squares, and sums of them, neither overflow nor vanish.
LEAST_SPREAD, LARGEST_SPREAD = 1e-140, 1e140
# Logarithm of the longest step of Newton's method, short of an overflow.
LONGEST_STEP = 600.0


def kish(weight) -> float:
    """Return the number of rows that weights amount to (Kish's effective size)."""
    return float(weight.sum() ** 2 / (weight**2).sum())


def find_constant(X, weight):
    """Return which columns are constant up to rounding."""
    mean = np.average(X, axis=0, weights=weight)
    scale = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weight))
    return ~(scale > 10 * np.finfo(X.dtype).eps * np.abs(mean))


def check_spread(X, weight, names, what):
    """Raise an error that names columns whose variance is not a number of their type.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows.
    weight : ndarray of shape (n,)
        Their weights, of a size about one.
    names : ndarray of shape (d,)
        Names of the columns.
    what : str
        Name of the rows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.average(X, axis=0, weights=weight)
        spread = np.abs(X - mean).max(axis=0)
    rounding = max(10, len(X)) * np.finfo(X.dtype).eps * np.abs(mean)
    close = (spread < LEAST_SPREAD) & (spread > rounding)
    bad = close | ~(spread < LARGEST_SPREAD)
    if bad.any():
        raise ValueError(
            f"{what} must have columns whose values differ by {LEAST_SPREAD:g} to "
            f"{LARGEST_SPREAD:g}, or not at all. Got others in the columns "
            f"{', '.join(map(repr, names[bad].tolist()))}: use other units."
        )


def find_collinear(X, weight):
    """Return which columns are linear combinations of each other."""
    z = X - np.average(X, axis=0, weights=weight)
    share = weight / weight.sum()
    z /= np.sqrt(share @ z**2)
    values, vectors = np.linalg.eigh((z * share[:, None]).T @ z)
    return (np.abs(vectors[:, values < COLLINEAR]) > 1e-3).any(1)


@dataclass(frozen=True)
class Whitening:
    """The affine map to zero means and unit covariance.

    Attributes
    ----------
    mean, scale : ndarray of shape (d,)
        Moments of the columns.
    root : ndarray of shape (d, d)
        Lower Cholesky factor of the correlations.
    """

    mean: np.ndarray
    scale: np.ndarray
    root: np.ndarray

    @classmethod
    def fit(cls, X, weight):
        """Learn the map from weighted rows.

        With fewer than twice as many rows as columns the correlations are shrunk
        towards zero by the oracle approximating rule of Chen, Wiesel, Eldar & Hero,
        "Shrinkage algorithms for MMSE covariance estimation" (2010). Columns that are
        linear combinations of each other are treated as if each of them had a little
        noise of its own, 0.1 % of its scale.
        """
        mean = np.average(X, axis=0, weights=weight)
        scale = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weight))
        z = (X - mean) / scale
        correlation = (z * (weight / weight.sum())[:, None]).T @ z
        n, d = kish(weight), X.shape[1]
        if n < 2 * d and d > 1:
            square = (correlation**2).sum()
            share = (1 - 2 / d) * square + d**2
            share /= (n + 1 - 2 / d) * max(square - d, 1e-12)
            share = min(1.0, share)
            correlation = (1 - share) * correlation + share * np.eye(d)
        if np.linalg.eigvalsh(correlation)[0] < COLLINEAR:
            correlation += FLOOR * np.eye(d)
        return cls(mean, scale, np.linalg.cholesky(correlation))

    @cached_property
    def inverse_root(self):
        """Inverse of the root."""
        return solve_triangular(self.root, np.eye(len(self.root)), lower=True)

    def forward(self, X):
        """Return whitened rows and the log-determinant of the map, (n,)."""
        z = (X - self.mean) / self.scale
        # not a product of matrices, whose rounding depends on the number of rows
        z = np.einsum("nj,ij->ni", z, self.inverse_root)
        log_det = -np.log(np.diag(self.root)).sum() - np.log(self.scale).sum()
        return z, np.full(len(X), log_det)

    def inverse(self, Z):
        """Return rows in the original units."""
        return Z @ self.root.T * self.scale + self.mean


@dataclass(frozen=True)
class Marginals:
    """The map of every column to a standard normal distribution, by itself.

    The distribution of a column is a mixture of a few Gaussians, so the map is smooth
    and affine far out.

    Attributes
    ----------
    shift, unit : ndarray of shape (d,)
        Median and spread of the columns.
    weights, means, scales : ndarray of shape (d, k)
        Mixtures of the columns in these units.
    """

    shift: np.ndarray
    unit: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    scales: np.ndarray

    @classmethod
    def fit(cls, X, weight, n_components, rng):
        """Learn the map from weighted rows."""
        shift, unit, mixtures = [], [], []
        for column in X.T:
            low, middle, high = _quantiles(column, weight, (0.25, 0.5, 0.75))
            spread = (high - low) / 1.349  # of a normal distribution: its scale
            if not spread > 0:
                spread = math.sqrt(np.average((column - middle) ** 2, weights=weight))
            z = (column[:, None] - middle) / spread
            shift.append(middle)
            unit.append(spread)
            mixtures.append(
                fit_mixture(z, weight, n_components, rng, max_iter=200, tol=1e-5)
            )
        # a column may have got fewer components than asked for
        k = max(len(m.weights) for m in mixtures)

        def table(read, fill):
            return np.array(
                [
                    np.pad(x, (0, k - len(x)), constant_values=fill)
                    for x in map(read, mixtures)
                ]
            )

        return cls(
            np.array(shift),
            np.array(unit),
            table(lambda m: m.weights, 0.0),
            table(lambda m: m.means[:, 0], 0.0),
            table(lambda m: np.sqrt(m.covariances[:, 0, 0]), 1.0),
        )

    def _column(self, x, i):
        """Return the normal score of values in the units, and the log-slope."""
        kept = self.weights[i] > 0
        weights, scales = self.weights[i][kept], self.scales[i][kept]
        u = (x[:, None] - self.means[i][kept]) / scales
        below = log_sum_exp(log_ndtr(u), weights)
        above = log_sum_exp(log_ndtr(-u), weights)
        # from the smaller tail, for accuracy; rounding may exceed log 1
        below, above = np.minimum(below, 0.0), np.minimum(above, 0.0)
        z = np.where(below < above, ndtri_exp(below), -ndtri_exp(above))
        log_density = log_sum_exp(-0.5 * u**2, weights / scales)
        return z, log_density + 0.5 * z**2

    def forward(self, X):
        """Return normal scores and the log-determinants of the map, (n,)."""
        Z, log_det = np.empty(X.shape), np.zeros(len(X))
        for i, column in enumerate(X.T):
            Z[:, i], slope = self._column((column - self.shift[i]) / self.unit[i], i)
            log_det += slope - math.log(self.unit[i])
        return Z, log_det

    def inverse(self, Z):
        """Return rows in the original units: Newton's method, kept in a bracket."""
        X = np.empty(Z.shape)
        for i, z in enumerate(Z.T):
            kept = self.weights[i] > 0
            # where all components agree with z: on either side of the solution
            ends = self.means[i][kept] + self.scales[i][kept] * z[:, None]
            low, high = ends.min(1), ends.max(1)
            x = (low + high) / 2
            active = np.arange(len(z))
            for _ in range(100):
                value, slope = self._column(x[active], i)
                miss = value - z[active]
                low[active] = np.where(miss < 0, x[active], low[active])
                high[active] = np.where(miss > 0, x[active], high[active])
                # where the density is next to none a step is longer than any bracket
                step = x[active] - miss * np.exp(np.minimum(-slope, LONGEST_STEP))
                inside = (step > low[active]) & (step < high[active])
                middle = (low[active] + high[active]) / 2
                moved = np.where(inside, step, middle)
                done = np.abs(moved - x[active]) <= 1e-14 * (1 + np.abs(moved))
                x[active] = np.where(miss == 0, x[active], moved)
                active = active[~(done | (miss == 0))]
                if not len(active):
                    break
            X[:, i] = x * self.unit[i] + self.shift[i]
        return X


def _quantiles(x, weight, levels):
    """Return quantiles of weighted values."""
    order = np.argsort(x, kind="stable")
    mass = np.cumsum(weight[order])
    at = np.searchsorted(mass, np.array(levels) * mass[-1])
    return x[order][np.minimum(at, len(x) - 1)]
