"""What pictures of states ask fitted estimators for: paths, and what moves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sknode._odenet_base import BaseODENet
from sknode._series.keys import encode_series
from sknode.density import CNFDensity
from sknode.timeseries import LatentODERegressor

__all__ = ["Paths", "last_step", "read_paths"]

# What has states, with the names for messages.
KINDS = {
    BaseODENet: "an ODENetClassifier or ODENetRegressor",
    CNFDensity: "a CNFDensity",
    LatentODERegressor: "a LatentODERegressor",
}


@dataclass(frozen=True)
class Paths:
    """States on their way, a row for each: the paths one after another.

    Attributes
    ----------
    path : ndarray of shape (n_states,)
        Which path a state is of: the row of X, or the name of a series.
    row : ndarray of shape (n_states,)
        The row of X that a state belongs to.
    time : array-like of shape (n_states,)
        Times, ascending within a path.
    states : ndarray of shape (n_states, n_dims)
        The states.
    names : list of str
        What the dimensions are called.
    velocity : callable or None
        ``velocity(t, states)`` returns the vector field (n, n_dims) at a time or times
        (n,), if there is one that is the same for all paths.
    steady : bool
        Whether that is the same at all times.
    """

    path: np.ndarray
    row: np.ndarray
    time: object
    states: np.ndarray
    names: list
    velocity: Callable | None
    steady: bool = False


def last_step(estimator, X):
    """Return the last step of a pipeline, and rows as it gets them.

    Any other estimator is its own last step.

    Parameters
    ----------
    estimator : object
        What the user passed.
    X : array-like
        Rows.

    Raises
    ------
    TypeError
        If the last step is none of `KINDS`.
    """
    last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    if not isinstance(last, tuple(KINDS)):
        raise TypeError(
            f"estimator must be {', '.join(KINDS.values())}, or a pipeline that ends "
            f"in one. Got {type(last).__name__} instead."
        )
    check_is_fitted(last)
    if last is not estimator and len(estimator) > 1:
        X = estimator[:-1].transform(X)
    return last, X


def read_paths(estimator, X, y, n_times):
    """Return the `Paths` of rows and the last step of the estimator."""
    readers = {
        BaseODENet: _read_net,
        CNFDensity: _read_density,
        LatentODERegressor: _read_latent,
    }
    last, X = last_step(estimator, X)
    read = next(read for kind, read in readers.items() if isinstance(last, kind))
    return read(last, X, y, n_times), last


def _read_net(net, X, y, n_times):
    """Return the paths of hidden states."""
    states = net.trajectory(X, n_times)
    states = states.reshape(*states.shape[:2], -1)
    names = [f"state {i}" for i in range(states.shape[2])]

    def velocity(t, y):
        return net._velocity(np.broadcast_to(t, len(y)).astype(np.float64), y)

    return _as_paths(states, names, velocity)


def _read_density(density, X, y, n_times):
    """Return the paths from the normal distribution to the rows."""
    rows = density.trajectory(X, n_times, y=y)
    names = [name if isinstance(name, str) else f"x{name}" for name in density._names()]
    given = density._maps.condition.encode(y, len(rows))
    if (given != given[0]).any():  # every row has a field of its own
        return _as_paths(rows, names, None)

    def velocity(t, y):
        # the times of a grid over time are few
        slopes = np.empty(y.shape)
        times = np.broadcast_to(t, len(y))
        for time in np.unique(times):
            at = times == time
            condition = np.tile(given[0], (at.sum(), 1))
            slopes[at] = density._velocity(float(time), y[at], condition)
        return slopes

    return _as_paths(rows, names, velocity)


def _read_latent(regressor, X, y, n_times):
    """Return the paths of latent states through the rows of every series."""
    states = regressor.trajectory(X)
    rows = regressor._layout.read(regressor._check_table(X))
    codes, _ = encode_series(rows.ids)
    order = np.lexsort((rows.time, codes))
    n_dims = states.shape[1]

    def velocity(t, y):
        return regressor._velocity(y)

    return Paths(
        rows.ids[order],
        order,
        regressor._layout.to_times(rows.time[order]),
        states[order],
        [f"latent {i}" for i in range(n_dims)],
        velocity if n_dims > 1 else None,
        steady=True,
    )


def _as_paths(states, names, velocity):
    """Return paths of the same times, of states (n_rows, n_times, n_dims)."""
    n, n_times, n_dims = states.shape
    path = np.repeat(np.arange(n), n_times)
    time = np.tile(np.linspace(0, 1, n_times), n)
    return Paths(path, path, time, states.reshape(-1, n_dims), names, velocity)
