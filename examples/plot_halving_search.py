"""
Search tolerances and sizes by halving
======================================

The solver's tolerance and the size of the network are parameters like any other, so
that scikit-learn's searches try them. ``HalvingGridSearchCV`` begins with all
candidates on few rows, keeps the better third, and goes on with three times as many
rows.
"""

# %%
# Two spirals have to be told apart: a flow has much to unwind, which takes a network of
# some size and a solver that can follow. Tolerances, relative and absolute, go from
# loose to tight, and there are three sizes of the vector field.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.inspection import DecisionBoundaryDisplay
from sklearn.model_selection import HalvingGridSearchCV, StratifiedKFold

from sknode import ODENetClassifier


def make_arms(n_samples, rng):
    """Return points on two spirals, with noise, and which one they are of."""
    arm = rng.integers(0, 2, n_samples)
    angle = 3 * np.pi * np.sqrt(rng.uniform(0.03, 1, n_samples))
    turned = angle + np.pi * arm
    points = (angle / 3 * [np.cos(turned), np.sin(turned)]).T
    return points + rng.normal(0, 0.15, points.shape), arm


rng = np.random.default_rng(0)
X_train, y_train = make_arms(1350, rng)
X_test, y_test = make_arms(2000, rng)
sizes = [(4,), (16,), (64,)]
grid = [
    {"rtol": [tol], "atol": [tol], "hidden_layer_sizes": sizes}
    for tol in (1e-1, 1e-2, 1e-4)
]
search = HalvingGridSearchCV(
    ODENetClassifier(random_state=0),
    grid,
    factor=3,
    min_resources=150,
    cv=StratifiedKFold(3, shuffle=True, random_state=0),
    error_score="raise",
    random_state=0,
).fit(X_train, y_train)

# %%
# What was tried in each round
# ----------------------------

results = pd.DataFrame(search.cv_results_)
columns = {
    "param_rtol": "tolerance",
    "param_hidden_layer_sizes": "hidden",
    "n_resources": "rows",
    "mean_test_score": "accuracy",
    "mean_fit_time": "seconds a fit",
}
table = results[["iter", *columns]].rename(columns=columns)
print(table.to_string(index=False, float_format="{:.3g}".format))
print(f"\nchosen: {search.best_params_}")
print(f"accuracy on test rows {search.score(X_test, y_test):.3f}")

# %%
# Each line is a candidate, as long as it stayed in the race.

figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
styles = {1e-1: "-", 1e-2: "--", 1e-4: ":"}
colours = {"(4,)": "C0", "(16,)": "C1", "(64,)": "C2"}
for (tol, hidden), rows in table.groupby(
    ["tolerance", table["hidden"].astype(str)], sort=False
):
    ax.plot(
        rows["rows"],
        rows["accuracy"],
        "o",
        ls=styles[tol],
        color=colours[hidden],
        label=f"tolerance {tol:g}, {hidden[1:-2]} units",
    )
ax.set_xscale("log")
n_rows = np.unique(table["rows"])
ax.set_xticks(n_rows, n_rows)
ax.minorticks_off()
ax.set(xlabel="rows to train on and validate", ylabel="accuracy, mean of 3 folds")
_ = figure.legend(loc="outside right center", fontsize="small")

# %%
# The size decides. The tolerance hardly matters for the accuracy here, but a tight one
# takes longer. Whether a flow was learned that only works at its own tolerance is told
# by other tolerances, with the same weights.

best = search.best_estimator_
for tol in (1e-1, 1e-3, 1e-6):
    best.set_params(rtol=tol, atol=tol)
    evaluations = best.count_evaluations(X_test).mean()
    print(
        f"solved at {tol:.0e}: accuracy {best.score(X_test, y_test):.3f}, "
        f"{evaluations:.0f} evaluations a row"
    )
figure, ax = plt.subplots(figsize=(5, 4.5), layout="constrained")
DecisionBoundaryDisplay.from_estimator(
    best, X_train, response_method="predict_proba", cmap="RdBu_r", alpha=0.6, ax=ax
)
for arm, colour in ((0, "C0"), (1, "C3")):
    ax.plot(*X_test[:600][y_test[:600] == arm].T, ".", ms=4, color=colour)
ax.set(title="probability, and test rows", xlabel="x0", ylabel="x1", aspect="equal")
plt.show()
