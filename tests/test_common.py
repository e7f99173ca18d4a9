"""scikit-learn's own checks, without expected failures."""

import re

import numpy as np
import pytest
from numpydoc.docscrape import ClassDoc
from sklearn.base import clone
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_inplace_ensure_writeable,
    check_param_validation,
    parametrize_with_checks,
)

from sknode import (
    CNFDensity,
    LatentODEImputer,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
)

# short trainings: the checks ask for a little accuracy on easy data
ESTIMATORS = [
    CNFDensity(max_iter=10),
    LatentODEImputer(max_iter=2),
    LatentODERegressor(max_iter=2),
    ODENetClassifier(max_iter=40),
    ODENetRegressor(max_iter=40),
]

# The checks train for fewer epochs than it takes, on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning"),
    # they have iris, with few different values, and redundant columns
    pytest.mark.filterwarnings("ignore:X has columns:UserWarning"),
    # they have rows in no order of time, and few of them
    pytest.mark.filterwarnings("ignore:.* is better than LatentODE:UserWarning"),
    pytest.mark.filterwarnings("ignore:Only .* observed:UserWarning"),
]


@pytest.fixture(autouse=True)
def array_api(monkeypatch):
    # without it scikit-learn skips its check of array API input
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    "check",
    [
        check_param_validation,
        check_dataframe_column_names_consistency,
        check_inplace_ensure_writeable,
    ],
    ids=lambda check: check.__name__,
)
def test_further_check_of_scikit_learn(estimator, check):
    check(type(estimator).__name__, clone(estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_every_parameter_and_fitted_attribute_is_documented(estimator):
    X = np.random.default_rng(0).normal(size=(40, 3))
    fitted = clone(estimator).fit(X, (X[:, 0] > 0).astype(int))
    documented = ClassDoc(type(estimator))
    attributes = {p.name for p in documented["Attributes"]}
    public = {k for k in vars(fitted) if re.fullmatch(r"[a-z]\w*_", k)}
    # column names are only there if X had some, classes if there are any
    absent = {"feature_names_in_"}
    if not hasattr(fitted, "classes_"):
        absent |= attributes & {"classes_", "class_prior_"}
    assert attributes - public == absent
    assert public <= attributes
    parameters = {n for p in documented["Parameters"] for n in p.name.split(", ")}
    assert parameters == set(estimator.get_params())
