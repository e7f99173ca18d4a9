"""
Laboratory values of patients
=============================

Patients come at irregular times, some for years and some for months, and not every
value is measured at every visit. The panel here is made up, after the well-known data
of primary biliary cholangitis: bilirubin rises and albumin falls as the liver fails,
faster at a later stage.
"""

# %%
# A row a visit. Age and stage are known once and for all; of the laboratory values 5 to
# 30 % are missing.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.model_selection import GroupKFold, cross_val_score

from sknode import LatentODEImputer, LatentODERegressor
from sknode.model_selection import PanelBlockKFold, PanelTimeSeriesSplit
from sknode.plotting import SeriesDisplay

LABS = ["log bilirubin", "albumin, g/dl", "prothrombin, s"]
KNOWN = ["patient", "year", "age", "stage"]


def make_patients(n_patients, rng):
    """Return the visits of some patients."""
    parts = []
    for patient in range(n_patients):
        stage, age = rng.integers(1, 5), rng.normal(50, 10)
        n_visits = rng.integers(3, 12)
        due = np.concatenate([[0, 0.5], np.arange(1, 11)])[:n_visits]
        year = due + np.append(0, rng.normal(0, 0.08, n_visits - 1))
        pace = (0.02 + 0.03 * stage) * rng.lognormal(0, 0.5)
        severity = rng.normal(0.2 * stage, 0.5) + pace * (year + 0.1 * year**2)
        labs = {
            "log bilirubin": severity,
            "albumin, g/dl": 3.8 - 0.3 * severity - 0.004 * (age - 50),
            "prothrombin, s": 10.2 + 0.5 * np.exp(0.5 * severity),
        }
        part = pd.DataFrame(
            {"patient": patient, "year": year, "age": age, "stage": stage} | labs
        )
        part[LABS] += rng.normal(0, [0.15, 0.12, 0.25], (n_visits, 3))
        parts.append(part)
    visits = pd.concat(parts, ignore_index=True)
    return visits, rng.uniform(size=(len(visits), 3)) < [0.05, 0.15, 0.3]


rng = np.random.default_rng(0)
visits, missing = make_patients(150, rng)
visits[LABS] = visits[LABS].mask(missing)
print(f"{visits['patient'].nunique()} patients, {len(visits)} visits")
print(visits.head(4).round(2).to_string(index=False))

# %%
# Fill in missing values
# ----------------------
#
# To know how well that works, a tenth of the values that were measured is hidden, too.
# ``IterativeImputer`` fills in values from the others of the same visit, and knows
# nothing of the other visits of a patient. The last value of the same patient is what
# is done often. Errors are in standard deviations of a value.

values = visits[LABS]
hidden = values.notna() & (rng.uniform(size=values.shape) < 0.1)
seen = visits.assign(**values.mask(hidden))

settings = {"series": "patient", "time": "year", "tol": 0.05, "n_iter_no_change": 5}
imputer = LatentODEImputer(**settings, covariates=["age", "stage"], random_state=0)
filled = {
    "LatentODEImputer": imputer.fit_transform(seen)[LABS],
    "IterativeImputer": pd.DataFrame(
        IterativeImputer(random_state=0).fit_transform(seen[[*KNOWN[1:], *LABS]])[
            :, 3:
        ],
        columns=LABS,
    ),
    "last value": seen.groupby("patient")[LABS].ffill().fillna(seen[LABS].mean()),
}
errors = pd.DataFrame(
    {
        name: ((table - values).abs() / values.std()).where(hidden).mean()
        for name, table in filled.items()
    }
)
print(errors.round(2).to_string())
figure, ax = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
errors.T.plot.barh(ax=ax)
ax.invert_yaxis()
ax.set(xlabel="mean absolute error of hidden values, standard deviations")
ax.get_legend().remove()
_ = figure.legend(loc="outside upper center", ncols=3)

# %%
# Go on with a new patient
# ------------------------
#
# `LatentODERegressor` is the same model for rows that are observations. It learns from
# 120 patients, is told the first two and a half years of a new one, and predicts what
# comes. There may be a small step at the last observation: forecasts may go by the most
# recent values alone, if that was found to be better.

X, y = visits[KNOWN], visits[LABS]
model = LatentODERegressor(**settings, random_state=0)
old = X["patient"] < 120
model.fit(X[old], y[old])
new = visits[~old].groupby("patient").filter(lambda rows: len(rows) >= 9)
patient = new["patient"].iloc[0]
rows = X["patient"] == patient
early = rows & (X["year"] < 2.5)
informed = model.condition(X[early], y[early])
display = SeriesDisplay.from_estimator(
    informed, X[rows], y[rows], held_out=X["year"][rows] >= 2.5, coverage=0.9
)
display.axes_[0].set_title(
    f"patient {patient}, stage {X['stage'][rows].iloc[0]}: the first 2.5 years known"
)
for line in display.observed_ + display.held_out_:
    line.set_markersize(8)
display.axes_[0].legend(loc="upper left", ncols=2)
_ = display.ax_.set_xlabel("years since the first visit")

# %%
# Cross-validation
# ----------------
#
# What is held out decides what a score means: gaps in a patient's time, the last two
# years of every patient, or whole patients. Of patients that were not seen in training
# something has to be known at prediction: what was measured in the first two and a half
# years. It is in columns of X that ``context`` names, and only later visits are scored.


def score_later(model, X, y):
    """Return R2 of the visits whose values are not in the context."""
    return model.score(X, y.where(X["year"] >= 2.5))


context = [f"first {lab}" for lab in LABS]
early = y.where(X["year"] < 2.5).set_axis(context, axis=1)
where = {"series": "patient", "time": "year"}
scores = {
    "gaps of two years": cross_val_score(
        model, X, y, cv=PanelBlockKFold(2, block_length=2.0, **where)
    ),
    "last two years": cross_val_score(
        model,
        X,
        y,
        cv=PanelTimeSeriesSplit(1, test_size=2.0, per_series=True, **where),
    ),
    "new patients": cross_val_score(
        LatentODERegressor(**settings, context=context, random_state=0),
        X.join(early),
        y,
        cv=GroupKFold(2),
        groups=X["patient"],
        scoring=score_later,
    ),
}
for name, values in scores.items():
    print(f"{name:17} R2 {np.mean(values):.2f}, by fold {np.round(values, 2)}")
plt.show()
