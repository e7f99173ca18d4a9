"""Clocks and calendars: times of every kind as numbers, and back."""

import datetime
import pickle

import numpy as np
import pandas as pd
import pytest
from dateutil import tz as dateutil_tz

from sknode._series.calendar import CYCLES, calendar_features, check_calendar
from sknode._series.times import Clock, as_times, is_timelike

HERE = "the index"
UNITS = ["s", "ms", "us", "ns"]


def learned(values):
    """Return the clock of some times, and the times as it reads them."""
    clock = Clock.learn(values, HERE)
    return clock, clock.read(values, HERE)


# --- units and kinds ------------------------------------------------------------------


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kathmandu", "+02:00"])
@pytest.mark.parametrize("unit", UNITS)
def test_datetimes_of_any_unit_are_seconds(unit, zone):
    times = pd.DatetimeIndex(["2020-01-03", "2020-01-01", "2020-01-01 00:00:07"])
    times = times.as_unit(unit).tz_localize(zone)
    clock, seconds = learned(times)
    np.testing.assert_array_equal(seconds, [172800, 0, 7])
    back = clock.write(seconds)
    assert list(back) == list(times) and str(back.tz) == str(times.tz)
    assert back.unit == ("ns" if unit == "ns" else "us")


@pytest.mark.parametrize("unit", UNITS)
def test_unit_may_differ_from_that_of_training(unit):
    clock, _ = learned(
        pd.DatetimeIndex(["1969-12-31 23:59:58.123456789"]).as_unit("ns")
    )
    later = pd.DatetimeIndex(["1970-01-01 00:00:01"]).as_unit(unit)
    np.testing.assert_allclose(clock.read(later, HERE), 2.876543211, rtol=1e-15)


@pytest.mark.parametrize("unit", UNITS)
def test_timedeltas_of_any_unit_are_seconds(unit):
    times = pd.TimedeltaIndex(["-1 day", "2 days", "0 s"]).as_unit(unit)
    clock, seconds = learned(times)
    np.testing.assert_array_equal(seconds, [0, 3 * 86400, 86400])
    back = clock.write(seconds)
    assert isinstance(back, pd.TimedeltaIndex) and list(back) == list(times)


@pytest.mark.parametrize("freq", ["M", "W-SUN", "D", "h", "Q-DEC", "Y-DEC"])
def test_periods_are_read_where_they_start(freq):
    times = pd.period_range("2020-01-01", periods=4, freq=freq)
    clock, seconds = learned(times)
    starts = times.to_timestamp()
    expected = (starts - starts[0]) / pd.Timedelta(1, "s")
    np.testing.assert_array_equal(seconds, expected)
    back = clock.write(seconds)
    assert back.equals(times) and back.freqstr == times.freqstr


@pytest.mark.parametrize(
    "times",
    [
        [datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 2)],
        [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)],
        [datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 2)],
        [pd.Timestamp("2020-01-01"), pd.Timestamp("2020-01-02")],
        np.array(["2020-01-01", "2020-01-02"], dtype="M8[D]"),
        np.array(["2020-01-01", "2020-01-02"], dtype="M8[ns]"),
        [datetime.timedelta(3), datetime.timedelta(4)],
        [pd.Period("2020-01-01", "D"), pd.Period("2020-01-02", "D")],
    ],
    ids=["datetime", "date", "both", "Timestamp", "M8[D]", "M8[ns]", "delta", "Period"],
)
@pytest.mark.parametrize("dtype", [None, object, "category"])
def test_objects_are_read_as_what_they_are(times, dtype):
    if dtype is not None:
        times = pd.Series(list(times), dtype=object).astype(dtype)
    _, seconds = learned(times)
    np.testing.assert_array_equal(seconds, [0, 86400])


def test_datetimes_of_one_zone_in_objects_keep_the_zone():
    zone = datetime.timezone(datetime.timedelta(hours=1))
    times = [datetime.datetime(2020, 1, day, tzinfo=zone) for day in (1, 2)]
    clock, seconds = learned(pd.Series(times, dtype=object))
    np.testing.assert_array_equal(seconds, [0, 86400])
    assert clock.write([0.0])[0] == times[0]
    assert clock.write([0.0])[0].utcoffset() == datetime.timedelta(hours=1)


# --- numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "Int16", "UInt64", "Float32", "O"],
)
def test_numbers_of_any_type(dtype):
    times = pd.Series([7, 5, 9]).astype(dtype)
    clock, seconds = learned(times)
    np.testing.assert_array_equal(seconds, [2, 0, 4])
    assert seconds.dtype == np.float64
    back = clock.write(seconds)
    np.testing.assert_array_equal(back, [7, 5, 9])
    integer = dtype[0].lower() in "iuo"
    assert back.dtype == (np.int64 if integer else np.float64)


def test_fractions_and_booleans_are_numbers():
    clock, time = learned(np.array([0.25, -1.5]))
    np.testing.assert_array_equal(time, [1.75, 0])
    np.testing.assert_array_equal(clock.write([0.5, 1.75]), [-1, 0.25])
    np.testing.assert_array_equal(learned([True, False])[1], [1, 0])
    np.testing.assert_array_equal(
        learned(pd.Series([1, 2.5], dtype=object))[1], [0, 1.5]
    )


@pytest.mark.parametrize("dtype", ["i8", "u8", "O"])
def test_huge_integers_keep_their_last_digit(dtype):
    start = 1_700_000_000_000_000_001
    clock, time = learned(np.array([start, start + 3], dtype=dtype))
    np.testing.assert_array_equal(time, [0, 3])
    np.testing.assert_array_equal(clock.write(time), [start, start + 3])


def test_integers_beyond_64_bits_apart():
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    _, time = learned(np.array([low, 0, high]))
    np.testing.assert_array_equal(time, [0, 2.0**63, 2.0**64])
    _, time = learned(np.array([0, 2**64 - 1], dtype=np.uint64))
    np.testing.assert_array_equal(time, [0, 2.0**64])


def test_integers_may_follow_floats_and_the_other_way_round():
    clock, _ = learned(np.array([0.5, 2.0]))
    np.testing.assert_array_equal(clock.read(np.array([3]), HERE), [2.5])
    clock, _ = learned(np.array([5, 7]))
    np.testing.assert_array_equal(clock.read(np.array([5.5]), HERE), [0.5])
    np.testing.assert_array_equal(clock.write([0.5]), [5.5])


def test_floats_too_far_apart_raise_an_error():
    with pytest.raises(ValueError, match="too far apart"):
        learned(np.array([-1.7e308, 1.7e308]))


# --- precision ------------------------------------------------------------------------


def test_nanoseconds_are_exact_near_the_origin():
    start = pd.Timestamp("2024-02-29 12:34:56.123456789")
    steps = np.array([0, 1, 3, 10**9 + 1, 86400 * 10**9 + 7])
    times = start + pd.TimedeltaIndex(steps.view("m8[ns]"))
    clock, seconds = learned(times)
    np.testing.assert_allclose(seconds, steps / 1e9, rtol=1e-15)
    assert clock.write(seconds).equals(times)


@pytest.mark.parametrize("unit", ["us", "ns"])
def test_microseconds_are_exact_over_a_century(unit):
    rng = np.random.default_rng(0)
    micro = np.sort(rng.integers(0, 100 * 366 * 86400 * 10**6, 1000))
    times = pd.Timestamp("1930-01-01") + pd.TimedeltaIndex(micro.view("m8[us]"))
    times = times.as_unit(unit)
    clock, seconds = learned(times)
    assert clock.write(seconds).round("us").equals(times)


def test_centuries_beyond_the_reach_of_nanoseconds():
    times = pd.DatetimeIndex(np.array(["0001-01-01", "9999-12-31"], dtype="M8[s]"))
    clock, seconds = learned(times)
    assert seconds[1] == 3652058 * 86400
    assert list(clock.write(seconds)) == list(times)


def test_seconds_may_be_fractions_when_written():
    clock, _ = learned(pd.DatetimeIndex(["2020-01-01"]).as_unit("s"))
    assert clock.write([0.25])[0] == pd.Timestamp("2020-01-01 00:00:00.25")
    assert clock.write([-0.25])[0] == pd.Timestamp("2019-12-31 23:59:59.75")


def test_times_that_cannot_be_held_raise_an_error():
    clock, _ = learned(pd.DatetimeIndex(["2020-01-01"]).as_unit("ns"))
    with pytest.raises(ValueError, match="beyond what 64 bits of ns hold"):
        clock.write([300 * 366 * 86400.0])
    with pytest.raises(ValueError, match="finite"):
        clock.write([np.nan])


