"""A neural ODE on real data: classify handwritten digits.

Fits `ODENetClassifier` in a scikit-learn pipeline on the digits that come with
scikit-learn (1797 images of 8 x 8 pixels), cross-validates it beside `MLPClassifier`,
searches a small grid over solver tolerance and hidden size, and solves one model at
several tolerances. Takes less than a minute on two cores.

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
    started = time.perf_counter()
    X, y = load_digits(return_X_y=True)
    print(f"Handwritten digits: {len(X)} images of 8 x 8 pixels, digits 0 to 9.\n")
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=0.2, stratify=y, random_state=0
    )

    model = fit(X_train, y_train)
    accuracy = model.score(X_test, y_test)
    wrong = np.count_nonzero(model.predict(X_test) != y_test)
    print(
        f"   test accuracy {accuracy:.1%}: {wrong} of {len(y_test)} images that it "
        "never saw are read wrong\n"
    )
    ours, theirs = cross_validation(X, y)
    best = grid_search(X_train, y_train)
    tolerances(model, X_test, y_test)

    print("In short")
    tuned = best.score(X_test, y_test)
    print(f"   test accuracy                           {accuracy:.1%}")
    print(f"   accuracy in 5-fold cross-validation     {ours:.1%}")
    print(f"   scikit-learn's MLPClassifier, the same  {theirs:.1%}")
    print(f"   grid search, best on the test set       {tuned:.1%}")
    print(f"   everything took {time.perf_counter() - started:.0f} s")


def fit(X, y):
    """Fit a pipeline and return it."""
    print("1. Fit on four fifths of the images")
    print(
        "   An epoch is one pass over them. The loss, the penalty for wrong or unsure\n"
        "   answers, should fall. Evaluations is how often the ODE solver asked the\n"
        "   network for a slope, on average for an image."
    )
    net = ODENetClassifier(verbose=True, random_state=0)
    return make_pipeline(StandardScaler(), net).fit(X, y)


def cross_validation(X, y):
    """Return the mean accuracies of both classifiers, 5 folds."""
    print("2. Cross-validation: train on four fifths and test on the rest, five times")
    accuracies = []
    for classifier in (ODENetClassifier(random_state=0), MLPClassifier(random_state=0)):
        result = cross_validate(
            make_pipeline(StandardScaler(), classifier),
            X,
            y,
            cv=StratifiedKFold(5, shuffle=True, random_state=0),
        )
        score = result["test_score"]
        print(
            f"   {type(classifier).__name__:16s} right {score.mean():.1%} (folds from "
            f"{score.min():.1%} to {score.max():.1%}), "
            f"{np.median(result['fit_time']):.1f} s a fit",
            flush=True,
        )
        accuracies.append(score.mean())
    print()
    return accuracies


def grid_search(X, y):
    """Search over solver tolerance and hidden size; return the fitted search."""
    print("3. Grid search: the tolerance of the solver, the size of the network")
    # errors up to atol + rtol |state| are tolerated: both have to be small
    grid = [
        {
            "odenetclassifier__rtol": [tolerance],
            "odenetclassifier__atol": [tolerance],
            "odenetclassifier__hidden_layer_sizes": [(16,), (64,)],
        }
        for tolerance in (1e-1, 1e-3)
    ]
    model = make_pipeline(StandardScaler(), ODENetClassifier(random_state=0))
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    search = GridSearchCV(model, grid, cv=folds).fit(X, y)
    results = search.cv_results_
    for setting, score, seconds in zip(
        results["params"],
        results["mean_test_score"],
        results["mean_fit_time"],
        strict=True,
    ):
        rtol = setting["odenetclassifier__rtol"]
        (hidden,) = setting["odenetclassifier__hidden_layer_sizes"]
        chosen = "  <- chosen" if setting == search.best_params_ else ""
        print(
            f"   tolerance {rtol:<6g} {hidden} hidden units: right {score:.1%}, "
            f"{seconds:.1f} s a fit{chosen}"
        )
    print()
    return search


def tolerances(model, X, y):
    """Solve the ODE of a fitted model more and less accurately."""
    print("4. The model of part 1 as it is, solved more and less accurately")
    reference = model.set_params(
        odenetclassifier__rtol=1e-9, odenetclassifier__atol=1e-9
    ).predict_proba(X)
    for tolerance in (1e-1, 1e-2, 1e-4):
        model.set_params(
            odenetclassifier__rtol=tolerance, odenetclassifier__atol=tolerance
        )
        off = np.abs(model.predict_proba(X) - reference).max()
        evaluations = model[-1].count_evaluations(model[:-1].transform(X)).mean()
        print(
            f"   tolerance {tolerance:<6g} {evaluations:.0f} evaluations, "
            f"right {model.score(X, y):.1%}, probabilities off by at most {off:.0e}"
        )
    print()


if __name__ == "__main__":
    main()
