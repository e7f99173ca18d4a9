"""Synthetic data sets whose densities are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from scipy.special import ive, logsumexp
from sklearn.utils import check_array, check_random_state

__all__ = ["log_density", "make_density"]

# Rows times nodes of a quadrature that are held in memory at a time.
BLOCK_VALUES = 2**21
# Nodes of Gauss and Legendre a panel, and its length in standard deviations of the
# noise: together exact to about 1e-13.
PANEL_NODES, PANEL_LENGTH = 20, 2.0


def make_density(name, n_samples=1000, *, noise=None, random_state=None):
    """Draw from a distribution in the plane whose density is known exactly.

    Parameters
    ----------
    name : {"moons", "circles", "8gaussians", "checkerboard", "pinwheel", \
            "spirals", "rings"}
        Which one.
    n_samples : int, default=1000
        Number of rows.
    noise : float, optional
        Standard deviation of the Gaussian noise around the curves, or of the Gaussians;
        by default 0.1 for "moons" and "spirals", 0.06 for "circles", ``sqrt(1 / 8)``
        for "8gaussians", 0.05 for "rings". "checkerboard" and "pinwheel" have none.
    random_state : int, RandomState instance or None, default=None
        Draws the rows.

    Returns
    -------
    X : ndarray of shape (n_samples, 2)
        The rows.
    log_density : ndarray of shape (n_samples,)
        Logarithm of their density. Its mean estimates minus the entropy, which no model
        can exceed in expectation.

    See Also
    --------
    sknode.datasets.log_density : The same at other points.

    Notes
    -----
    "moons" are the half circles of `sklearn.datasets.make_moons` and "circles" two of
    radius 1 and 0.5, with uniform angles; "rings" have radii 1, 2, 3 and 4; "spirals"
    are two arms of one and a half turns; "8gaussians" lie on a circle of radius
    ``sqrt(8)``; "checkerboard" is uniform on every other unit square of
    ``[-4, 4]^2``; "pinwheel" is five Gaussians, twisted about the origin by an angle
    that depends on the radius, which keeps areas.

    Examples
    --------
    >>> from sknode.datasets import make_density
    >>> X, log_density = make_density("moons", 500, random_state=0)
    >>> X.shape, log_density.shape
    ((500, 2), (500,))
    """
    toy = _make(name, noise)
    if not isinstance(n_samples, Integral) or n_samples < 1:
        raise ValueError(f"n_samples must be a positive integer. Got {n_samples!r}.")
    X = toy.sample(int(n_samples), check_random_state(random_state))
    return X, toy.log_density(X)


def log_density(name, X, *, noise=None):
    """Return the logarithm of the density that `make_density` draws from.

    Parameters
    ----------
    name : str
        As in `make_density`.
    X : array-like of shape (n_samples, 2)
        Points.
    noise : float, optional
        As in `make_density`.

    Returns
    -------
    ndarray of shape (n_samples,)
        Log-densities; minus infinity where there is none.

    Examples
    --------
    >>> from sknode.datasets import log_density
    >>> log_density("checkerboard", [[0.5, 0.5], [0.5, 1.5]]).round(3)
    array([-3.466,   -inf])
    """
    X = check_array(X, dtype=np.float64)
    if X.shape[1] != 2:
        raise ValueError(f"X must have 2 features. Got {X.shape[1]} instead.")
    return _make(name, noise).log_density(X)


def _make(name, noise):
    """Return a distribution by name."""
    if name not in TOYS:
        raise ValueError(
            f"name must be one of {', '.join(map(repr, TOYS))}. Got {name!r} instead."
        )
    make, default = TOYS[name]
    if default is None:
        if noise is not None:
            raise ValueError(f"noise must be None for {name!r}. Got {noise!r}.")
        return make()
    noise = default if noise is None else noise
    if not isinstance(noise, Real) or not 0 < noise < math.inf:
        raise ValueError(f"noise must be a positive number. Got {noise!r} instead.")
    return make(float(noise))


@dataclass(frozen=True)
class NoisyCurves:
    """Gaussian noise around curves that are run through at random.

    ``curve`` maps the square root of a parameter that is uniform in [0, 1] to points of
    the first curve, and ``others`` that one to all of them. ``speed`` bounds how fast
    ``curve`` moves.
    """

    curve: Callable[[np.ndarray], np.ndarray]
    others: Callable[[np.ndarray], list[np.ndarray]]
    speed: float
    noise: float

    def sample(self, n, rng):
        """Draw rows."""
        curves = np.stack(self.others(self.curve(np.sqrt(rng.uniform(size=n)))))
        which = rng.randint(len(curves), size=n)
        return curves[which, np.arange(n)] + self.noise * rng.normal(size=(n, 2))

    def log_density(self, X):
        """Integrate over the parameter, by Gauss and Legendre in short panels."""
        n_panels = math.ceil(self.speed / (PANEL_LENGTH * self.noise))
        nodes, weights = np.polynomial.legendre.leggauss(PANEL_NODES)
        s = (np.arange(n_panels)[:, None] + (nodes + 1) / 2).ravel() / n_panels
        # du = 2 s ds
        share = s * np.tile(weights / n_panels, n_panels)
        curves = self.others(self.curve(s))
        points = np.concatenate(curves)
        share = np.tile(share, len(curves)) / len(curves)
        result = np.empty(len(X))
        rows_each = max(1, BLOCK_VALUES // len(points))
        for start in range(0, len(X), rows_each):
            rows = X[start : start + rows_each]
            squares = sum((rows[:, [i]] - points[:, i]) ** 2 for i in (0, 1))
            exponents = -0.5 * squares / self.noise**2
            result[start : start + rows_each] = logsumexp(exponents, b=share, axis=1)
        return result - math.log(2 * math.pi * self.noise**2)


@dataclass(frozen=True)
class NoisyCircles:
    """Gaussian noise around circles about the origin, all equally likely."""

    radii: tuple[float, ...]
    noise: float

    def sample(self, n, rng):
        """Draw rows."""
        angle = rng.uniform(0, 2 * math.pi, size=n)
        radius = np.array(self.radii)[rng.randint(len(self.radii), size=n)]
        X = radius[:, None] * np.c_[np.cos(angle), np.sin(angle)]
        return X + self.noise * rng.normal(size=(n, 2))

    def log_density(self, X):
        """Integrate over the angle, which makes a Bessel function."""
        r, radii = np.hypot(*X.T)[:, None], np.array(self.radii)
        variance = self.noise**2
        logs = -0.5 * (r - radii) ** 2 / variance + np.log(ive(0, r * radii / variance))
        return logsumexp(logs, axis=1) - math.log(
            2 * math.pi * variance * len(self.radii)
        )


@dataclass(frozen=True)
class TwistedGaussians:
    """Gaussians on a ring, rotated by an angle that depends on the radius.

    Such a twist keeps areas, so that densities are those of the Gaussians.
    """

    n_components: int
    radius: float
    radial: float
    tangential: float
    twist: Callable[[np.ndarray], np.ndarray] = np.zeros_like

    @property
    def _angles(self):
        return 2 * math.pi * np.arange(self.n_components) / self.n_components

    def sample(self, n, rng):
        """Draw rows."""
        X = rng.normal(size=(n, 2)) * [self.radial, self.tangential]
        X[:, 0] += self.radius
        angle = self._angles[rng.randint(self.n_components, size=n)]
        return _rotate(X, angle + self.twist(np.hypot(*X.T)))

    def log_density(self, X):
        """Untwist and evaluate the Gaussians."""
        X = _rotate(X, -self.twist(np.hypot(*X.T)))
        scale = np.array([self.radial, self.tangential])
        logs = []
        for angle in self._angles:
            z = (_rotate(X, np.full(len(X), -angle)) - [self.radius, 0.0]) / scale
            logs.append(-0.5 * (z**2).sum(1))
        area = 2 * math.pi * scale.prod() * self.n_components
        return logsumexp(logs, axis=0) - math.log(area)


class Checkerboard:
    """Uniform on every other unit square of [-4, 4]^2."""

    def sample(self, n, rng):
        """Draw rows."""
        x = rng.uniform(-4, 4, size=n)
        y = rng.uniform(size=n) + 2 * rng.randint(-2, 2, size=n) + np.floor(x) % 2
        return np.c_[x, y]

    def log_density(self, X):
        """Return minus the logarithm of the area, inside."""
        dark = np.floor(X).sum(1) % 2 == 0
        inside = (X >= -4).all(1) & (X < 4).all(1) & dark
        return np.where(inside, -math.log(32), -np.inf)


def _rotate(X, angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.c_[c * X[:, 0] - s * X[:, 1], s * X[:, 0] + c * X[:, 1]]


def _moons(noise):
    def curve(s):
        angle = math.pi * s**2
        return np.c_[np.cos(angle), np.sin(angle)]

    def both(points):
        return [points, [1.0, 0.5] - points]

    return NoisyCurves(curve, both, 2 * math.pi, noise)


def _spirals(noise):
    def curve(s):
        # about as dense at the centre as outside
        angle = 3 * math.pi * s
        return angle[:, None] * np.c_[-np.cos(angle), np.sin(angle)] / 3

    def both(points):
        return [points, -points]

    return NoisyCurves(curve, both, math.pi * math.hypot(1.0, 3 * math.pi), noise)


TOYS = {
    "moons": (_moons, 0.1),
    "circles": (lambda noise: NoisyCircles((1.0, 0.5), noise), 0.06),
    "8gaussians": (
        lambda noise: TwistedGaussians(8, math.sqrt(8), noise, noise),
        math.sqrt(1 / 8),
    ),
    "checkerboard": (Checkerboard, None),
    "pinwheel": (
        lambda: TwistedGaussians(5, 2.0, 0.6, 0.2, lambda r: np.exp(r / 2) / 4),
        None,
    ),
    "spirals": (_spirals, 0.1),
    "rings": (lambda noise: NoisyCircles((1.0, 2.0, 3.0, 4.0), noise), 0.05),
}
