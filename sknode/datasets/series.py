"""Time series."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

__all__ = ["load_co2"]


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
