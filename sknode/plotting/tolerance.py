"""Evaluations, time and error of a fitted estimator against the tolerance."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from numbers import Integral, Real

import numpy as np
import pandas as pd
from sklearn.base import is_classifier

from sknode.density import CNFDensity
from sknode.ode.methods import get_method
from sknode.plotting._matplotlib import import_pyplot
from sknode.plotting._states import last_step

__all__ = ["ToleranceDisplay"]

PANEL_SIZE = 3.2  # inches
RTOLS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# The reference is solved with this share of the smallest tolerance, but with no less
# than double precision carries, and may take so many times more steps.
FINER, LEAST_RTOL, MORE_STEPS = 1e-3, 1e-15, 10


class ToleranceDisplay:
    """What the tolerance of the solver costs and what it gains, with the same weights.

    Use `from_estimator` to create one. Tolerances are read whenever an estimator is
    asked, so that one fit tells of all of them: how often the vector field is
    evaluated, how long it takes, and how far the result is from that of a solve that is
    more accurate. It says nothing of how well the model fits, but for the score.

    Parameters
    ----------
    rtol : ndarray of shape (n_tolerances,)
        Relative tolerances, ascending.
    atol : ndarray of shape (n_tolerances,)
        Absolute tolerances.
    evaluations : ndarray of shape (n_tolerances,), optional
        Evaluations of the vector field, on average over rows.
    seconds : ndarray of shape (n_tolerances,)
        Time for all rows.
    error : ndarray of shape (n_tolerances,)
        Root of the mean square of the differences to the reference.
    max_error : ndarray of shape (n_tolerances,)
        Largest difference.
    score : ndarray of shape (n_tolerances,), optional
        Scores; larger is better.
    current : float, optional
        The relative tolerance that the estimator has, for a line.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
        Figure that has the panels.
    axes_ : ndarray of matplotlib.axes.Axes
        The panels: of evaluations, seconds, errors and scores, as far as there are any.
    ax_ : matplotlib.axes.Axes
        The last one.
    lines_ : dict of str to matplotlib.lines.Line2D
        The lines, by the names of columns of `frame`.

    See Also
    --------
    sknode.ODENetClassifier.count_evaluations : The evaluations of every row.
    sknode.CNFDensity.estimate_error : The error of the log-density of every row.
    sklearn.model_selection.ValidationCurveDisplay : Fits anew for every value.

    Examples
    --------
    >>> from sklearn.datasets import make_moons
    >>> from sknode import ODENetClassifier
    >>> from sknode.plotting import ToleranceDisplay
    >>> X, y = make_moons(100, noise=0.1, random_state=0)
    >>> net = ODENetClassifier(tol=0.1, random_state=0).fit(X, y)
    >>> display = ToleranceDisplay.from_estimator(net, X, y, rtols=(1e-2, 1e-6))
    >>> table = display.frame()
    >>> table.columns.tolist()
    ['rtol', 'atol', 'evaluations', 'seconds', 'error', 'max_error', 'score']
    >>> bool(table["evaluations"].is_monotonic_decreasing)
    True
    """

    def __init__(
        self,
        rtol,
        atol,
        *,
        evaluations=None,
        seconds,
        error,
        max_error,
        score=None,
        current=None,
    ):
        self.rtol = rtol
        self.atol = atol
        self.evaluations = evaluations
        self.seconds = seconds
        self.error = error
        self.max_error = max_error
        self.score = score
        self.current = current

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        *,
        rtols=RTOLS,
        n_repeats=3,
        ax=None,
        **kwargs,
    ):
        """Ask a fitted estimator with every tolerance and draw what comes of it.

        Results are the probabilities of a classifier, the predictions of a regressor
        and the log-densities of `CNFDensity`. The reference is a solve in double
        precision with a thousandth of the smallest tolerance. The estimator itself
        stays as it is.

        Parameters
        ----------
        estimator : object
            Fitted `ODENetClassifier`, `ODENetRegressor`, `CNFDensity` or
            `LatentODERegressor`, or a pipeline that ends in one, with a solver that
            adapts its steps. The last of them does not count evaluations.
        X : array-like of shape (n_samples, n_features)
            Rows. What the steps of a pipeline before the last do to them is not timed.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs), optional
            What the score needs, and a `CNFDensity` with ``conditional=True``. The
            score of another `CNFDensity` needs none and is always there.
        rtols : iterable of float, default=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
            Relative tolerances. The ratio of ``atol`` to ``rtol`` is that of the
            estimator.
        n_repeats : int, default=3
            How often time is taken; it is the median.
        ax : array of matplotlib axes, optional
            Where to draw, as in `plot`.
        **kwargs : dict
            As in `plot`.

        Returns
        -------
        ToleranceDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If the estimator is none of these.
        ValueError
            If its solver takes constant steps, or a parameter has a value that is not
            among those above.
        """
        import_pyplot(f"{cls.__name__}.from_estimator")
        rtols = _check_rtols(rtols)
        if not isinstance(n_repeats, Integral) or n_repeats < 1:
            raise ValueError(f"n_repeats must be an integer >= 1. Got {n_repeats!r}.")
        last, X = last_step(estimator, X)
        if not get_method(last.solver).adaptive:
            raise ValueError(
                "estimator must have a solver that adapts its steps: the accuracy of "
                f"{last.solver!r} is a matter of step_size, not of tolerances."
            )
        ratio = last.atol / last.rtol
        reference = _as_accurate(last, max(FINER * rtols[0], LEAST_RTOL), ratio)
        exact = _evaluate(reference, X, y)
        rows = [
            _measure(_with_tolerance(last, rtol, ratio), X, y, exact, n_repeats)
            for rtol in rtols
        ]
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        display = cls(rtols, ratio * rtols, **columns, current=float(last.rtol))
        return display.plot(ax, **kwargs)

    def plot(self, ax=None, **kwargs):
        """Draw what there is against the relative tolerance, on logarithmic axes.

        The axis of the score is not logarithmic, nor one of nothing but zeros. A dotted
        line is at the tolerance that the estimator has.

        Parameters
        ----------
        ax : array of matplotlib axes, optional
            Where to draw: one for evaluations and one for scores, if there are any, and
            one each for seconds and errors. By default a new figure.
        **kwargs : dict
            Passed on to ``ax.plot``.

        Returns
        -------
        ToleranceDisplay
            The display.
        """
        plt = import_pyplot(f"{type(self).__name__}.plot")
        panels = {
            "evaluations": ["evaluations"],
            "seconds": ["seconds"],
            "error": ["error", "max_error"],
            "score": ["score"],
        }
        panels = {k: v for k, v in panels.items() if getattr(self, k) is not None}
        n = len(panels)
        if ax is None:
            size = (PANEL_SIZE * n, PANEL_SIZE)
            _, ax = plt.subplots(1, n, figsize=size, layout="constrained")
        self.axes_ = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if len(self.axes_) != n:
            raise ValueError(
                f"ax must be {n} axes: {', '.join(panels)}. Got {len(self.axes_)}."
            )
        self.ax_, self.figure_ = self.axes_[-1], self.axes_[-1].figure
        self.lines_ = {}
        for panel, (label, names) in zip(self.axes_, panels.items(), strict=True):
            self._draw(panel, label, names, kwargs)
        return self

    def frame(self):
        """Return what is drawn as a table.

        Returns
        -------
        DataFrame
            A row for every tolerance, with the columns ``"rtol"``, ``"atol"``,
            ``"evaluations"``, ``"seconds"``, ``"error"``, ``"max_error"`` and
            ``"score"``, as far as the display has them.
        """
        names = "rtol", "atol", "evaluations", "seconds", "error", "max_error", "score"
        columns = {name: getattr(self, name) for name in names}
        return pd.DataFrame({k: v for k, v in columns.items() if v is not None})

    def _draw(self, panel, label, names, kwargs):
        """Draw lines into a panel."""
        columns = {n: np.asarray(getattr(self, n), dtype=np.float64) for n in names}
        # a flow without networks takes no evaluations and has no error
        logarithmic = label != "score" and any((x > 0).any() for x in columns.values())
        # first, for the limits that a single tolerance has
        panel.set(xscale="log", yscale="log" if logarithmic else "linear")
        shown = {"error": "root mean square", "max_error": "largest"}
        for name, values in columns.items():
            if logarithmic:
                values = np.where(values > 0, values, np.nan)
            look = {"marker": "o", "markersize": 4, "label": shown.get(name)} | kwargs
            (self.lines_[name],) = panel.plot(self.rtol, values, **look)
        if self.current is not None:
            panel.axvline(self.current, color="0.6", linestyle=":", zorder=0)
        panel.set(xlabel="rtol", ylabel=label)
        if len(names) > 1:
            panel.legend()


def _check_rtols(rtols):
    """Return tolerances in ascending order."""
    given = rtols
    rtols = list(rtols) if isinstance(rtols, Iterable) else [None]
    good = all(isinstance(x, Real) and 0 < x < np.inf for x in rtols)
    if not rtols or not good:
        raise ValueError(
            f"rtols must be one or more positive numbers. Got {given!r} instead."
        )
    return np.unique(np.asarray(rtols, dtype=np.float64))


def _with_tolerance(estimator, rtol, ratio):
    """Return the same fitted estimator with another tolerance."""
    other = copy.copy(estimator)
    if estimator.module_ is not None:
        # a copy begins on the CPU: to move its weights is not what is to be timed
        other.module_ = estimator._module_for_prediction()
    return other.set_params(rtol=float(rtol), atol=float(ratio * rtol))


def _as_accurate(estimator, rtol, ratio):
    """Return the same fitted estimator in double precision."""
    other = _with_tolerance(estimator, rtol, ratio)
    other.set_params(max_steps=MORE_STEPS * estimator.max_steps)
    if other.module_ is not None:
        if other._device().type == "mps":  # has no double precision
            other.set_params(device="cpu")
        other.module_ = copy.deepcopy(other._module_for_prediction()).double()
    return other


def _evaluate(estimator, X, y):
    """Return what is compared, in double precision."""
    if isinstance(estimator, CNFDensity):
        results = estimator.score_samples(X, y)
    elif is_classifier(estimator):
        results = estimator.predict_proba(X)
    else:
        results = estimator.predict(X)
    return np.asarray(results, dtype=np.float64)


def _measure(estimator, X, y, exact, n_repeats):
    """Return what there is to tell of an estimator as it is."""
    found, seconds = {}, []
    if hasattr(estimator, "count_evaluations"):
        given = {"y": y} if isinstance(estimator, CNFDensity) else {}
        found["evaluations"] = estimator.count_evaluations(X, **given).mean()
    for _ in range(n_repeats):
        started = time.perf_counter()
        results = _evaluate(estimator, X, y)
        seconds.append(time.perf_counter() - started)
    found["seconds"] = np.median(seconds)
    with np.errstate(invalid="ignore"):  # beyond bounds both are -inf
        error = np.where(results == exact, 0.0, results - exact)
    found["error"] = np.sqrt(np.mean(error**2))
    found["max_error"] = np.abs(error).max()
    if y is not None or isinstance(estimator, CNFDensity):
        found["score"] = estimator.score(X, y)
    return found
