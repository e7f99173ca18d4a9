"""What every estimator shares: parameters, device and dtype, persistence."""

from __future__ import annotations

import copy
import functools
import os
import threading
import warnings
from numbers import Integral, Real

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import (
    Interval,
    StrOptions,
    validate_parameter_constraints,
)
from sklearn.utils.validation import validate_data

from sknode._compat import CallbackSupportMixin
from sknode._network import SolverSettings
from sknode._training import Recipe
from sknode._warning import stacklevel_of_caller
from sknode.fields import ACTIVATIONS
from sknode.ode import METHODS, SolverWarning
from sknode.ode.integrate import ROW_BLOCK
from sknode.ode.methods import get_method
from sknode.ode.solution import failure_report

__all__ = [
    "SHARED_CONSTRAINTS",
    "BaseODEEstimator",
    "all_or_nothing",
    "as_sizes",
    "near_one",
    "outcome",
    "padded_blocks",
    "warn_of_failures",
]

# Page of an estimator in the reference, which its HTML representation links to.
DOC_PAGE = (
    "https://sknode.readthedocs.io/en/stable/generated/sknode.{estimator_name}.html"
)

# Held while torch's random state, of which a process has one, is another for a moment.
_random_state_lock = threading.RLock()


def _renew_lock():
    global _random_state_lock
    _random_state_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # the thread that held it may not be there in the child
    os.register_at_fork(after_in_child=_renew_lock)

# What scikit-learn removes itself after a fit, also after one that failed.
TORN_DOWN = {"_callback_fit_ctx", "_skl_callbacks_to_teardown"}

SHARED_CONSTRAINTS = {
    "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
    "activation": [StrOptions(set(ACTIVATIONS))],
    "solver": [StrOptions(set(METHODS))],
    "rtol": [Interval(Real, 0, None, closed="neither")],
    "atol": [Interval(Real, 0, None, closed="left")],
    "max_steps": [Interval(Integral, 1, None, closed="left")],
    "step_size": [Interval(Real, 0, 1, closed="right")],
    "gradient": [StrOptions({"discrete", "continuous", "backprop"})],
    "optimizer": [StrOptions({"adam", "muon"})],
    "alpha": [Interval(Real, 0, None, closed="left")],
    "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
    "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "tol": [Interval(Real, 0, None, closed="left")],
    "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
    "early_stopping": ["boolean"],
    "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
    "warm_start": ["boolean"],
    "device": [str],
    "dtype": [StrOptions({"auto", "float32", "float64"})],
    "verbose": ["verbose"],
    "random_state": ["random_state"],
}


