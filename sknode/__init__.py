"""Neural ordinary differential equations as scikit-learn estimators.

`sknode.ode` has the solver and `sknode.fields` the vector fields; both are plain torch
and can be used alone.
"""

from sknode._version import __version__
from sknode.odenet import ODENetClassifier

__all__ = ["ODENetClassifier", "__version__"]
