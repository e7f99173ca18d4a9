"""What every layout of a table knows: its columns, and where time and series are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from sknode._series.calendar import calendar_features, check_calendar
from sknode._series.table import (
    Source,
    as_list,
    as_table,
    find,
    looks_dated,
    read_numbers,
)
from sknode._series.times import Clock, is_timelike

__all__ = ["Keys", "encode_series", "find_series", "find_time", "learn_keys"]


@dataclass(frozen=True)
class Keys:
    """Columns of a table, and where in it time, series and covariates are.

    Attributes
    ----------
    n_features_in : int
        Number of columns.
    labels : list or None
        Their labels, None if X was an array.
    n_levels : int
        Number of index levels, 0 if X was an array.
    time : Source
        Where time is.
    series : list of Source
        Where the names of the series are; empty if there is one series.
    clock : Clock
        Kind of time.
    calendar : tuple of str
        Cycles of the calendar that are covariates.
    covariates : list of int
        Columns that are covariates.
    """

    n_features_in: int
    labels: list | None
    n_levels: int
    time: Source
    series: list
    clock: Clock
    calendar: tuple
    covariates: list

    @property
    def feature_names(self):
        """Labels of all columns if they are strings, else None, as in scikit-learn."""
        strings = self.labels and all(isinstance(x, str) for x in self.labels)
        return self.labels if strings else None

    @property
    def time_name(self):
        """What to call the column of times in a table, "time" if it had no name."""
        return "time" if self.time.name is None else self.time.name

    @property
    def series_names(self):
        """What to call the columns that name the series."""
        n = len(self.series)
        defaults = ["series"] if n == 1 else [f"series_{i}" for i in range(n)]
        named = zip(self.series, defaults, strict=True)
        return [name if x.name is None else x.name for x, name in named]

    @property
    def n_covariates(self):
        """Number of covariates, two for each cycle of the calendar."""
        return len(self.covariates) + 2 * len(self.calendar)

    def conform(self, X):
        """Return X as a data frame with the columns of training, and whether it was.

        Raises
        ------
        ValueError
            If columns are missing, new or in another order, or there is no index where
            one is needed. scikit-learn's own checks come first where X has names.
        """
        frame, framed = as_table(X)
        if framed and self.labels is not None:
            self._check_labels(frame.columns.tolist())
        if frame.shape[1] != self.n_features_in:
            raise ValueError(
                f"X has {frame.shape[1]} features, but had {self.n_features_in} in fit."
            )
        n_levels = frame.index.nlevels if framed else 0
        levels = [x for x in (self.time, *self.series) if x.place == "level"]
        if levels and n_levels != self.n_levels:
            raise ValueError(
                f"X has {n_levels} index levels, but had {self.n_levels} in fit, and "
                f"{levels[0]} is needed."
            )
        return frame, framed

    def read_keys(self, frame):
        """Return the names of the series and times of the rows.

        Returns
        -------
        ids : ndarray of shape (n,), object
            Names; tuples if several columns name the series, 0 if none does.
        time : ndarray of shape (n,), float64
            Times since the clock's origin.
        """
        time = self.clock.read(self.time.get(frame), str(self.time))
        if not self.series:
            return np.full(len(frame), 0, dtype=object), time
        parts = [_read_names(source, frame) for source in self.series]
        if len(parts) == 1:
            return parts[0], time
        pairs = zip(*parts, strict=True)
        return np.fromiter(pairs, dtype=object, count=len(frame)), time

    def read_covariates(self, frame, time):
        """Return the covariates of rows, shape (n, n_covariates)."""
        known = read_numbers(frame, self.covariates, "covariate", allow_nan=False)
        return self.extend(known, time)

    def extend(self, known, time):
        """Append the cycles of the calendar at some times to known covariates.

        Parameters
        ----------
        known : ndarray of shape (n, n_columns)
            Values of the columns that are covariates.
        time : ndarray of shape (n,)
            Times since the clock's origin.

        Returns
        -------
        ndarray of shape (n, n_covariates)
            All covariates.
        """
        if known.shape[1] != len(self.covariates):
            raise ValueError(
                f"There are {known.shape[1]} covariates, but were "
                f"{len(self.covariates)} in fit."
            )
        if not self.calendar:
            return known
        waves = calendar_features(self.clock.write(time), self.calendar)
        return np.hstack([known, waves])

    def to_times(self, time):
        """Return times of the user's kind, see `Clock.write`."""
        return self.clock.write(time)

    def _check_labels(self, labels):
        """Raise an error unless the columns are those of training."""
        if labels == self.labels:
            return
        missing = [
            self._describe(i) for i, x in enumerate(self.labels) if x not in labels
        ]
        if missing:
            raise ValueError(
                f"X lacks columns that it had in fit: {', '.join(missing)}."
            )
        new = [x for x in labels if x not in self.labels]
        if new:
            raise ValueError(f"X has columns that it did not have in fit: {new}.")
        raise ValueError("The columns of X must be in the same order as in fit.")

    def _describe(self, position):
        """Return the label of a column and what it is for."""
        sources = {"time": [self.time], "series": self.series}
        for role, found in sources.items():
            if any(x.place == "column" and x.position == position for x in found):
                return f"{self.labels[position]!r} ({role})"
        role = " (covariate)" if position in self.covariates else ""
        return f"{self.labels[position]!r}{role}"


def learn_keys(frame, framed, time, series, calendar, covariates):
    """Return the fields of `Keys` that a table, time and series decide."""
    clock = Clock.learn(time.get(frame), str(time))
    return {
        "n_features_in": frame.shape[1],
        "labels": frame.columns.tolist() if framed else None,
        "n_levels": frame.index.nlevels if framed else 0,
        "time": time,
        "series": series,
        "clock": clock,
        "calendar": check_calendar(calendar, clock.kind),
        "covariates": covariates,
    }


