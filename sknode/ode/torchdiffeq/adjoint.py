"""The continuous adjoint: gradients from a second solve, back in time.

With ``a = dL/dy(t)``, the state ``(dL/dt, y, a, dL/dtheta)`` is integrated from the
last output time to the first one,

    da/dt = -(df/dy)^T a,   d(dL/dtheta)/dt = -(df/dtheta)^T a,
    d(dL/dt)/dt = -(df/dt)^T a,

and at every output time ``a`` jumps by that output's own gradient, while ``y`` returns
to what the forward solve had there. It is one solve: these jumps are stops of the
solver, over which it carries its step size.

References
----------
Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential Equations",
NeurIPS 2018, appendix B.
Kidger, Chen & Lyons, "Hey, that's not an ODE: Faster ODE adjoints via seminorms", ICML
2021.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sknode.ode.grid import Stops
from sknode.ode.once_differentiable import once_differentiable
from sknode.ode.torchdiffeq.event import integrate_until
from sknode.ode.torchdiffeq.fixed_grid import grid_times
from sknode.ode.torchdiffeq.forward import integrate, just_after, numerics, run
from sknode.ode.torchdiffeq.problem import (
    CALLBACKS,
    Layout,
    Problem,
    check_options,
    family_of,
    mixed_norm,
)

__all__ = ["odeint_adjoint"]


def odeint_adjoint(
    func: Callable,
    y0,
    t: Tensor,
    *,
    rtol=1e-7,
    atol=1e-9,
    method: str | None = None,
    options: dict | None = None,
    event_fn: Callable | None = None,
    adjoint_rtol=None,
    adjoint_atol=None,
    adjoint_method: str | None = None,
    adjoint_options: dict | None = None,
    adjoint_params=None,
):
    """Solve as `odeint` does, with the gradient from the adjoint equation.

    It needs no memory for the steps, but its gradient is accurate only to the
    tolerance; that of `odeint` is exact, and usually faster.

    Parameters
    ----------
    func, y0, t, rtol, atol, method, options, event_fn : various
        As for `odeint`. A function that is no module needs ``adjoint_params``.
    adjoint_rtol, adjoint_atol : float or tuple, optional
        Tolerances of the solve back in time; by default those of the other one. A tuple
        has an entry for each of ``(t, y, adj_y, *adj_params)``.
    adjoint_method : str, optional
        Its method, by default ``method``.
    adjoint_options : dict, optional
        Its options, by default ``options`` without ``norm``. ``norm`` here is
        "seminorm", which leaves the parameters out of the error, or a function of the
        tuple ``(t, y, adj_y, *adj_params)``, where the tensors of a tuple state appear
        one by one. By default it is the largest of the norms of all of them.
    adjoint_params : iterable of Tensor, optional
        The tensors that gradients flow to, by default the module's parameters. Those
        that ``func`` does not use get zeros.

    Returns
    -------
    y : Tensor of shape (n_times, \\*state), or tuple of such
        As `odeint`, also with ``event_fn``.

    Raises
    ------
    ValueError, TypeError, SolverError
        As `odeint`; the last also from ``backward``.

    Notes
    -----
    Attributes ``callback_step_adjoint``, ``callback_accept_step_adjoint`` and
    ``callback_reject_step_adjoint`` of ``func`` are called by the solve back in time.

    Examples
    --------
    >>> import torch
    >>> from sknode.ode import odeint_adjoint
    >>> field = torch.nn.Linear(2, 2)
    >>> y = odeint_adjoint(
    ...     lambda t, y: field(y),
    ...     torch.ones(2),
    ...     torch.tensor([0.0, 1.0]),
    ...     adjoint_params=field.parameters(),
    ... )
    >>> y[-1].sum().backward()
    >>> field.weight.grad.shape
    torch.Size([2, 2])
    """
    if adjoint_params is None and not isinstance(func, torch.nn.Module):
        raise ValueError(
            "adjoint_params must be given where func is no torch.nn.Module; () if there"
            " are none."
        )
    problem = Problem.check(func, y0, t, rtol, atol, method, options)
    backward = _backward_settings(
        problem,
        method,
        options,
        adjoint_rtol,
        adjoint_atol,
        adjoint_method,
        adjoint_options,
    )
    params = find_parameters(func) if adjoint_params is None else list(adjoint_params)
    trained = [p for p in params if p.requires_grad]
    if len(trained) < len(params) and callable((adjoint_options or {}).get("norm")):
        warnings.warn(
            "adjoint_params without gradient are not part of the adjoint state and do "
            "not appear in the adjoint norm.",
            stacklevel=2,
        )
    arguments = problem, event_fn, backward, problem.y0, problem.t, *trained
    if event_fn is None:
        y = _ContinuousAdjoint.apply(*arguments)
        return problem.restore(y) if problem.layout.is_tuple else y
    event_t, y = _ContinuousAdjoint.apply(*arguments)
    return event_t, problem.restore(y) if problem.layout.is_tuple else y


def find_parameters(module: torch.nn.Module) -> list[Tensor]:
    """Return the parameters of a module, also of a replica in `DataParallel`."""
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    # the tensors of a replica are plain attributes
    return [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.requires_grad
    ]


def _backward_settings(problem, method, options, rtol, atol, back_method, back_options):
    """Return what the solve back in time is given: method, tolerances, options."""
    back_method = method if back_method is None else back_method
    if back_method != method and options is not None and back_options is None:
        raise ValueError(
            "adjoint_options must be given if options are and adjoint_method is not "
            "method."
        )
    back_method = "dopri5" if back_method is None else back_method
    family = family_of(back_method)
    if back_options is None:
        back_options = {k: v for k, v in problem.options.items() if k != "norm"}
    norm = adjoint_norm(back_options.get("norm"), problem)
    back_options = check_options(back_method, family, {**back_options, "norm": norm})
    return {"method": back_method, "options": back_options, "tolerances": (rtol, atol)}


def adjoint_norm(choice, problem: Problem) -> Callable[[tuple], Tensor]:
    """Return the norm of the adjoint state ``(t, y, adj_y, *adj_params)``.

    States that are tuples for the user are vectors in it.
    """
    layout = problem.layout

    def of_state(y):
        return problem.state_norm(layout.restore(y.reshape(-1)))

    def seminorm(state):
        t, y, adj_y, *_ = state
        return _largest(t.abs(), of_state(y), of_state(adj_y))

    def full(state):
        return _largest(seminorm(state), mixed_norm(state[3:]))

    def custom(state):
        t, y, adj_y, *adj_params = state
        parts = layout.restore(y), layout.restore(adj_y)
        return choice((t, *parts[0], *parts[1], *adj_params))

    if choice is None:
        return full
    if choice == "seminorm":
        return seminorm
    if not callable(choice):
        raise TypeError(f"norm must be callable or 'seminorm'. Got {choice!r}.")
    return custom if layout.is_tuple else choice


def _largest(first: Tensor, *others) -> Tensor:
    """Return the largest of some scalars."""
    others = [
        torch.as_tensor(x, dtype=first.dtype, device=first.device) for x in others
    ]
    return torch.stack([first, *others]).max()


def _shaped(problem: Problem, y: Tensor) -> Tensor:
    """Return states in their shape; those of a tuple stay one vector."""
    return y if problem.layout.is_tuple else problem.restore(y)


class _ContinuousAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, event_fn, backward, y0, t, *params):
        problem = replace(problem, y0=y0, t=t)
        ctx.problem, ctx.backward_settings = problem, backward
        ctx.adjoint_options = backward["options"]
        with torch.no_grad():
            if event_fn is None:
                y = _shaped(problem, integrate(problem))
                ctx.save_for_backward(t, y, *params)
                return y
            event_t, y = integrate_until(problem, event_fn, "discrete")
            y = _shaped(problem, y)
            # as if event_t were an output time; it has no gradient of its own here
            ctx.save_for_backward(torch.stack([t[0], event_t]), y, *params)
            return event_t, y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        t, y, *params = ctx.saved_tensors
        need_t, is_event = ctx.needs_input_grad[4], len(grads) == 2
        grad_y = grads[-1].reshape(len(t), -1)
        solve = _Reverse(ctx, t, y.reshape(len(t), -1), grad_y, params, need_t)
        grad_t, grad_y0, grad_params = solve.run()
        if need_t and is_event:
            # the second time only tells the direction
            grad_t = torch.stack([grad_t[0], torch.zeros_like(grad_t[0])])
        return None, None, None, grad_y0, grad_t, *grad_params


class AdjointField:
    """Time derivative of the adjoint state.

    Parameters
    ----------
    problem : Problem
        The forward one.
    params : list of Tensor
        Parameters.
    need_t : bool
        Whether the derivative by time is wanted.
    """

    def __init__(self, problem: Problem, params: list[Tensor], need_t: bool):
        self.field, self.params, self.need_t = problem.field, params, need_t
        self.is_real = not problem.y0.is_complex()
        for name in CALLBACKS:
            callback = getattr(problem.func, f"{name}_adjoint", None)
            if callable(callback):
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: tuple) -> tuple:
        """Return the derivative of ``(t, y, adj_y, *adj_params)``."""
        _, y, adj_y, *_ = state
        if self.is_real and y.is_complex():
            y, adj_y = y.real, adj_y.real
        with torch.enable_grad():
            time = t.detach().requires_grad_(self.need_t)
            y = y.detach().requires_grad_()
            value = self.field(time, y.reshape(1, -1))
            inputs = [*([time] if self.need_t else []), y, *self.params]
            grads = [None] * len(inputs)
            if value.requires_grad:
                # parameters may have a history that all evaluations share
                grads = torch.autograd.grad(
                    value,
                    inputs,
                    -adj_y.reshape(1, -1),
                    allow_unused=True,
                    retain_graph=True,
                )
        grads = [
            torch.zeros_like(x) if g is None else g
            for g, x in zip(grads, inputs, strict=True)
        ]
        by_time = grads.pop(0) if self.need_t else torch.zeros_like(time)
        return by_time, value.detach(), *grads


class _Reverse:
    """The solve back in time."""

    def __init__(self, ctx, t, y, grad_y, params, need_t):
        self.t, self.y, self.grad_y, self.params = t, y, grad_y, params
        self.need_t, self.forward = need_t, ctx.problem
        self.grad_t = torch.zeros_like(t)
        layout, n = self.forward.layout, y.shape[1]
        shape = torch.Size([n]) if layout.is_tuple else layout.shapes[0]
        shapes = (torch.Size(), shape, shape, *(p.shape for p in params))
        self.layout = Layout(shapes, True)
        complex_parameter = any(p.is_complex() for p in params)
        dtype = y.dtype.to_complex() if complex_parameter else y.dtype
        start = torch.zeros(sum(self.layout.sizes), dtype=dtype, device=y.device)
        self.start = self._jump(start, len(t) - 1)
        settings = ctx.backward_settings
        rtol, atol = (
            self._tolerance(name, given, getattr(self.forward, name))
            for name, given in zip(
                ("rtol", "atol"), settings["tolerances"], strict=True
            )
        )
        self.problem = Problem(
            func=AdjointField(self.forward, params, need_t),
            layout=self.layout,
            y0=self.start,
            t=t.flip(0),
            rtol=rtol,
            atol=atol,
            method=settings["method"],
            options=ctx.adjoint_options,
        )

    def run(self):
        """Return the gradients of the times, the initial state and the parameters."""
        if len(self.t) == 1:
            state = self.start
        elif self.problem.family in ("adams", "scipy"):
            state = self._piece_by_piece()
        else:
            state = self._in_one()
        if len(self.t) > 1:
            state = state.clone()
            n = self.y.shape[1]
            state[1 + n : 1 + 2 * n] += self.grad_y[0]
        adj_t, _, adj_y, *adj_params = self.layout.restore(state)
        if self.need_t:
            self.grad_t[0] = adj_t.real if adj_t.is_complex() else adj_t
        grads = [
            (g.real if g.is_complex() and not p.is_complex() else g).to(p.dtype)
            for g, p in zip(adj_params, self.params, strict=True)
        ]
        if adj_y.is_complex() and not self.y.is_complex():
            adj_y = adj_y.real
        return self.grad_t if self.need_t else None, adj_y.reshape(-1), grads

    def _tolerance(self, name: str, given, forward: Tensor) -> Tensor:
        """Return a tolerance of the adjoint state, by default the forward one."""
        if given is not None:
            return self.layout.tolerance(f"adjoint_{name}", given, self.y)
        if forward.ndim == 0:
            return forward
        # one for every component: the same for its cotangent, the least elsewhere
        others = forward.min().expand(sum(self.layout.sizes[3:]))
        return torch.cat([forward.min()[None], forward, forward, others])

    def _jump(self, state: Tensor, i: int) -> Tensor:
        """Return the adjoint state before output time i from that after it."""
        state, n = state.clone(), self.y.shape[1]
        state[1 : 1 + n] = self.y[i]
        state[1 + n : 1 + 2 * n] += self.grad_y[i]
        if self.need_t:
            with torch.no_grad():
                time = self.t[i].to(self.y.abs().dtype)
                slope = self.forward.field(time, self.y[i][None])[0]
            moved = (slope * self.grad_y[i].conj()).real.sum()
            self.grad_t[i] = moved
            state[0] -= moved
        return state

    def _piece_by_piece(self) -> Tensor:
        """Integrate from output time to output time, for methods with a history."""
        state = self.start
        for i in range(len(self.t) - 1, 0, -1):
            piece = replace(self.problem, y0=state, t=self.t[i - 1 : i + 1].flip(0))
            state = integrate(piece)[-1]
            if i > 1:
                state = self._jump(state, i - 1)
        return state

    def _in_one(self) -> Tensor:
        """Integrate over all output times, with jumps on the way."""
        problem = self.problem
        sign = problem.sign
        outputs = sign * problem.t.double().cpu().numpy()[1:-1]  # ascending
        jumps = problem.stops("jump_t")
        times = np.concatenate(
            [outputs, jumps, problem.stops("step_t"), *self._grids(sign)]
        )
        times = np.unique(times)
        output_at = {time: len(self.t) - 2 - i for i, time in enumerate(outputs)}
        field, far_side = problem.field, set(jumps)
        adaptive = problem.family == "adaptive"

        def on_reach(rows, first, last, t, y, k):
            time = times[first[0]]
            jumped = time in output_at
            if jumped:
                y = self._jump(y[0], output_at[time])[None]
            if not adaptive or not (jumped or time in far_side):
                return y, k
            if time in far_side:
                at = just_after(time, sign, y)
            else:
                at = torch.tensor(sign * time, dtype=y.abs().dtype, device=y.device)
            return y, field(at, y)

        settings = numerics(problem)
        settings["stops"] = Stops(times, on_reach) if len(times) else None
        return run(problem, problem.t[[0, -1]], "discrete", **settings)[-1]

    def _grids(self, sign: float) -> list[np.ndarray]:
        """Return the grid points inside the pieces between output times."""
        if "grid_constructor" not in self.problem.options:
            return []
        pieces = []
        for i in range(len(self.t) - 1, 0, -1):
            piece = replace(self.problem, t=self.t[i - 1 : i + 1].flip(0))
            points = grid_times(piece).detach().double().cpu().numpy()
            pieces.append(sign * points[1:-1])
        return pieces
