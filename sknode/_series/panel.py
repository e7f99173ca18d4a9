"""Panels: the observations of several series as sorted arrays of numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    Examples
    --------
    >>> import numpy as np
    >>> from sknode._series.panel import Panel
    >>> time = np.array([3.0, 1.0, 0.0])
    >>> values = np.array([[30.0], [10.0], [np.nan]])
    >>> panel, order = Panel.from_rows([0, 0, 1], time, values)
    >>> panel.time, panel.offsets, order
    (array([1., 3., 0.]), array([0, 2, 3]), array([1, 0, 2]))
    >>> panel.observed.ravel()
    array([ True,  True, False])
    """

    offsets: np.ndarray
    time: np.ndarray
    values: np.ndarray
    covariates: np.ndarray

    @classmethod
    def from_rows(
        cls, codes, time, values, covariates=None, *, n_series=None, merge=False
    ):
        """Sort rows by series and time.

        Parameters
        ----------
        codes : array-like of shape (n_rows,), int
            Series of each row, from 0. A number that does not occur is a series
            without rows.
        time : ndarray of shape (n_rows,)
            Times.
        values : ndarray of shape (n_rows, n_channels)
            Values, NaN where not observed.
        covariates : ndarray of shape (n_rows, n_covariates), optional
            What is known at any time.
        n_series : int, optional
            Number of series. The default is the largest code plus one.
        merge : bool, default=False
            Whether rows of a series with the same time and the same covariates become
            one row, each channel the mean of its observed values. Rows of the same
            time are then sorted by their covariates, so that the panel does not
            depend on the order of the rows.

        Returns
        -------
        panel : Panel
            The panel.
        order : ndarray of shape (n_rows,), int
            Rows in the order of the panel: ``panel.time == time[order]``. Rows of the
            same series and time keep their order. With ``merge`` instead the row of
            the panel in which each row is: ``panel.time[order] == time``.
        """
        codes = np.asarray(codes, dtype=np.int64)
        n = len(codes)
        covariates = np.empty((n, 0)) if covariates is None else covariates
        if n_series is None:
            n_series = int(codes.max()) + 1 if n else 0
        ties = covariates.T[::-1] if merge else ()
        order = np.lexsort((*ties, time, codes))
        parts = codes, time, values, covariates
        codes, time, values, covariates = (part[order] for part in parts)
        if merge:
            new = (np.diff(codes, prepend=-1) != 0) | (np.diff(time, prepend=0) != 0)
            new |= (np.diff(covariates, axis=0, prepend=0) != 0).any(axis=1)
            new[:1] = True
            group = np.empty(n, dtype=np.int64)
            group[order] = np.cumsum(new) - 1
            values = _average(values, np.flatnonzero(new))
            codes, time, covariates = codes[new], time[new], covariates[new]
            order = group
        counts = np.bincount(codes, minlength=n_series)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(offsets, time, values, covariates), order

    @property
    def n_series(self):
        """Number of series."""
        return len(self.offsets) - 1

    @property
    def lengths(self):
        """Number of rows of each series, shape (n_series,)."""
        return np.diff(self.offsets)

    @property
    def observed(self):
        """Which values were observed, shape (n_rows, n_channels)."""
        return ~np.isnan(self.values)

    def series_of_rows(self):
        """Return the series of each row, shape (n_rows,)."""
        return np.repeat(np.arange(self.n_series), self.lengths)

    def rows_of(self, series):
        """Return the rows of some series, one series after the other."""
        series = np.asarray(series, dtype=np.int64)
        lengths = self.lengths[series]
        ends = np.cumsum(lengths)
        # counts up through each series, from its first row
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            self.offsets[series] - ends + lengths, lengths
        )

    def take(self, series):
        """Return the panel of some series, in the order given.

        Parameters
        ----------
        series : array-like of int
            Numbers of the series; one may occur several times.
        """
        rows = self.rows_of(series)
        lengths = self.lengths[np.asarray(series, dtype=np.int64)]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Panel(offsets, self.time[rows], self.values[rows], self.covariates[rows])

    def select(self, rows):
        """Return the panel of some of the rows; series may lose all of theirs.

        Parameters
        ----------
        rows : ndarray of shape (n_rows,), bool
            Rows to keep.
        """
        before = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        parts = self.time[rows], self.values[rows], self.covariates[rows]
        return Panel(before[self.offsets], *parts)

    def hide(self, mask):
        """Return the panel without the values where ``mask`` is true.

        Parameters
        ----------
        mask : ndarray of shape (n_rows, n_channels) or (n_rows, 1), bool
            Cells to hide.
        """
        return replace(self, values=np.where(mask, np.nan, self.values))


def _average(values, starts):
    """Return means of the observed values of rows from each start to the next."""
    if not len(starts):
        return values
    observed = ~np.isnan(values)
    counts = np.add.reduceat(observed, starts, axis=0, dtype=np.int64)
    # a value alone stays as it is, to the bit; scaled sums can't overflow
    shares = np.where(observed, values, 0.0) / np.repeat(
        np.maximum(counts, 1), np.diff(starts, append=len(values)), axis=0
    )
    means = np.add.reduceat(shares, starts, axis=0)
    return np.where(counts > 0, means, np.nan)
