"""Latent ODEs: regression on, forecasts and imputation of irregular series."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import pandas as pd
from scipy.special import ndtri
from sklearn.base import (
    OneToOneFeatureMixin,
    RegressorMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
)

from sknode._base import all_or_nothing
from sknode._latent_base import BaseLatentODE
from sknode._series.ahead import times_ahead
from sknode._series.keys import encode_series
from sknode._series.layout import SeriesLayout
from sknode._series.panel import Panel
from sknode._series.wide import WideLayout

__all__ = ["LatentODEImputer", "LatentODERegressor"]


class LatentODERegressor(RegressorMixin, BaseLatentODE):
    """Regression on irregular series by a latent ODE.

    Rows are observations, as for Gaussian processes: X holds the time, and optionally
    the series and what else is known at any time; y holds the values, a column a
    channel, NaN where a channel was not observed. A recurrent encoder reads a series
    and tells its latent state, which follows a learned ODE and is decoded at any time
    [1]_. What that leaves is followed by a linear process, an Ornstein-Uhlenbeck
    process of several time scales, whose posterior is a Kalman smoother, so that
    predictions pass near the data and their uncertainty grows in gaps.

    Parameters
    ----------
    latent_dim : int, default=8
        Size of the latent state.
    hidden_layer_sizes : tuple of int or int, default=(32,)
        Sizes of the hidden layers of the latent vector field.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="silu"
        Activation of the vector field and of the decoder.
    rnn_hidden_size : int, default=32
        Size of the state of the encoder, a gated recurrent unit that reads a series
        backwards in time.
    decoder_hidden_layer_sizes : tuple of int or int, default=(32,)
        Sizes of the hidden layers of the decoder.
    time : str or int, default="auto"
        Where the time is: the name or position of a column, "index", or the name of an
        index level. "auto" takes an index, or level, of dates or durations, else the
        first such column, else the first column.
    series : str or int, optional
        Where the series is, if there are several: the name or position of a column, or
        the name of an index level. Where the other level of an index of two is the
        time it is found by itself.
    context : str, int or list of them, optional
        Columns of X that hold values known at prediction time, one for each column of
        y, NaN where unknown. Rows that have them are conditioned on, which lets
        scikit-learn's cross-validation evaluate series that ``fit`` did not see.
    calendar : str or list of str, optional
        Cycles of dates, in local time, whose sine and cosine are further covariates:
        "minute", "hour", "dayofweek", "day" (of the month), "month", "yearday".
    residual : {"ou"} or None, default="ou"
        What is left by the latent ODE follows a linear process, or is independent
        noise, which is the model of [1]_.
    kl_weight : float, default=1.0
        Weight of the divergence of latent states from their prior.
    solver : {"dopri5", "tsit5", "bosh3", "dopri8", "heun", "rk4", "midpoint", \
            "euler", "adams", "rodas5p", "scipy_rk45", "scipy_rk23", "scipy_dop853", \
            "scipy_radau", "scipy_bdf", "scipy_lsoda"}, default="dopri5"
        ODE solver, as in `sknode.ode.solve_ode`.
    rtol, atol : float, default=1e-8
        Relative and absolute tolerance of the solver, at least 1e-3 in training. Read
        again at prediction.
    max_steps : int, default=10_000
        Steps that the solver may attempt for a series.
    step_size : float, default=0.02
        Length of the steps of the solvers without error estimate, in units of
        ``time_unit_``.
    gradient : {"discrete", "continuous", "backprop"}, default="discrete"
        How to differentiate the solver.
    optimizer : {"adam", "muon"}, default="muon"
        Training algorithm. "muon" orthogonalises the updates of matrices.
    alpha : float, default=1e-4
        Strength of the L2 penalty on the weight matrices.
    batch_size : int or "auto", default="auto"
        Series of a minibatch; "auto" is a sixteenth of them, but from 32 to 50.
    learning_rate_init : float, default=2e-2
        Step size of the training algorithm.
    max_iter : int, default=100
        Largest number of epochs, of at most 800 series each.
    tol : float, default=1e-2
        What the held-out score has to gain to count as progress.
    n_iter_no_change : int, default=10
        After so many epochs without progress training ends; not in the first 0.4
        times ``max_iter``, in which ever longer pieces of the series are learned.
    early_stopping : bool, default=True
        Whether ``fit`` hides ``validation_fraction`` of the values from itself, to
        choose the model by them, to correct its intervals and to compare it with
        baselines, and as many series, or pieces of a long one, to end training by.
    validation_fraction : float, default=0.1
        Share of the values, and of the series, that are hidden.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the weights of the last one.
    device : str, default="cpu"
        Torch device; "auto" is an accelerator if there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Precision of the latent ODE in predictions; "auto" is float64 on the CPU.
    verbose : bool, default=False
        Whether to print a line an epoch: loss, evaluations, validation score, and the
        time that is left if training goes on to ``max_iter``.
    random_state : int, RandomState instance or None, default=None
        Draws hidden values, initial weights, batches and latent states.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns of X in ``fit``.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, if they are strings.
    n_outputs_ : int
        Number of channels.
    module_ : LatentODENetwork or None
        The latent ODE; None if values that were hidden are predicted no better with it,
        neither between observations nor beyond them.
    time_unit_ : float
        Span of a typical series, in seconds or in the units of a numeric time.
    n_iter_ : int
        Number of epochs.
    loss_ : float or None
        Training loss of the last epoch.
    loss_curve_ : list of float
        Minus the evidence lower bound a value, an entry an epoch.
    nfe_curve_ : list of float
        Mean number of evaluations of the vector field a series, an entry an epoch.
    validation_scores_ : list of float or None
        Lower bound of held-out series, an entry an epoch.
    validation_errors_ : dict or None
        Mean absolute error on the values that ``fit`` hid from itself, by kind
        ("points", "blocks", "tails", "all"), in standard deviations of a channel.
    baseline_scores_ : dict or None
        The same for linear interpolation, the last value and the mean of the series.
    coverage_ : float or None
        Share of the hidden values within intervals of 90 % before they were corrected.

    See Also
    --------
    LatentODEImputer : Fills the holes of a table of series.
    sklearn.gaussian_process.GaussianProcessRegressor : Gaussian processes.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential
       Equations", NeurIPS 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from sknode import LatentODERegressor
    >>> t = np.sort(np.random.default_rng(0).uniform(0, 20, size=(80, 1)), axis=0)
    >>> y = np.sin(t[:, 0])
    >>> model = LatentODERegressor(tol=1.0, n_iter_no_change=1, random_state=0)
    >>> model = model.fit(t, y)
    >>> mean, std = model.predict([[3.0], [40.0]], return_std=True)
    >>> bool(abs(mean[0] - np.sin(3.0)) < 0.1), bool(std[0] < std[1])
    (True, True)
    """

    _parameter_constraints: ClassVar[dict] = {
        **BaseLatentODE._parameter_constraints,
        "context": [str, Integral, "array-like", None],
    }

    def __init__(
        self,
        latent_dim=8,
        hidden_layer_sizes=(32,),
        activation="silu",
        *,
        rnn_hidden_size=32,
        decoder_hidden_layer_sizes=(32,),
        time="auto",
        series=None,
        context=None,
        calendar=None,
        residual="ou",
        kl_weight=1.0,
        solver="dopri5",
        rtol=1e-8,
        atol=1e-8,
        max_steps=10_000,
        step_size=0.02,
        gradient="discrete",
        optimizer="muon",
        alpha=1e-4,
        batch_size="auto",
        learning_rate_init=2e-2,
        max_iter=100,
        tol=1e-2,
        n_iter_no_change=10,
        early_stopping=True,
        validation_fraction=0.1,
        warm_start=False,
        device="cpu",
        dtype="auto",
        verbose=False,
        random_state=None,
    ):
        self.latent_dim = latent_dim
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.rnn_hidden_size = rnn_hidden_size
        self.decoder_hidden_layer_sizes = decoder_hidden_layer_sizes
        self.time = time
        self.series = series
        self.context = context
        self.calendar = calendar
        self.residual = residual
        self.kl_weight = kl_weight
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.step_size = step_size
        self.gradient = gradient
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.random_state = random_state

    # --- fitting ----------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y):
        """Fit to observations.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Times, and series and covariates if there are any.
        y : array-like of shape (n_samples,) or (n_samples, n_channels)
            Values, NaN where a channel was not observed.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        X = self._check_table(X, reset=True)
        given, y = y, self._check_values(X, y)
        self._layout = SeriesLayout.learn(
            X,
            time=self.time,
            series=self.series,
            context=self.context,
            calendar=self.calendar,
        )
        n_known, n_channels = len(self._layout.context), _as_columns(y).shape[1]
        if n_known not in (0, n_channels):
            raise ValueError(
                f"context names {n_known} column{'s' * (n_known > 1)}, but y has "
                f"{n_channels}: there must be one for each column of y."
            )
        self.n_outputs_ = n_channels
        self._y_names, self._is_column = _names_of(given, n_channels), y.ndim == 1
        return self._fit_rows(self._layout.read(X), _as_columns(y), X, given)

    def condition(self, X, y):
        """Take in further observations, of old or new series, without training.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            As in `fit`.
        y : array-like of shape (n_samples,) or (n_samples, n_channels)
            Values.

        Returns
        -------
        LatentODERegressor
            An estimator with the same parameters and weights that has seen these
            observations, too. The one that it comes from stays as it is.
        """
        check_is_fitted(self)
        X = self._check_table(X)
        y = self._check_channels(X, y)
        more = copy.copy(self)
        rows = self._layout.read(X)
        more._ids, more._context = self._extend(rows, y)
        return more

    # --- predicting -------------------------------------------------------------------

    def predict(self, X, return_std=False):
        """Predict the channels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Times, before, between or after what is known, of series that ``fit`` has
            seen or of others, about which nothing is known but ``context``.
        return_std : bool, default=False
            Whether to return standard deviations, too, those of the noise included.

        Returns
        -------
        mean : ndarray of shape (n_samples,) or (n_samples, n_channels)
            Centres of the predictive distributions, their medians: the means, too,
            where channels are not skewed.
        std : ndarray of the same shape
            Predictive standard deviations, if asked for: half of the length of an
            interval of 68 %.
        """
        predictive = self._predict(X)
        mean = self._as_y(predictive.at(0.0))
        return (mean, self._as_y(predictive.spread())) if return_std else mean

    def trajectory(self, X):
        """Return the latent states at the times of rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            As in `predict`.

        Returns
        -------
        ndarray of shape (n_samples, latent_dim)
            The centres of what is believed of them, given what is known of a series.
        """
        rows, codes, context = self._known(X)
        return self._latent_rows(context, codes, rows)

    def predict_interval(self, X, coverage=0.9):
        """Predict intervals that values lie in.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            As in `predict`.
        coverage : float, default=0.9
            Share of the values that is to lie inside.

        Returns
        -------
        lower, upper : ndarray of shape (n_samples,) or (n_samples, n_channels)
            The ends.
        """
        reach = _normal_reach(coverage)
        predictive = self._predict(X)
        return tuple(self._as_y(predictive.at(z)) for z in (-reach, reach))

    def sample(self, X, n_samples=1, random_state=None):
        """Draw series, coherent in time, noise included.

        Parameters
        ----------
        X : array-like of shape (n_points, n_features)
            As in `predict`.
        n_samples : int, default=1
            Number of draws.
        random_state : int, RandomState instance or None, default=None
            Draws them.

        Returns
        -------
        ndarray of shape (n_samples, n_points) or (n_samples, n_points, n_channels)
            Draws.
        """
        _check_draws(n_samples)
        rows, codes, context = self._known(X)
        rng = _generator(random_state)
        draws = self._sample_rows(context, codes, rows, int(n_samples), rng)
        return draws[..., 0] if self._is_column else draws

    def score_samples(self, X, y=None):
        """Return the log predictive density of observations.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            As in `predict`.
        y : array-like of shape (n_samples,) or (n_samples, n_channels), optional
            Values, NaN where there is none. By default what is predicted: the result
            then tells how sure predictions are.

        Returns
        -------
        ndarray of shape (n_samples,)
            Sum over the channels that are observed of the logarithms of their
            densities; 0 for a row of none.
        """
        rows, codes, context = self._known(X)
        predictive = self._predict_rows(context, codes, rows)
        y = predictive.at(0.0) if y is None else self._check_channels(X, y)
        logs = predictive.log_density(y, rows.covariates)
        return np.nansum(logs, axis=1)

    def score(self, X, y, sample_weight=None):
        """Return the coefficient of determination over the values observed.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            As in `predict`.
        y : array-like of shape (n_samples,) or (n_samples, n_channels)
            Values, NaN where there is none.
        sample_weight : array-like of shape (n_samples,), optional
            Weights of rows.

        Returns
        -------
        float
            R2, the mean over the channels that are observed.
        """
        y = self._check_channels(X, y)
        weight = sample_weight
        if weight is not None:
            weight = _check_sample_weight(weight, y, dtype=np.float64)
        mean = self._predict(X).at(0.0)
        scores = []
        for truth, predicted in zip(y.T, mean.T, strict=True):
            seen = np.isfinite(truth)
            if seen.any():
                w = None if weight is None else weight[seen]
                scores.append(r2_score(truth[seen], predicted[seen], sample_weight=w))
        if not scores:
            raise ValueError("y has no value to score by: all are NaN.")
        return float(np.mean(scores))

    def forecast(self, horizon, *, freq=None, series=None, coverage=0.9):
        """Predict what follows the observations of every series.

        Parameters
        ----------
        horizon : int or array-like
            Number of steps after the last observation of a series, or the times
            themselves.
        freq : str, offset, timedelta or float, optional
            Length of a step. Whole days, and what is longer, are those of the calendar,
            in local time; of periods it may be their number. By default a period, the
            frequency of dates that have one, else the median distance between the
            observations of a series.
        series : label or list of labels, optional
            Which series; by default all that are known.
        coverage : float, default=0.9
            Coverage of the intervals.

        Returns
        -------
        DataFrame
            A row for each series, time and channel: "series" (if there are several),
            "time", "channel", "mean", "std", "lower", "upper".
        """
        check_is_fitted(self)
        reach = _normal_reach(coverage)
        if self._layout.covariates:
            raise ValueError(
                "forecast cannot know the covariates of the future. Use predict(X) "
                "with rows that have them."
            )
        codes = self._chosen(series)
        times = [self._future(code, horizon, freq) for code in codes]
        lengths = [len(t) for t in times]
        rows = self._layout.rows_at(
            self._labels()[np.repeat(codes, lengths)], np.concatenate(times)
        )
        local = np.repeat(np.arange(len(codes)), lengths)
        context = self._context.take(codes)
        predictive = self._predict_rows(context, local, rows)
        n, n_channels = predictive.mean.shape
        columns = {
            "series": np.repeat(rows.ids, n_channels),
            "time": self._layout.to_times(rows.time).repeat(n_channels),
            "channel": np.tile(_as_objects(self._y_names), n),
            "mean": predictive.at(0.0).ravel(),
            "std": predictive.spread().ravel(),
            "lower": predictive.at(-reach).ravel(),
            "upper": predictive.at(reach).ravel(),
        }
        if not self._layout.series:
            del columns["series"]
        return pd.DataFrame(columns)

    def _future(self, code, horizon, freq):
        """Return the times, relative to the origin, that are asked for of a series."""
        clock = self._layout.clock
        if np.ndim(horizon) == 1 and len(horizon):
            return clock.read(horizon, "horizon")
        if not _is_count(horizon):
            raise ValueError(
                "horizon must be a positive integer, the number of steps, or a list of "
                f"times. Got {horizon!r}."
            )
        panel = self._context.take([code])
        time = self._unscale_time(np.unique(panel.time))
        seen = panel.observed.any(axis=1)
        observed = (
            self._unscale_time(np.unique(panel.time[seen])) if any(seen) else time
        )
        name = repr(self._ids[code])
        if not len(observed):
            raise ValueError(f"horizon must be times: series {name} has none yet.")
        if freq is None and len(observed) < 2 and clock.kind != "periods":
            raise ValueError(f"freq is needed: series {name} has a single observation.")
        return times_ahead(clock, observed, time, int(horizon), freq)

    def _labels(self):
        """Return the names of the series, (n_series,), object."""
        return _as_objects(self._ids)

    def _chosen(self, series):
        """Return the codes of the series that are asked for."""
        if series is None:
            return np.arange(len(self._ids))
        number = {name: i for i, name in enumerate(self._ids)}
        # of several columns a label is a tuple
        single = isinstance(series, str) or not np.iterable(series)
        if single or (isinstance(series, tuple) and series in number):
            series = [series]
        labels = list(series)
        if not labels:
            raise ValueError("series must name one series at least, or be None.")
        unknown = [x for x in labels if x not in number]
        if unknown:
            raise ValueError(f"series names {unknown!r}, which are not known.")
        return np.array([number[x] for x in labels])

    # --- tables -----------------------------------------------------------------------

    def _predict(self, X):
        """Return what is predicted of the rows of a table."""
        rows, codes, context = self._known(X)
        return self._predict_rows(context, codes, rows)

    def _known(self, X):
        """Return the rows of a table, the codes of their series, and what is known of
        these.
        """
        check_is_fitted(self)
        rows = self._layout.read(self._check_table(X))
        codes, ids = encode_series(rows.ids)
        number = {name: i for i, name in enumerate(self._ids)}
        context = _gather(self._context, [number.get(name, -1) for name in ids])
        if rows.context is not None:
            context = self._join(context, codes, rows, rows.context)
        return rows, codes, context

    def _extend(self, rows, values):
        """Return ids and context with further rows."""
        codes, ids = encode_series(rows.ids, self._ids)
        known = [i if i < len(self._ids) else -1 for i in range(len(ids))]
        return ids, self._join(_gather(self._context, known), codes, rows, values)

    def _join(self, context, codes, rows, values):
        """Return a context with further rows, but for values that it has already."""
        seen = np.isfinite(values).any(axis=1)
        if not seen.any():
            return context
        scaled, inputs = self._scaling.forward(values[seen], rows.covariates[seen])
        codes, time = codes[seen], self._scale_time(rows.time[seen])
        before = context.series_of_rows()
        for c in range(scaled.shape[1]):
            old = pd.MultiIndex.from_arrays(
                [before, context.time, context.values[:, c]]
            )
            new = pd.MultiIndex.from_arrays([codes, time, scaled[:, c]])
            scaled[new.isin(old), c] = np.nan
        panel, _ = Panel.from_rows(
            np.concatenate([before, codes]),
            np.concatenate([context.time, time]),
            np.concatenate([context.values, scaled]),
            np.concatenate([context.covariates, inputs]),
            n_series=context.n_series,
        )
        return panel

    def _check_values(self, X, y):
        """Return checked values, in one dimension if they came in one."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is "
                "None."
            )
        y = check_array(
            _without_na(y),
            ensure_2d=False,
            dtype=np.float64,
            ensure_all_finite="allow-nan",
            input_name="y",
        )
        if np.isinf(y).any():
            raise ValueError("Input y contains infinity.")
        if y.ndim > 2:
            raise ValueError(f"y must have one or two dimensions. Got {y.ndim}.")
        check_consistent_length(X, y)
        return y

    def _check_channels(self, X, y):
        """Return values (n_samples, n_channels) to compare predictions with."""
        y = _as_columns(self._check_values(X, y))
        if y.shape[1] != self.n_outputs_:
            raise ValueError(
                f"y has {y.shape[1]} columns, but {type(self).__name__} was fitted "
                f"with {self.n_outputs_}."
            )
        return y

    def _channel_names(self):
        return self._y_names

    def _as_y(self, values):
        return values[:, 0] if self._is_column else values

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _takes_nan(self):
        """Return whether X may have missing values: those of the context."""
        return self.context is not None


def _gather(panel, series):
    """Return a panel of some series, without rows where the number is -1."""
    series = np.asarray(series, dtype=np.int64)
    known = series >= 0
    lengths = np.zeros(len(series), np.int64)
    lengths[known] = panel.lengths[series[known]]
    found = panel.take(series[known])
    return replace(found, offsets=np.concatenate([[0], np.cumsum(lengths)]))


def _take_rows(rows, which):
    """Return some rows of what was read from a table."""
    parts = {x.name: getattr(rows, x.name) for x in fields(rows)}
    return replace(
        rows, **{k: None if x is None else x[which] for k, x in parts.items()}
    )


def _as_columns(y):
    """Return values as (n_samples, n_channels)."""
    return y[:, None] if y.ndim == 1 else y


def _without_na(y):
    """Return values with NaN for what else pandas has for missing ones."""
    if isinstance(y, pd.Series):
        numeric = isinstance(y.dtype, np.dtype) and y.dtype != object
        return y if numeric else y.to_numpy(dtype=np.float64, na_value=np.nan)
    if not isinstance(y, pd.DataFrame) or not y.shape[1]:
        return y
    return np.stack([_without_na(column) for _, column in y.items()], axis=1)


def _names_of(y, n_channels):
    """Return the names of channels, or their numbers."""
    if hasattr(y, "columns"):
        return list(y.columns)
    if getattr(y, "name", None) is not None:
        return [y.name]
    return list(range(n_channels))


def _normal_reach(coverage):
    """Return how many standard deviations a central interval reaches."""
    if not isinstance(coverage, Real) or not 0 < coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1. Got {coverage!r}.")
    return float(ndtri(0.5 + coverage / 2))


def _as_objects(labels):
    """Return labels, tuples among them, as an array of one dimension."""
    return np.fromiter(labels, dtype=object, count=len(labels))


def _is_count(number):
    """Return whether this is a positive integer."""
    no_number = isinstance(number, bool | np.bool_ | np.timedelta64)
    return isinstance(number, Integral) and not no_number and number >= 1


def _check_draws(n_samples):
    if not _is_count(n_samples):
        raise ValueError(
            f"n_samples must be a positive integer. Got {n_samples!r} instead."
        )


def _generator(random_state):
    """Return a generator of numbers from what scikit-learn takes as a random state."""
    return np.random.default_rng(check_random_state(random_state).randint(2**31 - 1))


class LatentODEImputer(OneToOneFeatureMixin, TransformerMixin, BaseLatentODE):
    """Fill the holes of a table of irregular series by a latent ODE.

    A wide table comes in, a column a channel, NaN where nothing was observed, with the
    time in its index (or in a column), and leaves without holes: the same index,
    columns and types, observed cells untouched to the bit. The model is that of
    `LatentODERegressor`; rows of times that lie ahead are a forecast.

    Parameters
    ----------
    latent_dim : int, default=8
        Size of the latent state.
    hidden_layer_sizes : tuple of int or int, default=(32,)
        Sizes of the hidden layers of the latent vector field.
    activation : {"tanh", "softplus", "silu", "elu", "sigmoid", "relu"}, default="silu"
        Activation of the vector field and of the decoder.
    rnn_hidden_size : int, default=32
        Size of the state of the encoder.
    decoder_hidden_layer_sizes : tuple of int or int, default=(32,)
        Sizes of the hidden layers of the decoder.
    time : str or int, default="auto"
        Where the time is: "index", the name of an index level or of a column. "auto" is
        the index, if it has dates, durations or numbers of its own; rows of arrays, and
        of tables whose index just counts them, are equally spaced steps.
    series : str or int, optional
        Where the series is, if there are several: the name of an index level or of a
        column. The other level of an index of two is found by itself.
    covariates : list of str or int, optional
        Columns that are known at any time and not to be filled.
    calendar : str or list of str, optional
        Cycles of dates, in local time, whose sine and cosine are further covariates:
        "minute", "hour", "dayofweek", "day" (of the month), "month", "yearday".
    residual : {"ou"} or None, default="ou"
        What is left by the latent ODE follows a linear process, or is independent
        noise.
    kl_weight : float, default=1.0
        Weight of the divergence of latent states from their prior.
    solver : {"dopri5", "tsit5", "bosh3", "dopri8", "heun", "rk4", "midpoint", \
            "euler", "adams", "rodas5p", "scipy_rk45", "scipy_rk23", "scipy_dop853", \
            "scipy_radau", "scipy_bdf", "scipy_lsoda"}, default="dopri5"
        ODE solver, as in `sknode.ode.solve_ode`.
    rtol, atol : float, default=1e-8
        Relative and absolute tolerance of the solver, at least 1e-3 in training.
    max_steps : int, default=10_000
        Steps that the solver may attempt for a series.
    step_size : float, default=0.02
        Length of the steps of the solvers without error estimate, in units of
        ``time_unit_``.
    gradient : {"discrete", "continuous", "backprop"}, default="discrete"
        How to differentiate the solver.
    optimizer : {"adam", "muon"}, default="muon"
        Training algorithm. "muon" orthogonalises the updates of matrices.
    alpha : float, default=1e-4
        Strength of the L2 penalty on the weight matrices.
    batch_size : int or "auto", default="auto"
        Series of a minibatch; "auto" is a sixteenth of them, but from 32 to 50.
    learning_rate_init : float, default=2e-2
        Step size of the training algorithm.
    max_iter : int, default=100
        Largest number of epochs, of at most 800 series each.
    tol : float, default=1e-2
        What the held-out score has to gain to count as progress.
    n_iter_no_change : int, default=10
        After so many epochs without progress training ends; not in the first 0.4
        times ``max_iter``, in which ever longer pieces of the series are learned.
    early_stopping : bool, default=True
        Whether ``fit`` hides ``validation_fraction`` of the values from itself, to
        choose the model by them, to correct its intervals and to compare it with
        baselines.
    validation_fraction : float, default=0.1
        Share of the values, and of the series, that are hidden.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the weights of the last one.
    device : str, default="cpu"
        Torch device; "auto" is an accelerator if there is one.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Precision of the latent ODE in predictions; "auto" is float64 on the CPU.
    verbose : bool, default=False
        Whether to print a line an epoch: loss, evaluations, validation score, and the
        time that is left if training goes on to ``max_iter``.
    random_state : int, RandomState instance or None, default=None
        Draws hidden values, initial weights, batches and latent states.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns in ``fit``.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, if they are strings.
    module_ : LatentODENetwork or None
        The latent ODE; None if values that were hidden are predicted no better with it,
        neither between observations nor beyond them.
    time_unit_ : float
        Span of a typical series, in seconds or in the units of a numeric time.
    n_iter_ : int
        Number of epochs.
    loss_ : float or None
        Training loss of the last epoch.
    loss_curve_ : list of float
        Minus the evidence lower bound a value, an entry an epoch.
    nfe_curve_ : list of float
        Mean number of evaluations of the vector field a series, an entry an epoch.
    validation_scores_ : list of float or None
        Lower bound of held-out series, an entry an epoch.
    validation_errors_ : dict or None
        Mean absolute error on the values that ``fit`` hid from itself, by kind
        ("points", "blocks", "tails", "all"), in standard deviations of a channel.
    baseline_scores_ : dict or None
        The same for linear interpolation, the last value and the mean of the series.
    coverage_ : float or None
        Share of the hidden values within intervals of 90 % before they were corrected.

    See Also
    --------
    LatentODERegressor : The same model for rows that are observations.
    sklearn.impute.KNNImputer : Knows nothing of time.

    Notes
    -----
    ``transform`` conditions on what is observed in the table that it gets, and on that
    alone: what was learned in ``fit`` are the parameters of the model. To forecast, let
    the table reach further: ``imputer.transform(table.reindex(times))``.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from sknode import LatentODEImputer
    >>> days = pd.date_range("2026-01-01", periods=60, freq="D")
    >>> table = pd.DataFrame({"level": np.sin(np.arange(60) / 5)}, index=days)
    >>> table.iloc[20:25] = np.nan
    >>> imputer = LatentODEImputer(tol=1.0, n_iter_no_change=1, random_state=0)
    >>> filled = imputer.fit_transform(table)
    >>> int(filled.isna().sum().sum()), filled.index.equals(table.index)
    (0, True)
    """

    _parameter_constraints: ClassVar[dict] = {
        **BaseLatentODE._parameter_constraints,
        "covariates": [str, Integral, "array-like", None],
    }

    def __init__(
        self,
        latent_dim=8,
        hidden_layer_sizes=(32,),
        activation="silu",
        *,
        rnn_hidden_size=32,
        decoder_hidden_layer_sizes=(32,),
        time="auto",
        series=None,
        covariates=None,
        calendar=None,
        residual="ou",
        kl_weight=1.0,
        solver="dopri5",
        rtol=1e-8,
        atol=1e-8,
        max_steps=10_000,
        step_size=0.02,
        gradient="discrete",
        optimizer="muon",
        alpha=1e-4,
        batch_size="auto",
        learning_rate_init=2e-2,
        max_iter=100,
        tol=1e-2,
        n_iter_no_change=10,
        early_stopping=True,
        validation_fraction=0.1,
        warm_start=False,
        device="cpu",
        dtype="auto",
        verbose=False,
        random_state=None,
    ):
        self.latent_dim = latent_dim
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.rnn_hidden_size = rnn_hidden_size
        self.decoder_hidden_layer_sizes = decoder_hidden_layer_sizes
        self.time = time
        self.series = series
        self.covariates = covariates
        self.calendar = calendar
        self.residual = residual
        self.kl_weight = kl_weight
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.step_size = step_size
        self.gradient = gradient
        self.optimizer = optimizer
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y=None):
        """Learn what the series have in common.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_channels)
            A table of series with holes.
        y : None
            Ignored.

        Returns
        -------
        self : object
            The fitted estimator.
        """
        X = self._check_table(X, reset=True)
        self._layout = WideLayout.learn(
            X,
            time=self.time,
            series=self.series,
            covariates=self.covariates,
            calendar=self.calendar,
        )
        rows = self._layout.read(X)
        return self._fit_rows(rows, rows.values, X, None)

    def transform(self, X):
        """Fill the holes of a table.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_channels)
            A table like that of ``fit``, of the same series or of others.

        Returns
        -------
        DataFrame or ndarray
            The same table without holes: an array if X was none. Channels of few
            different values, such as counts and stages, are filled with one of these.
        """
        return self.impute(X)

    def impute(self, X, return_std=False):
        """Fill the holes of a table, and tell how sure that is.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_channels)
            A table like that of ``fit``.
        return_std : bool, default=False
            Whether to return standard deviations, too.

        Returns
        -------
        filled : DataFrame or ndarray
            The table without holes.
        std : DataFrame or ndarray
            Predictive standard deviations where there were holes, zero elsewhere; with
            the channels as columns, if asked for.
        """
        X, rows, codes, context, asked = self._holes(X)
        values, deviation = rows.values.copy(), np.zeros_like(rows.values)
        if asked.any():
            query = _take_rows(rows, asked)
            predictive = self._predict_rows(context, codes[asked], query)
            hole = np.isnan(values[asked])
            values[asked] = np.where(hole, predictive.point(), values[asked])
            deviation[asked] = np.where(hole, predictive.spread(), 0.0)
        filled = self._layout.write(X, values)
        if not return_std:
            return filled
        if hasattr(X, "columns"):
            names = self._layout.channel_names
            deviation = pd.DataFrame(deviation, index=X.index, columns=names)
        return filled, deviation

    def sample(self, X, n_samples=1, random_state=None):
        """Fill the holes of a table with draws: multiple imputation.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n_samples, n_channels)
            A table like that of ``fit``.
        n_samples : int, default=1
            Number of tables.
        random_state : int, RandomState instance or None, default=None
            Draws them.

        Returns
        -------
        list of DataFrame or ndarray
            Tables without holes, each coherent in time. Channels of few different
            values are filled with these, as by `transform`.
        """
        _check_draws(n_samples)
        X, rows, codes, context, asked = self._holes(X)
        if not asked.any():
            return [self._layout.write(X, rows.values) for _ in range(n_samples)]
        draws = self._sample_rows(
            context,
            codes[asked],
            _take_rows(rows, asked),
            int(n_samples),
            _generator(random_state),
            snaps=True,
        )
        tables = []
        for draw in draws:
            values = rows.values.copy()
            values[asked] = np.where(np.isnan(values[asked]), draw, values[asked])
            tables.append(self._layout.write(X, values))
        return tables

    def _channel_names(self):
        return self._layout.channel_names

    def _holes(self, X):
        """Return the table, its rows with their series, what is observed in it, and
        which rows have holes.
        """
        check_is_fitted(self)
        X = self._check_table(X)
        rows = self._layout.read(X)
        codes, ids = encode_series(rows.ids)
        seen = ~np.isnan(rows.values).all(axis=1)
        context, _ = self._panel(
            codes[seen], _take_rows(rows, seen), rows.values[seen], len(ids)
        )
        return X, rows, codes, context, np.isnan(rows.values).any(axis=1)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags
