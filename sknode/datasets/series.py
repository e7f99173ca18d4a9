"""Time series."""

from __future__ import annotations

from importlib.resources import files
from numbers import Integral, Real

import numpy as np
import pandas as pd
from sklearn.utils import check_random_state

__all__ = ["load_co2", "make_spirals"]

# The curves have so many points over three turns, and grow by so much in a radian.
CURVE_POINTS, CURVE_TURNS, GROWTH = 500, 3, 0.3
# Series start between these points.
FIRST_START, LAST_START = 100, 300


def make_spirals(
    n_series=1000,
    *,
    n_times=100,
    n_future=0,
    n_observed=None,
    noise=0.3,
    random_state=None,
):
    """Draw noisy pieces of two spirals, one clockwise and one counterclockwise.

    The example on which latent ODEs were introduced [1]_. Half of the series follow
    each spiral, from a start of their own. Some of the points of a piece are observed;
    the points after it, on request, are what is to be forecast.

    Parameters
    ----------
    n_series : int, default=1000
        Number of series.
    n_times : int, default=100
        Length of a piece, in points at equal distances in time.
    n_future : int, default=0
        Points after the piece, all of them observed. Pieces and future together can
        have up to 200 points.
    n_observed : int, optional
        Points of a piece that are observed, drawn without replacement for each series;
        by default all.
    noise : float, default=0.3
        Standard deviation of the Gaussian noise of each coordinate.
    random_state : int, RandomState instance or None, default=None
        Draws starts, directions, observed points and noise.

    Returns
    -------
    DataFrame
        A row an observation, sorted by series and time, with the columns

        - ``series``: number of the series, int;
        - ``time``: time since the start of the series, in radians: the spirals turn at
          unit speed;
        - ``x1``, ``x2``: observed position;
        - ``x1_true``, ``x2_true``: position without noise;
        - ``future``: whether the point is after the piece, bool;
        - ``clockwise``: direction of the series, bool.

    See Also
    --------
    sknode.LatentODERegressor : Learns how such series go on.

    Notes
    -----
    The curves are those of the example of torchdiffeq [2]_: 500 points over three
    turns; the counterclockwise spiral has radius 0.3 a at the angle a and is centred at
    (5, 0); the clockwise one has radius 15 / a, about (-5, 0). Both widen with time.
    Pieces start at the points 100 to 300.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018, section 5.1.
    .. [2] https://github.com/rtqichen/torchdiffeq, ``examples/latent_ode.py``.

    Examples
    --------
    >>> from sknode.datasets import make_spirals
    >>> spirals = make_spirals(10, n_observed=30, n_future=100, random_state=0)
    >>> X, y = spirals[["series", "time"]], spirals[["x1", "x2"]]
    >>> X.shape, y.shape
    ((1300, 2), (1300, 2))
    >>> seen = spirals[~spirals["future"]]
    >>> seen.groupby("series").size().unique()
    array([30])
    """
    for name, value, least in (
        ("n_series", n_series, 1),
        ("n_times", n_times, 1),
        ("n_future", n_future, 0),
    ):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"{name} must be an integer of at least {least}. Got {value!r}."
            )
    length = n_times + n_future
    if length > CURVE_POINTS - LAST_START:
        raise ValueError(
            f"n_times + n_future must be at most {CURVE_POINTS - LAST_START}, where "
            f"the spirals end. Got {length}."
        )
    n_observed = n_times if n_observed is None else n_observed
    if not isinstance(n_observed, Integral) or not 1 <= n_observed <= n_times:
        raise ValueError(
            f"n_observed must be an integer between 1 and n_times={n_times}, or None. "
            f"Got {n_observed!r}."
        )
    if not isinstance(noise, Real) or not 0 <= noise < np.inf:
        raise ValueError(f"noise must be a non-negative number. Got {noise!r}.")
    rng = check_random_state(random_state)
    angle = np.linspace(0, 2 * np.pi * CURVE_TURNS, CURVE_POINTS)
    curves = np.stack([_spiral(angle, False), _spiral(angle, True)])
    clockwise = rng.permutation(np.arange(n_series) % 2)
    start = rng.randint(FIRST_START, LAST_START + 1, size=n_series)
    observed = rng.uniform(size=(n_series, n_times)).argsort(1) < n_observed
    observed = np.pad(observed, ((0, 0), (0, n_future)), constant_values=True)
    series, step = observed.nonzero()
    truth = curves[clockwise[series], start[series] + step]
    position = truth + noise * rng.normal(size=truth.shape)
    return pd.DataFrame(
        {
            "series": series,
            "time": angle[step],
            "x1": position[:, 0],
            "x2": position[:, 1],
            "x1_true": truth[:, 0],
            "x2_true": truth[:, 1],
            "future": step >= n_times,
            "clockwise": clockwise[series].astype(bool),
        }
    )


def _spiral(angle, clockwise):
    """Return the points (..., 2) of a spiral, as torchdiffeq's example has them."""
    if clockwise:
        angle = 2 * np.pi * CURVE_TURNS + 1 - angle
        radius, centre = 50 * GROWTH / angle, -5.0
    else:
        radius, centre = GROWTH * angle, 5.0
    return np.stack([radius * np.cos(angle) + centre, radius * np.sin(angle)], -1)


def load_co2():
    """Load the weekly carbon dioxide of the air above Mauna Loa, with its gaps.

    Averages of weeks from March 1958 to December 2001 that end on the Saturdays of the
    index. Of 2284 weeks 59 were not measured, among them 18 in a row in 1964.

    Returns
    -------
    DataFrame of shape (2284, 1)
        Column ``"co2"``: parts per million by volume of dry air, NaN where it was not
        measured. The index is a `pandas.DatetimeIndex` of Saturdays named ``"date"``.

    Notes
    -----
    Compiled by C. D. Keeling and T. P. Whorf, "Atmospheric CO2 concentrations derived
    from flask air samples at sites in the SIO network", in Trends: A Compendium of Data
    on Global Change, Carbon Dioxide Information Analysis Center, Oak Ridge National
    Laboratory, 2004. The data are in the public domain.

    Examples
    --------
    >>> from sknode.datasets import load_co2
    >>> co2 = load_co2()
    >>> co2["co2"].isna().sum()
    np.int64(59)
    >>> co2.loc["1958-05"]
                  co2
    date
    1958-05-03  316.9
    1958-05-10    NaN
    1958-05-17  317.5
    1958-05-24  317.9
    1958-05-31    NaN
    """
    source = files("sknode") / "data" / "co2_weekly.csv"
    with source.open(encoding="utf-8") as file:
        return pd.read_csv(file, index_col="date", parse_dates=["date"])
