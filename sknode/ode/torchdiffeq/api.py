"""`odeint` and `odeint_event`, to be called like torchdiffeq's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sknode.ode.torchdiffeq.event import EventFunction, integrate_until
from sknode.ode.torchdiffeq.forward import integrate
from sknode.ode.torchdiffeq.problem import Layout, Problem

__all__ = ["odeint", "odeint_event"]

GRADIENTS = ("discrete", "backprop")


def odeint(
    func: Callable,
    y0,
    t: Tensor,
    *,
    rtol=1e-7,
    atol=1e-9,
    method: str | None = None,
    options: dict | None = None,
    event_fn: Callable | None = None,
    gradient: str = "discrete",
):
    """Solve ``dy/dt = func(t, y)`` with the arguments of torchdiffeq's ``odeint``.

    Parameters
    ----------
    func : callable or torch.nn.Module
        The vector field: it gets a scalar time and the state in the form of ``y0``, and
        returns slopes in that form. Attributes ``callback_step``,
        ``callback_accept_step`` and ``callback_reject_step`` are called with
        ``(t, y, dt)`` before, and after, every step.
    y0 : Tensor or tuple of Tensor
        Initial state, of any shapes; real or complex.
    t : Tensor of shape (n_times,)
        Output times, strictly increasing or decreasing; the first is that of ``y0``.
    rtol, atol : float, Tensor or tuple, default=1e-7, 1e-9
        Tolerances: numbers, tensors that broadcast to the state, or one of these for
        every tensor of a tuple.
    method : str, default="dopri5"
        Adaptive: "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun" and those of
        `solve_ode`. On a grid, that is on ``t`` unless options say otherwise: "euler",
        "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"
        (also "fixed_adams"). "scipy_solver" is `scipy.integrate.solve_ivp`, without
        gradients.
    options : dict, optional
        Adaptive methods: ``norm``, ``first_step``, ``min_step`` (steps of this length
        are accepted), ``max_step``, ``step_t``, ``jump_t`` (times at which to end a
        step; at which ``func`` jumps), ``safety``, ``ifactor``, ``dfactor``,
        ``max_num_steps`` (between two output times), ``dtype`` (without effect: time
        is float64). On a grid: ``step_size`` or ``grid_constructor``, ``interp``
        ("linear" or "cubic"), ``perturb``; Adams: ``max_order``, ``max_iters``.
        "scipy_solver": ``solver``, ``min_step``, ``max_step``.
    event_fn : callable, optional
        ``event_fn(t, y)`` returns a tensor; the solve ends when the first of its
        entries crosses zero. ``t`` has two entries, and the second tells only the
        direction.
    gradient : {"discrete", "backprop"}, default="discrete"
        As for `solve_ode`: the exact reverse of the steps taken, or torch's autograd
        through them, which can be differentiated twice.

    Returns
    -------
    y : Tensor of shape (n_times, \\*state), or tuple of such
        The states at the output times.
    event_t : Tensor of shape ()
        With ``event_fn``, ``(event_t, y)`` is returned, and ``y`` has the states at the
        start and at the event.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable; the message names it.
    SolverError
        If the end was not reached. Also an ``AssertionError``, as torchdiffeq's.

    Warns
    -----
    UserWarning
        If there are options or callbacks that the method does not know.

    See Also
    --------
    odeint_adjoint : The same with a gradient that needs constant memory.
    odeint_event : The same with the event's time differentiable.
    solve_ode : The solver's own interface, with a step size for every sample.

    Notes
    -----
    ``func`` is called without recording a graph, and never outside the interval;
    gradients come from the steps that were taken. A field that uses autograd inside has
    to enable it for itself, with ``torch.enable_grad()``.

    Examples
    --------
    >>> import torch
    >>> from sknode.ode import odeint
    >>> y0, t = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    >>> odeint(lambda t, y: -y, y0, t)[-1]
    tensor([0.3679, 0.7358])
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}. Got {gradient!r}.")
    problem = Problem.check(func, y0, t, rtol, atol, method, options)
    if event_fn is None:
        return problem.restore(integrate(problem, gradient))
    event_t, y = integrate_until(problem, event_fn, gradient)
    return event_t, problem.restore(y)


