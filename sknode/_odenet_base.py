"""What ODE-Net classifiers and regressors share: from checked data to a solve."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import torch
from scipy import sparse
from sklearn.model_selection import train_test_split
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from sknode._base import (
    SHARED_CONSTRAINTS,
    BaseODEEstimator,
    all_or_nothing,
    near_one,
    outcome,
    padded_blocks,
    warn_of_failures,
)
from sknode._images import shift_at_random
from sknode._network import ImageNetwork, TabularNetwork
from sknode._optimizers import make_optimizer
from sknode._training import History, train
from sknode._warning import stacklevel_of_caller
from sknode._warp import check_spread

__all__ = ["BaseODENet", "usable_scale"]

# Predictions are made in blocks of so many numbers in the states, to bound memory; and
# of at most so many rows.
CHUNK_VALUES = 2**20
CHUNK_ROWS = 4096

# Images are halved until the shorter side is no longer than this, and shifted in
# training by one pixel for so many of them.
SMALL_IMAGE = 8
PIXELS_PER_SHIFT = 16

# Dimensions to let flows of a few features pass by each other. Where there are many,
# they find a way and the dimensions only cost time.
AUGMENT_DIM = 2
FEW_FEATURES = 16


class BaseODENet(BaseODEEstimator):
    """Base of the ODE-Nets.

    A subclass says what targets are, by the first methods below.
    """

    _parameter_constraints: ClassVar[dict] = {
        **SHARED_CONSTRAINTS,
        "image_shape": ["array-like", None],
        "n_channels": [Interval(Integral, 1, None, closed="left")],
        "n_downsamplings": [Interval(Integral, 0, None, closed="left"), None],
        "random_shift": [
            StrOptions({"auto"}),
            Interval(Integral, 0, None, closed="left"),
        ],
        "augment_dim": [
            StrOptions({"auto"}),
            Interval(Integral, 0, None, closed="left"),
        ],
        "vector_field": [callable, None],
        "kinetic_penalty": [Interval(Real, 0, None, closed="left")],
        "jacobian_penalty": [Interval(Real, 0, None, closed="left")],
    }
    # how validate_data looks at y
    _y_checks: ClassVar[dict] = {}

    # --- for the subclasses: what targets are -----------------------------------------

    def _check_targets(self, X, y, sample_weight, going_on, classes=None):
        """Return targets and the weight of every row."""
        raise NotImplementedError

    def _see_targets(self, y, going_on):
        """Learn what targets are, or make sure that they are still the same."""
        raise NotImplementedError

    def _check_validation_targets(self, y_val):
        """Return targets for validation after checking that they fit."""
        raise NotImplementedError

    def _scale_targets(self, y, weight):
        """Learn the units of the targets from the training data; return outputs."""
        raise NotImplementedError

    def _encode(self, y, dtype) -> torch.Tensor:
        """Return targets as the loss wants them."""
        raise NotImplementedError

    def _losses(self, outputs, targets) -> torch.Tensor:
        """Return the loss of every row."""
        raise NotImplementedError

    def _score_outputs(self, outputs, y, weight) -> float:
        """Return a score of predictions, larger is better."""
        raise NotImplementedError

    def _strata(self, y):
        """Return what a split has to keep the shares of, or None."""
        return None

    # --- input ------------------------------------------------------------------------

    def _validate(self, X, y="no_validation", reset=False, **kwargs):
        """Check X (and y); say how images have to come."""
        if getattr(X, "ndim", 2) > 2:
            raise ValueError(
                f"Found array with dim {X.ndim}, while X must have a row a sample. For "
                "images of shape (n_samples, channels, height, width) pass "
                "X.reshape(n_samples, -1) and image_shape=(channels, height, width); "
                "with the channels last, X.transpose(0, 3, 1, 2) first."
            )
        if sparse.issparse(y):
            raise TypeError("y must be dense. Got a sparse array: pass y.toarray().")
        # pandas has a missing value that NumPy cannot compare
        if hasattr(y, "isna") and np.asarray(y.isna()).any():
            raise ValueError("Input y contains NaN.")
        return super()._validate(X, y, reset, **kwargs)

    # --- fitting ----------------------------------------------------------------------

    @all_or_nothing
    def _fit(self, X, y, sample_weight, X_val, y_val, sample_weight_val):
        """Fit from scratch, or go on with ``warm_start``."""
        going_on = self.warm_start and hasattr(self, "module_")
        X, y = self._validate(X, y, reset=not going_on, **self._y_checks)
        y, weight = self._check_targets(X, y, sample_weight, going_on)
        weight, exponent = near_one(weight)
        kept = weight > 0
        X, y, weight = X[kept], y[kept], weight[kept]
        self._see_targets(y, going_on)
        validation = self._validation_data(X_val, y_val, sample_weight_val)
        seed = self._seed()
        if self.early_stopping and validation is None:
            X, y, weight, *validation = self._hold_out(X, y, weight, seed)
        if going_on:
            self._check_unchanged(X)
            seed = self._next_seed(seed)
        else:
            self._start(X, y, weight, seed)
        self._weight_seen = total_weight(weight, exponent)
        self._train(X, y, weight, validation, self.max_iter, seed, self._weight_seen)
        return self

    def _next_seed(self, seed):
        """Return a seed for going on: other batches than in the epochs before."""
        return (seed + self._n_epochs) % (2**31 - 1)

    @all_or_nothing
    def _partial_fit(self, X, y, sample_weight, classes=None):
        """Go over the data once."""
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True.")
        first = not hasattr(self, "module_")
        X, y = self._validate(X, y, reset=first, **self._y_checks)
        y, weight = self._check_targets(X, y, sample_weight, not first, classes)
        weight, exponent = near_one(weight)
        if classes is not None:
            self._see_targets(classes, not first)
        self._see_targets(y, not first or classes is not None)
        kept = weight > 0
        X, y, weight = X[kept], y[kept], weight[kept]
        seed = self._seed()
        if first:
            self._start(X, y, weight, seed)
        else:
            self._check_unchanged(X)
            seed = self._next_seed(seed)
        before = 0.0 if first else self._weight_seen
        self._weight_seen = before + total_weight(weight, exponent)
        self._train(X, y, weight, None, 1, seed, self._weight_seen, keep_history=True)
        return self

    def _check_weights(self, sample_weight, X):
        """Return weights that are not negative and not all zero."""
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        if not (weight > 0).any():
            raise ValueError("sample_weight must have at least one positive weight.")
        return weight

    def _validation_data(self, X_val, y_val, sample_weight_val):
        """Check data passed for validation."""
        if X_val is None:
            if y_val is not None or sample_weight_val is not None:
                raise ValueError("y_val and sample_weight_val need X_val.")
            return None
        if y_val is None:
            raise ValueError("X_val needs y_val.")
        try:
            X_val, y_val = self._validate(X_val, y_val, **self._y_checks)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(re.sub(r"\b([Xy])\b", r"\1_val", str(error))) from error
        y_val = self._check_validation_targets(y_val)
        try:
            weight, _ = near_one(self._check_weights(sample_weight_val, X_val))
        except ValueError as error:
            raise ValueError(f"sample_weight_val: {error}") from error
        self._check_validation(y_val[weight > 0])
        return X_val, y_val, weight

    def _hold_out(self, X, y, weight, seed):
        """Split off a part for validation."""
        try:
            X, X_val, y, y_val, weight, weight_val = train_test_split(
                X,
                y,
                weight,
                test_size=self.validation_fraction,
                random_state=seed,
                stratify=self._strata(y),
            )
        except ValueError as error:
            raise ValueError(
                f"early_stopping cannot hold out validation_fraction="
                f"{self.validation_fraction:g} of {len(X)} samples: too few are held "
                "out or left for training. Use another validation_fraction, pass X_val "
                "or more samples. "
                f"{error}"
            ) from error
        self._check_rest(y)
        self._check_validation(y_val)
        return X, y, weight, X_val, y_val, weight_val

    def _check_rest(self, y):
        """Raise if a part for training lacks something."""

    def _check_validation(self, y_val):
        """Raise if there is no score on targets for validation."""

    # --- the network ------------------------------------------------------------------

    def _start(self, X, y, weight, seed):
        """Build the module for this data."""
        device = self._device()
        n_outputs = self._scale_targets(y, weight)
        self._module_config = {"n_outputs": n_outputs, **self._network_config(X)}
        dtype = self._dtype(X, device)
        module = self._new_module(self._module_config, dtype, device, seed)
        mean, scale = self._moments(X, weight)
        module.mean.copy_(torch.from_numpy(mean))
        module.scale.copy_(torch.from_numpy(scale))
        # single precision would lose columns that are far from zero
        by_hand = dtype == torch.float32 and self.image_shape is None
        self._standard = (mean, scale) if by_hand else None
        self.module_ = module
        self._optimizer_state = None
        self._n_epochs = 0

    def _network_config(self, X):
        """Return what the parameters and the rows say of the network."""
        sizes = {"n_features": X.shape[1]}
        if self.image_shape is not None:
            sizes = self._image_config(X)
        return {
            "hidden_layer_sizes": self._hidden_layer_sizes(),
            "activation": self.activation,
            "augment_dim": self._augment_dim(X.shape[1]),
            "vector_field": self.vector_field,
            **sizes,
        }

    def _check_unchanged(self, X):
        """Raise if parameters ask for another network than the one to go on with."""
        before, now = self._module_config, self._network_config(X)
        changed = [name for name in now if before.get(name) != now[name]]
        if "image_shape" in {*before} ^ {*now}:
            changed = ["image_shape"]
        precision = next(self.module_.parameters()).dtype
        if self.dtype != "auto" and getattr(torch, self.dtype) != precision:
            changed.append("dtype")
        if changed:
            raise ValueError(
                f"{type(self).__name__} cannot go on from a fit with another value of "
                f"{', '.join(changed)}. Use a new estimator."
            )

    def _augment_dim(self, n_features):
        """Resolve augment_dim."""
        if self.augment_dim != "auto":
            return int(self.augment_dim)
        few = self.image_shape is None and n_features <= FEW_FEATURES
        return AUGMENT_DIM if few else 0

    def _image_config(self, X):
        """Return the sizes of the network for images."""
        shape = tuple(self.image_shape)
        good = len(shape) == 3 and all(isinstance(n, Integral) and n > 0 for n in shape)
        if not good:
            raise ValueError(
                "image_shape must be three positive integers: channels, height and "
                f"width. Got {self.image_shape!r} instead."
            )
        if shape[0] == shape[1] and shape[2] in (1, 3, 4) and shape[0] > 4:
            warnings.warn(
                f"image_shape={shape} are {shape[0]} channels of {shape[1]}x{shape[2]} "
                "pixels: channels come first. If these are images with the channels "
                "last, pass images.transpose(0, 3, 1, 2).reshape(n_samples, -1) and "
                f"image_shape={(shape[2], *shape[:2])}.",
                stacklevel=stacklevel_of_caller(),
            )
        if np.prod(shape) != X.shape[1]:
            raise ValueError(
                f"image_shape={shape} makes {np.prod(shape)} features, but X has "
                f"{X.shape[1]}: X must have shape (n_samples, channels * height * "
                "width)."
            )
        n_halvings = self.n_downsamplings
        if n_halvings is None:
            n_halvings, side = 0, min(shape[1:])
            while side > SMALL_IMAGE:
                n_halvings, side = n_halvings + 1, -(-side // 2)
        if max(shape[1:]) <= 2**n_halvings:
            raise ValueError(
                f"n_downsamplings={n_halvings} leaves a single pixel of images of "
                f"{shape[1]}x{shape[2]}: normalisation makes all images alike there."
            )
        return {
            "image_shape": tuple(int(n) for n in shape),
            "n_channels": int(self.n_channels),
            "n_downsamplings": int(n_halvings),
        }

    def _moments(self, X, weight):
        """Return weighted mean and scale: of features, or of channels of images."""
        if self.image_shape is None:
            names = getattr(self, "feature_names_in_", np.arange(X.shape[1]))
            check_spread(X, weight, names, "X")
            mean = np.average(X, axis=0, weights=weight)
            scale = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weight))
        else:
            pixels = X.reshape(len(X), self.image_shape[0], -1)
            mean = np.average(pixels.mean(2, dtype=np.float64), axis=0, weights=weight)
            squares = ((pixels - mean[:, None]) ** 2).mean(2, dtype=np.float64)
            scale = np.sqrt(np.average(squares, axis=0, weights=weight))
            mean, scale = mean[:, None, None], scale[:, None, None]
        return mean, usable_scale(mean, scale, X)

    def _make_module(self, **config):
        network = ImageNetwork if "image_shape" in config else TabularNetwork
        return network(**config)

    @property
    def _largest_batch(self):
        # an image gives more gradient than a row does
        return 200 if self.image_shape is None else 64

    def _dtype(self, X, device):
        """Resolve the dtype parameter: single precision for images."""
        if self.dtype == "auto" and self.image_shape is not None:
            return torch.float32
        return super()._dtype(X, device)

    def _is_standardised(self):
        """Return whether the module gets rows that are standardised already."""
        # no attribute of pickles from before there was one
        return getattr(self, "_standard", None) is not None

    def _standardise(self, X):
        """Return rows as the module gets them, in double precision if standardised."""
        if not self._is_standardised():
            return X
        mean, scale = self._standard
        return (X - mean) / scale

    # --- training ---------------------------------------------------------------------

    def _train(
        self,
        X,
        y,
        weight,
        validation,
        max_iter,
        seed,
        total_weight,
        keep_history=False,
    ) -> None:
        """Run the training loop and set the fitted attributes."""
        module, device = self.module_.train(), self._device()
        module.to(device)
        dtype = next(module.parameters()).dtype
        settings = self._solver_settings(dtype)
        recipe = replace(self._recipe(len(X), max_iter), total_weight=total_weight)
        optimizer = make_optimizer(
            module, recipe.optimizer, recipe.learning_rate, self._optimizer_state
        )
        data = (
            torch.from_numpy(np.array(self._standardise(X))).to(device, dtype),
            self._encode(y, dtype).to(device),
        )
        generator = torch.Generator().manual_seed(seed)
        validate = None
        if validation is not None:
            X_val, y_val, weight_val = validation

            def validate():
                outputs = self._outputs_of_checked(X_val, settings)
                return self._score_outputs(outputs, y_val, weight_val)

        context = self._init_callback_context(max_subtasks=max_iter)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        history = History()
        before = copy.deepcopy(module.state_dict())
        try:
            n_iter = train(
                module,
                data,
                torch.from_numpy(weight).to(device, dtype),
                self._objective(module, settings, generator),
                optimizer,
                recipe,
                generator,
                history,
                validate=validate,
                on_epoch=self._epoch_callback(context, history, X, y),
            )
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) and history.loss):
                # no predictions by weights that diverged or that have seen a part of
                # the rows only, and no warm start from them
                module.eval().load_state_dict(before)
                raise
            warnings.warn(
                "Training interrupted by user.", stacklevel=stacklevel_of_caller()
            )
            n_iter = len(history.loss)
        module.eval()
        self._optimizer_state = optimizer.state_dict()
        self._finish(history, n_iter, validation is not None, keep_history)
        context.call_on_fit_task_end(
            estimator=self, X=X, y=y, reconstruction_attributes={}
        )

    def _objective(self, module, settings, generator):
        """Return the function that gives losses and evaluations of a batch."""
        shift = 0
        if self.image_shape is not None:
            shift = self.random_shift
            if shift == "auto":
                shift = min(module.image_shape[1:]) // PIXELS_PER_SHIFT
        kinetic_penalty = float(self.kinetic_penalty)
        jacobian_penalty = float(self.jacobian_penalty)
        standardised = self._is_standardised()

        def prepare(x):
            if not shift:
                return x
            return shift_at_random(x, module.image_shape, int(shift), generator)

        def plain(x, target):
            x = prepare(x)
            outputs, nfe = module(x, settings, standardised)
            return self._losses(outputs, target), nfe

        def penalized(x, target):
            x = prepare(x)
            probe = None
            if jacobian_penalty:
                # one for all rows: a weight of 2 is then the same as a row twice
                signs = torch.randint(2, module.state_shape, generator=generator)
                probe = (2 * signs - 1).to(x)
            outputs, nfe, kinetic, jacobian = module.forward_with_energy(
                x, settings, probe, standardised
            )
            losses = self._losses(outputs, target) + kinetic_penalty * kinetic
            if jacobian_penalty:
                losses = losses + jacobian_penalty * jacobian
            return losses, nfe

        return penalized if kinetic_penalty or jacobian_penalty else plain

    def _epoch_callback(self, context, history, X, y):
        """Return a function that tells scikit-learn's callbacks of an epoch."""

        def on_epoch(epoch):
            task = context.subcontext(task_name="epoch")
            task.call_on_fit_task_begin(estimator=self, X=X, y=y)
            return task.call_on_fit_task_end(
                estimator=self,
                X=X,
                y=y,
                metadata=history.latest(),
                reconstruction_attributes=lambda: {
                    "module_": copy.deepcopy(self.module_).eval(),
                    "n_iter_": epoch + 1,
                },
            )

        return on_epoch

    def _finish(self, history, n_iter, validated, keep_history):
        """Set the fitted attributes of a training."""
        self._n_epochs += n_iter
        before = keep_history and hasattr(self, "loss_curve_")
        self.loss_curve_ = (self.loss_curve_ if before else []) + history.loss
        self.nfe_curve_ = (self.nfe_curve_ if before else []) + history.nfe
        self.n_iter_ = (self.n_iter_ if before else 0) + n_iter
        self.loss_ = self.loss_curve_[-1] if self.loss_curve_ else None
        self.validation_scores_ = history.validation if validated else None
        self.best_validation_score_ = max(history.validation) if validated else None

    # --- predicting -------------------------------------------------------------------

    def trajectory(self, X, n_times=50):
        """Follow the hidden state of samples from t = 0 to t = 1.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.
        n_times : int, default=50
            Number of equally spaced times, both ends included.

        Returns
        -------
        ndarray of shape (n_samples, n_times, n_features + augment_dim)
            States; with ``image_shape`` of shape (n_samples, n_times, n_channels +
            augment_dim, height, width), with the size of the image inside the network.
        """
        if not isinstance(n_times, Integral) or n_times < 2:
            raise ValueError(f"n_times must be an integer >= 2. Got {n_times!r}.")
        t = torch.linspace(0.0, 1.0, int(n_times), dtype=torch.float64)
        check_is_fitted(self)
        return self._solve(self._validate(X), lambda module, s: s.y, t=t).numpy()

    def _velocity(self, t, states):
        """Return the vector field (n, n_states) at times (n,) and states of rows."""
        module = self._module_for_prediction()
        like = next(module.parameters())
        t, y = (torch.from_numpy(x).to(like) for x in (t, states))
        with torch.no_grad():
            return module.field(t[:, None], y).cpu().numpy()

    def count_evaluations(self, X):
        """Count the evaluations of the vector field that the solver needs.

        Depends on ``solver``, ``rtol`` and ``atol`` as they are now: with a looser
        tolerance a prediction costs less.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Data.

        Returns
        -------
        ndarray of shape (n_samples,)
            Number of function evaluations (NFE) of every sample.
        """
        check_is_fitted(self)
        return self._solve(
            self._validate(X), lambda module, s: s.stats["n_f_evals"]
        ).numpy()

    def _chunks(self, X, module, dtype, n_times):
        """Yield blocks of rows on the device, of a size that bounds the memory."""
        device = next(module.parameters()).device
        values = np.prod(module.state_shape) * max(1, n_times - 1)
        rows_each = int(min(CHUNK_VALUES // values, CHUNK_ROWS))
        for n, block in padded_blocks(X, rows_each):
            yield n, torch.from_numpy(self._standardise(block)).to(device, dtype)

    def _solve(self, X, read, settings=None, t=None):
        """Solve for checked rows and return ``read(module, solution)`` for them."""
        module = self._module_for_prediction()
        dtype = next(module.parameters()).dtype
        settings = settings or self._solver_settings(dtype)
        results, outcomes = [], []
        n_times = 2 if t is None else len(t)
        with torch.no_grad():
            for n, block in self._chunks(X, module, dtype, n_times):
                solution = module.flow(block, settings, t, self._is_standardised())
                outcomes.append([outcome(solution, n)])
                results.append(read(module, solution)[:n].cpu())
        warn_of_failures(outcomes)
        return torch.cat(results)

    def _outputs(self, X):
        """Return the outputs of the network for rows that were not checked yet."""
        check_is_fitted(self)
        return self._outputs_of_checked(self._validate(X))

    def _outputs_of_checked(self, X, settings=None):
        return self._solve(X, lambda module, s: module.output_map(s.y[:, -1]), settings)

    def __sklearn_is_fitted__(self):
        return hasattr(self, "module_")


def total_weight(weight, exponent):
    """Return the sum of weights divided by a power of two, as it was; or infinity."""
    with np.errstate(over="ignore"):
        return float(np.ldexp(weight.sum(), exponent))


def usable_scale(mean, scale, values):
    """Return scales with 1 for what is constant up to rounding.

    That of the values themselves, or that of a sum of so many rows.
    """
    eps, eps_of_sum = np.finfo(values.dtype).eps, np.finfo(np.float64).eps
    rounding = max(10 * eps, len(values) * eps_of_sum) * np.abs(mean)
    return np.where(scale <= rounding, 1.0, scale)
