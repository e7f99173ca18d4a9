"""A time series: what was observed, and the mean and band of an estimator."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from numbers import Integral, Real

import numpy as np
import pandas as pd
from scipy.stats import norm
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from sknode._series.keys import encode_series
from sknode._series.layout import SeriesLayout
from sknode._series.table import as_list, as_table
from sknode._series.times import as_times
from sknode._series.wide import WideLayout
from sknode.plotting._matplotlib import import_pyplot
from sknode.plotting._times import drawable_times

__all__ = ["SeriesDisplay"]

PANEL_HEIGHT, PANEL_WIDTH = 2.2, 7.0  # inches
N_TIMES = 200
PARTS = "mean", "lower", "upper", "observed", "held_out"


class SeriesDisplay:
    """Observations of a time series with the mean and the band of an estimator.

    Use `from_estimator` to create one. Every channel has a panel of its own.

    Parameters
    ----------
    time : DatetimeIndex, PeriodIndex, TimedeltaIndex or array-like of shape (n_times,)
        Times, ascending.
    mean : ndarray of shape (n_times, n_channels)
        Mean of every channel.
    lower, upper : ndarray of shape (n_times, n_channels), optional
        Ends of the band.
    observed : ndarray of shape (n_times, n_channels), optional
        Values that the estimator has seen, NaN where there is none.
    held_out : ndarray of shape (n_times, n_channels), optional
        Values that it has not seen, NaN where there is none.
    coverage : float, optional
        Share of values that should be in the band, for the legend.
    channel_names : list of str, optional
        Labels of the vertical axes.
    series_name : object, optional
        What the series is called, for the title.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
        Figure that has the panels.
    axes_ : ndarray of matplotlib.axes.Axes
        The panels, one a channel.
    ax_ : matplotlib.axes.Axes
        The last one, which has the time.
    lines_ : list of matplotlib.lines.Line2D
        The means, one a channel.
    bands_ : list of matplotlib.collections.PolyCollection
        The bands; empty without.
    observed_, held_out_ : list of matplotlib.lines.Line2D
        The dots; empty without.

    See Also
    --------
    sklearn.gaussian_process.GaussianProcessRegressor : Has a mean and a band, too.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.gaussian_process import GaussianProcessRegressor
    >>> from sknode.plotting import SeriesDisplay
    >>> X = np.array([0.0, 0.7, 1.1, 3.5, 4.0, 5.0])[:, None]
    >>> y = np.sin(X[:, 0])
    >>> process = GaussianProcessRegressor().fit(X[:4], y[:4])
    >>> display = SeriesDisplay.from_estimator(
    ...     process, X, y, held_out=[4, 5], n_times=None
    ... )
    >>> display.frame()[["time", "mean", "observed", "held_out"]].round(2)
       time  mean  observed  held_out
    0   0.0  0.00      0.00       NaN
    1   0.7  0.64      0.64       NaN
    2   1.1  0.89      0.89       NaN
    3   3.5 -0.35     -0.35       NaN
    4   4.0 -0.36       NaN     -0.76
    5   5.0 -0.15       NaN     -0.96
    """

    def __init__(
        self,
        time,
        mean,
        *,
        lower=None,
        upper=None,
        observed=None,
        held_out=None,
        coverage=None,
        channel_names=None,
        series_name=None,
    ):
        self.time = time
        self.mean = mean
        self.lower = lower
        self.upper = upper
        self.observed = observed
        self.held_out = held_out
        self.coverage = coverage
        self.channel_names = channel_names
        self.series_name = series_name

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        *,
        series=None,
        channels=None,
        held_out=None,
        coverage=0.9,
        n_times="auto",
        ax=None,
        **kwargs,
    ):
        """Predict or impute a series and draw it.

        Parameters
        ----------
        estimator : object
            Fitted regressor whose rows are observations, such as `LatentODERegressor`
            or `sklearn.gaussian_process.GaussianProcessRegressor`, or an imputer with
            ``impute``, such as `LatentODEImputer`. Its parameters ``time`` and
            ``series`` say where those are in X; without, the first column of a
            regressor's X has the time (or its index, if that has dates). The band is
            that of ``predict_interval(X, coverage=...)``, which returns the lower and
            the upper ends, else of the standard deviations of
            ``predict(X, return_std=True)``. A regressor with neither gets no band.
        X : array-like or DataFrame of shape (n_samples, n_features)
            For a regressor the times to draw, with series and covariates; for an
            imputer the values with NaN where they are missing.
        y : array-like of shape (n_samples,) or (n_samples, n_channels), optional
            For a regressor the values, NaN where they were not observed. For an imputer
            the truth, like X: what it has and X has not is drawn as held out.
        series : object, optional
            Name of the series to draw; by default that of the first row.
        channels : str, int or list of those, optional
            Names or positions of the channels to draw; by default all.
        held_out : array-like of bool or int, optional
            For a regressor the rows of X that it has not seen, as a mask or positions,
            like ``test`` of a split.
        coverage : float, default=0.9
            Share of values that should be in the band.
        n_times : int, None or "auto", default="auto"
            Number of equally spaced times that are drawn in addition to those of X.
            There, covariates are those of the row before, and context is unknown. With
            None there are none, nor where time is a number of the row or a period.
            "auto" is 200 for a regressor and None for an imputer, whose band has no
            width where a value is known.
        ax : matplotlib axes or array of them, optional
            Where to draw, as in `plot`.
        **kwargs : dict
            As in `plot`.

        Returns
        -------
        SeriesDisplay
            The display, drawn.
        """
        import_pyplot(f"{cls.__name__}.from_estimator")
        check_is_fitted(estimator)
        if not isinstance(coverage, Real) or not 0 < coverage < 1:
            raise ValueError(
                f"coverage must be a number between 0 and 1. Got {coverage!r}."
            )
        imputes = hasattr(estimator, "impute")
        if not imputes and not hasattr(estimator, "predict"):
            raise TypeError(
                "estimator must have predict or impute. "
                f"Got {type(estimator).__name__} instead."
            )
        if n_times == "auto":
            n_times = None if imputes else N_TIMES
        if n_times is not None and (not isinstance(n_times, Integral) or n_times < 2):
            raise ValueError(
                f"n_times must be an integer >= 2, None or 'auto'. Got {n_times!r}."
            )
        query = _make_query(estimator, X, series, n_times)
        evaluate = _impute if imputes else _predict
        names, parts = evaluate(estimator, query, y, held_out, coverage)
        chosen = _choose(channels, names, parts["mean"].shape[1])
        parts = {
            key: None if part is None else part[np.ix_(query.order, chosen)]
            for key, part in parts.items()
        }
        display = cls(
            query.time,
            **parts,
            coverage=coverage,
            channel_names=None if names is None else [names[i] for i in chosen],
            series_name=query.name,
        )
        return display.plot(ax, **kwargs)

    def plot(
        self,
        ax=None,
        *,
        line_kwargs=None,
        band_kwargs=None,
        observed_kwargs=None,
        held_out_kwargs=None,
    ):
        """Draw the series, channel by channel.

        Parameters
        ----------
        ax : matplotlib axes or array of them, optional
            Where to draw: as many as there are channels. By default a new figure.
        line_kwargs : dict, optional
            Passed on to ``ax.plot`` for the mean.
        band_kwargs : dict, optional
            Passed on to ``ax.fill_between``.
        observed_kwargs, held_out_kwargs : dict, optional
            Passed on to ``ax.plot`` for the two kinds of dots.

        Returns
        -------
        SeriesDisplay
            The display.
        """
        plt = import_pyplot(f"{type(self).__name__}.plot")
        n_channels = self.mean.shape[1]
        if ax is None:
            size = (PANEL_WIDTH, PANEL_HEIGHT * (n_channels + 1))
            _, ax = plt.subplots(
                n_channels, 1, figsize=size, sharex=True, layout="constrained"
            )
        self.axes_ = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if len(self.axes_) != n_channels:
            raise ValueError(f"ax must be {n_channels} axes. Got {len(self.axes_)}.")
        self.ax_, self.figure_ = self.axes_[-1], self.axes_[-1].figure
        time, label = drawable_times(self.time)
        line = {"color": "C0", "label": "mean"} | (line_kwargs or {})
        name = "band" if self.coverage is None else f"{100 * self.coverage:g} % band"
        band = {"color": line["color"], "alpha": 0.25, "linewidth": 0, "label": name}
        dots = {"linestyle": "", "marker": ".", "markersize": 4}
        seen = dots | {"color": "0.2", "label": "observed"} | (observed_kwargs or {})
        unseen = dots | {"color": "C3", "label": "held out"} | (held_out_kwargs or {})
        self.lines_, self.bands_, self.observed_, self.held_out_ = [], [], [], []
        for i, panel in enumerate(self.axes_):
            if self.lower is not None:
                ends = self.lower[:, i], self.upper[:, i]
                shade = band | (band_kwargs or {})
                self.bands_.append(panel.fill_between(time, *ends, **shade))
            self.lines_ += panel.plot(time, self.mean[:, i], **line)
            if self.observed is not None:
                self.observed_ += panel.plot(time, self.observed[:, i], **seen)
            if self.held_out is not None:
                self.held_out_ += panel.plot(time, self.held_out[:, i], **unseen)
            if self.channel_names is not None:
                panel.set_ylabel(str(self.channel_names[i]))
        self.ax_.set_xlabel(label)
        self.axes_[0].legend()
        if self.series_name is not None:
            self.axes_[0].set_title(str(self.series_name))
        return self

    def frame(self):
        """Return what is drawn as a table.

        Returns
        -------
        DataFrame
            A row for every channel and time, with the columns ``"channel"``,
            ``"time"``, ``"mean"`` and those of ``"lower"``, ``"upper"``,
            ``"observed"`` and ``"held_out"`` that the display has.
        """
        n_channels = self.mean.shape[1]
        names = self.channel_names
        names = list(range(n_channels)) if names is None else names
        time = pd.Series(self.time)
        parts = []
        for i in range(n_channels):
            part = pd.DataFrame({"channel": names[i], "time": time})
            for key in PARTS:
                if getattr(self, key) is not None:
                    part[key] = getattr(self, key)[:, i]
            parts.append(part)
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class _Query:
    """Rows of one series, followed by rows at times between.

    Attributes
    ----------
    X : DataFrame or ndarray
        The rows, as the estimator wants them.
    kept : ndarray of int
        Which rows of the caller's X the first of them are.
    n_rows : int
        Number of rows of the caller's X.
    channels : list of int or None
        Columns with values, of an imputer.
    order : ndarray of int
        The rows in the order of time.
    time : Index or ndarray
        Times in that order.
    name : object
        What the series is called, None if there is only one.
    """

    X: object
    kept: np.ndarray
    n_rows: int
    channels: list | None
    order: np.ndarray
    time: object
    name: object

    def spread(self, values):
        """Return values of the caller's rows as those of these, NaN between."""
        out = np.full((len(self.order), values.shape[1]), np.nan)
        out[: len(self.kept)] = values[self.kept]
        return out


