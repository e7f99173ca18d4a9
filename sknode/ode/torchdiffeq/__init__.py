"""The interface of torchdiffeq 0.2.5, over the solver of this package.

Code written for torchdiffeq runs with ``from sknode.ode import odeint``; ``docs`` has a
page on what differs.
"""

from sknode.ode.torchdiffeq.adjoint import odeint_adjoint
from sknode.ode.torchdiffeq.api import odeint, odeint_event
from sknode.ode.torchdiffeq.dense import odeint_dense
from sknode.ode.torchdiffeq.problem import OdeintError

__all__ = ["OdeintError", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