def find_series(frame, series, framed):
    """Return where the names of the series are, by one key or a list of them."""
    keys = as_list(series, frame.columns)
    return [find(frame, key, "series", framed=framed) for key in keys]


def find_time(frame, time, series, taken, *, framed, wide):
    """Return where time is, and where the names of the series are.

    Parameters
    ----------
    frame : DataFrame
        Table.
    time : str, int or other label
        "auto" takes the first index level with datetimes, periods or timedeltas, or a
        column that repeats it, else the first such column. Where there is none, tables
        of rows take the first column, wide ones the last of several index levels, or a
        numeric index, or number their rows.
    series : list of Source
        Where series are named. If it is empty and time is one of several index levels,
        then the others name the series.
    taken : set of int
        Columns that are neither.
    framed : bool
        Whether X has an index.
    wide : bool
        Whether columns are channels.
    """
    if isinstance(time, str) and time == "auto":
        time = _find_dated(frame, series, taken, framed)
        if time is None:
            guess = _guess_wide if wide else _guess_column
            time = guess(frame, series, taken, framed)
        elif time.place == "level":
            time, series = _prefer_columns(frame, time, series, taken)
    else:
        time = find(frame, time, "time", framed=framed)
    if time in series:
        raise ValueError(f"time and series are both {time} of X.")
    if time.place == "column" and time.position in taken:
        raise ValueError(f"time is {time} of X, which has another role already.")
    if not series and time.place == "level":
        series = _other_levels(frame, time)
    return time, series


def encode_series(ids, known=()):
    """Return numbers of series from their names.

    Parameters
    ----------
    ids : ndarray of shape (n,), object
        Names of the rows' series.
    known : sequence
        Names that have numbers already, from 0.

    Returns
    -------
    codes : ndarray of shape (n,), int64
        Numbers; new names get the next ones as they first occur.
    names : list
        Known names, then the new ones.
    """
    codes, new = pd.factorize(ids)
    numbers = {name: i for i, name in enumerate(known)}
    translate = [numbers.setdefault(name, len(numbers)) for name in new]
    return np.asarray(translate, dtype=np.int64)[codes], list(numbers)


def _candidates(frame, series, taken):
    """Return the columns that may hold time."""
    named = {x.position for x in series if x.place == "column"}
    return [i for i in range(frame.shape[1]) if i not in taken | named]


def _find_dated(frame, series, taken, framed):
    """Return the first index level, else column, of datetimes and the like."""
    if framed:
        for i, name in enumerate(frame.index.names):
            source = Source("level", i, name)
            if source not in series and is_timelike(source.get(frame)):
                return source
    for i in _candidates(frame, series, taken):
        if is_timelike(frame.iloc[:, i]):
            return find(frame, i, "time", framed=framed)
    return None


def _prefer_columns(frame, time, series, taken):
    """Return where time and series are if a column repeats the level of the index that
    is the time, as those of ``index.to_frame()``: it is no covariate then.
    """
    column = _find_twin(frame, time, series, taken)
    if column is None:
        return time, series
    others = series or _other_levels(frame, time)
    taken = taken | {column.position}
    twins = [
        None if x.place == "column" else _find_twin(frame, x, series, taken)
        for x in others
    ]
    return column, [twin or x for twin, x in zip(twins, others, strict=True)]


def _find_twin(frame, level, series, taken):
    """Return the column that is the same as a level of the index, None without one."""
    values = level.get(frame)
    for i in _candidates(frame, series, taken):
        column = frame.iloc[:, i]
        if column.dtype == values.dtype and pd.Index(column).equals(values):
            return find(frame, i, "time", framed=True)
    return None


def _other_levels(frame, time):
    """Return the levels of the index but for that of time."""
    names = frame.index.names
    return [Source("level", i, x) for i, x in enumerate(names) if i != time.position]


def _guess_column(frame, series, taken, framed):
    """Return where time is among rows of observations that have no datetimes."""
    columns = _candidates(frame, series, taken)
    if columns:
        return find(frame, columns[0], "time", framed=framed)
    if framed and type(frame.index) is not pd.RangeIndex:
        return _last_level(frame, series)
    raise ValueError("X has no column of times: name one, or time='index'.")


def _guess_wide(frame, series, taken, framed):
    """Return where time is in a wide table that has no datetimes."""
    index = frame.index
    if framed and index.nlevels > 1:
        return _last_level(frame, series)
    if any(x.place == "column" for x in series) and type(index) is pd.RangeIndex:
        raise ValueError(
            "X has several series, but no datetimes. Name the column of times by "
            "time, or set time='index'."
        )
    if looks_dated(index[0]):
        raise ValueError(
            f"The index of X holds strings such as {index[0]!r}. Convert them with "
            "pd.to_datetime."
        )
    return Source("steps")


def _last_level(frame, series):
    """Return the last index level that names no series."""
    levels = [Source("level", i, name) for i, name in enumerate(frame.index.names)]
    free = [x for x in levels if x not in series]
    if not free:
        raise ValueError("X has no times: all levels of its index name series.")
    return free[-1]


def _read_names(source, frame):
    """Return the names of series in one column or level, none missing."""
    names = source.get(frame).astype(object).to_numpy(copy=True)
    missing = int(pd.isna(names).sum())
    if missing:
        raise ValueError(
            f"X has {missing} missing values in {source}, which names the series."
        )
    return names
