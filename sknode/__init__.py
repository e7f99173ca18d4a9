"""Neural ordinary differential equations as scikit-learn estimators.

`sknode.ode` has the solver and `sknode.fields` the vector fields; both are plain torch
and can be used alone.
"""

from importlib import import_module

from sknode._version import __version__

__all__ = [
    "CNFDensity",
    "LatentODEImputer",
    "LatentODERegressor",
    "ODENetClassifier",
    "ODENetRegressor",
    "__version__",
    "datasets",
    "fields",
    "model_selection",
    "ode",
    "plotting",
    "show_versions",
]

# Loaded when first asked for: a torch user who wants the solver does not wait for
# scikit-learn, and importing the package costs next to nothing.
_HOME = {
    "CNFDensity": "sknode.density",
    "LatentODEImputer": "sknode.timeseries",
    "LatentODERegressor": "sknode.timeseries",
    "ODENetClassifier": "sknode.odenet",
    "ODENetRegressor": "sknode.odenet",
    "show_versions": "sknode._show_versions",
}


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ("ode", "fields", "datasets", "model_selection", "plotting"):
        return import_module(f"sknode.{name}")
    raise AttributeError(f"module 'sknode' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
