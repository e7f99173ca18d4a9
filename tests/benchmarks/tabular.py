"""ODE-Nets beside their peers of scikit-learn on tables, 5-fold cross-validation.

Default parameters behind a `StandardScaler`, the same shuffled folds for all, one
process and one thread. The models take turns at every fold, so that a busy machine
slows all of them down. A score is that of the predictions of all folds together,
accuracy or R2, averaged over repeats; a rank is among the models on one set. Repeats
split by the seeds ``--seed``, ``--seed`` + 1 and so on, which are the models' too. The
defaults were chosen with seeds 10 to 12.

Those of the sets that are not part of scikit-learn are read from ``--data``, a folder
with files of standardised rows (``train``) and their columns' names (``columns``),
of which the first ``--rows`` are used. Without it they are left out.

    python tests/benchmarks/tabular.py [--repeats 1] [--seed 0] [--sets digits wine]
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and torch are loaded

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_linnerud,
    load_wine,
    make_friedman1,
    make_friedman2,
)
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.utils import get_tags

from sknode import ODENetClassifier, ODENetRegressor

CLASSIFIERS = {
    "MLP": MLPClassifier,
    "ODENet": ODENetClassifier,
    "SVM": lambda random_state: SVC(),
    "HistGB": HistGradientBoostingClassifier,
}
REGRESSORS = {
    "MLP": MLPRegressor,
    "ODENet": ODENetRegressor,
    "SVM": lambda random_state: SVR(),
    "HistGB": HistGradientBoostingRegressor,
}


def bundled(load):
    return lambda options: load(return_X_y=True)


def made(make, **settings):
    return lambda options: make(1000, random_state=0, **settings)


def from_file(name, target):
    """Return a loader; the target is a column, or labels beside the rows."""

    def load(options):
        path = options.data / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path) as file:
            rows = file["train"][: options.rows].astype(float)
            columns = [str(c) for c in file["columns"]]
            if target not in columns:
                return rows, file[target][: options.rows]
        at = columns.index(target)
        return np.delete(rows, at, axis=1), rows[:, at]

    return load


CLASSIFICATION = {
    "iris": bundled(load_iris),
    "wine": bundled(load_wine),
    "breast_cancer": bundled(load_breast_cancer),
    "digits": bundled(load_digits),
    "magic": from_file("magic", "y_train"),
}
REGRESSION = {
    "linnerud": bundled(load_linnerud),
    "diabetes": bundled(load_diabetes),
    "friedman1": made(make_friedman1, noise=1.0),
    "friedman2": made(make_friedman2, noise=125.0),
    "protein": from_file("protein", "log1p_RMSD"),
    "galaxy": from_file("galaxy", "redshift"),
    "power_mini": from_file("power_mini", "Global_active_power"),
}


def evaluate(models, X, y, classify, seeds):
    """Return scores (n_models, n_repeats) and seconds of fits (n_models, n_fits, 2)."""
    folds, score = (StratifiedKFold, accuracy_score) if classify else (KFold, r2_score)
    seconds = [[] for _ in models]
    scores = np.empty((len(models), len(seeds)))
    for repeat, seed in enumerate(seeds):
        predicted = [np.empty_like(y) for _ in models]
        for train, test in folds(5, shuffle=True, random_state=seed).split(X, y):
            for i, make in enumerate(models):
                model = make(random_state=seed)
                if y.ndim == 2 and not get_tags(model).target_tags.multi_output:
                    model = MultiOutputRegressor(model)
                model = make_pipeline(StandardScaler(), model)
                start = np.array([time.perf_counter(), time.process_time()])
                model.fit(X[train], y[train])
                end = np.array([time.perf_counter(), time.process_time()])
                seconds[i].append(end - start)
                predicted[i][test] = model.predict(X[test])
        scores[:, repeat] = [score(y, p) for p in predicted]
    return scores, np.array(seconds)


def report(title, models, results):
    """Print the table of one kind."""
    ranks = {
        name: rankdata(-scores.mean(1).round(6))
        for name, (scores, _) in results.items()
    }
    print(f"\n{title}: score (rank), and median seconds of a fit")
    heads = "".join(f"{name:>14s}" for name in models)
    print(f"{'':15s}{heads}  |{heads}  | ODENet/MLP wall   CPU")
    for name, (scores, seconds) in results.items():
        line = "".join(
            f"{s:9.4f} ({r:2.3g})".rjust(14)
            for s, r in zip(scores.mean(1), ranks[name], strict=True)
        )
        medians = np.median(seconds, axis=1)
        times = "".join(f"{wall:14.3f}" for wall, _ in medians)
        ratio, ratio_cpu = (medians[1] / medians[0]).tolist()
        print(f"{name:15s}{line}  |{times}  |{ratio:16.2f}{ratio_cpu:6.2f}", flush=True)
    mean = np.mean(list(ranks.values()), axis=0)
    print(f"{'mean rank':15s}" + "".join(f"{rank:14.2f}" for rank in mean))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="that of the first repeat")
    parser.add_argument("--sets", nargs="+", choices=[*CLASSIFICATION, *REGRESSION])
    parser.add_argument("--rows", type=int, default=3000, help="rows of a large set")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    seeds = range(options.seed, options.seed + options.repeats)
    for title, models, sets, classify in (
        ("Classification, accuracy", CLASSIFIERS, CLASSIFICATION, True),
        ("Regression, R2", REGRESSORS, REGRESSION, False),
    ):
        results = {}
        for name, load in sets.items():
            if options.sets and name not in options.sets:
                continue
            data = load(options)
            if data is None:
                print(f"{name} is left out: there is no {name}.npz in {options.data}")
                continue
            results[name] = evaluate(models.values(), *data, classify, seeds)
        if results:
            report(title, models, results)


if __name__ == "__main__":
    main()
