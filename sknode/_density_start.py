"""Where the flow of `CNFDensity` starts: a Gaussian or a mixture, as chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sknode._density_condition import ClassMixture, JointMixture
from sknode._density_rows import deal, hold_out
from sknode._mixture import GaussianMixtureModel
from sknode._warp import Marginals, Whitening, find_constant

__all__ = ["Start", "choose_start", "fit_start", "is_better"]

# Mixtures of 1, 2, 4, ... components are tried, up to the first number, and to the
# second as long as more are better and each of them has rows enough.
FEW_COMPONENTS, MOST_COMPONENTS = 16, 64
# Components of the mixture that is the distribution of a single column.
MARGINAL_COMPONENTS = 12
# With fewer rows all of them are held out in turn, in so many parts.
FEW_ROWS, N_FOLDS = 1000, 5
# Rows that choices are made by: so many to fit to, and to judge by.
CHOICE_ROWS = 10_000, 5_000


@dataclass(frozen=True)
class Start:
    """Maps from the units of X to whitened rows, and the mixture there.

    Attributes
    ----------
    marginals : Marginals or None
        Applied first, if at all.
    whitening : Whitening
        Applied second.
    mixture : GaussianMixtureModel, ClassMixture or JointMixture
        Density of whitened rows.
    n_components : int
        Components that were asked for; of classes, each.
    """

    marginals: Marginals | None
    whitening: Whitening
    mixture: GaussianMixtureModel | ClassMixture | JointMixture
    n_components: int = 1

    def forward(self, X):
        """Return whitened rows and the log-determinants of the map."""
        if self.marginals is None:
            return self.whitening.forward(X)
        Z, first = self.marginals.forward(X)
        Z, second = self.whitening.forward(Z)
        return Z, first + second

    def inverse(self, Z):
        """Return rows in the units of X."""
        X = self.whitening.inverse(Z)
        return X if self.marginals is None else self.marginals.inverse(X)

    def log_density(self, X, given):
        """Return the log-density in the units of X."""
        Z, log_det = self.forward(X)
        return given.log_density(self.mixture, Z) + log_det

    def simplify(self, X, given, weight, n_components, seed):
        """Return the same maps with a mixture of fewer components."""
        if n_components >= self.n_components:
            return self
        Z, _ = self.forward(X)
        rng = np.random.RandomState(seed)
        mixture = given.fit_mixture(Z, weight, n_components, rng)
        return replace(self, mixture=mixture, n_components=n_components)

    def refit(self, X, given, weight, seed):
        """Return maps and mixture for all rows, from where they are."""
        if len(self.mixture.weights) > 1:
            return fit_start(X, given, weight, None, None, seed, start=self)
        return fit_start(X, given, weight, self.marginals is not None, 1, seed)


def fit_start(X, given, weight, marginals, n_components, seed, start=None):
    """Fit maps and mixture to weighted rows.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows.
    given : Given
        What their density depends on.
    weight : ndarray of shape (n,)
        Their weights.
    marginals : bool
        Whether to map every column to a normal distribution first.
    n_components : int
        Components of the mixture; 1 is the Gaussian of maximum likelihood.
    seed : int
        Draws where the mixtures begin.
    start : Start, optional
        Keep its maps and begin with its mixture.
    """
    rng = np.random.RandomState(seed)
    if start is not None:
        Z, _ = start.forward(X)
        mixture = given.fit_mixture(Z, weight, None, rng, start=start.mixture)
        return replace(start, mixture=mixture)
    warp, Z = None, X
    if marginals:
        k = max(1, min(MARGINAL_COMPONENTS, len(X) // 100))
        warp = Marginals.fit(X, weight, k, rng)
        Z, _ = warp.forward(X)
    whitening = Whitening.fit(Z, weight)
    Z, _ = whitening.forward(Z)
    mixture = given.fit_mixture(Z, weight, n_components, rng)
    return Start(warp, whitening, mixture, n_components)


def choose_start(X, given, weight, train, marginals, n_components, fraction, seed):
    """Fit to the rows for training what held-out rows choose.

    Parameters
    ----------
    X, weight : ndarray
        Rows and their weights.
    given : Given
        What their density depends on.
    train : ndarray of int
        Indices of the rows that the result is fitted to.
    marginals : bool or "auto"
        Whether columns are mapped to normal distributions.
    n_components : int or "auto"
        Components of the mixture.
    fraction : float
        Share of the rows that is held out; few rows are all held out in turn.
    seed : int
        Draws where the mixtures begin, and the rows held out.
    """
    n, dim = X.shape
    if n_components == "auto" and n < 2 * dim:  # nothing beyond a Gaussian can be told
        marginals, n_components = False, 1
    elif "auto" in (n_components, marginals):
        folds = _make_folds(X, given, weight, fraction, seed)
        if folds:
            choices = marginals, n_components
            marginals, n_components = _compare_starts(
                X, given, weight, folds, *choices, seed
            )
        else:  # too few rows to hold any out
            marginals = marginals is True
            n_components = 1 if n_components == "auto" else n_components
    rows = np.sort(train)
    return fit_start(
        X[rows], given.take(rows), weight[rows], bool(marginals), n_components, seed
    )


def _make_folds(X, given, weight, fraction, seed):
    """Return pairs of indices: rows to fit to, and rows to judge by."""
    n, strata = len(X), given.strata()
    if n < FEW_ROWS:
        order = np.random.RandomState(seed).permutation(n)
        if strata is not None:
            order = deal(order, strata, N_FOLDS)
        parts = np.array_split(order, min(N_FOLDS, n))
        folds = [(np.setdiff1d(order, part), part) for part in parts]
    else:
        parts = hold_out(n, fraction, seed, strata)
        folds = [tuple(x[:k] for x, k in zip(parts, CHOICE_ROWS, strict=True))]
    return [
        (np.sort(a), np.sort(b))
        for a, b in folds
        if not find_constant(X[a], weight[a]).any()
    ]


def _compare_starts(X, given, weight, folds, marginals, n_components, seed):
    """Return what held-out rows choose: (marginals, n_components).

    Parameters
    ----------
    X, weight : ndarray
        Rows and their weights.
    given : Given
        What their density depends on.
    folds : list of (train, held_out)
        Indices of rows.
    marginals : bool or "auto"
        Whether columns are mapped to normal distributions.
    n_components : int or "auto"
        Components of the mixture.
    seed : int
        Draws where the mixtures begin.

    Notes
    -----
    Anything but the Gaussian has to be better by more than the standard error. Maps of
    columns are judged with as many components as help: what they gain with few may be
    what more components do better, as with rings.
    """
    rows = np.concatenate([held_out for _, held_out in folds])

    def evaluate(warp, k):
        parts = []
        for train, held_out in folds:
            conditions = given.take(train), given.take(held_out)
            start = fit_start(X[train], conditions[0], weight[train], warp, k, seed)
            parts.append(start.log_density(X[held_out], conditions[1]))
        return np.concatenate(parts)

    warps = [False, True] if marginals == "auto" else [bool(marginals)]
    dim = X.shape[1]
    most = min(given.take(a).most_components(dim, MOST_COMPONENTS) for a, _ in folds)
    if n_components != "auto":
        few = [n_components]
    else:
        few = [k for k in (1, 2, 4, 8, 16) if k <= min(FEW_COMPONENTS, most)]
    scores = {(warp, k): evaluate(warp, k) for warp in warps for k in few}

    def mean(key):
        return np.average(scores[key], weights=weight[rows])

    best = max(scores, key=mean)
    while n_components == "auto" and best[1] == max(k for _, k in scores):
        k = 2 * best[1]
        if k > most:
            break
        scores |= {(warp, k): evaluate(warp, k) for warp in warps}
        best = max(scores, key=mean)
    simple = (warps[0], few[0])
    if is_better(scores[best], scores[simple], weight[rows]):
        return best
    return simple


def is_better(one, other, weight) -> bool:
    """Return whether held-out log-densities are better by more than chance."""
    gain = one - other
    if np.average(gain, weights=weight) <= 0:
        return False
    # a few huge gains, as on rows far out, say less about chance than about the scale
    gain = np.clip(gain, *np.quantile(gain, [0.02, 0.98]))
    mean = np.average(gain, weights=weight)
    variance = np.average((gain - mean) ** 2, weights=weight)
    error = np.sqrt(variance * (weight**2).sum()) / weight.sum()
    return bool(mean > error)