def _make_query(estimator, X, series, n_times):
    """Find the rows of a series, and add some at equally spaced times."""
    frame, framed = as_table(X)
    layout = _learn_layout(estimator, X)
    ids, time = layout.read_keys(frame)
    codes, names = encode_series(ids)
    if series is not None and series not in names:
        raise ValueError(f"X has no series {series!r}, but {names[:5]} and so on.")
    kept = np.flatnonzero(codes == (0 if series is None else names.index(series)))
    between = np.empty(0)
    if n_times is not None and _has_times_between(layout, frame, framed):
        ends = time[kept].min(), time[kept].max()
        between = np.setdiff1d(np.linspace(*ends, n_times), time[kept])
    in_order = kept[np.argsort(time[kept], kind="stable")]
    before = np.searchsorted(time[in_order], between, side="right") - 1
    rows = frame.iloc[np.concatenate([kept, in_order[before]])]
    channels = getattr(layout, "channels", None)
    # what is known at a time and at no other
    known = layout.context if channels is None else channels
    if len(between):
        rows = _move(rows, layout, len(kept), between)
        is_own = np.arange(len(rows)) < len(kept)
        for i in known:
            rows.isetitem(i, rows.iloc[:, i].where(is_own))
    time = np.concatenate([time[kept], between])
    order = np.argsort(time, kind="stable")
    return _Query(
        rows if framed else rows.to_numpy(),
        kept,
        len(frame),
        channels,
        order,
        layout.to_times(time[order]),
        names[codes[kept[0]]] if len(names) > 1 else None,
    )


