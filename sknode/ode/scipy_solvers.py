"""scipy's solvers behind `solve_ode`: every lane is a problem of its own.

They run on the CPU in double precision, one lane after the other. They are there to
compare with, and for methods that only scipy has. The steps are scipy's own; this
module hands them a vector field and collects what comes out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from sknode.ode.control import StepController, real_dtype
from sknode.ode.grid import Grid
from sknode.ode.options import Options
from sknode.ode.solution import Status
from sknode.ode.trace import Trace
from sknode.ode.vector_field import BoundField

__all__ = ["SCIPY_METHODS", "solve_by_scipy"]

# by their names in `scipy.integrate`
SCIPY_METHODS = {
    "scipy_rk45": "RK45",
    "scipy_rk23": "RK23",
    "scipy_dop853": "DOP853",
    "scipy_radau": "Radau",
    "scipy_bdf": "BDF",
    "scipy_lsoda": "LSODA",
}

# those that take a Jacobian; differences of slopes would be useless in single precision
IMPLICIT = ("scipy_radau", "scipy_bdf", "scipy_lsoda")


def solve_by_scipy(
    method: str,
    field: BoundField,
    y0: Tensor,
    grid: Grid,
    options: Options,
    *,
    k0: Tensor | None = None,
    record: bool = False,
) -> Trace:
    """Integrate all lanes over their intervals, as `integrate` does.

    Parameters
    ----------
    method : str
        A key of ``SCIPY_METHODS``.
    field : BoundField
        The vector field on (lanes, n) states.
    y0 : Tensor of shape (lanes, n)
        States at the first output time.
    grid : Grid
        Output times.
    options : Options
        Tolerances and limits. A step is an accepted one: scipy does not tell how many
        attempts it rejected.
    k0, record
        As for `integrate`, but without meaning: scipy asks for the first slope itself
        and shows no steps.

    Returns
    -------
    Trace

    Raises
    ------
    ValueError
        If an option is set that scipy does not have.
    """
    _check_options(method, grid, options)
    n_lanes, n_times = len(y0), grid.times.shape[-1]
    sign = grid.direction
    times = grid.times * (sign[:, None] if isinstance(sign, np.ndarray) else sign)
    times = np.broadcast_to(times, (n_lanes, n_times))
    results = []
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # scipy's reports; the status has them
        warnings.filterwarnings("ignore", "lsoda:", UserWarning)
        for lane in range(n_lanes):
            problem = _Problem(field, y0, times[:, :1], lane)
            results.append(_solve_lane(method, problem, times[lane], options))

    def collect(name):
        return np.array([getattr(result, name) for result in results])

    nothing = np.zeros(n_lanes, np.int64)
    return Trace(
        y=torch.from_numpy(collect("outputs")).to(y0),
        status=collect("status"),
        n_steps=collect("n_steps"),
        n_rejected=nothing,
        n_dense=nothing,
        next_output=collect("reached"),
        t_reached=collect("t"),
        moving=times[:, -1] != times[:, 0],
        records=None,
        n_evaluations=collect("n_evaluations"),
    )


def _check_options(method: str, grid: Grid, options: Options) -> None:
    """Raise where something is asked for that scipy does not have."""
    rtol = options.rtol
    newton = method in ("scipy_radau", "scipy_bdf")
    asked = {
        "a controller": options.controller != StepController(),
        "a norm": options.norm is not None,
        "events": options.watch is not None,
        "callbacks": options.monitor is not None,
        "times to stop at": grid.stops is not None,
        "steps that are too short": options.force_min_step,
        "an rtol for every component": newton and np.ndim(rtol) and len(rtol) > 1,
    }
    for what, wanted in asked.items():
        if wanted:
            raise ValueError(f"method {method!r} is scipy's and does not take {what}.")


class _Problem:
    """One lane as scipy sees it: functions of a time and a NumPy state.

    A field whose rows may be taken apart gets one row. Another one may hold a value for
    every sample: it gets the whole batch, with the other rows at their starts.
    """

    def __init__(self, field: BoundField, y0: Tensor, starts: np.ndarray, lane: int):
        self.field, self.row = field, lane
        states, starts = y0.detach(), np.array(starts)
        if field.row_wise:
            self.row, states, starts = 0, states[lane : lane + 1], starts[lane][None]
        self._states, self._starts = states, starts
        double = torch.complex128 if y0.is_complex() else torch.float64
        self.y0 = states[self.row].cpu().to(double).numpy()
        self.t0 = float(starts[self.row, 0])
        self._first = None

    def _inputs(self, t: float, y: np.ndarray) -> tuple[Tensor | None, Tensor]:
        states, times = self._states.clone(), None
        states[self.row] = torch.from_numpy(np.array(y)).to(states)
        if self.field.uses_time:
            self._starts[self.row] = t
            times = torch.from_numpy(self._starts.copy())
            times = times.to(states.device, real_dtype(states.dtype))
        return times, states

    def slope(self, t: float, y: np.ndarray) -> np.ndarray:
        """Return the slope in double precision."""
        first = self._first
        if first is not None and t == self.t0 and np.array_equal(y, self.y0):
            return first
        value = self.field.evaluate(*self._inputs(t, y))[self.row]
        value = value.cpu().numpy().astype(self.y0.dtype)
        self.finite = bool(np.isfinite(value).all())  # the latest one
        return value

    def jacobian(self, t: float, y: np.ndarray) -> np.ndarray:
        """Return the Jacobian in double precision."""
        value = self.field.jacobian(*self._inputs(t, y))[0][self.row]
        value = value.cpu().numpy().astype(self.y0.dtype)
        if not np.isfinite(value).all():
            raise _NonFiniteJacobian
        return value

    def can_start(self) -> bool:
        """Return whether state and slope are finite; scipy may hang otherwise."""
        self._first = self.slope(self.t0, self.y0)
        return self.finite and bool(np.isfinite(self.y0).all())


class _NonFiniteJacobian(ArithmeticError):
    """Raised to leave a solver of scipy's that would not survive such a matrix."""


