"""Wide tables, a column per channel: what `LatentODEImputer` reads and fills."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sknode._series.keys import Keys, find_series, find_time, learn_keys
from sknode._series.table import as_table, find_columns, read_numbers

__all__ = ["WideLayout", "WideRows"]


@dataclass(frozen=True)
class WideRows:
    """What a wide table says of each row.

    Attributes
    ----------
    ids : ndarray of shape (n,), object
        Names of the series, see `sknode._series.layout.Rows`.
    time : ndarray of shape (n,), float64
        Seconds since the first time of training, or the difference of plain numbers.
    covariates : ndarray of shape (n, n_covariates), float64
        What is known at any time, then sine and cosine of the calendar's cycles.
    values : ndarray of shape (n, n_channels), float64
        Values, NaN where missing.
    """

    ids: np.ndarray
    time: np.ndarray
    covariates: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class WideLayout(Keys):
    """Where time, series, covariates and channels are in a wide table.

    Made by `learn`. It consists of numbers, strings, lists and tuples, so that it can
    be stored by pickle or skops.

    Attributes
    ----------
    channels : list of int
        Columns whose missing values are to be filled.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from sknode._series.wide import WideLayout
    >>> days = pd.to_datetime(["2024-01-01", "2024-01-03"])
    >>> X = pd.DataFrame({"co2": [420.0, None]}, index=days)
    >>> layout = WideLayout.learn(X)
    >>> layout.read(X).time
    array([     0., 172800.])
    >>> layout.write(X, np.array([[0.0], [421.5]]))
                  co2
    2024-01-01  420.0
    2024-01-03  421.5
    """

    channels: list

    @classmethod
    def learn(cls, X, *, time="auto", series=None, covariates=None, calendar=None):
        """Find time, series, covariates and channels.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n, n_features)
            Table. Rows of an array are equally spaced steps in time.
        time : str, int or other label, default="auto"
            A column by label or position, an index level by name, or "index". "auto"
            takes an index level with datetimes, periods or timedeltas, else the first
            such column, else the last of several index levels, else a numeric index.
            If the index is not numeric, rows are equally spaced steps; those of a
            default index are such as well.
        series : str, int, other label, or list of them, optional
            Columns or index levels that name the series. If time is one of several
            index levels and this is None, then the others are it.
        covariates : str, int, other label, or list of them, optional
            Columns that are known in every row and not to be filled.
        calendar : str or tuple of str, optional
            Cycles whose sine and cosine in local time are further covariates:
            "minute", "hour", "dayofweek", "day" (of the month), "month", "yearday".

        Returns
        -------
        WideLayout
            The layout. All other columns are channels.

        Raises
        ------
        ValueError
            If a parameter names no column, no channel is left, or a time is missing,
            infinite or not of a proper type.
        """
        frame, framed = as_table(X)
        known = find_columns(frame, covariates, "covariates", framed=framed)
        known = [x.position for x in known]
        series = find_series(frame, series, framed)
        time, series = find_time(
            frame, time, series, set(known), framed=framed, wide=True
        )
        taken = {x.position for x in (time, *series) if x.place == "column"}
        if taken & set(known):
            raise ValueError("A covariate cannot be time or series as well.")
        channels = [i for i in range(frame.shape[1]) if i not in taken | set(known)]
        if not channels:
            raise ValueError(
                "X has no channels: all columns are time, series or covariates."
            )
        keys = learn_keys(frame, framed, time, series, calendar, known)
        return cls(**keys, channels=channels)

    @property
    def channel_names(self):
        """Labels of the channels, their positions if X was an array."""
        labels = range(self.n_features_in) if self.labels is None else self.labels
        return [labels[i] for i in self.channels]

    def read(self, X):
        """Return what X says of each row, in the order of X.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n, n_features)
            Table with the columns of training.

        Returns
        -------
        WideRows
            Series, times, covariates and values.

        Raises
        ------
        TypeError
            If time is of another kind than in training.
        ValueError
            If columns differ from those of training, a time or covariate is missing,
            or something is infinite or not of a proper type.
        """
        frame, _ = self.conform(X)
        ids, time = self.read_keys(frame)
        values = read_numbers(frame, self.channels, "channel", allow_nan=True)
        return WideRows(ids, time, self.read_covariates(frame, time), values)

    def write(self, X, filled):
        """Return X with its missing values filled; the others stay to the bit.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n, n_features)
            Table.
        filled : ndarray of shape (n, n_channels)
            Values, of which those of missing cells are taken.

        Returns
        -------
        DataFrame or ndarray of shape (n, n_features)
            A copy with the same index, columns and types. A nullable integer or
            boolean column (Int64, boolean) becomes Float64 unless all that is filled
            is whole (0 or 1).
        """
        frame, framed = self.conform(X)
        values = read_numbers(frame, self.channels, "channel", allow_nan=True)
        holes = np.isnan(values)
        if not framed:
            out = np.array(X)
            for j, i in enumerate(self.channels):
                out[holes[:, j], i] = filled[holes[:, j], j]
            return out
        out = frame.copy()
        for j in np.flatnonzero(holes.any(axis=0)):
            hole, i = holes[:, j], self.channels[j]
            out.isetitem(i, _fill(frame.iloc[:, i].array, hole, filled[hole, j]))
        return out


def _fill(array, hole, filled):
    """Return a copy of a column's array with values in its holes."""
    array = array.copy()
    if array.dtype.kind in "iub":
        with np.errstate(invalid="ignore"):
            whole = np.rint(filled).astype(array.dtype.numpy_dtype)
        # but for what rounding in other units left
        if np.allclose(whole.astype(np.float64), filled, rtol=1e-12, atol=1e-9):
            filled = whole
        else:
            array = _to_floats(array)
    if array.dtype.kind == "f":  # pandas refuses digits that the column cannot hold
        filled = filled.astype(getattr(array.dtype, "numpy_dtype", array.dtype))
    array[hole] = filled
    return array


def _to_floats(array):
    """Return a nullable array of integers or booleans as one of floats."""
    if array.dtype.kind != "b" and ((array > 2**53) | (array < -(2**53))).any():
        raise ValueError(
            f"A column of type {array.dtype} has holes and integers beyond 2**53, "
            "which cannot stay as they are beside filled values. Convert it to floats."
        )
    return array.astype("Float64")
