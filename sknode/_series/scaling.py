"""Units in which series are modelled: of channels and of covariates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import RidgeCV

__all__ = ["Scaling"]

# Penalties that the linear part is tried with, times its number of rows.
PENALTIES = np.geomspace(1e-6, 1e2, 17)
# Values further out than this many interquartile ranges do not count in the scale.
FAR_OUT = 3.0


@dataclass(frozen=True)
class Scaling:
    """Maps between values in the units of y and scaled ones.

    A linear function of the covariates is taken off: what is left, the model explains.

    Attributes
    ----------
    centre, scale : ndarray of shape (n_channels,)
        Of values.
    mean, deviation : ndarray of shape (n_covariates,)
        Of covariates.
    slopes : ndarray of shape (n_covariates, n_channels)
        The linear part, of scaled covariates on scaled values.
    intercept : ndarray of shape (n_channels,)
        Its constant.
    """

    centre: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    slopes: np.ndarray
    intercept: np.ndarray

    @classmethod
    def learn(cls, values, covariates, names=None) -> Scaling:
        """Learn the units from rows; ``names`` are those of the channels, for errors.

        Raises
        ------
        ValueError
            If the spread of a channel is too large for float64.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            units = [_robust_moments(x[np.isfinite(x)]) for x in values.T]
        centre, scale = (
            np.array(x, dtype=np.float64) for x in zip(*units, strict=True)
        )
        if not np.isfinite(centre + scale).all():
            lost = np.flatnonzero(~np.isfinite(centre + scale))
            lost = [i if names is None else names[i] for i in lost.tolist()]
            raise ValueError(
                f"The values of the columns {lost} are too large for float64: their "
                "spread is infinite. Divide them by a power of ten."
            )
        mean = covariates.mean(0)
        deviation = covariates.std(0)
        rounding = 1e-12 * np.abs(mean).max(initial=0.0)
        deviation = np.where(deviation > rounding, deviation, 1.0)
        n_channels, n_covariates = values.shape[1], covariates.shape[1]
        slopes, intercept = np.zeros((n_covariates, n_channels)), np.zeros(n_channels)
        scaled = (values - centre) / scale
        inputs = (covariates - mean) / deviation
        for c, column in enumerate(scaled.T if n_covariates else ()):
            rows = np.isfinite(column)
            if rows.sum() > 2:
                ridge = RidgeCV(PENALTIES * rows.sum()).fit(inputs[rows], column[rows])
                slopes[:, c], intercept[c] = ridge.coef_, ridge.intercept_
        return cls(centre, scale, mean, deviation, slopes, intercept)

    def forward(self, values, covariates):
        """Return scaled values without the linear part, and scaled covariates."""
        inputs = (covariates - self.mean) / self.deviation
        scaled = (values - self.centre) / self.scale
        return scaled - self.linear(inputs), inputs

    def linear(self, inputs):
        """Return the linear part of scaled covariates."""
        # not a product of matrices, whose rounding depends on the number of rows
        return np.einsum("nk,kc->nc", inputs, self.slopes) + self.intercept

    def inverse(self, scaled, inputs):
        """Return values in the units of y."""
        return (scaled + self.linear(inputs)) * self.scale + self.centre


def _robust_moments(values):
    """Return mean and standard deviation of the values that are not far out."""
    if not len(values):
        return 0.0, 1.0
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    reach = FAR_OUT * (high - low)
    inside = values
    if reach > 0:
        inside = values[np.abs(values - middle) <= reach + (high - low) / 2]
    mean, scale = inside.mean(), inside.std()
    rounding = 1e-12 * np.abs(mean)
    return mean, scale if scale > rounding else 1.0