@dataclass
class _Result:
    """What became of a lane."""

    outputs: np.ndarray  # (n_times, n)
    t: float
    reached: int  # output times that hold states, but for the last
    status: Status = Status.SUCCESS
    n_steps: int = 0
    n_evaluations: int = 0


def _solve_lane(
    method: str, problem: _Problem, times: np.ndarray, options: Options
) -> _Result:
    """Take steps to the last time, as `scipy.integrate.solve_ivp` does."""
    n_times, interval = len(times), abs(times[-1] - times[0])
    outputs = np.repeat(problem.y0[None], n_times, axis=0)
    result = _Result(outputs, times[0], min((times == times[0]).sum(), n_times - 1))
    if interval == 0:
        return result
    if not problem.can_start():
        result.status, result.n_evaluations = Status.NON_FINITE, 1
        return result
    try:
        solver = _make_solver(method, problem, times[-1], options)
        result.status = _take_steps(solver, problem, times, options, result)
        result.n_evaluations = solver.nfev
    except _NonFiniteJacobian:
        result.status = Status.NON_FINITE
    return result


def _make_solver(method: str, problem: _Problem, t_end: float, options: Options):
    """Return one of scipy's solvers at the start of a lane."""

    def tolerance(value, least):
        return np.maximum(torch.as_tensor(value).cpu().double().numpy(), least)

    settings = {
        # below this scipy warns and uses it
        "rtol": tolerance(options.rtol, 100 * np.finfo(float).eps),
        "atol": tolerance(options.atol, np.finfo(float).tiny),
        "max_step": options.max_step,
    }
    if options.first_step is not None:
        settings["first_step"] = min(options.first_step, abs(t_end - problem.t0))
    if method in IMPLICIT and not np.iscomplexobj(problem.y0):
        settings["jac"] = problem.jacobian
    # looked up here: importing scipy's solvers takes a while
    make = getattr(scipy.integrate, SCIPY_METHODS[method])
    return make(problem.slope, problem.t0, problem.y0, t_end, **settings)


def _take_steps(solver, problem, times, options: Options, result: _Result) -> Status:
    """Step to the end, filling in the result; return how it ended."""
    status, last = Status.SUCCESS, problem.y0
    ahead = solver.direction * times
    if np.isnan(getattr(solver, "h_abs", 0.0)):
        return Status.NON_FINITE
    while solver.status == "running":
        if result.n_steps == options.max_steps:
            status = Status.MAX_STEPS
            break
        solver.step()
        if solver.status == "failed":
            finite = problem.finite
            status = Status.STEP_TOO_SMALL if finite else Status.NON_FINITE
            break
        if not np.isfinite(solver.y).all():
            status = Status.NON_FINITE
            break
        short = solver.step_size < options.min_step and solver.status == "running"
        if short or solver.t == result.t:
            status = Status.STEP_TOO_SMALL
            break
        result.n_steps += 1
        result.t, last, before = solver.t, solver.y, result.reached
        after = np.searchsorted(ahead, solver.direction * solver.t, side="right")
        # the last time is served by the last state itself
        result.reached = max(min(after, len(times) - 1), before)
        if result.reached > before:
            inside = slice(before, result.reached)
            result.outputs[inside] = solver.dense_output()(times[inside]).T
    result.outputs[result.reached :] = last
    return status
