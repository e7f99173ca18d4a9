"""The methods by name: what each can do, and how it is put to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sknode.ode import tableaus
from sknode.ode.implicit import RosenbrockStepper
from sknode.ode.multistep import AdamsStepper
from sknode.ode.runge_kutta import ExplicitStepper
from sknode.ode.scipy_solvers import SCIPY_METHODS, solve_by_scipy
from sknode.ode.stepper import Stepper
from sknode.ode.tableaus import Tableau, get_tableau
from sknode.ode.trace import Trace

__all__ = ["METHODS", "Method", "get_method"]

GRADIENTS = ("discrete", "continuous", "backprop")


@dataclass(frozen=True)
class Method:
    """A method as `solve_ode` knows it.

    Attributes
    ----------
    name : str
        Its name.
    adaptive : bool
        Whether it estimates its error; otherwise it needs a step size.
    make_stepper : callable or None
        ``make_stepper(field, options)`` returns its `Stepper`.
    tableau : Tableau or None
        Coefficients of an explicit Runge-Kutta method.
    gradients : tuple of str
        The values of ``gradient`` that it serves.
    constant_steps : bool
        Whether it can take constant steps.
    complex_states : bool
        Whether states may be complex.
    backward : str or None
        The method for the solve backwards of the continuous adjoint, if another one.
    loop : callable or None
        What takes the place of `integrate`, for methods without stepper.
    """

    name: str
    adaptive: bool
    make_stepper: Callable[..., Stepper] | None
    tableau: Tableau | None = None
    gradients: tuple[str, ...] = GRADIENTS
    constant_steps: bool = True
    complex_states: bool = True
    backward: str | None = None
    loop: Callable[..., Trace] | None = None


def _explicit(name: str) -> Method:
    tableau = get_tableau(name)
    return Method(name, tableau.adaptive, ExplicitStepper, tableau)


def _of_scipy(name: str) -> Method:
    return Method(
        name,
        True,
        make_stepper=None,
        gradients=("continuous",),
        constant_steps=False,
        complex_states=name not in ("scipy_radau", "scipy_lsoda"),
        backward="dopri5",
        loop=partial(solve_by_scipy, name),
    )


_METHODS = {name: _explicit(name) for name in tableaus.METHODS}
_METHODS["adams"] = Method(
    "adams", True, AdamsStepper, gradients=("continuous",), constant_steps=False
)
_METHODS["rodas5p"] = Method(
    "rodas5p",
    True,
    RosenbrockStepper,
    gradients=("discrete", "backprop"),
    complex_states=False,
)
_METHODS |= {name: _of_scipy(name) for name in SCIPY_METHODS}

METHODS = tuple(_METHODS)
"""Names of the methods that `solve_ode` takes."""


def get_method(name: str | Method) -> Method:
    """Return a method by name; a `Method` is returned as it is.

    Raises
    ------
    ValueError
        If the name is unknown; the message lists the known ones.
    """
    if isinstance(name, Method):
        return name
    if name not in _METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}. Got {name!r} instead."
        )
    return _METHODS[name]
