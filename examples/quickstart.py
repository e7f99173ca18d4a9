"""A neural ODE on real data: classify handwritten digits.

Fits `ODENetClassifier` in a scikit-learn pipeline on the digits that come with
scikit-learn (1797 images of 8 x 8 pixels), cross-validates it beside `MLPClassifier`,
searches a small grid over solver tolerance and hidden size, and shows what the solver
did. Takes a minute or two on a laptop.

    python examples/quickstart.py
"""

import time
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    cross_validate,
    train_test_split,
)
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import ODENetClassifier


def main():
    # MLPClassifier reaches its default max_iter on some folds, which is its business.
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, y = load_digits(return_X_y=True)
    print(
        f"Digits: {X.shape[0]} images of {X.shape[1]} pixels, {len(set(y))} classes\n"
    )

    print("1. Fit on 80 %, test on 20 %")
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=0.2, stratify=y, random_state=0
    )
    model = make_pipeline(
        StandardScaler(), ODENetClassifier(verbose=True, random_state=0)
    )
    model.fit(X_train, y_train)
    net = model[-1]
    print(f"   test accuracy {model.score(X_test, y_test):.4f}")
    print(
        f"   evaluations of the vector field per sample: {net.nfe_curve_[0]:.1f} in "
        f"the first epoch, {net.nfe_curve_[-1]:.1f} in the last\n"
    )

    print("2. Cross-validation, 5 folds, beside scikit-learn's multilayer perceptron")
    contestants = {
        "ODENetClassifier": ODENetClassifier(random_state=0),
        "MLPClassifier": MLPClassifier(random_state=0),
    }
    for name, classifier in contestants.items():
        result = cross_validate(
            make_pipeline(StandardScaler(), classifier),
            X,
            y,
            cv=StratifiedKFold(5, shuffle=True, random_state=0),
        )
        print(
            f"   {name:18s} accuracy {result['test_score'].mean():.4f} +- "
            f"{result['test_score'].std():.4f}, "
            f"fit {np.median(result['fit_time']):.1f} s",
            flush=True,
        )

    print("\n3. Grid search over solver tolerance and hidden size (2 folds)")
    start = time.perf_counter()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), ODENetClassifier(max_iter=7, random_state=0)),
        {
            "odenetclassifier__rtol": [1e-1, 1e-2],
            "odenetclassifier__hidden_layer_sizes": [(16,), (64,)],
        },
        cv=StratifiedKFold(2, shuffle=True, random_state=0),
    )
    search.fit(X_train, y_train)
    for parameters, score in zip(
        search.cv_results_["params"],
        search.cv_results_["mean_test_score"],
        strict=True,
    ):
        rtol, hidden = parameters.values()
        if isinstance(rtol, tuple):
            rtol, hidden = hidden, rtol
        print(f"   rtol {rtol:<6g} hidden {hidden!s:6s} accuracy {score:.4f}")
    print(
        f"   best on the test set: {search.score(X_test, y_test):.4f} "
        f"({time.perf_counter() - start:.0f} s)\n"
    )

    print("4. The same weights at other tolerances")
    for rtol in (1e-1, 1e-3, 1e-6):
        net.set_params(rtol=rtol, atol=rtol)
        print(f"   rtol {rtol:<6g} test accuracy {model.score(X_test, y_test):.4f}")


if __name__ == "__main__":
    main()
