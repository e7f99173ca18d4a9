"""
Samples of a density given a value
==================================

With ``conditional=True`` `CNFDensity` estimates the density of X given y: what can be
said of X once y is known. It may have several peaks, and a width that depends on y,
where a regression would answer with one number.
"""

# %%
# Given a value
# -------------
#
# A robot arm has two links, of 1.0 and 0.6 m, that turn in a plane. The angles of its
# joints say how high its hand is; we ask the other way round. Given the height, as
# measured with an error of 5 cm, which angles may the joints have? There are infinitely
# many answers, and more of them for a hand at half height than for one that is
# stretched upwards.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_iris
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from sknode import CNFDensity

rng = np.random.default_rng(0)


def height_of(angles):
    """Return the height of the hand in m."""
    return np.sin(angles[:, 0]) + 0.6 * np.sin(angles.sum(1))


# what the joints usually do, in radians
angles = rng.normal([0.3, 0.0], [0.6, 0.9], size=(3000, 2))
height = height_of(angles) + rng.normal(0, 0.05, len(angles))

arm = CNFDensity(
    conditional=True, n_components=16, tol=0.02, n_iter_no_change=4, random_state=0
).fit(angles, height)
print(f"{arm.n_iter_} epochs")

# %%
# Draws of the angles, given three heights. The hand is where it was seen, within its
# error: that is a check of the draws that needs no truth. Pictures need no solutions of
# seven digits, and looser tolerances are faster.

arm.set_params(rtol=1e-4, atol=1e-4)
asked = [-0.5, 0.5, 1.3]
figure, axes = plt.subplots(2, 3, figsize=(9, 5.6), layout="constrained")
for (top, bottom), value in zip(axes.T, asked, strict=True):
    drawn = arm.sample(1000, random_state=0, y=value)
    top.plot(*angles[:1000].T, ".", ms=3, color="0.8", label="any height")
    top.plot(*drawn.T, ".", ms=3, label="drawn, given the height")
    top.set(title=f"hand at {value} m", xlabel="shoulder, rad", xlim=(-2, 2.5))
    top.set_ylim(-3, 3)
    reached = height_of(drawn)
    print(f"given {value:4.1f} m: drawn {reached.mean():5.2f} +- {reached.std():.2f} m")
    # the arm itself, of some of the draws
    for shoulder, elbow in drawn[:40]:
        bend = np.array([0, shoulder, shoulder + elbow])
        links = np.array([0, 1, 0.6])
        x, y = np.cumsum(links * np.cos(bend)), np.cumsum(links * np.sin(bend))
        bottom.plot(x, y, color="C0", lw=0.8, alpha=0.4)
        bottom.plot(x[-1], y[-1], "k.", ms=4)
    bottom.axhline(value, color="C3", lw=1)
    bottom.set(xlabel="x, m", xlim=(-0.7, 1.7), ylim=(-1.3, 1.7), aspect="equal")
axes[0, 0].set_ylabel("elbow, rad")
axes[1, 0].set_ylabel("height, m")
_ = axes[0, 0].legend(loc="upper right", fontsize="small", markerscale=3)

# %%
# Given a class
# -------------
#
# y may be classes, too. Then there is a density for every class, and Bayes' rule makes
# a classifier of them. The lengths of iris flowers are rounded to millimetres, which
# ``dequantize`` takes into account.

X, y = load_iris(return_X_y=True, as_frame=True)
species = load_iris().target_names
X = X[["petal length (cm)", "petal width (cm)"]]
iris = CNFDensity(
    conditional=True, dequantize=dict.fromkeys(X.columns, 0.1), random_state=0
).fit(X, y)

figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
for k, name in enumerate(species):
    drawn = iris.sample(200, random_state=k, y=k)
    jitter = rng.uniform(-0.05, 0.05, size=drawn.shape)  # most values occur often
    ax.plot(*(drawn + jitter).T, ".", ms=4, color=f"C{k}", alpha=0.4)
    ax.plot(*X[y == k].to_numpy().T, "o", ms=4, mec="k", color=f"C{k}", label=name)
ax.set(
    xlabel=X.columns[0],
    ylabel=X.columns[1],
    title="flowers (circles), and drawn ones (dots)",
)
_ = ax.legend()

# %%
# Read as a classifier, on rows that were not seen:

figure, ax = plt.subplots(figsize=(4.5, 4), layout="constrained")
folds = StratifiedKFold(5, shuffle=True, random_state=0)
predicted = cross_val_predict(iris, X, y, cv=folds)
ConfusionMatrixDisplay.from_predictions(
    y, predicted, display_labels=species, cmap="Blues", colorbar=False, ax=ax
)
ax.set_title(f"accuracy {np.mean(predicted == y):.3f} in five folds")
print(f"accuracy in five folds {np.mean(predicted == y):.3f}")
plt.show()