def odeint_event(
    func: Callable,
    y0,
    t0: Tensor,
    *,
    event_fn: Callable,
    reverse_time: bool = False,
    odeint_interface: Callable = odeint,
    **kwargs,
):
    """Solve until an event, whose time is differentiable.

    Parameters
    ----------
    func, y0 : callable, Tensor or tuple of Tensor
        As for `odeint`.
    t0 : Tensor of shape ()
        Initial time.
    event_fn : callable
        As for `odeint`.
    reverse_time : bool, default=False
        Whether to go back in time.
    odeint_interface : callable, default=odeint
        What solves: `odeint` or `odeint_adjoint`.
    **kwargs
        Further arguments for it.

    Returns
    -------
    event_t : Tensor of shape ()
        Time of the event, differentiable by everything that the state there and
        ``event_fn`` depend on.
    y : Tensor of shape (2, \\*state), or tuple of such
        States at ``t0`` and at the event; the latter moves with its time.

    Notes
    -----
    With ``c(t, y) = 0`` at the event, the implicit function theorem gives
    ``d event_t = -dc / (dc/dt + dc/dy f)``, where ``dc`` is the change at a fixed time.

    Examples
    --------
    A falling body, from the height ``y0``, hits the ground after ``sqrt(2 y0 / g)``:

    >>> import torch
    >>> from sknode.ode import odeint_event
    >>> height = torch.tensor(5.0, requires_grad=True)
    >>> event_t, _ = odeint_event(
    ...     lambda t, y: (y[1], torch.full_like(y[1], -10.0)),
    ...     (height, torch.tensor(0.0)),
    ...     torch.tensor(0.0),
    ...     event_fn=lambda t, y: y[0],
    ... )
    >>> event_t.backward()
    >>> height.grad
    tensor(0.1000)
    """
    if not isinstance(t0, Tensor):
        raise TypeError(f"t0 must be a torch tensor. Got {type(t0).__name__} instead.")
    start = t0.reshape(-1)
    other = start.detach() + (-1.0 if reverse_time else 1.0)
    t = torch.cat([start, other])
    event_t, y = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    problem = Problem.check(func, y0, t.detach(), 0.0, 0.0, None, None)
    final = Layout.of(y0).flatten([part[-1] for part in y] if _many(y) else y[-1])
    event_t, final = _let_time_move(problem, event_fn, event_t.detach(), final)
    last = problem.layout.restore(final)
    if _many(y):
        parts = zip(y, last, strict=True)
        return event_t, tuple(torch.cat([a[:-1], b[None]]) for a, b in parts)
    return event_t, torch.cat([y[:-1], last[None]])


def _many(y) -> bool:
    return not isinstance(y, Tensor)


def _let_time_move(problem: Problem, event_fn, event_t: Tensor, y: Tensor):
    """Let the event's time, and the state with it, move with what they depend on."""
    event = EventFunction(event_fn, problem)
    time = event_t.to(y.abs().dtype)
    with torch.no_grad():
        slope = problem.field(time, y[None])[0]
    with torch.enable_grad():
        at_t = time.detach().clone().requires_grad_()
        at_y = y.detach().clone().requires_grad_()
        by_t, by_y = torch.autograd.grad(
            event(at_t, at_y), (at_t, at_y), allow_unused=True
        )
    rate = torch.zeros_like(time) if by_t is None else by_t
    if by_y is not None:
        rate = rate + (by_y.conj() * slope).real.sum()
    value = event(time, y)
    shift = -(value - value.detach()) / rate
    return event_t + shift.to(event_t.dtype), y + slope * shift
