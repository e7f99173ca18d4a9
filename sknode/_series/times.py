"""Clocks: the times of a user as numbers, and back.

Times are datetimes of any unit with or without a time zone, periods, durations or plain
numbers. A clock subtracts the first time of training in integers, and only then turns
the rest into float64: seconds, or the user's own unit if times are numbers. So
nanoseconds within days and days within centuries keep all their digits: float64 is
exact to a microsecond 142 years from the origin, to a nanosecond 52 days from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["Clock", "as_times", "is_timelike"]

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_NANO = 10**9
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class Clock:
    """A kind of time, and where its zero is.

    Attributes
    ----------
    kind : str
        "datetimes without a time zone", "datetimes with a time zone", "periods",
        "timedeltas" or "numbers".
    origin : int or float
        The first time of training: whole seconds (of datetimes since 1970 in UTC), or
        the number itself.
    origin_ns : int
        Nanoseconds to add to it.
    unit : str
        Resolution of what `write` returns: "us" or "ns"; of numbers "int" or "float".
    zone : str or None
        Name of the time zone.
    freq : str or None
        Frequency of periods.

    Examples
    --------
    >>> import pandas as pd
    >>> from sknode._series.times import Clock
    >>> days = pd.date_range("2024-03-30", periods=3, tz="Europe/Berlin", unit="s")
    >>> clock = Clock.learn(days, "the index")
    >>> clock.read(days, "the index")  # the second day lasts 23 hours
    array([     0.,  86400., 169200.])
    >>> clock.write([169200.5])
    DatetimeIndex(['2024-04-01 00:00:00.500000+02:00'],
                  dtype='datetime64[us, Europe/Berlin]', freq=None)
    """

    kind: str
    origin: int | float
    origin_ns: int = 0
    unit: str = "float"
    zone: str | None = None
    freq: str | None = None

    @classmethod
    def learn(cls, values, where):
        """Return the clock that starts at the first of some times.

        Parameters
        ----------
        values : array-like of shape (n,)
            Times of any kind.
        where : str
            Where they come from, for error messages.

        Raises
        ------
        ValueError
            If a time is missing or infinite, if time zones are mixed, or if these are
            no times.
        """
        times = as_times(values, where)
        kind = _kind(times)
        if kind == "numbers":
            origin = times.min()
            whole = not isinstance(origin, float | np.floating) or origin.is_integer()
            integer = times.dtype.kind in "iuO"
            return cls(
                kind,
                int(origin) if whole else float(origin),
                unit="int" if integer else "float",
            )
        zone = freq = None
        if kind == "periods":
            freq = times.freqstr
        elif kind == "datetimes with a time zone":
            zone = _name_zone(times.tz, where)
        ticks, unit = _ticks(times)
        origin, origin_ns = _split(int(ticks.min()), unit)
        # periods start on whole microseconds, and what rounding takes off one would
        # make it the period before
        coarse = freq is not None and "ns" not in freq
        unit = "ns" if unit == "ns" and not coarse else "us"
        return cls(kind, origin, origin_ns, unit, zone, freq)

    def read(self, values, where):
        """Return times since the origin.

        Parameters
        ----------
        values : array-like of shape (n,)
            Times of the clock's kind, in any unit and time zone.
        where : str
            Where they come from, for error messages.

        Returns
        -------
        ndarray of shape (n,), float64
            Seconds since the origin, or differences of plain numbers.

        Raises
        ------
        TypeError
            If this is another kind of time.
        ValueError
            As in `learn`.
        """
        times = as_times(values, where)
        kind = _kind(times)
        if kind != self.kind:
            hint = ""
            if kind[:9] == self.kind[:9] == "datetimes":
                hint = " Use tz_localize, with None to take a time zone away."
            raise TypeError(
                f"Time was {self.kind} in fit, but {where} holds {kind}.{hint}"
            )
        if kind == "numbers":
            return self._read_numbers(times, where)
        seconds, ns = _split(*_ticks(times))
        return (seconds - self.origin) + (ns - self.origin_ns) / _NANO

    def write(self, time):
        """Return times of the user's kind; the inverse of `read`.

        Parameters
        ----------
        time : array-like of shape (n,)
            Times since the origin.

        Returns
        -------
        DatetimeIndex, PeriodIndex, TimedeltaIndex or ndarray
            In the time zone of training. Datetimes and durations are in
            nanoseconds if they were in training, in microseconds if not. Integers are
            integers if all are.
        """
        time = np.asarray(time, dtype=np.float64)
        if not np.isfinite(time).all():
            raise ValueError("Times must be finite numbers.")
        if self.kind == "numbers":
            return self._write_numbers(time)
        whole = np.floor(time)
        ns = np.rint((time - whole) * _NANO).astype(np.int64) + self.origin_ns
        per = _PER_SECOND[self.unit]
        if (np.abs(whole + float(self.origin)) + 2 > _INT64.max / per).any():
            raise ValueError(f"Times are beyond what 64 bits of {self.unit} hold.")
        nano_per_tick = _NANO // per
        ticks = (whole.astype(np.int64) + self.origin) * per
        ticks += (ns + nano_per_tick // 2) // nano_per_tick
        if self.kind == "timedeltas":
            return pd.TimedeltaIndex(ticks.view(f"m8[{self.unit}]"))
        times = pd.DatetimeIndex(ticks.view(f"M8[{self.unit}]"))
        if self.kind == "periods":
            return times.to_period(self.freq)
        return times.tz_localize("UTC").tz_convert(self.zone) if self.zone else times

    def _read_numbers(self, times, where):
        """Subtract the origin from plain numbers, in integers where they are."""
        values, origin = times.to_numpy(), self.origin
        if values.dtype.kind == "f" or isinstance(origin, float):
            with np.errstate(over="ignore"):
                time = values.astype(np.float64) - float(origin)
        elif _fits(int(values.min()), int(values.max()), origin):
            time = (values.astype(np.int64) - origin).astype(np.float64)
        else:
            time = (values.astype(object) - origin).astype(np.float64)
        if not np.isfinite(time).all():
            raise ValueError(f"The times in {where} are too far apart for float64.")
        return time

    def _write_numbers(self, time):
        """Add the origin to plain numbers, in integers where they are."""
        whole = np.rint(time)
        if (
            self.unit == "int"
            and (time == whole).all()
            and np.abs(whole).max(initial=0.0) + abs(self.origin) < _INT64.max
        ):
            return whole.astype(np.int64) + self.origin
        return time + float(self.origin)


def as_times(values, where):
    """Return times as an index of a proper type: datetimes, numbers and so on.

    Raises
    ------
    ValueError
        If a time is missing or infinite, if time zones are mixed, or if these are no
        times.
    """
    dtype = getattr(values, "dtype", None)
    if dtype == np.float16:  # which no index can have
        values = values.astype(np.float32)
    # pandas 2 looks for datetimes in objects, which pandas 3 no longer does
    index = pd.Index(values, dtype=object if dtype == np.object_ else None)
    if isinstance(index.dtype, pd.CategoricalDtype):
        index = index.astype(index.categories.dtype)
    missing = int(index.isna().sum())
    if missing:
        raise ValueError(
            f"The times in {where} contain {missing} missing values (NaT or NaN). Drop "
            "these rows."
        )
    if index.dtype == object:
        index = _of_objects(index, where)
    if isinstance(index, pd.DatetimeIndex | pd.PeriodIndex | pd.TimedeltaIndex):
        return index
    if index.dtype == object:  # integers of any size
        return index
    if not pd.api.types.is_numeric_dtype(index.dtype) or index.dtype.kind == "c":
        raise ValueError(
            f"The times in {where} are of type {index.dtype}, but must be datetimes, "
            "periods, timedeltas or numbers. Convert strings with pd.to_datetime."
        )
    kind = "f8" if index.dtype.kind == "f" else index.dtype.kind + "8"
    numbers = index.to_numpy(dtype="i8" if kind == "b8" else kind)
    infinite = int((~np.isfinite(numbers)).sum())
    if infinite:
        raise ValueError(f"The times in {where} contain {infinite} infinite values.")
    return pd.Index(numbers)


def is_timelike(values):
    """Tell whether these are datetimes, periods or durations, not numbers."""
    dtype = values.dtype
    if dtype.kind == "O" and not isinstance(dtype, pd.PeriodDtype):
        return pd.api.types.infer_dtype(values, skipna=True) in (
            *_DATES,
            "timedelta",
            "timedelta64",
            "period",
        )
    return isinstance(dtype, pd.PeriodDtype) or dtype.kind in "mM"


_DATES = "datetime", "datetime64", "date"


def _of_objects(index, where):
    """Return an index of Python's own objects as one of a proper type."""
    found = pd.api.types.infer_dtype(index)
    if found in _DATES:
        zones = {str(getattr(t, "tzinfo", None)) for t in index}
        if len(zones) > 1:
            raise ValueError(
                f"The times in {where} are in several time zones "
                f"({', '.join(sorted(zones))}). Convert them to one with "
                "pd.to_datetime(..., utc=True)."
            )
        return pd.DatetimeIndex(index)
    if found in ("timedelta", "timedelta64"):
        return pd.TimedeltaIndex(index)
    if found == "period":
        return pd.PeriodIndex(index)
    if found == "integer":
        return index
    if found in ("floating", "mixed-integer-float", "boolean"):
        return index.astype(np.float64)
    raise ValueError(
        f"The times in {where} are objects of type {found!r}, but must be datetimes, "
        "periods, timedeltas or numbers. Convert strings with pd.to_datetime."
    )


