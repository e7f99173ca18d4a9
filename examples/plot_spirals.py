"""
Noisy spirals: reconstruct and go on
====================================

The example on which latent ODEs were introduced. Pieces of two spirals are observed at
a few irregular times, with noise; half of them turn clockwise. `LatentODERegressor`
learns from many of them how such curves go on, and reads from the few points of a new
one which curve it is.

``examples/spirals.py`` has the experiment in the size of the paper, with recurrent
networks to compare with.
"""

# %%
# 250 series, each observed at 40 of 100 times. Those that the model learns from are
# known for 60 times more. Of the 50 others only the 40 points are known.
#
# What a latent ODE leaves is noise here. By default the estimator would look for a
# process in it that lasts for a while; ``residual=None`` makes it the model of the
# paper, whose predictions are smooth curves.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sknode import LatentODERegressor
from sknode.datasets import make_spirals
from sknode.plotting import TrajectoryDisplay

WHERE, POSITION, TRUTH = ["series", "time"], ["x1", "x2"], ["x1_true", "x2_true"]
spirals = make_spirals(250, n_observed=40, n_future=60, noise=0.3, random_state=0)
train = spirals[spirals["series"] < 200]
test = spirals[spirals["series"] >= 200]
given, future = test[~test["future"]], test[test["future"]]

model = LatentODERegressor(
    series="series",
    residual=None,
    max_iter=60,
    tol=0.05,
    n_iter_no_change=4,
    random_state=0,
).fit(train[WHERE], train[POSITION])

# %%
# ``condition`` tells the fitted model what is known of new series, without training.
# Errors are those from the curves without noise, which has a standard deviation of 0.3.

model = model.condition(given[WHERE], given[POSITION])
for name, rows in ("where observed", given), ("60 times ahead", future):
    error = model.predict(rows[WHERE]) - rows[TRUTH].to_numpy()
    print(f"root mean square error {name}: {np.sqrt((error**2).mean()):.3f}")

# %%
# Four of the new series
# ----------------------

clockwise = given.groupby("series")["clockwise"].first()
shown = [*clockwise.index[clockwise][:2], *clockwise.index[~clockwise][:2]]
figure, axes = plt.subplots(2, 2, figsize=(8, 7), layout="constrained")
for ax, series in zip(axes.flat, shown, strict=True):
    seen, ahead = (part[part["series"] == series] for part in (given, future))
    for part, colour, label in (
        (seen, "C0", "reconstruction"),
        (ahead, "C3", "forecast"),
    ):
        ax.plot(*part[TRUTH].to_numpy().T, color="0.85", lw=5)
        times = np.linspace(part["time"].min(), part["time"].max(), 200)
        where = pd.DataFrame({"series": series, "time": times})
        ax.plot(*model.predict(where).T, color=colour, label=label)
    ax.plot(*seen[POSITION].to_numpy().T, "k.", ms=4, label="observed")
    way = "clockwise" if clockwise[series] else "counterclockwise"
    ax.set(title=f"series {series}, {way}", xlabel="x1", ylabel="x2")
    ax.set_aspect("equal", "datalim")
axes[0, 0].plot([], [], color="0.85", lw=5, label="truth")
_ = figure.legend(
    *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4
)

# %%
# The latent states
# -----------------
#
# Every curve is a path in a latent space of eight dimensions, here seen in the plane in
# which they vary most. Nobody told the model of the two directions.

figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
way = given["clockwise"].map({True: "clockwise", False: "counterclockwise"})
TrajectoryDisplay.from_estimator(model, given[WHERE], way, ax=ax)
ax.set_title("latent paths of 50 series, dots at their ends")
plt.show()
