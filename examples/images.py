"""A convolutional ODE-Net in a scikit-learn pipeline, on images.

The digits that come with scikit-learn, 8 x 8 pixels, as rows of 64 values: scale them,
classify them by a small convolutional ODE-Net, search over its size, and look at what
the solver spends on single images. Takes about two minutes on two cores.

    python examples/images.py
"""

import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import classification_report
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from sknode import ODENetClassifier


def main():
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=0.25, stratify=y, random_state=0
    )
    # X stays a table, so that every tool of scikit-learn can handle it
    net = ODENetClassifier(image_shape=(1, 8, 8), max_iter=40, random_state=0)
    model = make_pipeline(MinMaxScaler(), net)

    print("Search over the number of channels, two folds")
    grid = [
        {
            "odenetclassifier__n_channels": [n],
            "odenetclassifier__hidden_layer_sizes": [(n,)],
        }
        for n in (8, 16)
    ]
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    search = GridSearchCV(model, grid, cv=folds).fit(X_train, y_train)
    results = search.cv_results_
    for setting, score, seconds in zip(
        results["params"],
        results["mean_test_score"],
        results["mean_fit_time"],
        strict=True,
    ):
        n = setting["odenetclassifier__n_channels"]
        print(f"   {n:3d} channels: right {score:.1%}, {seconds:.1f} s a fit")

    best = search.best_estimator_
    net, images = best[-1], best[:-1].transform(X_test)
    n_parameters = sum(p.numel() for p in net.module_.parameters())
    print(f"\nThe better one, {n_parameters:,} parameters, on images it never saw")
    print(classification_report(y_test, best.predict(X_test), digits=3))

    print("Evaluations that the solver needs for an image, at several tolerances")
    for tolerance in (1e-1, 1e-3, 1e-5):
        net.set_params(rtol=tolerance, atol=tolerance)
        counts = net.count_evaluations(images)
        right = np.mean(net.predict(images) == y_test)
        print(
            f"   tolerance {tolerance:.0e}: {counts.min()} to {counts.max()}, "
            f"{counts.mean():.1f} on average; right {right:.1%}"
        )


if __name__ == "__main__":
    main()
