"""Where in the hour, day, week, month or year a time is, as known inputs."""

from __future__ import annotations

import numpy as np
import pandas as pd

__all__ = ["CYCLES", "calendar_features", "check_calendar"]


def _of_day(times):
    """Return the share of the day that is over by the clock on the wall."""
    return (times - times.normalize()) / pd.Timedelta(1, "D")


def _of_month(times):
    """Return the share of the month that is over."""
    return (times.day - 1 + _of_day(times)) / times.days_in_month


CYCLES = {
    "minute": lambda t: (t.minute + (t.second + t.microsecond / 1e6) / 60) / 60,
    "hour": _of_day,
    "dayofweek": lambda t: (t.day_of_week + _of_day(t)) / 7,
    "day": _of_month,
    "month": lambda t: (t.month - 1 + _of_month(t)) / 12,
    "yearday": lambda t: (t.day_of_year - 1 + _of_day(t)) / (365 + t.is_leap_year),
}


def check_calendar(calendar, kind):
    """Return the names of cycles as a tuple, or raise an error.

    Parameters
    ----------
    calendar : None, str or tuple of str
        Names from `CYCLES`: "minute" of the hour, "hour" of the day, "dayofweek",
        "day" of the month, "month" of the year (all months are equally long),
        "yearday".
    kind : str
        Kind of time, see `Clock`.
    """
    if calendar is None:
        return ()
    names = (calendar,) if isinstance(calendar, str) else tuple(calendar)
    unknown = [name for name in names if name not in CYCLES]
    if unknown:
        raise ValueError(
            f"calendar must be None or names from {list(CYCLES)}. Got {unknown}."
        )
    if names and kind in ("numbers", "timedeltas"):
        raise ValueError(
            f"calendar={calendar!r} needs datetimes or periods, but time is {kind}."
        )
    return names


def calendar_features(times, names):
    """Return sine and cosine of the position in each cycle, in local time.

    Parameters
    ----------
    times : DatetimeIndex or PeriodIndex of length n
        Times. Their own time zone decides what the time of day is.
    names : tuple of str
        Cycles.

    Returns
    -------
    ndarray of shape (n, 2 * len(names)), float64
        The columns are sine and cosine of the first cycle, and so on.
    """
    if isinstance(times, pd.PeriodIndex):
        times = times.to_timestamp(how="start")
    local = times.tz_localize(None)
    phases = [2 * np.pi * np.asarray(CYCLES[name](local)) for name in names]
    waves = [wave(phase) for phase in phases for wave in (np.sin, np.cos)]
    return np.stack(waves, axis=1) if waves else np.empty((len(times), 0))
