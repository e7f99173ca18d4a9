"""
The flow from noise to two moons
================================

A continuous normalizing flow carries a normal distribution, at ``t = 0``, to that of
the data, at ``t = 1``. `CNFDensity` learns the vector field that does so. Here is what
it looks like on the way.
"""

# %%
# The data come with their exact log-density. The mean over held-out rows is the best
# that any model can reach, up to chance.
#
# By default `CNFDensity` starts from a Gaussian mixture that it fits first, and adds
# networks only where held-out rows become more likely by them. That is hard to improve
# on here, but it is no picture of a flow. So we switch off what is done beforehand:
# with ``n_components=1`` and without ``marginals`` and ``refine`` a single network
# starts from a single Gaussian and has all to do.

import matplotlib.pyplot as plt
import numpy as np

from sknode import CNFDensity
from sknode.datasets import log_density, make_density
from sknode.plotting import DensityDisplay, TrajectoryDisplay

X_train, _ = make_density("moons", 3000, random_state=0)
X_test, exact = make_density("moons", 1000, random_state=1)
density = CNFDensity(n_components=1, marginals=False, refine=False, random_state=0).fit(
    X_train
)
print(f"{density.n_iter_} epochs")
print(f"mean log-density of held-out rows {density.score(X_test):.3f}")
print(f"                     in the truth {exact.mean():.3f}")

# %%
# Rows at several times, and the density at the end
# -------------------------------------------------
#
# The first panels hardly differ from a normal distribution: most happens late.

figure, axes = plt.subplots(
    1, 5, figsize=(10, 2.2), sharex=True, sharey=True, layout="constrained"
)
display = DensityDisplay.from_estimator(
    density, X_test, n_times=5, cmap="Blues", ax=axes
)
for ax in axes:
    ax.set_aspect("equal")

# %%
# Paths
# -----
#
# The same flow as paths of rows, from the normal distribution to the data, which are
# the dots. The arrows are the vector field at two times: early it points inwards, at
# the end it pulls rows towards the moons. Paths that seem to cross do so at different
# times.

figure, axes = plt.subplots(
    1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained"
)
for ax, time in zip(axes, (0.5, 0.95), strict=True):
    TrajectoryDisplay.from_estimator(density, X_test[:150], field_time=time, ax=ax)
    ax.set(aspect="equal", xlim=(-1.8, 2.8), ylim=(-1.1, 1.5))
_ = axes[1].set_ylabel("")

# %%
# The truth beside it
# -------------------
#
# The same colours for the density that the rows were drawn from, and for what the flow
# has learned of it.

grid = display.grid
points = np.stack([x.ravel() for x in np.meshgrid(*grid)], axis=1)
truth = DensityDisplay(
    grid, log_density("moons", points).reshape(len(grid[1]), -1), rows=X_test
)
figure, axes = plt.subplots(
    1, 2, figsize=(8, 3), sharex=True, sharey=True, layout="constrained"
)
levels = np.linspace(0, np.exp(truth.log_density).max() * 1.3, 20)
truth.plot(axes[0], levels=levels, cmap="Blues", extend="max")
DensityDisplay(grid, display.log_density, rows=X_test).plot(
    axes[1], levels=levels, cmap="Blues", extend="max"
)
for ax, title in zip(axes, ("truth", "flow"), strict=True):
    ax.set(title=title, aspect="equal", ylabel="x1", xlim=(-1.7, 2.7), ylim=(-1, 1.5))
axes[1].set_ylabel("")
_ = figure.colorbar(truth.surface_, ax=axes, label="density", format="%.1f")

# %%
# And back
# --------
#
# The flow can be solved backwards: ``transform`` carries rows to what should be a
# standard normal distribution. ``inverse_transform`` carries them to the data again.

Z = density.transform(X_test)
print("means", Z.mean(0).round(2), "standard deviations", Z.std(0).round(2))
back = density.inverse_transform(Z)
print(f"there and back again they are off by at most {abs(back - X_test).max():.0e}")
plt.show()