def _kind(times):
    """Return what to call times of this type."""
    if isinstance(times, pd.PeriodIndex):
        return "periods"
    if isinstance(times, pd.TimedeltaIndex):
        return "timedeltas"
    if isinstance(times, pd.DatetimeIndex):
        return f"datetimes {'with' if times.tz else 'without'} a time zone"
    return "numbers"


def _ticks(times):
    """Return 64-bit integers since 1970 in UTC, or durations, and their unit."""
    if isinstance(times, pd.PeriodIndex):
        times = times.to_timestamp(how="start")
    if isinstance(times, pd.DatetimeIndex) and times.tz is not None:
        times = times.tz_convert(None)
    return times.to_numpy().view(np.int64), times.unit


def _split(ticks, unit):
    """Return whole seconds and the rest in nanoseconds."""
    per = _PER_SECOND[unit]
    return ticks // per, ticks % per * (_NANO // per)


def _name_zone(zone, where):
    """Return the name of a time zone, from which pandas can make it again."""
    name = "UTC" if str(zone) == "tzutc()" else str(zone)
    try:
        pd.Timestamp(0, tz=name)
    except Exception as error:
        raise ValueError(
            f"The time zone of {where} has no name: {zone!r}. Convert it with "
            "tz_convert, for example to 'Europe/Berlin'."
        ) from error
    return name


def _fits(low, high, origin):
    """Tell whether integers and their differences from the origin fit 64 bits."""
    ends = low, high, origin, low - origin, high - origin
    return all(_INT64.min <= x <= _INT64.max for x in ends)
