"""ODENetClassifier beside MLPClassifier and SVC on the digits, 5-fold cross-validation.

Default parameters, standardised features, the same folds for all, one process; and the
ODE-Net cut short, for its time at about the accuracy of the perceptron. The classifiers
take turns, so that a busy machine slows all of them down. Shuffled folds
are drawn once per repeat; the plain ones, cv=5, hold other writers than the training
data, which is harder.

    python tests/benchmarks/digits.py [--repeats 1]
"""

import argparse
import warnings
from collections import defaultdict
from functools import partial

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sknode import ODENetClassifier

CLASSIFIERS = {
    "MLPClassifier": MLPClassifier,
    "ODENetClassifier": ODENetClassifier,
    "  12 epochs": partial(ODENetClassifier, max_iter=12),
    "  12 epochs, bosh3": partial(ODENetClassifier, max_iter=12, solver="bosh3"),
    "SVC": SVC,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, y = load_digits(return_X_y=True)
    for folds in ("shuffled", "plain"):
        accuracies, times = defaultdict(list), defaultdict(list)
        for seed in range(repeats):
            cv = 5
            if folds == "shuffled":
                cv = StratifiedKFold(5, shuffle=True, random_state=seed)
            for name, make in CLASSIFIERS.items():
                model = make_pipeline(StandardScaler(), make(random_state=seed))
                result = cross_validate(model, X, y, cv=cv)
                accuracies[name].append(result["test_score"].mean())
                times[name].extend(result["fit_time"])
        print(f"{folds} folds, {repeats} x 5")
        print(f"{'':18s}{'accuracy':>9s}{'+-':>7s}{'fit, median s':>15s}{'of MLP':>8s}")
        for name in CLASSIFIERS:
            # the spread is that of the mean over the folds of one repeat
            seconds = np.median(times[name])
            print(
                f"{name:18s}{np.mean(accuracies[name]):9.4f}"
                f"{np.std(accuracies[name]):7.4f}{seconds:15.2f}"
                f"{seconds / np.median(times['MLPClassifier']):8.2f}"
            )


if __name__ == "__main__":
    main()