def _learn_layout(estimator, X):
    """Find time and series where the parameters of an estimator say they are."""
    model = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    kind, other = SeriesLayout, "context"
    if hasattr(estimator, "impute"):
        kind, other = WideLayout, "covariates"
    keys = {"time": "auto", "series": None, other: None}
    return kind.learn(X, **{key: getattr(model, key, keys[key]) for key in keys})


def _has_times_between(layout, frame, framed):
    """Tell whether there may be rows at other times than those that are there."""
    counted = layout.time.place == "steps" and not (
        framed and pd.api.types.is_numeric_dtype(frame.index.dtype)
    )
    return layout.clock.kind != "periods" and not counted


def _move(rows, layout, n_kept, between):
    """Return rows of which those after the first ones are at other times."""
    source = layout.time
    own = as_times(source.get(rows)[:n_kept], str(source))
    times = own.append(pd.Index(layout.to_times(between)))
    if source.place == "column":
        rows = rows.copy()
        rows.isetitem(source.position, times)
        return rows
    levels = [rows.index.get_level_values(i) for i in range(rows.index.nlevels)]
    levels[source.position] = times
    names = rows.index.names
    if len(levels) == 1:
        return rows.set_axis(times.rename(names[0]))
    return rows.set_axis(pd.MultiIndex.from_arrays(levels, names=names))


