"""What the estimators of series share: from rows to a fitted model and back."""

from __future__ import annotations

import warnings
from dataclasses import replace
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from sklearn.utils import get_tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_feature_names, _check_n_features

from sknode._base import SHARED_CONSTRAINTS, BaseODEEstimator, as_sizes
from sknode._series.fitting import LEAST_CELLS, fit_series
from sknode._series.keys import encode_series
from sknode._series.model import Predictive
from sknode._series.network import LatentODENetwork
from sknode._series.neural import NeuralMean
from sknode._series.panel import Panel
from sknode._series.posterior import refinement_helps
from sknode._series.scaling import Scaling
from sknode._series.training import Trainer
from sknode._series.windows import WINDOW_ROWS
from sknode._training import History, warn_of_setbacks, warn_unless_converged
from sknode._warning import stacklevel_of_caller
from sknode.ode import SolverWarning

__all__ = ["BaseLatentODE"]

# Updates an epoch that are aimed at, and series in one at most.
N_UPDATES, EPOCH_SERIES = 16, 800
# Solves inside of training need not be more accurate than this.
TRAINING_TOLERANCE = 1e-3
# How often training goes on after a solve that failed.
MOST_SETBACKS = 5
# Draws of latent states that predictions average.
N_DRAWS = 8
# Series that the network is asked about at a time, to bound the memory.
CHUNK_SERIES = 512


