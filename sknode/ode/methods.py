"""The methods by name: what each can do, and how it is put to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sknode.ode import tableaus
from sknode.ode.runge_kutta import ExplicitStepper
from sknode.ode.stepper import Stepper
from sknode.ode.tableaus import Tableau, get_tableau

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
    make_stepper : callable
        ``make_stepper(field, options)`` returns its `Stepper`.
    tableau : Tableau or None
        Coefficients of an explicit Runge-Kutta method.
    gradients : tuple of str
        The values of ``gradient`` that it serves.
    constant_steps : bool
        Whether it can take constant steps.
    """

    name: str
    adaptive: bool
    make_stepper: Callable[..., Stepper]
    tableau: Tableau | None = None
    gradients: tuple[str, ...] = GRADIENTS
    constant_steps: bool = True


def _explicit(name: str) -> Method:
    tableau = get_tableau(name)
    return Method(name, tableau.adaptive, ExplicitStepper, tableau)


_METHODS = {name: _explicit(name) for name in tableaus.METHODS}

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
