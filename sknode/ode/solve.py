"""`solve_ode`: check the problem, integrate it, hand back a `Solution`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from sknode.ode import kernels
from sknode.ode.continuous import continuous_adjoint
from sknode.ode.control import StepController, make_controller, real_dtype
from sknode.ode.events import solve_with_events
from sknode.ode.gradients import Run, discrete_adjoint, replay
from sknode.ode.grid import Stops, check_order
from sknode.ode.methods import GRADIENTS, Method, get_method
from sknode.ode.options import Options
from sknode.ode.solution import STATISTICS, Solution, SolverWarning
from sknode.ode.trace import Trace
from sknode.ode.vector_field import bind

__all__ = ["solve_ode"]

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
LEAST_RTOL = {dtype: 4 * torch.finfo(dtype).eps for dtype in DTYPES}
STEP_CONTROLS = ("per_sample", "shared")
# Kinds of settings that are known by their value.
BY_VALUE = {str, bool, int, float, type(None)}


def solve_ode(
    f: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t: Tensor,
    *,
    method: str = "dopri5",
    rtol: float = 1e-6,
    atol: float = 1e-6,
    step_control: str = "per_sample",
    gradient: str = "discrete",
    max_steps: int = 10_000,
    first_step: float | None = None,
    min_step: float = 0.0,
    max_step: float | None = None,
    step_size: float | None = None,
    controller: str | StepController = "PI",
    row_wise: bool = False,
    event=None,
) -> Solution:
    """Solve ``dy/dt = f(t, y)`` for a batch of initial states.

    Every sample has its own step size, its own error norm and its own status: its
    result does not depend on the other samples, and a sample that fails stops no other.

    Parameters
    ----------
    f : callable or torch.nn.Module
        The vector field. It gets the states ``y`` of shape (batch, \\*state) and the
        times ``t``, of shape (batch, 1, ...) to broadcast against them, or a scalar
        under shared control, and returns slopes of the shape of ``y``. It is never
        called outside the interval. A module with a closed form, such as
        `sknode.fields.MLPField`, is solved without autograd.
    y0 : Tensor of shape (batch, \\*state)
        Initial states, float32 or float64.
    t : Tensor of shape (n_times,) or (batch, n_times)
        Output times, ascending or descending; the first is that of ``y0``. One grid for
        all samples, or a row for every sample (rows may end at different times: repeat
        the last time).
    method : {"dopri5", "tsit5", "bosh3", "dopri8", "heun", "rk4", "midpoint", \
            "euler", "adams", "rodas5p", "scipy_rk45", "scipy_rk23", \
            "scipy_dop853", "scipy_radau", "scipy_bdf", "scipy_lsoda"}, \
            default="dopri5"
        The first eight are explicit Runge-Kutta methods; "rk4", "midpoint" and "euler"
        have no error estimate and need a ``step_size``. "adams" has variable order,
        "rodas5p" is for stiff problems. Those of scipy run on the CPU, one sample after
        the other. "adams" and those of scipy have no discrete gradient.
    rtol, atol : float, default=1e-6
        Relative and absolute tolerance of a step's error: ``atol + rtol * |y|``, in
        root mean square over the sample's state.
    step_control : {"per_sample", "shared"}, default="per_sample"
        "shared" treats the whole batch as one system, with one step size; for fields
        that couple the samples.
    gradient : {"discrete", "continuous", "backprop"}, default="discrete"
        "discrete": the exact reverse of the steps taken, keeping the state of each; of
        fields without a closed form also, up to 256 MB, what torch needs to reverse
        them.
        "continuous": the adjoint equation, solved backwards in time with the same
        settings, keeping the outputs only; as accurate as the tolerance.
        "backprop": torch's autograd through the same steps, keeping everything;
        can be differentiated twice.
    max_steps : int, default=10000
        Attempted steps after which a sample gives up.
    first_step : float, optional
        Length of the first step. By default it is chosen from the first two slopes, for
        an error of the tolerance.
    min_step : float, default=0
        A step that would have to be shorter than this fails.
    max_step : float, optional
        Longest step.
    step_size : float, optional
        Take constant steps of this length, without error control.
    controller : {"PI", "I", "PID"} or StepController, default="PI"
        Step-size controller; "adams" has its own.
    row_wise : bool, default=False
        Whether a row of ``f`` depends on the same row of ``y`` alone and ``f`` holds no
        tensor with an entry per sample. Samples that are done then leave the batch, and
        ``f`` is called with the others only. Fields with a closed form say so
        themselves.
    event : Event, callable or sequence of them, optional
        Functions whose zero crossings end a sample, or are taken note of: see `Event`.
        A callable is a terminal event. A sample's event ends no other sample; its
        outputs after the event hold the state at the event.

    Returns
    -------
    Solution
        ``y`` has shape (batch, n_times, \\*state); ``events`` has the times and states
        of the events.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable; the message names it.
    SolverError
        In the backward pass of ``gradient="continuous"``, if the solve backwards fails.
    RuntimeError
        If a gradient is differentiated again, but for ``gradient="backprop"``.
    NotImplementedError
        If ``y0`` or ``t`` carry derivatives in forward mode.

    Warns
    -----
    SolverWarning
        If samples did not reach the end; ``status`` says which, and why.

    See Also
    --------
    sknode.fields.MLPField : Vector field with closed-form derivatives.

    Notes
    -----
    Steps are shortened to lead to the end in equal ones, as many as it takes anyway.
    Outputs inside a step come from the method's dense output and change no step. A
    non-finite trial state shortens the step. Gradients flow to ``y0``, to ``t`` and to
    every tensor that ``f`` depends on.

    References
    ----------
    Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential Equations",
    NeurIPS 2018.
    Kidger, Chen & Lyons, "'Hey, that's not an ODE': faster ODE adjoints via seminorms",
    ICML 2021.
    Hairer, Norsett & Wanner, "Solving Ordinary Differential Equations I", 2nd edition,
    Springer 1993.
    Steinebach, "Construction of Rosenbrock-Wanner method Rodas5P and numerical
    benchmarks within the Julia Differential Equations package", BIT Numerical
    Mathematics 63 (2023), 27.
    Shampine & Gordon, "Computer Solution of Ordinary Differential Equations: The
    Initial Value Problem", Freeman 1975.

    Examples
    --------
    >>> import torch
    >>> from sknode.ode import solve_ode
    >>> y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> solution = solve_ode(lambda t, y: -y, y0, torch.tensor([0.0, 0.5, 1.0]))
    >>> solution.y[:, -1, 0]
    tensor([0.3679, 0.7358], dtype=torch.float64)
    >>> solution.stats["n_accepted"].shape
    torch.Size([2])
    """
    solution = solve(
        f,
        y0,
        t,
        method=method,
        rtol=rtol,
        atol=atol,
        step_control=step_control,
        gradient=gradient,
        max_steps=max_steps,
        first_step=first_step,
        min_step=min_step,
        max_step=max_step,
        step_size=step_size,
        controller=controller,
        row_wise=row_wise,
        event=event,
    )
    if not solution.success:
        warnings.warn(solution.failure_report(), SolverWarning, stacklevel=2)
    return solution


def solve(
    f,
    y0,
    t,
    *,
    step_control="per_sample",
    gradient="discrete",
    row_wise=False,
    stops=None,
    event=None,
    adjoint=None,
    **settings,
):
    """Solve as `solve_ode` does, but leave it to the caller to look at the status.

    ``stops`` and the fields of `Options` that `solve_ode` does not have are for the
    other interfaces of the solver. ``adjoint`` is a dict of settings in which the solve
    backwards of the continuous adjoint differs from the one forwards.
    """
    if not callable(f):
        raise TypeError(f"f must be callable. Got {type(f).__name__} instead.")
    _check_choice("step_control", step_control, STEP_CONTROLS)
    _check_choice("gradient", gradient, GRADIENTS)
    _check_state(y0)
    options = _options(y0.dtype, **settings)
    known = get_method(settings.get("method", "dopri5"))
    backward = None
    if gradient == "continuous":
        backward = options
        if adjoint or known.backward:
            other = {"method": known.backward} if known.backward else {}
            backward = _options(y0.dtype, **settings | other | (adjoint or {}))
    shared = step_control == "shared"
    batch, state = y0.shape[0], y0.shape[1:]
    times, host_times = _check_times(t, batch, shared)
    settings |= {"step_control": step_control, "gradient": gradient}
    settings |= {"adjoint": adjoint}
    again = partial(solve, f, y0, row_wise=row_wise, event=event, **settings)
    if batch == 0:
        return _empty_solution(y0, times, again)
    if event is not None:
        settings["row_wise"] = row_wise
        solution = solve_with_events(
            solve, f, y0, times, event, shared=shared, **settings
        )
        solution._resolve = again
        return solution
    flat = y0
    if shared or y0.ndim != 2 or not y0.is_contiguous():
        flat = y0.reshape(1 if shared else batch, -1).contiguous()

    field = bind(f, batch, state, shared, row_wise=row_wise)
    replayable = partial(bind, f, batch, state, shared, closed_form=False)
    run = Run(field, replayable, host_times, options, stops, backward)
    run.fused = (
        options.plain
        and stops is None
        and gradient in kernels.gradients(field)
        and kernels.serves(field, flat, times)
    )
    if run.fused:
        field.parameters = field.network.parameters
    needs_grad = torch.is_grad_enabled()
    if needs_grad and field.probed and not run.fused:
        start = times.detach()[..., :1].expand(flat.shape[0], 1)
        start = start.to(flat.device, real_dtype(flat.dtype))
        if options.open_steps:
            towards = times.detach()[..., -1:].to(start).expand_as(start)
            start = torch.nextafter(start, towards)
        run.k0 = field.discover(start, flat.detach())
    needs_grad = needs_grad and any(
        x.requires_grad for x in (flat, times, *field.parameters)
    )
    if needs_grad:
        _check_gradient(known, gradient, stops)
    if not needs_grad:
        y = run.forward(flat.detach(), record=False)
    elif gradient == "discrete":
        y = discrete_adjoint(run, flat, times)
    elif gradient == "continuous":
        y = continuous_adjoint(run, flat, times)
    else:
        y = replay(run, replayable(), flat, times)
    n_times = times.shape[-1]
    if shared:
        y = y.view(n_times, *y0.shape).transpose(0, 1)
    elif len(state) != 1:
        y = y.view(batch, n_times, *state)
    trace = run.trace
    counts = trace.statistics
    return Solution(
        t=times,
        y=y,
        _counts=_statistics(trace, options) if counts is None else counts,
        _t_reached=np.array(trace.t_reached, np.float64),
        _resolve=again,
    )


def _empty_solution(y0: Tensor, times: Tensor, resolve) -> Solution:
    """Return the solution for a batch without samples."""
    return Solution(
        t=times,
        y=y0[:, None].repeat(1, times.shape[-1], *(1 for _ in y0.shape[1:])),
        _counts=np.zeros((1 + len(STATISTICS), 0), np.int64),
        _t_reached=np.zeros(0),
        _resolve=resolve,
    )


def _statistics(trace: Trace, options: Options) -> np.ndarray:
    """Return the status and the `STATISTICS` of every lane, those that it needed."""
    counts = np.empty((1 + len(STATISTICS), len(trace.status)), np.int64)
    counts[0], counts[1], counts[3] = trace.status, trace.n_steps, trace.n_rejected
    np.subtract(counts[1], counts[3], out=counts[2])
    counts[4] = trace.n_evaluations
    if options.loop is None:
        chosen = options.step_size is None and options.first_step is None
        counts[4] += trace.moving * np.int64(1 + chosen)
    return counts


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}. "
            f"Got {value!r} instead."
        )


def _check_gradient(known: Method, gradient: str, stops: Stops | None) -> None:
    """Raise where a gradient is needed that the method does not serve."""
    if gradient not in known.gradients:
        raise ValueError(
            f"method {known.name!r} does not serve gradient={gradient!r}: use "
            f"gradient={' or '.join(map(repr, known.gradients))}, or torch.no_grad() "
            "if no gradient is needed."
        )
    if gradient == "continuous" and stops is not None and stops.on_reach is not None:
        raise ValueError("gradient='continuous' does not serve states that jump.")


def _refuse_tangents(name: str, x: Tensor) -> None:
    """Raise if derivatives are wanted in forward mode: they would be lost."""
    if unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"solve_ode has no derivatives in forward mode: {name} must not be a dual "
            "tensor. Use reverse mode."
        )


def _check_state(y0) -> None:
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 must be a torch tensor. Got {type(y0).__name__} instead.")
    if y0.dtype not in DTYPES:
        raise TypeError(
            "y0 must be float32 or float64, or complex of these. "
            f"Got {y0.dtype} instead."
        )
    if y0.ndim == 0:
        raise ValueError("y0 must have a batch dimension: shape (batch, ...).")
    if y0.shape[1:].numel() == 0:
        raise ValueError(f"y0 has an empty state: shape {tuple(y0.shape)}.")
    _refuse_tangents("y0", y0)


def _check_times(t, batch: int, shared: bool) -> tuple[Tensor, np.ndarray]:
    """Return the output times in double precision, also as the host has them.

    Time costs nothing on the host. There, what needs no gradient is copied, since of
    changes to it autograd would not know.
    """
    if not isinstance(t, Tensor):
        t = torch.tensor(t, dtype=torch.float64)
    if t.is_complex():
        raise TypeError("t must be real.")
    fits = t.ndim == 1 or (t.ndim == 2 and len(t) == batch and not shared)
    if not fits or t.shape[-1] == 0:
        expected = "(n_times,)" if shared else f"(n_times,) or ({batch}, n_times)"
        raise ValueError(f"t must have shape {expected}. Got {tuple(t.shape)} instead.")
    _refuse_tangents("t", t)
    if t.requires_grad or not t.is_cpu or t.dtype not in DTYPES:
        times = t.double()
        return times, check_order(times.numpy(force=True))
    host = check_order(t.resolve_neg().numpy().astype(np.float64))
    return torch.from_numpy(host), host


def _options(dtype: torch.dtype, **settings) -> Options:
    """Check the numerical settings, those that were seen before only once."""
    rtol = settings.get("rtol")
    # rounding in a step is a few units in the last place: below this there is
    # nothing to control
    least = LEAST_RTOL[dtype]
    if isinstance(rtol, Real) and 0 < rtol < least:
        warnings.warn(
            f"rtol={rtol:g} is below what {dtype} can carry; using {least:.2g}.",
            SolverWarning,
            stacklevel=4,
        )
        settings["rtol"] = least
    if BY_VALUE.issuperset(map(type, settings.values())):
        return _options_seen_before(dtype, **settings)
    return _make_options(dtype, **settings)


def _make_options(
    dtype: torch.dtype,
    *,
    method="dopri5",
    rtol=1e-6,
    atol=1e-6,
    max_steps=10_000,
    first_step=None,
    min_step=0.0,
    max_step=None,
    step_size=None,
    controller="PI",
    **further,
) -> Options:
    """Check the numerical settings."""
    known = get_method(method)
    _check_tolerances(rtol, atol)
    _check_number("min_step", min_step)
    _check_number("first_step", first_step, positive=True, optional=True)
    _check_number("max_step", max_step, positive=True, optional=True)
    _check_number("step_size", step_size, positive=True, optional=True)
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive integer. Got {max_steps!r}.")
    if step_size is None and not known.adaptive:
        raise ValueError(
            f"method {method!r} has no error estimate and needs step_size, the length "
            "of its steps."
        )
    if step_size is not None and not known.constant_steps:
        raise ValueError(
            f"method {method!r} cannot take constant steps: step_size must be None. "
            f"Got {step_size!r} instead."
        )
    if dtype.is_complex and not known.complex_states:
        raise TypeError(
            f"method {method!r} does not take complex states: y0 must be real."
        )
    return Options(
        tableau=known.tableau,
        rtol=rtol if isinstance(rtol, Tensor) else float(rtol),
        atol=atol if isinstance(atol, Tensor) else float(atol),
        max_steps=max_steps,
        controller=make_controller(controller),
        first_step=first_step,
        min_step=float(min_step),
        max_step=math.inf if max_step is None else float(max_step),
        step_size=step_size,
        make_stepper=known.make_stepper,
        **({"loop": known.loop} | further),
    )


# typed: True is no number of steps
_options_seen_before = lru_cache(maxsize=64, typed=True)(_make_options)


def _check_tolerances(rtol, atol) -> None:
    """Tolerances are numbers, or tensors with an entry for every component."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, Tensor):
            _check_number(name, value)
        elif not bool(((value >= 0) & torch.isfinite(value)).all()):
            raise ValueError(f"{name} must be finite and non-negative.")
    numbers = not (isinstance(rtol, Tensor) or isinstance(atol, Tensor))
    if numbers and rtol == 0 and atol == 0:
        raise ValueError("rtol and atol must not both be zero.")


def _check_number(name: str, value, *, positive=False, optional=False) -> None:
    """Raise unless a value is a number in the range."""
    if optional and value is None:
        return
    good = (
        isinstance(value, Real)
        and 0 <= value < math.inf
        and not (positive and not value)
    )
    if not good:
        kind = "positive" if positive else "non-negative"
        raise ValueError(
            f"{name} must be a finite {kind} number{' or None' if optional else ''}. "
            f"Got {value!r} instead."
        )
