"""Observations of several series as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Panel"]


@dataclass(frozen=True)
class Panel:
    """Observations of several series, sorted by series and time.

    Attributes
    ----------
    offsets : ndarray of shape (n_series + 1,), int64
        Rows ``offsets[i]:offsets[i + 1]`` are those of series ``i``.
    time : ndarray of shape (n_rows,), float64
        Scaled times, non-decreasing within a series (duplicates possible).
    values : ndarray of shape (n_rows, n_channels), float64
        Standardised values, NaN where a channel was not observed. A panel of query
        times has all NaN.
    covariates : ndarray of shape (n_rows, n_covariates), float64
        What is known at any time; may have no columns.
    """

    offsets: np.ndarray
    time: np.ndarray
    values: np.ndarray
    covariates: np.ndarray
