"""
Forecasts with intervals
========================

A forecast is worth as much as what it says about its own error. `LatentODERegressor`
predicts intervals; here is how to get them, and how to find out whether as many values
lie inside as they promise.
"""

# %%
# Twelve gauges of rivers, made up: a yearly cycle that differs in height and phase, wet
# and dry spells of some weeks, and an error of measurement. They are read every twelve
# days on average, for four years, at irregular times.

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning

from sknode import LatentODERegressor
from sknode.model_selection import PanelTimeSeriesSplit
from sknode.plotting import SeriesDisplay


def make_gauges(n_gauges, rng, n_days=4 * 365, spell=25.0):
    """Return levels in m, a row a reading."""
    parts = []
    for gauge in range(n_gauges):
        day = np.arange(n_days)
        wet = np.zeros(n_days)
        for i in range(1, n_days):
            wet[i] = wet[i - 1] * (1 - 1 / spell) + rng.normal(0, 0.06)
        peak = rng.normal(100, 15)
        level = 2 + rng.uniform(0.4, 0.8) * np.cos(2 * np.pi * (day - peak) / 365.25)
        read = np.sort(rng.choice(n_days, n_days // 12, replace=False))
        date = pd.Timestamp("2020-01-01") + pd.to_timedelta(day[read], "D")
        noisy = (level + wet)[read] + rng.normal(0, 0.05, len(read))
        parts.append(pd.DataFrame({"gauge": gauge, "date": date, "level": noisy}))
    return pd.concat(parts, ignore_index=True)


data = make_gauges(12, np.random.default_rng(0))
X, y = data[["gauge", "date"]], data["level"].rename("level, m")

# %%
# ``PanelTimeSeriesSplit`` cuts by time: trained is on what was before, tested what
# comes after. Twice a year is held out, so that no single strange year decides.
# Training ends with the learning rate at zero after max_iter epochs, which is enough
# here; the warning that more might be better is switched off.

warnings.simplefilter("ignore", ConvergenceWarning)
model = LatentODERegressor(
    series="gauge", time="date", calendar="yearday", random_state=0
)
cv = PanelTimeSeriesSplit(2, series="gauge", time="date", test_size="365D")
for train, test in cv.split(X):
    model.fit(X.iloc[train], y.iloc[train])
    where, truth = X.iloc[test], y.iloc[test]
    print(
        f"{where['date'].min():%B %Y} to {where['date'].max():%B %Y}, "
        f"{len(test)} readings: R2 {model.score(where, truth):.2f}, "
        f"log-density {model.score_samples(where, truth).mean():.2f} a reading"
    )

# %%
# A tidy table of what comes
# --------------------------
#
# The model that is left has not seen the last year. ``forecast`` takes a number of
# steps, or the times.

table = model.forecast(3, freq="30D", series=0, coverage=0.9)
print(table.to_string(index=False, float_format="{:.2f}".format))

# %%
# ``SeriesDisplay`` has the year that was held out in red.

figure, axes = plt.subplots(2, 1, figsize=(8, 6), layout="constrained")
for gauge, ax in enumerate(axes):
    SeriesDisplay.from_estimator(
        model, X, y, series=gauge, held_out=test, coverage=0.9, ax=ax
    )
    ax.set(title=f"gauge {gauge}", xlabel="", ylabel="level, m")
    ax.set_xlim(pd.Timestamp("2021-07-01"), pd.Timestamp("2023-12-31"))
axes[1].get_legend().remove()

# %%
# Do the intervals keep their promise?
# ------------------------------------
#
# Left: for several coverages, the share of the last year's readings that lie inside.
# Right: intervals should be wide where it is hard to know, and only there. Just after
# the last reading the wet or dry spell is known; a few weeks later it is not.

promised = np.array([0.5, 0.7, 0.8, 0.9, 0.95])
found = []
for coverage in promised:
    lower, upper = model.predict_interval(where, coverage=coverage)
    found.append(np.mean((lower <= truth) & (truth <= upper)))
    print(f"promised {coverage:.0%}, found {found[-1]:.0%}")

mean, std = model.predict(where, return_std=True)
last = X.iloc[train].groupby("gauge")["date"].max()
ahead = (where["date"] - where["gauge"].map(last)).dt.days
square = pd.DataFrame({"error": (mean - truth) ** 2, "std": std**2})
square = square.groupby(pd.cut(ahead, [0, 14, 28, 56, 112, 366])).mean()
middle = [interval.mid for interval in square.index]

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
axes[0].plot([0.4, 1], [0.4, 1], ":", color="0.5", label="as promised")
axes[0].plot(promised, found, "o-", label="LatentODERegressor")
axes[0].set(xlabel="coverage promised", ylabel="share of readings inside")
axes[1].plot(middle, np.sqrt(square["error"]), "o-", label="error, root mean square")
axes[1].plot(middle, np.sqrt(square["std"]), "s--", label="standard deviation promised")
axes[1].set_xscale("log")
axes[1].set_xticks(middle, [f"{day:.0f}" for day in middle])
axes[1].minorticks_off()
axes[1].set(xlabel="days since the last reading", ylabel="level, m", ylim=(0, None))
for ax in axes:
    ax.legend()
plt.show()
