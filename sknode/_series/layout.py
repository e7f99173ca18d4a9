"""Rows of observations: what `LatentODERegressor` reads from X."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sknode._series.keys import Keys, find_series, find_time, learn_keys
from sknode._series.table import as_table, find_columns, read_numbers

__all__ = ["Rows", "SeriesLayout"]


@dataclass(frozen=True)
class Rows:
    """What X says of each row.

    Attributes
    ----------
    ids : ndarray of shape (n,), object
        Names of the series: labels of any kind, tuples of them if several columns name
        the series, 0 if there is one series.
    time : ndarray of shape (n,), float64
        Seconds since the first time of training, or the difference of plain numbers.
    covariates : ndarray of shape (n, n_covariates), float64
        What is known at any time, then sine and cosine of the calendar's cycles.
    context : ndarray of shape (n, n_context), float64, or None
        Known values, NaN where unknown; None if X has no columns of them.
    """

    ids: np.ndarray
    time: np.ndarray
    covariates: np.ndarray
    context: np.ndarray | None = None


@dataclass(frozen=True)
class SeriesLayout(Keys):
    """Where time, series, context and covariates are in rows of observations.

    Made by `learn`. It consists of numbers, strings, lists and tuples, so that it can
    be stored by pickle or skops.

    Attributes
    ----------
    context : list of int
        Columns of values known at prediction time.

    Examples
    --------
    >>> import pandas as pd
    >>> from sknode._series.layout import SeriesLayout
    >>> X = pd.DataFrame(
    ...     {"ward": ["a", "a", "b"],
    ...      "time": pd.to_datetime(["2024-01-02", "2024-01-01", "2024-01-01"]),
    ...      "dose": [1.0, 2.0, 3.0]})
    >>> layout = SeriesLayout.learn(X, series="ward")
    >>> rows = layout.read(X)
    >>> rows.ids, rows.time
    (array(['a', 'a', 'b'], dtype=object), array([86400.,     0.,     0.]))
    >>> rows.covariates.ravel()
    array([1., 2., 3.])
    >>> layout.to_times([3600.0])
    DatetimeIndex(['2024-01-01 01:00:00'], dtype='datetime64[us]', freq=None)
    """

    context: list

    @classmethod
    def learn(cls, X, *, time="auto", series=None, context=None, calendar=None):
        """Find time, series, context and covariates.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n, n_features)
            Rows of observations.
        time : str, int or other label, default="auto"
            A column by label or position, an index level by name, or "index". "auto"
            takes an index level with datetimes, periods or timedeltas, else the first
            such column, else the first column that is neither series nor context.
        series : str, int, other label, or list of them, optional
            Columns or index levels that name the series. If time is one of several
            index levels and this is None, then the others are it.
        context : str, int, other label, or list of them, optional
            Columns of values known at prediction time.
        calendar : str or tuple of str, optional
            Cycles whose sine and cosine in local time are further covariates:
            "minute", "hour", "dayofweek", "day" (of the month), "month", "yearday".

        Returns
        -------
        SeriesLayout
            The layout. All other columns are covariates.

        Raises
        ------
        ValueError
            If a parameter names no column, or a time or covariate is missing,
            infinite or not of a proper type.
        """
        frame, framed = as_table(X)
        context = [
            x.position for x in find_columns(frame, context, "context", framed=framed)
        ]
        series = find_series(frame, series, framed)
        time, series = find_time(
            frame, time, series, set(context), framed=framed, wide=False
        )
        taken = {x.position for x in (time, *series) if x.place == "column"}
        if taken & set(context):
            raise ValueError("A column of context cannot be time or series as well.")
        taken |= set(context)
        covariates = [i for i in range(frame.shape[1]) if i not in taken]
        keys = learn_keys(frame, framed, time, series, calendar, covariates)
        return cls(**keys, context=context)

    def read(self, X):
        """Return what X says of each row, in the order of X.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n, n_features)
            Rows with the columns of training.

        Returns
        -------
        Rows
            Series, times, covariates and context.

        Raises
        ------
        TypeError
            If time is of another kind than in training.
        ValueError
            If columns differ from those of training, or a time or covariate is
            missing, infinite or not of a proper type.
        """
        frame, _ = self.conform(X)
        ids, time = self.read_keys(frame)
        context = None
        if self.context:
            context = read_numbers(frame, self.context, "context", allow_nan=True)
        return Rows(ids, time, self.read_covariates(frame, time), context)

    def rows_at(self, ids, time, covariates=None):
        """Return rows that are in no table, with the calendar's covariates.

        Parameters
        ----------
        ids : ndarray of shape (n,), object
            Names of the series.
        time : ndarray of shape (n,)
            Times since the clock's origin.
        covariates : ndarray of shape (n, n_columns), optional
            Values of the columns that are covariates, needed if there are any.

        Returns
        -------
        Rows
            Rows without known values.
        """
        time = np.asarray(time, dtype=np.float64)
        known = np.empty((len(time), 0)) if covariates is None else covariates
        context = np.full((len(time), len(self.context)), np.nan)
        covariates = self.extend(known, time)
        return Rows(ids, time, covariates, context if self.context else None)

    def _describe(self, position):
        """Return the label of a column and what it is for."""
        if position in self.context:
            return f"{self.labels[position]!r} (context)"
        return super()._describe(position)
