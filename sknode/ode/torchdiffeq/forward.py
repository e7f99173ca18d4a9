"""From a checked problem to the states at its output times."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import StepController, just_inside
from sknode.ode.gradients import TAPE_NUMBERS
from sknode.ode.grid import Stops
from sknode.ode.options import Watch
from sknode.ode.solution import Solution, Status
from sknode.ode.solve import solve
from sknode.ode.torchdiffeq import scipy_solver
from sknode.ode.torchdiffeq.adams import AdamsSteps
from sknode.ode.torchdiffeq.fixed_grid import UNLIMITED, on_grid, walk
from sknode.ode.torchdiffeq.march import RungeKuttaSteps, march, step_grid
from sknode.ode.torchdiffeq.problem import Monitor, OdeintError, Problem

__all__ = ["integrate", "numerics", "run", "stop_times"]

STEPS = 2**31 - 1


def integrate(problem: Problem, gradient: str = "discrete") -> Tensor:
    """Return the states at the output times, of shape (n_times, n)."""
    if problem.family == "scipy":
        return scipy_solver.integrate(problem)
    if problem.family == "adaptive":
        settings = numerics(problem) | {"stops": stop_times(problem)}
        return run(problem, problem.t, gradient, **settings)
    grid = step_grid(problem)
    if problem.family == "adams":
        return march(problem, grid, AdamsSteps(problem).step)
    constructed = "grid_constructor" in problem.options
    if _marches(problem, grid, gradient, constructed):
        steps = RungeKuttaSteps(problem, problem.core_method.tableau)
        return march(problem, grid, steps.step)
    settings = numerics(problem)
    settings["stops"] = stop_times(problem, grid if constructed else None)
    return run(problem, problem.t, gradient, **settings)


def _marches(problem: Problem, grid: Tensor, gradient: str, constructed: bool) -> bool:
    """Whether to leave the steps on a grid to autograd altogether.

    Nothing is rejected there, so this is the same gradient; it is quicker where it
    takes little memory. And only so can the user's grid be any function of ``t``.
    """
    if problem.callbacks:
        return False
    grad = torch.is_grad_enabled()
    if grad and constructed and problem.t.requires_grad:
        return True
    if problem.options.get("interp", "linear") == "cubic" and grid is not problem.t:
        return False  # would evaluate the field twice at every output
    numbers = len(grid) * problem.core_method.tableau.n_stages * problem.y0.numel()
    return numbers <= TAPE_NUMBERS or (grad and gradient == "backprop")


def run(problem: Problem, t: Tensor, gradient: str, **settings) -> Tensor:
    """Solve at some times; raise if the solve does not get there."""
    return reach(problem, t, gradient, **settings)[0]


def reach(problem: Problem, t: Tensor, gradient: str, **settings):
    """Solve at some times; return states and the last time reached."""
    monitor = Monitor(problem)
    if monitor.needed and "monitor" not in settings:
        settings["monitor"] = monitor
    settings |= {"step_control": "shared", "gradient": gradient, "max_steps": STEPS}
    layout = problem.layout
    shape = layout.shapes[0]
    closed = hasattr(problem.func, "closed_form")
    if closed and not layout.is_tuple and len(shape) > 1:
        # a field that needs no autograd
        solution = solve(problem.func, layout.restore(problem.y0), t, **settings)
        y = solution.y.transpose(0, 1).flatten(1)
    else:
        solution = solve(problem.field, problem.y0[None], t, **settings)
        y = solution.y[0]
    check_success(solution)
    return y, solution


def check_success(solution: Solution) -> None:
    """Raise if the solve ended early for a bad reason."""
    if solution.success:
        return
    status = Status(int(solution.status[0]))
    reached = float(solution.t_reached[0])
    raise OdeintError(f"The solve stopped at t = {reached:.6g}: {status.message}")


def numerics(problem: Problem) -> dict[str, Any]:
    """Return the settings of `solve` that do not depend on the output times."""
    options = problem.options
    settings: dict[str, Any] = {"rtol": problem.rtol, "atol": problem.atol}
    if problem.family == "fixed":
        step_size = options.get("step_size")
        tableau = problem.core_method.tableau
        return settings | {
            "method": on_grid(tableau, options.get("interp", "linear")),
            "step_size": UNLIMITED if step_size is None else float(step_size),
            "open_steps": bool(options.get("perturb", False)),
            "loop": walk,
        }
    min_step = float(options.get("min_step", 0.0))
    max_step = float(options.get("max_step", math.inf))
    first_step = options.get("first_step")
    if first_step is not None:
        first_step = min(max(float(first_step), min_step), max_step)
    if "norm" in options or problem.layout.is_tuple:
        settings["norm"] = problem.norm
    return settings | {
        "method": problem.core_method,
        "controller": StepController(
            pcoeff=0.0,
            icoeff=1.0,
            safety=float(options.get("safety", 0.9)),
            factor_min=float(options.get("dfactor", 0.2)),
            factor_max=float(options.get("ifactor", 10.0)),
        ),
        "first_step": first_step,
        "min_step": min_step,
        "force_min_step": min_step > 0,
        "max_step": None if math.isinf(max_step) else max_step,
        "open_steps": len(problem.stops("jump_t")) > 0,
    }


def stop_times(problem: Problem, grid: Tensor | None = None) -> Stops | None:
    """Return where steps have to end."""
    if problem.family == "fixed":
        if grid is not None:
            return _between(problem, grid)
        if problem.options.get("step_size") is None:
            return _between(problem, problem.t, tied=True)
        return None
    jumps = problem.stops("jump_t")
    times = np.concatenate([problem.stops("step_t"), jumps])
    if len(times) == 0:
        return None
    unique = np.unique(times)
    if len(unique) < len(times):
        raise ValueError("step_t and jump_t must not repeat times.")
    if len(jumps) == 0:
        return Stops(unique)
    field, sign = problem.field, problem.sign
    is_jump = np.isin(unique, jumps)

    def on_reach(rows, first, last, t, y, k):
        """Take the slope on the far side of a jump."""
        if not is_jump[first[0] : last[0]].any():
            return y, k
        return y, field(just_after(t[0], sign, y), y)

    return Stops(unique, on_reach)


def just_after(ascending: float, sign: float, y: Tensor) -> Tensor:
    """Return the next time in the direction of the solve, as the state sees it."""
    time = just_inside(sign * ascending, sign * np.inf, y.dtype)
    return torch.as_tensor(time, device=y.device)


def _between(problem: Problem, grid: Tensor, tied: bool = False) -> Stops | None:
    """Return the inner points of a grid as stops."""
    times = problem.sign * grid.detach().cpu().to(torch.float64).numpy()
    return Stops(times[1:-1], tied=tied) if len(times) > 2 else None


def watched(problem: Problem, t: Tensor, watch: Watch) -> Solution:
    """Solve, without gradients, until a watch ends it."""
    settings = numerics(problem)
    settings["stops"] = None
    if problem.family == "adaptive":
        settings["stops"] = stop_times(problem)
    with torch.no_grad():
        return reach(problem, t, "discrete", watch=watch, **settings)[1]