def _predict(estimator, query, y, held_out, coverage):
    """Return names of channels, and the mean, band and values of a regressor."""
    model = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    lower = upper = None
    if hasattr(estimator, "predict_interval"):
        mean = estimator.predict(query.X)
        lower, upper = estimator.predict_interval(query.X, coverage=coverage)
    elif "return_std" in signature(model.predict).parameters:
        mean, std = estimator.predict(query.X, return_std=True)
        half = norm.interval(coverage)[1] * std
        lower, upper = mean - half, mean + half
    else:
        mean = estimator.predict(query.X)
    names = _names(mean if y is None else y)
    parts = {"mean": mean, "lower": lower, "upper": upper}
    parts = {k: None if x is None else _as_columns(x) for k, x in parts.items()}
    observed = unseen = None
    if y is not None:
        check_consistent_length(np.empty(query.n_rows), y)
        observed = query.spread(_as_columns(y))
        if observed.shape[1] != parts["mean"].shape[1]:
            raise ValueError(
                f"y must have a column a channel, {parts['mean'].shape[1]}. "
                f"Got {observed.shape[1]}."
            )
    if held_out is not None:
        if y is None:
            raise ValueError("held_out needs y, which has the values that were.")
        hidden = np.zeros((query.n_rows, 1))
        hidden[np.asarray(held_out)] = 1.0
        hidden = query.spread(hidden) == 1
        unseen = np.where(hidden, observed, np.nan)
        observed = np.where(hidden, np.nan, observed)
    return names, parts | {"observed": observed, "held_out": unseen}


def _impute(estimator, query, y, held_out, coverage):
    """Return names of channels, and the mean, band and values of an imputer."""
    if held_out is not None:
        raise ValueError("Of an imputer, y has the values that it has not seen.")
    filled, std = estimator.impute(query.X, return_std=True)
    filled, seen = (_as_columns(x, query.channels) for x in (filled, query.X))
    std = _as_columns(std)
    if std.shape[1] > len(query.channels):
        std = std[:, query.channels]
    names = None
    if isinstance(query.X, pd.DataFrame):
        names = query.X.columns[query.channels].tolist()
    unseen = None
    if y is not None:
        check_consistent_length(np.empty(query.n_rows), y)
        unseen = query.spread(_as_columns(y, query.channels))
        unseen[~np.isnan(seen)] = np.nan
    half = norm.interval(coverage)[1] * std
    parts = {"mean": filled, "lower": filled - half, "upper": filled + half}
    return names, parts | {"observed": seen, "held_out": unseen}


def _as_columns(values, columns=None):
    """Return float64 values of shape (n, n_channels)."""
    frame = pd.DataFrame(values)
    frame = frame if columns is None else frame.iloc[:, columns]
    return frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _names(values):
    """Return names of channels, None if they have none."""
    if isinstance(values, pd.DataFrame):
        return values.columns.tolist()
    name = getattr(values, "name", None)
    return None if name is None else [name]


def _choose(channels, names, n_channels):
    """Return positions of the channels to draw."""
    labels = list(range(n_channels)) if names is None else names
    chosen = []
    for key in range(n_channels) if channels is None else as_list(channels, labels):
        if key in labels:
            chosen.append(labels.index(key))
        elif isinstance(key, Integral) and -n_channels <= key < n_channels:
            chosen.append(int(key) % n_channels)
        else:
            raise ValueError(f"There is no channel {key!r}, but there are {labels}.")
    return chosen
