"""
Regression, and what the model has learned
==========================================

`ODENetRegressor` predicts numbers. It is inspected by scikit-learn's own displays,
which need nothing of it but ``fit`` and ``predict``.
"""

# %%
# The data are Friedman's first problem: of ten features five matter,
#
# .. math::
#
#     y = 10 \sin(\pi x_0 x_1) + 20 (x_2 - 0.5)^2 + 10 x_3 + 5 x_4 + \varepsilon
#
# with noise of standard deviation 1. No model can predict better than that.

import matplotlib.pyplot as plt
from sklearn.datasets import make_friedman1
from sklearn.inspection import PartialDependenceDisplay, permutation_importance
from sklearn.metrics import PredictionErrorDisplay, root_mean_squared_error
from sklearn.model_selection import train_test_split

from sknode import ODENetRegressor
from sknode.plotting import TrajectoryDisplay

X, y = make_friedman1(1200, noise=1.0, random_state=0)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
model = ODENetRegressor(random_state=0).fit(X_train, y_train)
rmse = root_mean_squared_error(y_test, model.predict(X_test))
print(f"{model.n_iter_} epochs, R2 on test rows {model.score(X_test, y_test):.3f}")
print(f"root mean square error {rmse:.2f}, of the noise alone 1.00")

# %%
# Errors of the predictions
# -------------------------

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for ax, kind in zip(
    axes, ("actual_vs_predicted", "residual_vs_predicted"), strict=True
):
    PredictionErrorDisplay.from_estimator(
        model,
        X_test,
        y_test,
        kind=kind,
        ax=ax,
        scatter_kwargs={"s": 10, "alpha": 0.6},
    )

# %%
# What does it depend on?
# -----------------------
#
# The mean prediction where one feature has a given value and the others are as in the
# data. The parabola of ``x2`` and the lines of ``x3`` and ``x4`` come out, and that
# ``x5`` does not matter.

figure, axes = plt.subplots(1, 4, figsize=(10, 3), layout="constrained", sharey=True)
PartialDependenceDisplay.from_estimator(
    model, X_train, [2, 3, 4, 5], kind="average", grid_resolution=30, ax=axes
)
axes[0].set_ylabel("mean prediction")
for ax in axes[1:]:
    ax.set_ylabel("")

# %%
# ``x0`` and ``x1`` act together. How much the features matter in all is told by what is
# lost when one of them is shuffled.

figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
PartialDependenceDisplay.from_estimator(
    model, X_train, [(0, 1)], grid_resolution=15, ax=ax
)
ax.set_title("mean prediction")
importance = permutation_importance(model, X_test, y_test, n_repeats=5, random_state=0)
for i, drop in enumerate(importance.importances_mean):
    print(f"feature {i}: R2 falls by {drop:.2f} if it is shuffled")

# %%
# The flow inside
# ---------------
#
# Rows become states, which flow for one unit of time; a linear map of where they end is
# the prediction. So the flow has to sort the states by y.

figure, ax = plt.subplots(figsize=(6.5, 5), layout="constrained")
TrajectoryDisplay.from_estimator(model, X_test[:100], y_test[:100], ax=ax)
ax.set_title("paths of 100 test rows, dots at their ends")
plt.show()
