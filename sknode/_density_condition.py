"""What the density of `CNFDensity` may depend on: classes or values, and mixtures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import type_of_target

from sknode._mixture import GaussianMixtureModel, fit_mixture
from sknode._warp import Whitening, check_spread, find_constant

__all__ = [
    "ClassCondition",
    "ClassMixture",
    "Given",
    "JointMixture",
    "Unconditional",
    "ValueCondition",
    "check_target",
    "fit_condition",
]

# A class with a single Gaussian is shrunk towards the covariance within all classes as
# if it had so many rows of that more than there are columns.
MORE_ROWS = 1


def fit_condition(y, weight, kind=True):
    """Learn from targets what they are.

    Parameters
    ----------
    y : array-like of shape (n,) or (n, n_values)
        Targets.
    weight : ndarray of shape (n,)
        Weights, positive.
    kind : {True, "classes", "values"}
        What they are; True to tell from their type.

    Returns
    -------
    ClassCondition or ValueCondition
    """
    y = check_target(y, len(weight))
    if kind is True or isinstance(kind, np.bool_):
        kind = _kind_of_target(y)
    if kind == "classes":
        y = column_or_1d(y, warn=True)
        classes, label = np.unique(y, return_inverse=True)
        shares = np.bincount(label, weights=weight / weight.sum())
        return ClassCondition(classes, shares)
    y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
    y = y.reshape(len(y), -1)
    check_spread(y, weight, np.arange(y.shape[1]), "y")
    constant = find_constant(y, weight)
    if constant.any():
        which = ", ".join(map(str, np.flatnonzero(constant)))
        raise ValueError(f"y has constant columns: {which}. Drop them.")
    mean = np.average(y, axis=0, weights=weight)
    scale = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
    return ValueCondition(mean, scale)


def _kind_of_target(y):
    """Return whether targets are classes or values, by their type."""
    kind = type_of_target(y, input_name="y")
    if kind in ("binary", "multiclass"):
        return "classes"
    if kind in ("continuous", "continuous-multioutput"):
        return "values"
    raise ValueError(
        "With conditional=True y must be one column of classes, or one or several of "
        f"continuous values. Got a {kind} target. conditional='values' takes all "
        "numbers for values."
    )


def check_target(y, n):
    """Return targets as an array without missing values, one a row."""
    if y is None:
        raise ValueError(
            "A conditional density requires y to be passed, but the target y is None."
        )
    # pandas has a missing value that NumPy cannot compare
    if hasattr(y, "isna") and np.any(y.isna()):
        raise ValueError("Input y contains NaN.")
    y = check_array(y, ensure_2d=False, dtype=None, input_name="y")
    check_consistent_length(np.empty(n), y)
    return y


@dataclass(frozen=True)
class Unconditional:
    """Nothing: y is ignored."""

    kind, dim = None, 0

    def encode(self, y, n):
        """Return no columns (n, 0)."""
        return np.empty((n, 0))

    def repeat(self, y, n):
        """Return no target of rows to sample."""
        if y is not None:
            raise ValueError("y must be None without conditional=True.")

    def fit_mixture(self, Z, C, weight, n_components, rng, start=None):
        """Fit a mixture of at most so many components, or go on from one."""
        if start is None and n_components == 1:
            return GaussianMixtureModel.standard_normal(Z.shape[1])
        return fit_mixture(Z, weight, n_components, rng, start=start)

    def log_density(self, mixture, Z, C):
        """Return log-densities (n,) of whitened rows."""
        return mixture.log_density(Z)

    def most_components(self, C, dim, limit):
        """Return how many components may be tried, of which there are rows enough."""
        return min(limit, len(C) // (2 * (dim + 1)))

    def strata(self, C):
        """Return labels (n,) of which a share each is held out, if there are any."""


@dataclass(frozen=True)
class ClassCondition:
    """Classes, as indicators.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
        Labels.
    priors : ndarray of shape (n_classes,)
        Their shares.
    """

    classes: np.ndarray
    priors: np.ndarray
    kind = "classes"

    @property
    def dim(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def encode(self, y, n):
        """Return indicators (n, n_classes)."""
        y = column_or_1d(check_target(y, n), warn=True)
        labels, known = y.tolist(), self.classes.tolist()
        position = {label: i for i, label in enumerate(known)}
        unseen = sorted(set(labels) - set(known), key=str)
        if unseen:
            raise ValueError(
                f"y has labels that were not seen in fit: {unseen}. Known are {known}."
            )
        return np.eye(self.dim)[[position[label] for label in labels]]

    def repeat(self, y, n):
        """Return labels (n,) of rows to sample."""
        return _repeat(np.atleast_1d(y), n) if y is not None else None

    def fit_mixture(self, Z, C, weight, n_components, rng, start=None):
        """Fit a mixture to every class, with fewer components to those of few rows."""
        label, dim = C.argmax(1), Z.shape[1]
        parts = [np.flatnonzero(label == c) for c in range(self.dim)]
        within = _within_classes(Z, weight, parts)
        models = []
        for c, rows in enumerate(parts):
            part, shares = Z[rows], weight[rows]
            before = None if start is None else start.models[c]
            if before is None:
                n = min(n_components, len(rows) // (2 * (dim + 1)))
            else:
                n = len(before.weights)
            if n > 1:
                models.append(fit_mixture(part, shares, n, rng, start=before))
            else:
                models.append(_shrunk_gaussian(part, shares, within))
        return ClassMixture(tuple(models))

    def log_density(self, mixture, Z, C):
        """Return log-densities (n,) of whitened rows."""
        return mixture.log_density(Z, C)

    def most_components(self, C, dim, limit):
        """Return how many may be tried for a class: those for all are limited."""
        largest = int(C.sum(0).max()) // (2 * (dim + 1))
        return min(limit // self.dim, largest)

    def strata(self, C):
        """Return the labels (n,)."""
        return C.argmax(1)


@dataclass(frozen=True)
class ValueCondition:
    """Values, standardised.

    Attributes
    ----------
    mean, scale : ndarray of shape (n_values,)
        Moments of the columns.
    """

    mean: np.ndarray
    scale: np.ndarray
    kind = "values"

    @property
    def dim(self) -> int:
        """Number of columns."""
        return len(self.mean)

    def encode(self, y, n):
        """Return standardised values (n, n_values)."""
        y = check_array(
            check_target(y, n), ensure_2d=False, dtype=np.float64, input_name="y"
        )
        y = y.reshape(n, -1)
        if y.shape[1] != self.dim:
            raise ValueError(f"y has {y.shape[1]} columns, but had {self.dim} in fit.")
        return (y - self.mean) / self.scale

    def repeat(self, y, n):
        """Return values (n, n_values) of rows to sample."""
        if y is None:
            return None
        y = np.asarray(y, dtype=np.float64)
        return _repeat(
            y.reshape(-1, self.dim) if self.dim == 1 else np.atleast_2d(y), n
        )

    def fit_mixture(self, Z, C, weight, n_components, rng, start=None):
        """Fit a mixture to rows and values together."""
        joint, dim = np.hstack([Z, C]), Z.shape[1]
        if start is not None or n_components > 1:
            before = None if start is None else start.model
            return JointMixture(
                fit_mixture(joint, weight, n_components, rng, start=before), dim
            )
        # shrunk where there are few rows
        moments = Whitening.fit(joint, weight)
        root = moments.scale[:, None] * moments.root
        model = GaussianMixtureModel(
            np.ones(1), moments.mean[None], (root @ root.T)[None]
        )
        return JointMixture(model, dim)

    def log_density(self, mixture, Z, C):
        """Return log-densities (n,) of whitened rows."""
        return mixture.log_density(Z, C)

    def most_components(self, C, dim, limit):
        """Return how many components may be tried, of which there are rows enough."""
        return min(limit, len(C) // (2 * (dim + self.dim + 1)))

    def strata(self, C):
        """Return nothing: rows are held out regardless of their values."""


@dataclass(frozen=True)
class Given:
    """A condition and what it is for rows.

    Attributes
    ----------
    condition : Unconditional, ClassCondition or ValueCondition
        Its kind.
    rows : ndarray of shape (n, condition.dim)
        Encoded targets.
    """

    condition: object
    rows: np.ndarray

    def take(self, index):
        """Return that of some rows."""
        return replace(self, rows=self.rows[index])

    def fit_mixture(self, Z, weight, n_components, rng, start=None):
        """Fit a mixture to whitened rows with these conditions."""
        return self.condition.fit_mixture(
            Z, self.rows, weight, n_components, rng, start
        )

    def log_density(self, mixture, Z):
        """Return log-densities (n,) of whitened rows with these conditions."""
        return self.condition.log_density(mixture, Z, self.rows)

    def most_components(self, dim, limit):
        """Return how many components may be tried, at least one."""
        return max(1, self.condition.most_components(self.rows, dim, limit))

    def strata(self):
        """Return labels (n,) of which a share each is held out, or None."""
        return self.condition.strata(self.rows)


@dataclass(frozen=True)
class ClassMixture:
    """A mixture for every class.

    Attributes
    ----------
    models : tuple of GaussianMixtureModel
        The mixtures.
    """

    models: tuple[GaussianMixtureModel, ...]

    @property
    def n_iter(self) -> int:
        """Most iterations that one of them took."""
        return max(m.n_iter for m in self.models)

    @property
    def weights(self):
        """Shares (n_components, n_classes) of all components in the classes."""
        sizes = [len(m.weights) for m in self.models]
        table = np.zeros((sum(sizes), len(sizes)))
        rows, columns = np.arange(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes)
        table[rows, columns] = np.concatenate([m.weights for m in self.models])
        return table

    @property
    def means(self):
        """Their means (n_components, d)."""
        return np.concatenate([m.means for m in self.models])

    @property
    def covariances(self):
        """Their covariances (n_components, d, d)."""
        return np.concatenate([m.covariances for m in self.models])

    def log_density(self, Z, C):
        """Return the log-density (n,) at rows of classes, by indicators."""
        label, logs = C.argmax(1), np.empty(len(Z))
        for c, model in enumerate(self.models):
            logs[label == c] = model.log_density(Z[label == c])
        return logs


@dataclass(frozen=True)
class JointMixture:
    """A mixture of rows and values together, of which the values are given.

    Attributes
    ----------
    model : GaussianMixtureModel
        Distribution of ``(z, c)``.
    dim : int
        Size of z.
    """

    model: GaussianMixtureModel
    dim: int

    @property
    def n_iter(self) -> int:
        """Iterations that it took."""
        return self.model.n_iter

    @property
    def weights(self):
        """Shares (k,) of the components."""
        return self.model.weights

    @property
    def means(self):
        """Their means (k, d + c)."""
        return self.model.means

    @property
    def covariances(self):
        """Their covariances (k, d + c, d + c)."""
        return self.model.covariances

    def log_density(self, Z, C):
        """Return the log-density (n,) at rows with values."""
        given = GaussianMixtureModel(
            self.weights,
            self.means[:, self.dim :],
            self.covariances[:, self.dim :, self.dim :],
        )
        return self.model.log_density(np.hstack([Z, C])) - given.log_density(C)


def _within_classes(Z, weight, parts):
    """Return the covariance within classes, shrunk towards a multiple of identity."""
    dim = Z.shape[1]
    centred = Z.copy()
    for rows in parts:
        if len(rows):
            centred[rows] -= np.average(Z[rows], axis=0, weights=weight[rows])
    scatter = (centred * weight[:, None]).T @ centred
    total, more = weight.sum(), dim + MORE_ROWS
    # whitened rows have unit variance, with the means of the classes
    share = np.trace(scatter) / (dim * total) + 1e-4
    return (scatter + more * share * np.eye(dim)) / (total + more)


def _shrunk_gaussian(Z, weight, within):
    """Return the Gaussian of a class, as one component."""
    dim, total = Z.shape[1], weight.sum()
    mean = np.average(Z, axis=0, weights=weight) if len(Z) else np.zeros(dim)
    scatter = ((Z - mean) * weight[:, None]).T @ (Z - mean)
    more = dim + MORE_ROWS
    covariance = (scatter + more * within) / (total + more)
    return GaussianMixtureModel(np.ones(1), mean[None], covariance[None])


def _repeat(y, n):
    """Return targets, one for all rows or one each, for each row."""
    if len(y) not in (1, n):
        raise ValueError(
            f"y must have one entry for all samples, or n_samples = {n}. Got {len(y)}."
        )
    return y if len(y) == n else np.repeat(y, n, axis=0)
