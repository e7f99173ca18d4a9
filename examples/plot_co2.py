"""
Gaps and future of carbon dioxide
=================================

`LatentODEImputer` fills the holes of a table of time series and says how sure it is.
The air above Mauna Loa has been measured since 1958. Here are monthly means. Of some
months there are none, and more are hidden to see how well they are filled in.

``examples/co2.py`` does the same with the weekly data.
"""

# %%
# A wide table goes in: dates in the index, a column a channel, NaN where nothing is
# known. Hidden are a year, a year and a half, and all from 1999 on.

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning

from sknode import LatentODEImputer
from sknode.datasets import load_co2
from sknode.plotting import SeriesDisplay

co2 = load_co2().resample("MS").mean()
hidden = {
    "1975-03 to 1976-02": slice("1975-03", "1976-02"),
    "1986-03 to 1987-08": slice("1986-03", "1987-08"),
    "1999 on": slice("1999", None),
}
seen = co2.copy()
for months in hidden.values():
    seen.loc[months] = np.nan
print(f"{len(co2)} months, {co2['co2'].isna().sum()} of them without a measurement")

# Training ends with the learning rate at zero after max_iter epochs, which is enough
# here. The warning that more might be better is switched off.
warnings.simplefilter("ignore", ConvergenceWarning)
imputer = LatentODEImputer(random_state=0).fit(seen)

# %%
# How far is it from what was hidden?
# -----------------------------------
#
# Linear interpolation knows nothing of the seasons; from 1999 on it repeats the last
# value. A mean and a standard deviation make a band of 90 %.

filled, std = imputer.impute(seen, return_std=True)
error = (filled - co2).abs()["co2"]
linear = (seen.interpolate("time") - co2).abs()["co2"]
inside = error < 1.645 * std["co2"]
table = pd.DataFrame(
    {
        name: {
            "error, ppm": error[months].mean(),
            "linear, ppm": linear[months].mean(),
            "in the band": f"{inside[months].mean():.0%}",
        }
        for name, months in hidden.items()
    }
).T
print(table.to_string(float_format="{:.2f}".format))

# %%
# The band
# --------
#
# ``SeriesDisplay`` draws what is known, the mean and the band; what was hidden is in
# red.

figure, axes = plt.subplots(2, 1, figsize=(8, 6.5), layout="constrained")
views = ("1984", "1989"), ("1996", "2001")
for ax, (start, end) in zip(axes, views, strict=True):
    display = SeriesDisplay.from_estimator(imputer, seen, co2, coverage=0.9, ax=ax)
    view = display.frame().set_index("time").loc[start:end]
    ax.set(
        xlim=(view.index[0], view.index[-1]),
        ylim=(view["lower"].min() - 1, view["upper"].max() + 1),
        ylabel="CO2, ppm",
        xlabel="year",
    )
axes[1].get_legend().remove()

# %%
# Draws
# -----
#
# ``sample`` draws what may have been, coherent in time. Here are five answers to how
# the data may go on after 2001, by the same imputer, which now sees all the data and is
# not trained again. The band says where single months are, draws how they go together.

months = pd.date_range("1990", "2006-12", freq="MS", name="date")
ahead = co2.reindex(months)
draws = imputer.sample(ahead, n_samples=5, random_state=0)
figure, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
SeriesDisplay.from_estimator(imputer, ahead, coverage=0.9, ax=ax)
for i, draw in enumerate(draws):
    later = draw["co2"]["2001-12":]
    ax.plot(later, color="C1", lw=0.7, label="draws" if i == 0 else None)
ax.set(ylabel="CO2, ppm", xlabel="year", xlim=(months[60], months[-1]), ylim=(355, 395))
ax.legend(loc="upper left")
plt.show()