def test_written_numbers_beyond_64_bits_are_floats():
    clock, _ = learned(np.array([5, 7]))
    np.testing.assert_array_equal(clock.write([1e300]), [1e300])


# --- time zones -----------------------------------------------------------------------


def test_clock_changes_do_not_change_durations():
    times = pd.date_range("2024-03-31", periods=3, freq="D", tz="Europe/Berlin")
    clock, seconds = learned(times)
    np.testing.assert_array_equal(seconds / 3600, [0, 23, 47])
    assert list(clock.write(seconds)) == list(times)
    assert str(clock.write(seconds).tz) == "Europe/Berlin"


def test_other_zones_than_in_training_are_the_same_instants():
    times = pd.date_range("2024-03-31", periods=3, tz="Europe/Berlin")
    clock, seconds = learned(times)
    there = times.tz_convert("America/New_York")
    np.testing.assert_array_equal(clock.read(there, HERE), seconds)


@pytest.mark.parametrize("first", [None, "UTC"])
def test_naive_and_aware_datetimes_are_different_kinds(first):
    times = pd.DatetimeIndex(["2020-01-01"])
    clock, _ = learned(times.tz_localize(first))
    other = times.tz_localize(None if first else "UTC")
    with pytest.raises(TypeError, match=r"without a time zone.*tz_localize") as error:
        clock.read(other, HERE)
    assert "datetimes with a time zone" in str(error.value)


@pytest.mark.parametrize("zone", [None, "Europe/Paris"])
def test_mixed_zones_raise_an_error(zone):
    first = pd.Timestamp("2020-01-01", tz="Europe/Berlin")
    times = pd.Series([first, pd.Timestamp("2020-01-02", tz=zone)], dtype=object)
    with pytest.raises(ValueError, match=rf"several time zones \(.*{zone}.*\)"):
        Clock.learn(times, HERE)
    clock, _ = learned(times[:1])
    with pytest.raises(ValueError, match="several time zones"):
        clock.read(times, HERE)


def test_zones_of_dateutil():
    times = pd.DatetimeIndex([datetime.datetime(2020, 1, 1, tzinfo=dateutil_tz.UTC)])
    assert learned(times)[0].zone == "UTC"
    nameless = times.tz_convert(dateutil_tz.gettz("Europe/Berlin"))
    with pytest.raises(ValueError, match=r"has no name.*tz_convert"):
        Clock.learn(nameless, HERE)


# --- what is wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    "times",
    [
        pd.DatetimeIndex(["2020-01-01", None, None]),
        pd.DatetimeIndex(["2020-01-01", None, None]).tz_localize("UTC"),
        pd.PeriodIndex(["2020-01-01", None, None], freq="D"),
        pd.TimedeltaIndex(["1 s", None, None]),
        pd.Series([datetime.date(2020, 1, 1), None, pd.NaT], dtype=object),
        np.array([1.0, np.nan, np.nan]),
        pd.array([1, None, None], dtype="Int64"),
        pd.array([1, None, None], dtype="Float32"),
        pd.Series([1, None, None], dtype=object),
    ],
    ids=lambda x: str(x.dtype),
)
def test_missing_times_raise_an_error_that_counts_them(times):
    with pytest.raises(ValueError, match=r"the index contain 2 missing values \(NaT"):
        Clock.learn(times, HERE)


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinite_times_raise_an_error_that_counts_them(infinity):
    with pytest.raises(ValueError, match="column 't' contain 1 infinite"):
        Clock.learn(np.array([1.0, infinity]), "column 't'")
    with pytest.raises(ValueError, match="contain 1 infinite"):
        Clock.learn(pd.Series([1.0, infinity], dtype=object), HERE)


@pytest.mark.parametrize(
    "times",
    [
        ["2020-01-01", "2020-01-02"],
        pd.Series(["2020-01-01"], dtype="string"),
        pd.Series(["2020-01-01"], dtype="category"),
        pd.Series(["2020-01-01", 3], dtype=object),
        np.array([1j, 2j]),
        pd.interval_range(0, 2),
    ],
    ids=["list", "string", "category", "mixed", "complex", "interval"],
)
def test_what_is_no_time_raises_an_error(times):
    with pytest.raises(ValueError, match="must be datetimes, periods, timedeltas or n"):
        Clock.learn(times, HERE)


