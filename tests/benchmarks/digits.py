"""ODENetClassifier beside MLPClassifier and SVC on the digits, 5-fold cross-validation.

Default parameters, standardised features, the same folds for all, one process.

    python tests/benchmarks/digits.py [--repeats 1]
"""

import argparse
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sknode import ODENetClassifier


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, y = load_digits(return_X_y=True)
    print(f"{'classifier':20s}{'accuracy':>10s}{'fit, median s':>15s}{'of MLP':>8s}")
    base = None
    for make in (MLPClassifier, ODENetClassifier, SVC):
        scores, times = [], []
        for seed in range(args.repeats):
            result = cross_validate(
                make_pipeline(StandardScaler(), make(random_state=seed)),
                X,
                y,
                cv=StratifiedKFold(5, shuffle=True, random_state=seed),
            )
            scores.extend(result["test_score"])
            times.extend(result["fit_time"])
        median = np.median(times)
        base = base or median
        print(
            f"{make.__name__:20s}{np.mean(scores):10.4f}{median:15.2f}"
            f"{median / base:8.2f}"
        )


if __name__ == "__main__":
    main()
