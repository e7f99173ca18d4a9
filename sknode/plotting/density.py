"""A density in one or two dimensions, and the flow that leads to it."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
import pandas as pd
from sklearn.utils.validation import check_array, check_is_fitted

from sknode.plotting._matplotlib import import_pyplot

__all__ = ["DensityDisplay"]

PANEL_SIZE = 2.6  # inches
N_BINS = 40


class DensityDisplay:
    """Density of one or two features, and how a flow gets there.

    Use `from_estimator` to create one. Two features are drawn as filled contours of
    the density, a single one as a line over the histogram of rows. With ``n_times``
    there is a panel for every time, from the normal distribution that a flow starts
    from to the data, with rows that are carried along.

    Parameters
    ----------
    grid : tuple of ndarray
        For every feature, where on its axis the density is known.
    log_density : ndarray
        Log-density at the grid: of shape (n_grid,) for one feature; for two of
        (n_grid_1, n_grid_0), a row for every value of the second one.
    rows : ndarray of shape (n_samples, n_features)
        Data, for the histogram.
    paths : ndarray of shape (n_samples, n_times, n_features), optional
        Rows on their way from the normal distribution to the data.
    feature_names : list of str, optional
        Labels of the axes.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
        Figure that has the panels.
    axes_ : ndarray of matplotlib.axes.Axes
        The panels, one a time.
    ax_ : matplotlib.axes.Axes
        The one with the density: the last.
    surface_ : matplotlib.contour.QuadContourSet or matplotlib.collections.QuadMesh
        The density of two features.
    line_ : matplotlib.lines.Line2D
        The density of one feature.

    See Also
    --------
    sknode.CNFDensity : Density estimation by a continuous normalizing flow.
    sklearn.inspection.DecisionBoundaryDisplay : The same for classifiers.

    Examples
    --------
    >>> from sknode import CNFDensity
    >>> from sknode.datasets import make_density
    >>> from sknode.plotting import DensityDisplay
    >>> X, _ = make_density("moons", 500, random_state=0)
    >>> density = CNFDensity(max_iter=20, refine=False, random_state=0).fit(X)
    >>> display = DensityDisplay.from_estimator(density, X, n_times=4)
    >>> len(display.axes_)
    4
    """

    def __init__(self, grid, log_density, *, rows, paths=None, feature_names=None):
        self.grid = grid
        self.log_density = log_density
        self.rows = rows
        self.paths = paths
        self.feature_names = feature_names

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X=None,
        *,
        n_times=None,
        n_samples=1000,
        grid_resolution=100,
        margin=0.1,
        random_state=None,
        ax=None,
        plot_method="contourf",
        **kwargs,
    ):
        """Evaluate a density on a grid and draw it.

        Parameters
        ----------
        estimator : object
            Fitted estimator with ``score_samples``, of one or two features:
            `CNFDensity`, `sklearn.neighbors.KernelDensity`,
            `sklearn.mixture.GaussianMixture`, a pipeline that ends in one.
        X : array-like of shape (n_samples, n_features), optional
            Rows that the axes have to hold, that make the histogram and that are
            followed along the flow. By default they are drawn from the estimator, which
            has to have ``sample(n_samples, random_state=...)``.
        n_times : int, optional
            Number of panels, at equally spaced times of the flow. They need an
            estimator with ``trajectory``, as `CNFDensity` has; by default there is only
            the density.
        n_samples : int, default=1000
            Number of rows that are drawn without X.
        grid_resolution : int, default=100
            Points of the grid along every axis.
        margin : float, default=0.1
            How far the grid goes beyond the rows (at all times), as a share of their
            range.
        random_state : int, RandomState instance or None, default=None
            Draws rows without X.
        ax : matplotlib axes or array of them, optional
            Where to draw, as in `plot`.
        plot_method : {"contourf", "contour", "pcolormesh"}, default="contourf"
            As in `plot`.
        **kwargs : dict
            As in `plot`.

        Returns
        -------
        DensityDisplay
            The display, drawn.
        """
        import_pyplot(f"{cls.__name__}.from_estimator")
        _check_plot_method(plot_method)
        check_is_fitted(estimator)
        if not hasattr(estimator, "score_samples"):
            raise TypeError(
                "estimator must have score_samples. "
                f"Got {type(estimator).__name__} instead."
            )
        if n_times is not None and not hasattr(estimator, "trajectory"):
            raise TypeError(
                "n_times needs an estimator with trajectory, like CNFDensity. "
                f"Got {type(estimator).__name__} instead."
            )
        if not isinstance(grid_resolution, Integral) or grid_resolution < 2:
            raise ValueError(
                f"grid_resolution must be an integer >= 2. Got {grid_resolution!r}."
            )
        if not isinstance(margin, Real) or not 0 <= margin < np.inf:
            raise ValueError(f"margin must be a number >= 0. Got {margin!r} instead.")
        if X is None:
            if not hasattr(estimator, "sample"):
                raise ValueError(
                    f"X is needed: {type(estimator).__name__} cannot draw rows."
                )
            X = estimator.sample(n_samples, random_state=random_state)
        rows = check_array(X, dtype=np.float64)
        if rows.shape[1] > 2:
            raise ValueError(
                f"DensityDisplay shows one or two features. X has {rows.shape[1]}."
            )
        # an estimator that was fitted with names asks for them again
        names = getattr(estimator, "feature_names_in_", None)
        frame = pd.DataFrame if names is not None else lambda rows, columns: rows
        paths, held = None, rows
        if n_times is not None:
            paths = estimator.trajectory(frame(rows, columns=names), n_times=n_times)
            held = paths.reshape(-1, rows.shape[1])
        grid = _make_grid(held, margin, grid_resolution)
        points = np.stack([x.ravel() for x in np.meshgrid(*grid)], axis=1)
        logs = estimator.score_samples(frame(points, columns=names))
        display = cls(
            grid,
            logs.reshape([grid_resolution] * rows.shape[1]),
            rows=rows,
            paths=paths,
            feature_names=None if names is None else list(names),
        )
        return display.plot(ax, plot_method=plot_method, **kwargs)

    def plot(self, ax=None, *, plot_method="contourf", **kwargs):
        """Draw the density and, with paths, the flow.

        Parameters
        ----------
        ax : matplotlib axes or array of them, optional
            Where to draw: as many as there are times, one without. By default a new
            figure.
        plot_method : {"contourf", "contour", "pcolormesh"}, default="contourf"
            Method of the axes that draws the density of two features.
        **kwargs : dict
            Passed on to that method, or to ``ax.plot`` for one feature.

        Returns
        -------
        DensityDisplay
            The display.
        """
        plt = import_pyplot(f"{type(self).__name__}.plot")
        _check_plot_method(plot_method)
        n_panels = 1 if self.paths is None else self.paths.shape[1]
        if ax is None:
            size = (PANEL_SIZE * n_panels, PANEL_SIZE) if n_panels > 1 else None
            _, ax = plt.subplots(1, n_panels, figsize=size, layout="constrained")
        self.axes_ = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if len(self.axes_) != n_panels:
            raise ValueError(f"ax must be {n_panels} axes. Got {len(self.axes_)}.")
        self.ax_, self.figure_ = self.axes_[-1], self.axes_[-1].figure
        draw = self._draw_one if len(self.grid) == 1 else self._draw_two
        draw(plot_method, kwargs)
        if self.paths is not None:
            times = np.linspace(0, 1, n_panels)
            for panel, time in zip(self.axes_, times, strict=True):
                panel.set_title(f"t = {time:.2g}")
        return self

    def _draw_one(self, plot_method, kwargs):
        """Draw histograms, and the line of the density over the last one."""
        (x,) = self.grid
        panels = self.rows[:, None] if self.paths is None else self.paths
        for panel, values in zip(self.axes_, panels.swapaxes(0, 1), strict=True):
            panel.hist(values[:, 0], bins=N_BINS, density=True, color="0.8")
            panel.set_xlabel(self._name(0))
        (self.line_,) = self.ax_.plot(x, np.exp(self.log_density), **kwargs)
        self.axes_[0].set_ylabel("density")

    def _draw_two(self, plot_method, kwargs):
        """Draw the density, and rows on their way to it."""
        # as many as hide the steps between them
        if plot_method != "pcolormesh" and "colors" not in kwargs:
            kwargs = {"levels": 20, **kwargs}
        method = getattr(self.ax_, plot_method)
        self.surface_ = method(*self.grid, np.exp(self.log_density), **kwargs)
        for panel in self.axes_:
            panel.set_xlabel(self._name(0))
        self.axes_[0].set_ylabel(self._name(1))
        if self.paths is None:
            return
        ends = [(x[0], x[-1]) for x in self.grid]
        for panel, y in zip(self.axes_[:-1], self.paths.swapaxes(0, 1), strict=False):
            panel.plot(*y.T, ".", markersize=2, alpha=0.5)
        for panel in self.axes_:
            panel.set(xlim=ends[0], ylim=ends[1])

    def _name(self, i):
        return f"x{i}" if self.feature_names is None else str(self.feature_names[i])


def _make_grid(rows, margin, resolution):
    """Return, for every feature, points from below its values to above them."""
    low, high = rows.min(0), rows.max(0)
    # rows that are all the same still have a neighbourhood
    beyond = np.where(high > low, margin * (high - low), 0.5)
    ends = zip(low - beyond, high + beyond, strict=True)
    return tuple(np.linspace(*end, resolution) for end in ends)


def _check_plot_method(plot_method):
    if plot_method not in ("contourf", "contour", "pcolormesh"):
        raise ValueError(
            "plot_method must be 'contourf', 'contour' or 'pcolormesh'. "
            f"Got {plot_method!r} instead."
        )
