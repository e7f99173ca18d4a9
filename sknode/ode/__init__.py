"""Ordinary differential equation solvers for torch, usable without scikit-learn.

Examples
--------
>>> import torch
>>> from sknode.ode import solve_ode
>>> solution = solve_ode(lambda t, y: -y, torch.ones(3, 1), torch.tensor([0.0, 1.0]))
>>> solution.y[:, -1].shape
torch.Size([3, 1])
"""

from sknode.ode.control import StepController
from sknode.ode.events import Event
from sknode.ode.methods import METHODS
from sknode.ode.solution import (
    Occurrences,
    Solution,
    SolverError,
    SolverWarning,
    Status,
)
from sknode.ode.solve import solve_ode
from sknode.ode.tableaus import Tableau
from sknode.ode.torchdiffeq import (
    OdeintError,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
)

__all__ = [
    "METHODS",
    "Event",
    "Occurrences",
    "OdeintError",
    "Solution",
    "SolverError",
    "SolverWarning",
    "Status",
    "StepController",
    "Tableau",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve_ode",
]
