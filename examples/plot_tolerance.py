"""
Tolerance against accuracy and cost
===================================

An ODE-Net has no fixed number of layers. How often its vector field is evaluated is up
to the solver and its tolerance, which can be changed after training: accuracy is traded
for time, with the same weights. This is what Figure 3 of the paper shows.
"""

# %%
# An ODE-Net is trained on two moons, at the default tolerance of 1e-2. To tell them
# apart the flow has to bend.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons

from sknode import ODENetClassifier
from sknode.plotting import ToleranceDisplay, TrajectoryDisplay

X_train, y_train = make_moons(500, noise=0.15, random_state=0)
X_test, y_test = make_moons(1000, noise=0.15, random_state=1)
net = ODENetClassifier(augment_dim=0, random_state=0).fit(X_train, y_train)

figure, ax = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
TrajectoryDisplay.from_estimator(net, X_test[:100], y_test[:100], ax=ax)
print(f"{net.n_iter_} epochs, accuracy on test rows {net.score(X_test, y_test):.3f}")

# %%
# Solve it with other tolerances
# ------------------------------
#
# The error is that of the probabilities, against a far more accurate solution. The
# dotted line is at the tolerance of the training.

figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
display = ToleranceDisplay.from_estimator(net, X_test, y_test, n_repeats=10, ax=axes)
table = display.frame()
print(table.to_string(index=False, float_format="{:.3g}".format))

# %%
# Each digit of accuracy costs some evaluations more, and the error falls in proportion
# to the tolerance. The time grows with the evaluations. The accuracy of the
# classification does not change: errors of a few hundredths in some probabilities turn
# no answer here.

figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
axes[0].semilogy(table["evaluations"], table["error"], "o-")
axes[0].set(xlabel="evaluations a sample", ylabel="error of the probabilities")
axes[1].plot(table["evaluations"], 1e3 * table["seconds"], "o-")
_ = axes[1].set(
    xlabel="evaluations a sample", ylabel=f"ms for {len(X_test)} rows", ylim=(0, None)
)

# %%
# Every sample has steps of its own
# ---------------------------------
#
# Rows whose paths are harder to follow get more evaluations, and prolong no other one.

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
for i, rtol in enumerate((1e-2, 1e-4, 1e-6)):
    counts = net.set_params(rtol=rtol, atol=rtol).count_evaluations(X_test)
    values, rows = np.unique(counts, return_counts=True)
    ax.bar(values, rows, width=3, color=f"C{i}", label=f"tolerance {rtol:.0e}")
    print(f"tolerance {rtol:.0e}: {counts.min()} to {counts.max()} evaluations")
net.set_params(rtol=1e-2, atol=1e-2)
ax.set(xlabel="evaluations of a row", ylabel="rows")
_ = ax.legend()

# %%
# Evaluations in training
# -----------------------
#
# Training has to follow the flow, too. In the first epochs it learns to bend and comes
# to need more evaluations, most of all at a tight tolerance. Penalties on the kinetic
# energy and on the Jacobian of the flow keep it simple.

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.plot(net.nfe_curve_, label="tolerance 1e-2")
for label, settings in (
    ("tolerance 1e-4", {"rtol": 1e-4, "atol": 1e-4}),
    (
        "1e-4, with penalties",
        {"rtol": 1e-4, "atol": 1e-4, "kinetic_penalty": 0.1, "jacobian_penalty": 0.1},
    ),
):
    other = ODENetClassifier(augment_dim=0, random_state=0, **settings)
    other.fit(X_train, y_train)
    ax.plot(other.nfe_curve_, label=label)
    print(f"{label:22} accuracy {other.score(X_test, y_test):.3f}")
ax.set(xlabel="epoch", ylabel="evaluations a sample", ylim=(0, None))
ax.legend()
plt.show()
