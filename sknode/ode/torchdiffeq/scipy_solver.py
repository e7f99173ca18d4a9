"""scipy's `solve_ivp` behind the same arguments, without gradients."""

from __future__ import annotations

import math

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sknode.ode.control import real_dtype
from sknode.ode.torchdiffeq.problem import OdeintError, Problem

__all__ = ["integrate"]

REAL_ONLY = ("Radau", "LSODA")


def integrate(problem: Problem) -> Tensor:
    """Return the states at the output times, of shape (n_times, n).

    Options are ``solver``, the name of a method of `scipy.integrate.solve_ivp`
    ("LSODA"), ``max_step`` and, for LSODA, ``min_step``.
    """
    y0, t, options = problem.y0.detach(), problem.t.detach(), problem.options
    if len(t) == 1:
        return y0[None].clone()
    solver = options.get("solver", "LSODA")
    if y0.is_complex() and solver in REAL_ONLY:
        raise ValueError(f"solver {solver!r} does not take complex states.")
    field, dtype = problem.field, real_dtype(y0.dtype)

    def slope(time, y):
        time = torch.tensor(time, dtype=dtype, device=y0.device)
        state = torch.from_numpy(y).to(y0)
        with torch.no_grad():
            return field(time, state[None])[0].cpu().numpy()

    settings = {"max_step": float(options.get("max_step", math.inf))}
    if solver == "LSODA":
        settings["min_step"] = float(options.get("min_step", 0.0))
    times = t.cpu().double().numpy()
    rtol, atol = (x.cpu().double().numpy() for x in (problem.rtol, problem.atol))
    solution = solve_ivp(
        slope,
        (times[0], times[-1]),
        y0.cpu().numpy(),
        method=solver,
        t_eval=times,
        rtol=rtol,
        atol=atol,
        **settings,
    )
    if not solution.success:
        raise OdeintError(f"{solver} of scipy failed: {solution.message}")
    return torch.from_numpy(solution.y.T.copy()).to(y0)
