"""The times that follow those of a series, for forecasts."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import Day, Tick, Week

__all__ = ["times_ahead"]

# Integers to Python, but no numbers of steps.
_NO_NUMBERS = bool | np.bool_ | np.timedelta64


def times_ahead(clock, observed, rows, n, freq=None):
    """Return times at equal steps after the last observation.

    Parameters
    ----------
    clock : Clock
        The kind of time.
    observed : ndarray of shape (n_observations,), float64
        Times of observations since the clock's origin, increasing; more than one if
        these decide the step.
    rows : ndarray of shape (n_rows,), float64
        Times of all rows, of those without a value, too: they may show what the
        frequency of dates is where observations have gaps.
    n : int
        Number of steps.
    freq : str, offset, timedelta, float or None
        Length of a step. Of dates whole days, and what is longer, are those of the
        calendar, in local time. Of periods it may be a number of periods. By default
        one period, the frequency of dates if they have one, else the median distance
        between the observations.

    Returns
    -------
    ndarray of shape (n,), float64
        Times since the clock's origin.

    Raises
    ------
    ValueError
        If ``freq`` is no step forward in this kind of time.
    """
    if clock.kind == "periods":
        last = clock.write(observed[-1:])[0]
        return clock.read(_periods(last, n, freq), "freq")
    dated = clock.kind.startswith("datetimes")
    if freq is None and dated:
        freq = _infer(clock, observed) or _infer(clock, rows)
    if freq is None:
        step = float(np.median(np.diff(observed)))
        if not dated or step % 86400:
            return observed[-1] + step * np.arange(1, n + 1)
        freq = pd.Timedelta(step, "s")
    if clock.kind == "numbers":
        step = _number(freq)
    else:
        step = _duration(freq)
        if dated and (step is None or not step % pd.Timedelta(1, "D")):
            last = _stamps(clock, observed[-1:])[0]
            return clock.read(_dates(last, n, freq, step), "freq")
        if step is None:
            raise _no_step(freq, "a duration, such as '1h'")
        step = step.total_seconds()
    return observed[-1] + step * np.arange(1, n + 1)


def _stamps(clock, time):
    """Return datetimes without what rounding made of them."""
    stamps = clock.write(time)
    # an hour that the clocks repeat cannot be rounded in local time
    if stamps.tz is None:
        return stamps.round("us")
    return stamps.tz_convert("UTC").round("us").tz_convert(stamps.tz)


def _infer(clock, time):
    """Return the frequency of dates, None if there is none: months and the like are no
    constant steps.
    """
    if len(time) < 3:
        return None
    return pd.DatetimeIndex(_stamps(clock, time), freq="infer").freq


def _periods(last, n, freq):
    """Return the periods that follow one, of its own frequency."""
    wanted = f"a number of periods, or a frequency of whole ones ({last.freqstr})"
    if freq is None:
        freq = 1
    if isinstance(freq, Integral) and not isinstance(freq, _NO_NUMBERS):
        if freq < 1:
            raise _no_step(freq, wanted)
        return pd.PeriodIndex([last + int(freq) * k for k in range(1, n + 1)])
    try:
        coarse = pd.Period(last.start_time, freq=freq)
        steps = pd.period_range(coarse, periods=n + 1, freq=coarse.freq)
    except (TypeError, ValueError, AttributeError) as error:
        raise _no_step(freq, wanted) from error
    starts = steps.asfreq(last.freq, how="start")
    whole = starts.to_timestamp() == steps.to_timestamp()
    if coarse.freq.n < 1 or not whole.all() or not (np.diff(starts.asi8) > 0).all():
        raise _no_step(freq, wanted)
    return pd.PeriodIndex([last + (s - starts[0]).n // last.freq.n for s in starts[1:]])


def _dates(last, n, freq, step):
    """Return the dates that follow one by the calendar, in local time."""
    local = last.tz_localize(None)
    if step is not None:
        ahead = local + step * np.arange(1, n + 1)
    else:
        try:
            ahead = pd.date_range(local, periods=n + 1, freq=freq)
        except (TypeError, ValueError) as error:
            raise _no_step(freq, "a frequency, such as '1D' or 'MS'") from error
        ahead = ahead[ahead > local][:n]
        if len(ahead) < n or not (ahead[1:] > ahead[:-1]).all():
            raise _no_step(freq, "a step forward")
    ahead = pd.DatetimeIndex(ahead)
    if last.tz is None:
        return ahead
    first = np.ones(n, bool)  # of the two times of an hour that the clocks repeat
    return ahead.tz_localize(last.tz, ambiguous=first, nonexistent="shift_forward")


def _number(freq):
    """Return a positive step in plain numbers."""
    good = isinstance(freq, Real) and not isinstance(freq, _NO_NUMBERS)
    if not good or not 0 < freq < np.inf:
        raise _no_step(freq, "a positive number, as times are numbers")
    return float(freq)


def _duration(freq):
    """Return a positive duration, None for steps that have no constant length."""
    number = isinstance(freq, Real) and not isinstance(freq, np.timedelta64)
    if number or pd.isna(freq) is not False:
        raise _no_step(freq, "a duration or frequency, such as '1D', not a number")
    step, offset = None, _offset(freq)
    if offset is None or isinstance(offset, Tick | Day | Week):
        try:
            step = pd.Timedelta(freq)
        except (TypeError, ValueError) as error:  # a name of a unit alone, perhaps
            if offset is None:
                raise _no_step(freq, "a duration or frequency, such as '1D'") from error
            step = None if isinstance(offset, Week) else pd.Timedelta(offset)
    ahead = offset.n > 0 if step is None else step > pd.Timedelta(0)
    if not ahead:
        raise _no_step(freq, "a step forward")
    return step


def _offset(freq):
    """Return the offset of pandas for a step, None if there is none."""
    try:
        return to_offset(freq)
    except (TypeError, ValueError):
        return None


def _no_step(freq, wanted):
    """Return the error for a step that is none."""
    return ValueError(f"freq must be {wanted}. Got {freq!r}.")