class BaseLatentODE(BaseODEEstimator):
    """Base of the estimators of series.

    A subclass reads its input into rows: ids, times, covariates and values.
    """

    _parameter_constraints: ClassVar[dict] = {
        **SHARED_CONSTRAINTS,
        "latent_dim": [Interval(Integral, 1, None, closed="left")],
        "rnn_hidden_size": [Interval(Integral, 1, None, closed="left")],
        "decoder_hidden_layer_sizes": [
            "array-like",
            Interval(Integral, 1, None, closed="left"),
        ],
        "time": [str, Integral],
        "series": [str, Integral, "array-like", None],
        "calendar": [str, "array-like", None],
        "residual": [StrOptions({"ou"}), None],
        "kl_weight": [Interval(Real, 0, None, closed="left")],
    }

    def _check_table(self, X, reset=False):
        """Check X as far as that is possible for columns of any kind."""
        if not hasattr(X, "columns"):
            nan = "allow-nan" if self._takes_nan() else True
            return self._validate(X, reset=reset, ensure_all_finite=nan)
        if not len(X):
            raise ValueError(
                f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 "
                f"is required by {type(self).__name__}."
            )
        _check_feature_names(self, X, reset=reset)
        _check_n_features(self, X, reset=reset)
        return X

    def _takes_nan(self):
        """Return whether X may have missing values."""
        return get_tags(self).input_tags.allow_nan

    # largest batch that is chosen by itself
    _largest_batch = 50

    # --- fitting ----------------------------------------------------------------------

    def _fit_rows(self, rows, values, X, y):
        """Fit to rows and set the fitted attributes.

        Parameters
        ----------
        rows : Rows
            Ids, times and covariates.
        values : ndarray of shape (n_rows, n_channels)
            What was observed, NaN where nothing was.
        X, y : object
            What the user passed, for callbacks.
        """
        if np.isnan(values).all():
            raise ValueError(
                "There is nothing to learn from: no value is observed, all are NaN."
            )
        empty = np.isnan(values).all(axis=0)
        if empty.any():
            names = [self._channel_names()[i] for i in np.flatnonzero(empty)]
            raise ValueError(
                f"No value is observed in the columns {names}: all are NaN. Leave them "
                "out."
            )
        seed, device = self._seed(), self._device()
        rng = np.random.default_rng(seed)
        codes, self._ids = encode_series(rows.ids)
        self.time_unit_ = _time_unit(codes, rows.time)
        self._scaling = Scaling.learn(values, rows.covariates, self._channel_names())
        panel, _ = self._panel(codes, rows, values, len(self._ids))
        history = History()
        context = self._init_callback_context(max_subtasks=self.max_iter)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)

        def train(pieces):
            return self._train(pieces, history, seed, device, context, X, y)

        fraction = self.validation_fraction if self.early_stopping else 0.0
        fitted = fit_series(panel, self.residual is not None, train, fraction, rng)
        self._model, self._seed_ = fitted.model, seed
        self._context = panel
        self.module_ = None if fitted.mean is None else fitted.mean.network
        self._keep_scores(fitted, history)
        self._tell(fitted, values)
        if self.module_ is not None:  # not of a network that is of no use
            warn_of_setbacks(type(self).__name__, history)
            if len(history.loss) == self.max_iter:
                warn_unless_converged(type(self).__name__, self.max_iter, history)
        context.call_on_fit_task_end(
            estimator=self, X=X, y=y, reconstruction_attributes={}
        )
        return self

    def _panel(self, codes, rows, values, n_series):
        """Return the scaled panel of rows, and the order in which it has them."""
        scaled, inputs = self._scaling.forward(values, rows.covariates)
        time = self._scale_time(rows.time)
        return Panel.from_rows(codes, time, scaled, inputs, n_series=n_series)

    def _scale_time(self, time):
        """Return times in the units of the model."""
        return time / self.time_unit_

    def _unscale_time(self, time):
        return time * self.time_unit_

    def _train(self, pieces, history, seed, device, context, X, y):
        """Train a network on windows of series; return it with its settings."""
        before = getattr(self, "module_", None) if self.warm_start else None
        config_before = getattr(self, "_module_config", None)
        self._module_config = {
            "n_channels": pieces.values.shape[1],
            "n_covariates": pieces.covariates.shape[1],
            "latent_dim": int(self.latent_dim),
            "hidden_layer_sizes": self._hidden_layer_sizes(),
            "activation": self.activation,
            "rnn_hidden_size": int(self.rnn_hidden_size),
            "decoder_hidden_layer_sizes": as_sizes(
                self.decoder_hidden_layer_sizes, "decoder_hidden_layer_sizes"
            ),
        }
        network = self._new_module(self._module_config, torch.float32, device, seed)
        if before is not None:
            if config_before != self._module_config:
                raise ValueError(
                    "warm_start=True cannot go on from a fit with layers of other "
                    "sizes. Use a new estimator."
                )
            network.load_state_dict(before.state_dict())
        rng = np.random.default_rng(seed)
        order = rng.permutation(np.flatnonzero(pieces.lengths > 0))
        n_held_out = 0
        if self.early_stopping:
            n_held_out = round(self.validation_fraction * len(order))
            n_held_out = min(n_held_out, max(len(order) - 1, 0))  # one is trained on
        held_out = pieces.take(np.sort(order[:n_held_out])) if n_held_out else None
        trained_on = pieces.take(np.sort(order[n_held_out:]))
        recipe = replace(
            self._recipe(trained_on.n_series, self.max_iter, N_UPDATES),
            decays=True,
            gradient_bound=None,
            epoch_rows=EPOCH_SERIES,
            most_setbacks=MOST_SETBACKS,
            warns=False,
        )
        trainer = Trainer(
            network,
            self._solver_settings(torch.float32, TRAINING_TOLERANCE),
            recipe,
            torch.Generator().manual_seed(seed),
            history,
            float(self.kl_weight),
        )
        trainer.fit(
            trained_on, held_out, on_epoch=self._epoch_callback(context, history, X, y)
        )
        dtype = self._dtype(np.empty(0), device)
        network = network.to(dtype).eval()
        self._refine = refinement_helps(
            network,
            trained_on if held_out is None else held_out,
            self._solver_settings(dtype),
            trainer.generator,
        )
        return self._mean_of(network, seed)

    def _dtype(self, X, device):
        """Resolve the dtype parameter: double precision on the CPU."""
        if self.dtype == "auto" and device.type == "cpu":
            return torch.float64
        return super()._dtype(X, device)

    def _make_module(self, **config):
        return LatentODENetwork(**config)

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
                reconstruction_attributes={},
            )

        return on_epoch

    def _mean_of(self, network, seed):
        """Return the network with the solver parameters as they are now."""
        dtype = next(network.parameters()).dtype
        settings = self._solver_settings(dtype)
        return NeuralMean(network, settings, N_DRAWS, seed, self._refine)

    def _keep_scores(self, fitted, history):
        """Set the fitted attributes that tell how fit went."""
        self.loss_curve_, self.nfe_curve_ = history.loss, history.nfe
        self.loss_ = history.loss[-1] if history.loss else None
        self.n_iter_ = max(1, len(history.loss))
        self.validation_scores_ = history.validation or None
        scores = dict(fitted.scores)
        self.validation_errors_ = scores.pop("model", None)
        self.baseline_scores_ = scores or None
        self.coverage_ = fitted.coverage

    def _tell(self, fitted, values):
        """Warn about what the user should know of the fit."""
        for name, kind in fitted.beaten_by:
            error, own = (
                s[kind] for s in (fitted.scores[name], fitted.scores["model"])
            )
            warnings.warn(
                f"{name} is better than {type(self).__name__} on {kind} that fit hid "
                f"from itself: mean absolute error {error:.3g} against {own:.3g}, in "
                "standard deviations. See baseline_scores_ and validation_errors_.",
                UserWarning,
                stacklevel=stacklevel_of_caller(),
            )
        if self.early_stopping and not fitted.scores:
            n = np.isfinite(values).sum()
            what = f"Only {n} values are observed"
            if n >= LEAST_CELLS:
                what = f"Each series has only a few of the {n} values observed"
            warnings.warn(
                f"{what}: too few to hide some and judge the model by them. Do not "
                "rely on its intervals.",
                UserWarning,
                stacklevel=stacklevel_of_caller(),
            )

    # --- predicting -------------------------------------------------------------------

    def _mean(self):
        """Return the network as it is to be used now, or None."""
        self._validate_params()  # they may have been set since fit
        if self.module_ is None:
            return None
        mean = self._mean_of(self._module_for_prediction(), self._seed_)
        return replace(mean, strict=False)

    def _predict_rows(self, context, codes, rows):
        """Return what is predicted of rows, given what is known of their series."""
        n_series = context.n_series
        query, inputs, order = self._query(codes, rows, n_series)
        mean, std = np.empty(query.values.shape), np.empty(query.values.shape)
        network = self._mean()
        with np.errstate(over="ignore", invalid="ignore"):  # of what is not solved
            for part in _parts(n_series):
                at = slice(query.offsets[part.start], query.offsets[part.stop])
                mean[at], std[at] = self._model.predict(
                    network, _take(context, part), _take(query, part)
                )
            mean[order], std[order] = mean.copy(), std.copy()
            found = Predictive(mean, std, inputs, self._model, self._scaling)
            lost = ~np.isfinite(found.at(0.0) + found.spread()).all(axis=1)
        mean[lost] = std[lost] = np.nan
        self._warn_of_lost(rows, lost)
        return found

    def _warn_of_lost(self, rows, lost):
        """Warn about rows (n_rows,) up to which the latent ODE cannot be solved."""
        if not lost.any():
            return
        first = self._layout.to_times(rows.time[lost][:1])[0]
        warnings.warn(
            f"The latent ODE cannot be solved up to {lost.sum()} of {len(lost)} rows, "
            f"for which there is NaN; the first of them is at time {first}. Ask for "
            "times nearer to the observations, or raise max_steps, atol or rtol.",
            SolverWarning,
            stacklevel=stacklevel_of_caller(),
        )

    def _latent_rows(self, context, codes, rows):
        """Return the latent states (n_rows, latent_dim) at rows."""
        network = self._mean()
        if network is None:
            raise ValueError(
                f"This {type(self).__name__} has no latent states: fit found that "
                "hidden values are predicted no better by a latent ODE. "
                "residual=None keeps it in any case."
            )
        query, _, order = self._query(codes, rows, context.n_series)
        found = [
            self._model.latent(network, _take(context, part), _take(query, part))
            for part in _parts(context.n_series)
        ]
        states = np.empty((len(order), network.network.latent_dim))
        states[order] = np.concatenate(found)
        self._warn_of_lost(rows, ~np.isfinite(states).all(axis=1))
        return states

    def _velocity(self, states):
        """Return how fast latent states (n, latent_dim) change: in the unit of time of
        the vector field, and the same at all times.
        """
        module = self._module_for_prediction()
        like = module.log_noise
        y = torch.from_numpy(states).to(like.device, like.dtype)
        with torch.no_grad():
            return module.field(y.new_zeros(()), y).cpu().numpy()

    def _sample_rows(self, context, codes, rows, n_samples, rng, snaps=False):
        """Return draws (n_samples, n_rows, n_channels), in the units of y, those of
        channels with few values moved to one of them if ``snaps``.
        """
        n_series = context.n_series
        query, inputs, order = self._query(codes, rows, n_series)
        draws = np.empty((n_samples, *query.values.shape))
        network = self._mean()
        with np.errstate(over="ignore", invalid="ignore"):  # of what is not solved
            for part in _parts(n_series):
                at = slice(query.offsets[part.start], query.offsets[part.stop])
                draws[:, at] = self._model.sample(
                    network, _take(context, part), _take(query, part), n_samples, rng
                )
            draws[:, order] = draws.copy()
            if snaps and self._model.warp is not None:
                draws = self._model.warp.snap(draws)
            draws = np.stack([self._scaling.inverse(x, inputs) for x in draws])
        lost = ~np.isfinite(draws).all(axis=(0, 2))
        draws[:, lost] = np.nan
        self._warn_of_lost(rows, lost)
        return draws

    def _query(self, codes, rows, n_series):
        """Return the panel of rows to predict, their scaled covariates in the order of
        the rows, and where the rows of the panel come from.
        """
        n_channels = len(self._scaling.centre)
        values = np.full((len(rows.time), n_channels), np.nan)
        panel, order = self._panel(codes, rows, values, n_series)
        inputs = np.empty_like(panel.covariates)
        inputs[order] = panel.covariates
        return panel, inputs, order

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_model")


def _time_unit(codes, time):
    """Return the span of a typical series, or of a window of it if it is long."""
    table = pd.DataFrame({"code": codes, "time": time}).groupby("code")["time"]
    span = (table.max() - table.min()).to_numpy()
    rows = table.size().to_numpy()
    spans = (span * np.minimum(1.0, WINDOW_ROWS / rows))[span > 0]
    return float(np.median(spans)) if len(spans) else 1.0


def _take(panel, part):
    return panel.take(np.arange(part.start, part.stop))


def _parts(n_series):
    """Yield slices of series."""
    for first in range(0, n_series, CHUNK_SERIES):
        yield slice(first, min(first + CHUNK_SERIES, n_series))