KINDS = {
    "datetimes without a time zone": pd.DatetimeIndex(["2020-01-01"]),
    "datetimes with a time zone": pd.DatetimeIndex(["2020-01-01"], tz="UTC"),
    "periods": pd.PeriodIndex(["2020-01"], freq="M"),
    "timedeltas": pd.TimedeltaIndex(["1 s"]),
    "numbers": pd.Index([1.0]),
}


@pytest.mark.parametrize("seen", KINDS)
@pytest.mark.parametrize("fitted", KINDS)
def test_other_kinds_than_in_training_raise_an_error_with_both(fitted, seen):
    clock = Clock.learn(KINDS[fitted], HERE)
    assert clock.kind == fitted
    if seen == fitted:
        clock.read(KINDS[seen], HERE)
        return
    with pytest.raises(TypeError, match=f"was {fitted} in fit, but the .* {seen}"):
        clock.read(KINDS[seen], HERE)


@pytest.mark.parametrize("kind", KINDS)
def test_clocks_survive_pickle_and_are_plain(kind):
    clock = Clock.learn(KINDS[kind], HERE)
    assert pickle.loads(pickle.dumps(clock)) == clock
    assert all(type(x) in (str, int, float, type(None)) for x in vars(clock).values())


def test_only_dated_times_are_timelike():
    for kind, times in KINDS.items():
        assert is_timelike(times) == (kind != "numbers")
        assert is_timelike(pd.Series(times, dtype=object)) == (kind != "numbers")
        assert as_times(times, HERE).equals(times)
    assert not is_timelike(pd.Series(["2020-01-01"]))


# --- calendar -------------------------------------------------------------------------


def phase(times, name):
    """Return the position of times in a cycle, from 0 to 1."""
    sine, cosine = calendar_features(times, (name,)).T
    np.testing.assert_allclose(sine**2 + cosine**2, 1)
    return np.arctan2(sine, cosine) / (2 * np.pi) % 1


@pytest.mark.parametrize(
    "name, time, expected",
    [
        ("minute", "2024-01-01 05:15:30", 15.5 / 60),
        ("hour", "2024-01-01 06:00", 0.25),
        ("dayofweek", "2024-01-02 12:00", 1.5 / 7),
        ("day", "2024-02-15 12:00", 14.5 / 29),
        ("month", "2023-04-01", 0.25),
        ("yearday", "2024-12-31 12:00", 365.5 / 366),
        ("yearday", "2023-12-31 12:00", 364.5 / 365),
    ],
)
def test_cycles_of_the_calendar(name, time, expected):
    assert phase(pd.DatetimeIndex([time]), name)[0] == pytest.approx(expected)


def test_every_cycle_starts_anew_without_a_jump():
    start = pd.Timestamp("2024-01-01")  # a Monday
    around = pd.DatetimeIndex([start - pd.Timedelta(1, "ms"), start])
    for name in CYCLES:
        before, after = calendar_features(around, (name,))
        np.testing.assert_allclose(before, after, atol=1e-5)
        np.testing.assert_allclose(after, [0, 1], atol=1e-12)


@pytest.mark.parametrize(
    "day", ["2024-03-30", "2024-03-31", "2024-10-27", "2024-11-01"]
)
def test_hour_is_that_of_the_clock_on_the_wall(day):
    local = pd.DatetimeIndex([f"{day} 06:00", f"{day} 18:00"])
    times = local.tz_localize("Europe/Berlin")
    np.testing.assert_allclose(phase(times, "hour"), [0.25, 0.75])
    other = phase(times.tz_convert("UTC"), "hour")
    assert (np.abs(other - [0.25, 0.75]) > 0.03).all()


def test_periods_have_a_calendar():
    periods = pd.period_range("2023-01", periods=4, freq="M")
    np.testing.assert_allclose(phase(periods, "month"), np.arange(4) / 12, atol=1e-12)


def test_calendar_names_are_checked():
    assert check_calendar(None, "numbers") == ()
    assert check_calendar("hour", "periods") == ("hour",)
    assert check_calendar(["hour", "day"], "periods") == ("hour", "day")
    with pytest.raises(ValueError, match=r"names from .*'yearday'.*\['week'\]"):
        check_calendar(("hour", "week"), "periods")
    for kind in ("numbers", "timedeltas"):
        with pytest.raises(ValueError, match=f"needs datetimes or periods.*{kind}"):
            check_calendar(("hour",), kind)