class BaseODEEstimator(CallbackSupportMixin, BaseEstimator):
    """Base of the estimators.

    A subclass sets ``module_`` and, with it, ``_module_config``, the arguments that
    ``_make_module`` builds it from.
    """

    _parameter_constraints = SHARED_CONSTRAINTS
    _doc_link_module = "sknode"
    _doc_link_template = DOC_PAGE

    def _validate(self, X, y="no_validation", reset=False, **kwargs):
        """Check X (and y) as all estimators do."""
        if sparse.issparse(X):
            raise TypeError(
                f"Sparse data was passed to {type(self).__name__}, but dense data is "
                "required. Reduce it with sklearn.decomposition.TruncatedSVD first, or "
                "use X.toarray() if it fits into memory."
            )
        dtype = [np.float64, np.float32]
        frame = X if hasattr(X, "iloc") and hasattr(X, "columns") else None
        # NumPy takes dates for numbers of nanoseconds, if there is nothing else
        if frame is not None and any(dtype.kind in "mM" for dtype in frame.dtypes):
            check_numbers(frame)
        try:
            return validate_data(self, X, y, dtype=dtype, reset=reset, **kwargs)
        except Exception:
            if frame is not None:
                check_numbers(frame)
            raise

    def _device(self) -> torch.device:
        """Resolve the device parameter."""
        name = self.device
        if name == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            return accelerator or torch.device("cpu")
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device={name!r} cannot be used here: {error}. Use device='cpu' or "
                "device='auto'."
            ) from error
        return device

    def _dtype(self, X: np.ndarray, device: torch.device) -> torch.dtype:
        """Resolve the dtype parameter: that of X, or float32 on an accelerator."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        if device.type != "cpu" or X.dtype == np.float32:
            return torch.float32
        return torch.float64

    def _solver_settings(self, dtype: torch.dtype, floor: float = 0) -> SolverSettings:
        """Collect the solver parameters as they are now, with tolerances that are at
        least ``floor``.
        """
        # a prediction reads what may have been set since fit
        names = "solver", "rtol", "atol", "max_steps", "step_size", "gradient"
        validate_parameter_constraints(
            {name: SHARED_CONSTRAINTS[name] for name in names},
            {name: getattr(self, name) for name in names},
            caller_name=type(self).__name__,
        )
        rtol, least = max(self.rtol, floor), 4 * torch.finfo(dtype).eps
        if rtol < least:
            warnings.warn(
                f"rtol={rtol:g} is below what {dtype} can carry; using {least:.2g}. "
                "Use dtype='float64' or a larger rtol.",
                UserWarning,
                stacklevel=stacklevel_of_caller(),
            )
            rtol = least
        adaptive = get_method(self.solver).adaptive
        return SolverSettings(
            method=self.solver,
            rtol=float(rtol),
            atol=float(max(self.atol, floor)),
            max_steps=int(self.max_steps),
            gradient=self.gradient,
            step_size=None if adaptive else float(self.step_size),
        )

    def _hidden_layer_sizes(self) -> tuple[int, ...]:
        """Resolve hidden_layer_sizes: a number is one layer."""
        return as_sizes(self.hidden_layer_sizes, "hidden_layer_sizes")

    # largest batch that is chosen by itself
    _largest_batch = 200

    def _recipe(self, n_samples: int, max_iter: int, n_updates: int = 8) -> Recipe:
        """Collect the learning parameters; "auto" makes ``n_updates`` an epoch."""
        batch_size = self.batch_size
        if batch_size == "auto":
            # at least that many updates an epoch, but no batches of a few rows
            batch_size = max(32, -(-n_samples // n_updates))
            batch_size = min(batch_size, self._largest_batch, n_samples)
        elif batch_size > n_samples:
            warnings.warn(
                f"batch_size={batch_size} is larger than the number of samples; using "
                f"{n_samples}.",
                UserWarning,
                stacklevel=stacklevel_of_caller(),
            )
            batch_size = n_samples
        return Recipe(
            max_iter=max_iter,
            batch_size=int(batch_size),
            learning_rate=float(self.learning_rate_init),
            alpha=float(self.alpha),
            tol=float(self.tol),
            n_iter_no_change=self.n_iter_no_change,
            ends=not self.warm_start and max_iter > 1,
            optimizer=self.optimizer,
            verbose=bool(self.verbose),
            name=type(self).__name__,
        )

    def _new_module(self, config: dict, dtype, device, seed: int):
        """Build and initialise the module, from a seed and on the CPU.

        The start is then the same on every device, and torch's global random state is
        left alone.
        """
        with _random_state_lock, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self._make_module(**config)
        return module.to(device=device, dtype=dtype)

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _module_for_prediction(self):
        """Return the module on the device that the parameter names now."""
        device = self._device()
        parameter = next(self.module_.parameters())
        if parameter.device != device:
            return copy.deepcopy(self.module_).to(device)
        return self.module_

    def __getstate__(self):
        """Return a state of plain Python and NumPy objects on the CPU.

        It can be read anywhere, with or without the accelerator that fit used, and by
        tools that know nothing of torch.
        """
        state = dict(super().__getstate__())
        if state.get("module_") is not None:
            weights = state.pop("module_").state_dict()
            state["_module_weights"] = {
                k: v.detach().cpu().numpy().copy() for k, v in weights.items()
            }
        if state.get("_optimizer_state") is not None:
            state["_optimizer_state"] = to_numpy(state["_optimizer_state"])
        return state

    def __setstate__(self, state):
        state = dict(state)
        weights = state.pop("_module_weights", None)
        if state.get("_optimizer_state") is not None:
            state["_optimizer_state"] = to_torch(state["_optimizer_state"])
        super().__setstate__(state)
        if weights is not None:
            dtype = torch.from_numpy(next(iter(weights.values()))).dtype
            module = self._new_module(self._module_config, dtype, "cpu", 0)
            # a copy: what was read may be memory that cannot be written
            module.load_state_dict(
                {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}
            )
            self.module_ = module.eval()


def all_or_nothing(fit):
    """Let a method that fits leave the estimator as it was where it raises an error.

    Half of a fit and half of an earlier one would predict nonsense.
    """

    @functools.wraps(fit)
    def whole_fit(self, *args, **kwargs):
        before = dict(vars(self))
        try:
            return fit(self, *args, **kwargs)
        except BaseException:
            for name in set(vars(self)) - set(before) - TORN_DOWN:
                delattr(self, name)
            vars(self).update(before)
            raise

    return whole_fit


def as_sizes(sizes, name):
    """Return sizes of layers as a tuple: a number is one layer."""
    given = sizes
    sizes = (sizes,) if isinstance(sizes, Integral) else tuple(sizes)
    good = all(isinstance(s, Integral) and s > 0 for s in sizes)
    if not sizes or not good:
        raise ValueError(
            f"{name} must be one or more positive integers. Got {given!r} instead."
        )
    return tuple(int(s) for s in sizes)


def check_numbers(frame):
    """Raise an error that names the columns of a frame that are not numbers."""
    names = frame.columns
    if not names.is_unique:
        raise ValueError(
            "X must have a name for each column. Got several columns of the name "
            f"{', '.join(map(repr, names[names.duplicated()].unique()))}."
        )
    bad = [
        f"{name!r} ({column.dtype})"
        for name, column in frame.items()
        if column.dtype.kind in "mM" or not _can_be_numbers(column)
    ]
    if bad:
        raise ValueError(
            f"X must have columns of numbers. Got {', '.join(bad)}. Encode categories, "
            "e.g. by sklearn.preprocessing.OneHotEncoder in a ColumnTransformer, and "
            "turn dates into numbers."
        )


def _can_be_numbers(column):
    try:
        column.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        return False
    return True


def near_one(weight):
    """Return weights divided by a power of two, so that their largest is from 1 to 2,
    and its exponent.

    Their sums and squares then stay finite, and their ratios the same to the bit.
    """
    exponent = int(np.frexp(weight.max())[1]) - 1
    return np.ldexp(weight, -exponent), exponent


def padded_blocks(rows, rows_each):
    """Yield the rows in blocks filled up to what solvers like, and how many are real.

    A full block has the same bits in whatever company a row comes.

    Parameters
    ----------
    rows : ndarray of shape (n, n_columns)
        Rows, at least one.
    rows_each : int
        Size of a block, rounded up to a multiple of the solver's.
    """
    rows_each = max(1, -(-rows_each // ROW_BLOCK)) * ROW_BLOCK
    for first in range(0, len(rows), rows_each):
        block = rows[first : first + rows_each]
        n, missing = len(block), -len(block) % ROW_BLOCK
        yield n, np.concatenate([block, block[-1:].repeat(missing, axis=0)])


def outcome(solution, n):
    """Return how a solve ended for the first rows: statuses and times reached, (n,)."""
    return tuple(x[:n].numpy(force=True) for x in (solution.status, solution.t_reached))


def warn_of_failures(blocks):
    """Warn about rows that the solver did not finish.

    Parameters
    ----------
    blocks : list of list
        What `outcome` returns for each solve of a block of rows, block by block.
    """
    failures = []
    for solve in zip(*blocks, strict=True):
        codes, times = map(np.concatenate, zip(*solve, strict=True))
        if codes.any():
            failures.append(failure_report(codes, times))
    if any(failures):
        warnings.warn(
            "The solver did not reach the end for some rows of X, whose results are "
            f"those of the last state it reached. {' '.join(failures)}",
            SolverWarning,
            stacklevel=stacklevel_of_caller(),
        )


def to_numpy(state):
    """Return an optimizer's state with arrays for tensors."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().numpy().copy()
    if isinstance(state, dict):
        return {k: to_numpy(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return [to_numpy(v) for v in state]
    return state


def to_torch(state):
    """Undo `to_numpy`."""
    if isinstance(state, np.ndarray):
        return torch.from_numpy(np.array(state))
    if isinstance(state, dict):
        return {k: to_torch(v) for k, v in state.items()}
    if isinstance(state, list):
        return [to_torch(v) for v in state]
    return state
