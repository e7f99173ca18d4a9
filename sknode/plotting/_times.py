"""Times of series on an axis of matplotlib."""

from __future__ import annotations

import numpy as np
import pandas as pd

__all__ = ["drawable_times"]

DURATIONS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def drawable_times(time):
    """Return times that matplotlib draws, and a label for their axis."""
    if isinstance(time, pd.PeriodIndex):
        time = time.to_timestamp()
    if isinstance(time, pd.TimedeltaIndex):
        seconds = (time / pd.Timedelta(1, "s")).to_numpy()
        span = np.ptp(seconds)
        unit = next((unit for unit, n in DURATIONS.items() if span >= 2 * n), "seconds")
        return seconds / DURATIONS[unit], f"time, {unit}"
    if isinstance(time, pd.DatetimeIndex) and time.tz is not None:
        # the axis takes the zone of the first one
        return time.to_pydatetime(), "time"
    return np.asarray(time), "time"
