"""An initial value problem in torchdiffeq's terms, and in those of the solver.

A state there is a tensor of any shape, scalars included, or a tuple of such, and the
field gets a scalar time. Here it is one lane: a row of all numbers in the state, with
one step size for all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sknode.ode.control import real_dtype
from sknode.ode.methods import METHODS, Method, get_method
from sknode.ode.runge_kutta import ExplicitStepper
from sknode.ode.solution import SolverError
from sknode.ode.tableaus import FURTHER, get_tableau
from sknode.ode.vector_field import AutogradField

__all__ = [
    "ALIASES",
    "ArgumentError",
    "Layout",
    "OdeintError",
    "Problem",
    "invalid",
    "mixed_norm",
    "rms_norm",
]

# Names of torchdiffeq for methods of this package.
ALIASES = {"adaptive_heun": "heun", "heun2": "heun"}
# Methods that are taken without error control, on a grid.
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
SCIPY = ("scipy_solver",)

# What each family of methods takes in ``options``; callbacks that it calls.
GRID_OPTIONS = {"step_size", "grid_constructor", "interp", "perturb", "norm"}
OPTIONS = {
    "adaptive": {
        *("norm", "min_step", "max_step", "first_step", "step_t", "jump_t"),
        *("safety", "ifactor", "dfactor", "max_num_steps", "dtype"),
    },
    "fixed": GRID_OPTIONS,
    "adams": GRID_OPTIONS | {"max_order", "max_iters"},
    "scipy": {"solver", "min_step", "max_step", "norm", "grid_points", "eps"},
}
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
CALLED = {"adaptive": CALLBACKS, "fixed": CALLBACKS[:1], "adams": CALLBACKS[:1]}


class OdeintError(SolverError, AssertionError):
    """A solve did not get to its end.

    An `AssertionError` too, because this is what torchdiffeq raises.
    """


class ArgumentError(ValueError, AssertionError):
    """An argument is not usable.

    An `AssertionError` too, because this is what torchdiffeq raises.
    """


def invalid(name: str, expected: str, got) -> ArgumentError:
    """Return the error for an argument that is not what was expected."""
    return ArgumentError(f"{name} must be {expected}. Got {got!r} instead.")


@dataclass(frozen=True)
class Layout:
    """The shape of a state: a tensor's, or those of a tuple of tensors.

    Parameters
    ----------
    shapes : tuple of torch.Size
        Of its parts.
    is_tuple : bool
        Whether the user sees a tuple.
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool

    @classmethod
    def of(cls, state) -> Layout:
        """Return the layout of a state."""
        if isinstance(state, Tensor):
            return cls((state.shape,), False)
        return cls(tuple(part.shape for part in state), True)

    @property
    def sizes(self) -> list[int]:
        """How many numbers each part has."""
        return [shape.numel() for shape in self.shapes]

    def flatten(self, state) -> Tensor:
        """Return a state as a vector."""
        if not self.is_tuple:
            return state.reshape(-1)
        return torch.cat([part.reshape(-1) for part in state])

    def restore(self, flat: Tensor, lead: tuple[int, ...] = ()):
        """Return states of shape (*lead, n) as the user knows them."""
        if not self.is_tuple:
            return flat.reshape((*lead, *self.shapes[0]))
        parts, start = [], 0
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            parts.append(flat[..., start : start + size].view((*lead, *shape)))
            start += size
        return tuple(parts)

    def tolerance(self, name: str, value, y: Tensor) -> Tensor:
        """Return a tolerance as a scalar tensor or as one of shape (n,)."""
        if isinstance(value, Tensor) and value.requires_grad:
            raise invalid(name, "a constant", "a tensor that requires grad")
        like = {"dtype": real_dtype(y.dtype), "device": y.device}
        scalar = not isinstance(value, Tensor | tuple | list) or (
            isinstance(value, Tensor) and value.ndim == 0
        )
        if isinstance(value, float) and 0 <= value < math.inf:
            return torch.tensor(value, **like)
        if scalar:
            result = torch.as_tensor(value, **like)
        elif not self.is_tuple:
            shape = self.shapes[0]
            result = torch.as_tensor(value, **like).expand(shape).reshape(-1)
        else:
            if len(value) != len(self.shapes):
                expected = f"a number or a sequence of {len(self.shapes)}, as y0"
                raise invalid(name, expected, f"{len(value)} values")
            parts = [
                torch.as_tensor(part, **like).expand(shape).reshape(-1)
                for part, shape in zip(value, self.shapes, strict=True)
            ]
            result = torch.cat(parts)
        if not bool(((result >= 0) & torch.isfinite(result)).all()):
            raise invalid(name, "finite and non-negative", value)
        return result


