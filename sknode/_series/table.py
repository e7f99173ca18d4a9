"""Columns and index levels of whatever users call X, found and read as numbers."""

from __future__ import annotations

import numbers
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

__all__ = [
    "Source",
    "as_list",
    "as_table",
    "find",
    "find_columns",
    "looks_dated",
    "read_numbers",
]

_NUMBERS = "integer", "floating", "mixed-integer-float", "boolean", "empty"


@dataclass(frozen=True)
class Source:
    """Where a time or the name of a series is found.

    Attributes
    ----------
    place : str
        "column", "level" (of the index) or "steps" (a numeric index, else the numbers
        of the rows).
    position : int
        Number of the column or level.
    name : object
        Its label, None if it has none.
    """

    place: str
    position: int = 0
    name: object = None

    def __str__(self):
        """Return what to call it in a message."""
        if self.place == "column":
            return f"column {self.position if self.name is None else self.name!r}"
        return "the index" if self.name is None else f"index level {self.name!r}"

    def get(self, frame):
        """Return its values.

        Parameters
        ----------
        frame : DataFrame
            Table whose columns are those of training.

        Returns
        -------
        Series or Index
            Values of the column or level.
        """
        if self.place == "column":
            return frame.iloc[:, self.position]
        index = frame.index
        if self.place == "steps":
            if index.nlevels > 1:
                raise ValueError("X has several index levels, but had one in fit.")
            if pd.api.types.is_numeric_dtype(index.dtype) or _is_dated(index):
                return index
            return pd.RangeIndex(len(frame))
        if self.name is not None and self.name in index.names:
            return index.get_level_values(self.name)
        return index.get_level_values(self.position)


def as_table(X):
    """Return a data frame of X, without a copy of arrays, and whether X was one.

    Raises
    ------
    ValueError
        If X has not two dimensions or no rows.
    TypeError
        If X is sparse.
    """
    framed = isinstance(X, pd.DataFrame)
    if not framed:
        if sparse.issparse(X):
            raise TypeError(
                "Sparse data was passed for X, but dense data is required. Use "
                "'.toarray()' to convert to a dense numpy array."
            )
        shape = np.shape(X)
        if len(shape) != 2:
            raise ValueError(
                f"Expected 2D array, got {len(shape)}D array instead. Reshape your "
                "data: a Series with .to_frame(), an array of one feature with "
                ".reshape(-1, 1)."
            )
        # lists keep a type per column, which an array of them would lose
        X = pd.DataFrame(X if isinstance(X, list) else np.asarray(X), copy=False)
    if not len(X):
        raise ValueError(
            f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 is "
            "required."
        )
    return X, framed


def find(frame, key, parameter, *, framed):
    """Return the column or index level that a parameter names.

    Parameters
    ----------
    frame : DataFrame
        Table.
    key : str, int or other label
        Integers are positions of columns. Anything else is the label of a column,
        else of an index level; "index" is the whole index.
    parameter : str
        Name of the parameter, for error messages.
    framed : bool
        Whether X has an index and labels of its own.

    Returns
    -------
    Source
        Where it is.

    Raises
    ------
    ValueError
        If there is no such column or level, or several.
    """
    columns, names = frame.columns, list(frame.index.names) if framed else []
    if _is_position(key):
        n = len(columns)
        if not -n <= key < n:
            raise ValueError(f"{parameter}={key} is no column of X, which has {n}.")
        key = int(key) % n
        return Source("column", key, columns.tolist()[key] if framed else None)
    matches = []
    if framed and _is_in(key, columns):
        matches = [i for i, label in enumerate(columns) if label == key]
    if len(matches) == 1:
        return Source("column", matches[0], key)
    if len(matches) > 1:
        raise ValueError(f"{parameter}={key!r} names {len(matches)} columns of X.")
    if names.count(key) == 1 and key is not None:
        return Source("level", names.index(key), key)
    if isinstance(key, str) and key == "index" and len(names) == 1:
        return Source("level", 0, names[0])
    if not framed:
        raise ValueError(
            f"{parameter}={key!r} names a column, but X is an array: give a position."
        )
    raise ValueError(
        f"{parameter}={key!r} is no column of X and no level of its index. The columns "
        f"are {columns.tolist()}, the index levels {names}."
    )


def find_columns(frame, keys, parameter, *, framed):
    """Return the columns that a parameter names: None, one or a list of them."""
    found = []
    for key in as_list(keys, frame.columns):
        source = find(frame, key, parameter, framed=framed)
        if source.place != "column":
            raise ValueError(f"{parameter}={key!r} must be a column, but is {source}.")
        found.append(source)
    if len({source.position for source in found}) < len(found):
        raise ValueError(f"{parameter}={keys!r} names a column twice.")
    return found


def as_list(keys, columns):
    """Return a list of keys from None, one key or several."""
    if keys is None:
        return []
    several = isinstance(keys, list | tuple | np.ndarray | pd.Index)
    if several and not (isinstance(keys, tuple) and _is_in(keys, columns)):
        return list(keys)
    return [keys]


def read_numbers(frame, positions, role, *, allow_nan):
    """Return columns as float64.

    Parameters
    ----------
    frame : DataFrame
        Table.
    positions : list of int
        Columns.
    role : str
        What they are, for error messages.
    allow_nan : bool
        Whether values may be missing, which is NaN in what is returned.

    Raises
    ------
    ValueError
        If a column is not numeric, or not finite; it is named.
    """
    labels = frame.columns.tolist()
    out = np.empty((len(frame), len(positions)))
    for j, position in enumerate(positions):
        column = frame.iloc[:, position]
        where = f"{role} column {labels[position]!r}"
        out[:, j] = _as_float(column, where)
        if np.isinf(out[:, j]).any():
            raise ValueError(f"Input X contains infinity in {where}.")
        if not allow_nan and (n := int(np.isnan(out[:, j]).sum())):
            raise ValueError(
                f"Input X contains NaN in {where} ({n} of {len(frame)} rows)."
            )
    return out


def _as_float(column, where):
    """Return a column as float64, NaN where it is missing."""
    dtype = column.dtype
    if isinstance(dtype, pd.SparseDtype):
        raise ValueError(f"The {where} is sparse. Use .sparse.to_dense().")
    if dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {where} is {dtype}.")
    found = str(dtype)
    if found == "object":
        found = pd.api.types.infer_dtype(column, skipna=True)
    if found not in _NUMBERS and not pd.api.types.is_numeric_dtype(dtype):
        advice = (
            "Encode it, for example with OneHotEncoder or OrdinalEncoder, or drop it, "
            "or name it by time or series if it is that."
        )
        if looks_dated(column.iloc[0]):
            advice = "Convert dates with pd.to_datetime."
        raise ValueError(
            f"The {where} of X is of type {found}, but must be numeric. {advice}"
        )
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def looks_dated(value):
    """Tell whether a value is a string that starts like a date, such as 2024-05."""
    return isinstance(value, str) and bool(re.match(r"\d{4}-\d\d(-\d\d|$)", value))


def _is_position(key):
    """Tell whether a key is a number of a column."""
    return isinstance(key, numbers.Integral) and not isinstance(key, bool | np.bool_)


def _is_in(key, columns):
    """Tell whether a key, hashable or not, is a label."""
    try:
        return key in columns
    except TypeError as error:
        raise TypeError(
            f"Columns are named by labels or positions, not {key!r}."
        ) from (error)


def _is_dated(index):
    """Tell whether an index consists of datetimes, periods or durations."""
    return isinstance(index, pd.DatetimeIndex | pd.PeriodIndex | pd.TimedeltaIndex)
