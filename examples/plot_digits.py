"""
Classify handwritten digits
===========================

`ODENetClassifier` is a classifier like any other of scikit-learn: it goes into a
pipeline, and scikit-learn's own displays take the pipeline. Here they show which digits
are confused, whether the probabilities can be trusted, and how much more data would
help.
"""

# %%
# The data are 1797 images of 8 x 8 pixels that come with scikit-learn. A quarter is put
# aside.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.calibration import CalibrationDisplay
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, log_loss
from sklearn.model_selection import (
    LearningCurveDisplay,
    StratifiedKFold,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import ODENetClassifier

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    X, y, test_size=0.25, stratify=y, random_state=0
)
model = make_pipeline(StandardScaler(), ODENetClassifier(random_state=0))
model.fit(X_train, y_train)
net = model[-1]
n_wrong = np.count_nonzero(model.predict(X_test) != y_test)
print(f"{net.n_iter_} epochs, {n_wrong} of {len(y_test)} test images are read wrong")
print(f"accuracy {model.score(X_test, y_test):.3f}")

# %%
# Which digits are confused
# -------------------------
#
# Rows are the true digits, columns what was read.

figure, ax = plt.subplots(figsize=(5.5, 5), layout="constrained")
ConfusionMatrixDisplay.from_estimator(
    model, X_test, y_test, cmap="Blues", colorbar=False, ax=ax
)
_ = ax.set_title(f"{n_wrong} errors in {len(y_test)} test images")

# %%
# These are the images that were read wrong, with the probability of the answer.

proba = model.predict_proba(X_test)
wrong = np.flatnonzero(proba.argmax(1) != y_test)[:10]
figure, axes = plt.subplots(2, 5, figsize=(7, 3.4), layout="constrained")
for ax in axes.flat:
    ax.axis("off")
for ax, i in zip(axes.flat, wrong, strict=False):
    ax.imshow(X_test[i].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"{y_test[i]} read as {proba[i].argmax()}\np = {proba[i].max():.2f}")

# %%
# Can the probabilities be trusted?
# ---------------------------------
#
# By default training smooths the labels by 5 %, which keeps probabilities away from 1.
# For each test image we ask how probable the answer was said to be, and whether it was
# right. Above the diagonal a model is right more often than it says, below it less
# often.

plain = make_pipeline(
    StandardScaler(), ODENetClassifier(label_smoothing=0, random_state=0)
)
plain.fit(X_train, y_train)
figure, ax = plt.subplots(figsize=(5, 4.5), layout="constrained")
for name, fitted in ("smoothing of 5 %", model), ("no smoothing", plain):
    answers = fitted.predict_proba(X_test)
    right = answers.argmax(1) == y_test
    print(
        f"{name:17} log-loss {log_loss(y_test, answers):.3f}, mean probability of the "
        f"answer {answers.max(1).mean():.3f}, right {right.mean():.3f}"
    )
    CalibrationDisplay.from_predictions(
        right, answers.max(1), n_bins=5, strategy="quantile", name=name, ax=ax
    )
ax.set(
    xlabel="mean probability of the answer",
    ylabel="share of right answers",
    xlim=(0.75, 1.01),
    ylim=(0.75, 1.01),
)
_ = ax.legend(loc="lower right")

# %%
# With smoothing the model is too modest, without it too sure of itself; the log-loss,
# which punishes sure answers that are wrong, is smaller with smoothing.

# %%
# How much would more data help?
# ------------------------------

figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
LearningCurveDisplay.from_estimator(
    model,
    X,
    y,
    train_sizes=[0.1, 0.2, 0.4, 0.7, 1.0],
    cv=StratifiedKFold(3, shuffle=True, random_state=0),
    score_name="accuracy",
    ax=ax,
)
ax.set(xlabel="images to train on", ylabel="accuracy", title="3 folds")
plt.show()