class LaneField(AutogradField):
    """A field of a user's states as one of (1, n) rows.

    Parameters
    ----------
    func : callable or torch.nn.Module
        The user's field.
    layout : Layout
        Of its states.
    """

    def __init__(self, func, layout: Layout):
        super().__init__(func)
        self.layout = layout

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the slope in the dtype of y, as a row."""
        layout, t = self.layout, t.view(())
        if layout.is_tuple:
            slope = self.f(t, layout.restore(y[0]))
            parts = slope
        else:
            shape = layout.shapes[0]
            slope = self.f(t, y.view(shape))
            if isinstance(slope, Tensor) and slope.shape == shape:
                slope = slope.reshape(y.shape)
                return slope if slope.dtype == y.dtype else self._cast(slope, y)
            parts = (slope,)
        self._check(parts)
        return self._cast(layout.flatten(parts)[None], y)

    evaluate = __call__

    def _cast(self, slope: Tensor, y: Tensor) -> Tensor:
        if slope.is_complex() and not y.is_complex():
            raise TypeError(f"func must return the dtype of y, {y.dtype}.")
        return slope.to(y.dtype)

    def _check(self, parts) -> None:
        """Raise unless the slope has the shape of the state."""
        layout = self.layout
        if not isinstance(parts, tuple | list) or len(parts) != len(layout.shapes):
            n = len(layout.shapes)
            raise TypeError(f"func must return a tuple of {n} tensors, as y0.")
        for part, shape in zip(parts, layout.shapes, strict=True):
            if not isinstance(part, Tensor):
                kind = type(part).__name__
                raise TypeError(f"func must return tensors. Got {kind} instead.")
            # parts of a tuple may have the numbers of the state in another shape
            fits = part.shape == shape
            if not fits and not (layout.is_tuple and part.numel() == shape.numel()):
                raise ValueError(
                    f"func must return slopes of shape {tuple(shape)}, as y0. "
                    f"Got {tuple(part.shape)} instead."
                )


def rms_norm(x: Tensor) -> Tensor:
    """Return the root mean square of a tensor."""
    return torch.linalg.vector_norm(x) * max(x.numel(), 1) ** -0.5


def mixed_norm(parts) -> Tensor:
    """Return the largest root mean square of some tensors."""
    if len(parts) == 0:
        return torch.zeros(())
    return torch.stack([rms_norm(part) for part in parts]).max()


def family_of(method: str) -> str:
    """Return which kind of method this is: a key of `OPTIONS`.

    Raises
    ------
    ValueError
        If there is no such method; the message lists all.
    """
    known = dict.fromkeys((*METHODS, *FURTHER, *ALIASES, *ADAMS, *SCIPY))
    if method not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"method must be one of {names}. Got {method!r} instead.")
    if method in SCIPY:
        return "scipy"
    if method in ADAMS:
        return "adams"
    fixed = method in FIXED or not core_method(method).adaptive
    return "fixed" if fixed else "adaptive"


def core_method(name: str) -> Method:
    """Return a Runge-Kutta method, or another one of the solver, by name."""
    name = ALIASES.get(name, name)
    if name not in FURTHER:
        return get_method(name)
    tableau = get_tableau(name)
    return Method(name, tableau.adaptive, ExplicitStepper, tableau)


@dataclass
class Problem:
    """A problem after its arguments were checked.

    Attributes
    ----------
    func : callable
        The field as given.
    layout : Layout
        Of its states.
    y0 : Tensor of shape (n,)
        The initial state.
    t : Tensor of shape (n_times,)
        Output times, strictly ascending or descending, on the device of the state.
    rtol, atol : Tensor of shape () or (n,)
        Tolerances.
    method : str
        Name of the method.
    options : dict
        Its options; only known ones.
    """

    func: Callable
    layout: Layout
    y0: Tensor
    t: Tensor
    rtol: Tensor
    atol: Tensor
    method: str
    options: dict[str, Any]

    @classmethod
    def check(cls, func, y0, t, rtol, atol, method, options) -> Problem:
        """Check what the user gave."""
        if not callable(func):
            raise TypeError(f"func must be callable. Got {type(func).__name__}.")
        check_state(y0)
        layout = Layout.of(y0)
        flat = layout.flatten(y0)
        check_times(t)
        method = "dopri5" if method is None else method
        family = family_of(method)
        problem = cls(
            func=func,
            layout=layout,
            y0=flat,
            t=t.to(flat.device),
            rtol=layout.tolerance("rtol", rtol, flat),
            atol=layout.tolerance("atol", atol, flat),
            method=method,
            options=check_options(method, family, options),
        )
        unused = set(problem.callbacks) - set(CALLED.get(family, ()))
        if unused:
            warnings.warn(
                f"method {method!r} does not call {', '.join(sorted(unused))}",
                stacklevel=3,
            )
        return problem

    @property
    def family(self) -> str:
        """The kind of method: "adaptive", "fixed", "adams" or "scipy"."""
        return family_of(self.method)

    @property
    def core_method(self) -> Method:
        """The method as the solver knows it."""
        return core_method(self.method)

    @property
    def field(self) -> LaneField:
        """The field on (1, n) rows."""
        return LaneField(self.func, self.layout)

    @property
    def sign(self) -> float:
        """Direction of time."""
        return -1.0 if len(self.t) > 1 and self.t[-1] < self.t[0] else 1.0

    @property
    def callbacks(self) -> dict[str, Callable]:
        """The callbacks that the field has, by name."""
        found = {n: getattr(self.func, n, None) for n in CALLBACKS}
        return {name: call for name, call in found.items() if callable(call)}

    @property
    def state_norm(self) -> Callable[[Any], Tensor]:
        """The norm of a state as the user knows it."""
        default = mixed_norm if self.layout.is_tuple else rms_norm
        return self.options.get("norm", default)

    def norm(self, rows: Tensor) -> np.ndarray:
        """Return the norm of a (1, n) row, for the solver."""
        value = self.state_norm(self.layout.restore(rows[0]))
        return np.array([abs(float(value))])

    def stops(self, name: str) -> np.ndarray:
        """Return times of an option inside the interval, in ascending order."""
        times = self.options.get(name)
        if times is None:
            return np.zeros(0)
        if not isinstance(times, Tensor):
            times = torch.as_tensor(times, dtype=torch.float64)
        values = self.sign * times.detach().cpu().to(torch.float64).numpy().reshape(-1)
        t = self.sign * self.t.detach().cpu().to(torch.float64).numpy()
        return np.sort(values[(values > t[0]) & (values < t[-1])])

    def restore(self, flat: Tensor):
        """Return (n_times, n) states as the user wants them."""
        return self.layout.restore(flat, (len(flat),))


def check_state(y0) -> None:
    """Raise unless y0 is a tensor or a tuple of tensors."""
    if isinstance(y0, Tensor):
        return
    if not isinstance(y0, tuple | list) or len(y0) == 0:
        raise TypeError(
            f"y0 must be a tensor or a tuple of tensors. Got {type(y0).__name__}."
        )
    for part in y0:
        if not isinstance(part, Tensor):
            raise TypeError(f"y0 must hold tensors. Got {type(part).__name__}.")


def check_times(t) -> None:
    """Raise unless t is a vector of strictly monotonic real times."""
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a torch tensor. Got {type(t).__name__} instead.")
    if not t.is_floating_point():
        raise TypeError(f"t must be of a floating dtype. Got {t.dtype} instead.")
    if t.ndim != 1 or len(t) == 0:
        raise invalid("t", "of shape (n_times,)", tuple(t.shape))
    change = torch.diff(t.detach())
    if not bool((change > 0).all() or (change < 0).all()):
        expected = "strictly increasing or decreasing"
        raise invalid("t", expected, t.tolist() if len(t) < 8 else "other times")


def check_options(method: str, family: str, options) -> dict[str, Any]:
    """Return the options that the method knows; warn about others."""
    options = {} if options is None else dict(options)
    unknown = sorted(set(options) - OPTIONS[family])
    if unknown:
        warnings.warn(
            f"options of {method!r} have no meaning: {', '.join(unknown)}. "
            f"Known are {', '.join(sorted(OPTIONS[family]))}.",
            stacklevel=4,
        )
    for name in unknown:
        del options[name]
    if options.get("step_size") is not None and options.get("grid_constructor"):
        raise invalid("options", "without one of step_size, grid_constructor", "both")
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise invalid("interp", "'linear' or 'cubic'", interp)
    for name in ("norm", "grid_constructor"):
        if options.get(name) is None:
            options.pop(name, None)
        elif not callable(options[name]):
            raise TypeError(f"{name} must be callable. Got {options[name]!r}.")
    return options


class Monitor:
    """Calls the user's callbacks; counts steps between output times.

    Parameters
    ----------
    problem : Problem
        Its field has the callbacks.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        names = zip(("on_step", "on_accept", "on_reject"), CALLBACKS, strict=True)
        calls = problem.callbacks
        for name, callback in names:
            call = calls.get(callback)
            setattr(self, name, partial(self._tell, call) if call else _ignore)
        self._limit = problem.options.get("max_num_steps", math.inf)
        if math.isfinite(self._limit):
            self._tell_step, self.on_step = self.on_step, self._count
            self._times = problem.sign * problem.t.detach().cpu().double().numpy()
            self._interval, self._n_steps = 0, 0

    @property
    def needed(self) -> bool:
        """Whether there is anybody to be told."""
        return bool(self.problem.callbacks) or math.isfinite(self._limit)

    def _tell(self, call, t: float, y: Tensor, h: float) -> None:
        like = self.problem.t
        dtype = torch.float64 if self.problem.family == "adaptive" else like.dtype
        t, h = (torch.tensor(x, dtype=dtype, device=like.device) for x in (t, h))
        call(t, self.problem.layout.restore(y.view(-1)), h)

    def _count(self, t: float, y: Tensor, h: float) -> None:
        """Give up when too many steps were taken since the last output time."""
        ascending = self.problem.sign * t
        interval = np.searchsorted(self._times, ascending, side="right")
        if interval > self._interval:
            self._interval, self._n_steps = interval, 0
        if self._n_steps >= self._limit:
            raise OdeintError(
                f"max_num_steps was exceeded at t = {t:.6g}: {self._limit} steps were "
                "taken since the last output time. Raise it, or loosen rtol and atol."
            )
        self._n_steps += 1
        self._tell_step(t, y, h)


def _ignore(t, y, h) -> None:
    """Nobody wants to know."""
