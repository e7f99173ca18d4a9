"""Paths of states, and the vector field that moves them."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
import pandas as pd
from sklearn.base import is_regressor
from sklearn.decomposition import PCA
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_consistent_length, column_or_1d

from sknode.plotting._matplotlib import import_pyplot
from sknode.plotting._states import read_paths
from sknode.plotting._times import drawable_times

__all__ = ["TrajectoryDisplay"]

FIELD_COLOR = "0.75"
FIELD_METHODS = "quiver", "streamplot"


class TrajectoryDisplay:
    """Paths of states over the vector field that moves them.

    Use `from_estimator` to create one. States of two dimensions are drawn in the plane,
    with the vector field beneath. A state of one dimension is drawn against time, and
    the field with it. Of states of more dimensions the picture has the first two
    principal components, without the field: what it is in the plane depends on what the
    plane does not show.

    Parameters
    ----------
    path : ndarray of shape (n_states,)
        Which path a state is of. Those of a path come one after another.
    time : Index or array-like of shape (n_states,)
        Times of the states, ascending within a path.
    states : ndarray of shape (n_states, n_dims)
        States, of one or two dimensions.
    target : ndarray of shape (n_states,), optional
        Colours: of dtype float64 numbers, of any other one classes.
    names : list of str, optional
        What the dimensions are called.
    explained : ndarray of shape (2,), optional
        Shares of the variance that principal components have.
    grid : tuple of ndarray, optional
        Two axes: where the field is known. With a single dimension, the first is time.
    velocity : ndarray of shape (n_grid_1, n_grid_0, 2), optional
        The vector field at the grid, a row for every value of its second axis.
    field_time : float, optional
        The time that the field is of, for the title.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
        Figure that has the picture.
    ax_ : matplotlib.axes.Axes
        Axes with the paths.
    lines_ : list of matplotlib.collections.LineCollection
        The paths: one collection, or one a class.
    ends_ : list of matplotlib.collections.PathCollection
        Dots at their ends, as many.
    field_ : matplotlib.quiver.Quiver or matplotlib.streamplot.StreamplotSet or None
        The vector field.
    colorbar_ : matplotlib.colorbar.Colorbar or None
        Scale of the colours that stand for numbers.

    See Also
    --------
    DensityDisplay : The density that a flow leads to.
    SeriesDisplay : The channels of a series, rather than latent states.

    Examples
    --------
    >>> from sklearn.datasets import make_moons
    >>> from sknode import ODENetClassifier
    >>> from sknode.plotting import TrajectoryDisplay
    >>> X, y = make_moons(100, noise=0.1, random_state=0)
    >>> net = ODENetClassifier(augment_dim=0, tol=0.1, random_state=0).fit(X, y)
    >>> display = TrajectoryDisplay.from_estimator(net, X, y, n_times=3)
    >>> display.frame().columns.tolist()
    ['path', 'time', 'state 0', 'state 1', 'target']
    >>> len(display.frame())
    300
    """

    def __init__(
        self,
        path,
        time,
        states,
        *,
        target=None,
        names=None,
        explained=None,
        grid=None,
        velocity=None,
        field_time=None,
    ):
        self.path = path
        self.time = time
        self.states = states
        self.target = target
        self.names = names
        self.explained = explained
        self.grid = grid
        self.velocity = velocity
        self.field_time = field_time

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        *,
        n_times=50,
        field_time=0.5,
        grid_resolution=20,
        margin=0.1,
        ax=None,
        field_method="quiver",
        **kwargs,
    ):
        """Follow rows through a fitted estimator and draw their paths.

        Parameters
        ----------
        estimator : object
            Fitted estimator with ``trajectory``, or a pipeline that ends in one. The
            paths are of hidden states for `ODENetClassifier` and `ODENetRegressor`; of
            rows that come from the normal distribution, in the units of X, for
            `CNFDensity`; of latent states for `LatentODERegressor`. An ODE-Net for two
            features has states of two dimensions with ``augment_dim=0``.
        X : array-like of shape (n_samples, n_features)
            Rows to follow. For `LatentODERegressor` the rows of a series are a path:
            what is drawn between them is straight, and a long series that was cut into
            windows has a jump where one follows another.
        y : array-like of shape (n_samples,), optional
            What colours the paths: classes get a legend, numbers a scale. Those of
            regressors are numbers. For `LatentODERegressor` a number colours the path
            near its row, grey where it is NaN. A `CNFDensity` with ``conditional=True``
            needs y, and has a field to draw only if all rows have the same.
        n_times : int, default=50
            Number of equally spaced times from t = 0 to t = 1. `LatentODERegressor` has
            the times of its rows instead.
        field_time : float, default=0.5
            Time from 0 to 1 that the vector field is drawn of. That of
            `LatentODERegressor` is the same at all times, and a field over time has
            them all.
        grid_resolution : int, default=20
            Points of the field along both axes.
        margin : float, default=0.1
            How far the field goes beyond the paths, as a share of their range.
        ax : matplotlib axes, optional
            Where to draw. By default a new figure.
        field_method : {"quiver", "streamplot"} or None, default="quiver"
            As in `plot`.
        **kwargs : dict
            As in `plot`.

        Returns
        -------
        TrajectoryDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If the estimator is none of these.
        ValueError
            If a parameter has a value that is not among those above.
        """
        import_pyplot(f"{cls.__name__}.from_estimator")
        _check_field_method(field_method)
        if not isinstance(field_time, Real) or not 0 <= field_time <= 1:
            raise ValueError(
                f"field_time must be a number from 0 to 1. Got {field_time!r} instead."
            )
        if not isinstance(grid_resolution, Integral) or grid_resolution < 2:
            raise ValueError(
                f"grid_resolution must be an integer >= 2. Got {grid_resolution!r}."
            )
        if not isinstance(margin, Real) or not 0 <= margin < np.inf:
            raise ValueError(f"margin must be a number >= 0. Got {margin!r} instead.")
        if y is not None:
            check_consistent_length(X, y)
        paths, last = read_paths(estimator, X, y, n_times)
        states, names, explained = paths.states, paths.names, None
        grid = velocity = None
        if states.shape[1] > 2:
            states, explained = _project(states)
            names = ["component 0", "component 1"]
        elif paths.velocity is not None:
            grid = _make_grid(paths, margin, grid_resolution)
            velocity = _evaluate(paths.velocity, grid, float(field_time), states)
        # a field over time has all times, and a steady one is of none
        is_of_one_time = states.shape[1] == 2 and not paths.steady
        field_time = float(field_time) if is_of_one_time else None
        display = cls(
            paths.path,
            paths.time,
            states,
            target=None if y is None else _read_target(y, last)[paths.row],
            names=names,
            explained=explained,
            grid=grid,
            velocity=velocity,
            field_time=field_time,
        )
        return display.plot(ax, field_method=field_method, **kwargs)

    def plot(
        self,
        ax=None,
        *,
        field_method="quiver",
        cmap="viridis",
        line_kwargs=None,
        end_kwargs=None,
        field_kwargs=None,
    ):
        """Draw the paths, with dots at their ends, and the field beneath.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Where to draw. By default a new figure.
        field_method : {"quiver", "streamplot"} or None, default="quiver"
            Method of the axes that draws the field; None draws none.
        cmap : str or matplotlib.colors.Colormap, default="viridis"
            Colours of numbers.
        line_kwargs : dict, optional
            Passed on to `matplotlib.collections.LineCollection`.
        end_kwargs : dict, optional
            Passed on to ``ax.scatter``.
        field_kwargs : dict, optional
            Passed on to ``ax.quiver`` or ``ax.streamplot``.

        Returns
        -------
        TrajectoryDisplay
            The display.
        """
        plt = import_pyplot(f"{type(self).__name__}.plot")
        _check_field_method(field_method)
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        self.lines_, self.ends_, self.colorbar_ = [], [], None
        points, labels = self._place()
        self.field_ = None
        if self.velocity is not None and field_method is not None:
            self.field_ = self._draw_field(field_method, field_kwargs or {})
        styles = line_kwargs or {}, end_kwargs or {}
        if self.target is None:
            self._draw_paths(points, slice(None), *styles, {"color": "C0"})
        elif self.target.dtype == np.float64:
            colors = plt.get_cmap(cmap).with_extremes(bad="0.5")
            self._draw_numbers(points, *styles, colors)
        else:
            for i, label in enumerate(np.unique(self.target)):
                own = {"color": f"C{i % 10}", "label": str(label)}
                self._draw_paths(points, self.target == label, *styles, own)
            ax.legend()
        ax.set(xlabel=labels[0], ylabel=labels[1])
        ax.autoscale_view()
        return self

    def frame(self):
        """Return what is drawn as a table.

        Returns
        -------
        DataFrame
            A row for every state, with the columns ``"path"``, ``"time"``, one for each
            dimension, and ``"target"`` if there are colours.
        """
        keys = pd.DataFrame({"path": self.path, "time": self.time})
        parts = [keys, pd.DataFrame(self.states, columns=self._names())]
        if self.target is not None:
            parts.append(pd.Series(self.target, name="target"))
        # a feature may have the name of one of the other columns
        return pd.concat(parts, axis=1)

    def _names(self):
        n_dims = self.states.shape[1]
        return [f"x{i}" for i in range(n_dims)] if self.names is None else self.names

    def _place(self):
        """Return the points (n_states, 2) of the states, and labels of the axes."""
        names = self._names()
        if self.explained is not None:
            names = [
                f"{name} ({100 * share:.0f} % of the variance)"
                for name, share in zip(names, self.explained, strict=True)
            ]
        if self.states.shape[1] == 2:
            return self.states, names
        time, label = drawable_times(self.time)
        self.ax_.xaxis.update_units(time)
        time = np.asarray(self.ax_.convert_xunits(time), dtype=np.float64)
        return np.column_stack([time, self.states[:, 0]]), [label, *names]

    def _draw_field(self, method, kwargs):
        """Draw the vector field."""
        slopes = np.ma.masked_invalid(np.moveaxis(self.velocity, 2, 0))
        if method == "quiver":
            style = {"angles": "xy", "pivot": "mid", "zorder": 0}
        else:
            style = {"linewidth": 0.7, "arrowsize": 0.7, "zorder": 0}
        style = style | {"color": FIELD_COLOR} | kwargs
        if self.field_time is not None:
            self.ax_.set_title(f"vector field at t = {self.field_time:g}")
        return getattr(self.ax_, method)(*self.grid, *slopes, **style)

    def _draw_paths(self, points, chosen, line_kwargs, end_kwargs, style):
        """Draw paths of one colour."""
        from matplotlib.collections import LineCollection

        shown = np.zeros(len(points), bool)
        shown[chosen] = True
        joined, last = self._joints()
        pieces = np.stack([points[:-1], points[1:]], axis=1)[joined & shown[:-1]]
        look = style | {"linewidth": 0.8, "alpha": 0.7} | line_kwargs
        self.lines_.append(self.ax_.add_collection(LineCollection(pieces, **look)))
        look = {"s": 8, "color": style["color"], "zorder": 3} | end_kwargs
        self.ends_.append(self.ax_.scatter(*points[last & shown].T, **look))

    def _draw_numbers(self, points, line_kwargs, end_kwargs, cmap):
        """Draw paths in the colours of numbers."""
        from matplotlib.collections import LineCollection

        known = self.target[np.isfinite(self.target)]
        ends = (known.min(), known.max()) if len(known) else (0, 1)
        joined, last = self._joints()
        pieces = np.stack([points[:-1], points[1:]], axis=1)[joined]
        values = (0.5 * (self.target[:-1] + self.target[1:]))[joined]
        look = {"cmap": cmap, "linewidth": 0.8, "alpha": 0.7} | line_kwargs
        lines = LineCollection(pieces, array=np.ma.masked_invalid(values), **look)
        lines.set_clim(*ends)
        self.lines_ = [self.ax_.add_collection(lines)]
        look = {"s": 8, "cmap": cmap, "zorder": 3, "plotnonfinite": True} | end_kwargs
        dots = {"c": self.target[last], "vmin": ends[0], "vmax": ends[1]}
        self.ends_ = [self.ax_.scatter(*points[last].T, **dots, **look)]
        self.colorbar_ = self.figure_.colorbar(self.ends_[0], ax=self.ax_, label="y")

    def _joints(self):
        """Return where a state has a next one (n_states - 1,), and which have none."""
        joined = self.path[1:] == self.path[:-1]
        return joined, np.append(~joined, True)


def _check_field_method(field_method):
    if field_method is not None and field_method not in FIELD_METHODS:
        raise ValueError(
            "field_method must be 'quiver', 'streamplot' or None. "
            f"Got {field_method!r} instead."
        )


def _read_target(y, estimator):
    """Return numbers as float64, and classes as anything else."""
    y = column_or_1d(y)
    numeric = y.dtype.kind in "iuf"
    if numeric and (is_regressor(estimator) or type_of_target(y) == "continuous"):
        return y.astype(np.float64)
    return y.astype(object) if y.dtype == np.float64 else y


def _project(states):
    """Return the first two principal components and their shares of the variance."""
    components = PCA(2, random_state=0)
    projected = components.fit_transform(states.astype(np.float64))
    return projected, components.explained_variance_ratio_


def _make_grid(paths, margin, resolution):
    """Return points from below the states to above them; for one dimension, times."""
    states = paths.states.astype(np.float64)
    low, high = states.min(0), states.max(0)
    beyond = np.where(high > low, margin * (high - low), 0.5)
    axes = [
        np.linspace(*ends, resolution)
        for ends in zip(low - beyond, high + beyond, strict=True)
    ]
    if len(axes) == 1:
        axes.insert(0, np.linspace(0, 1, resolution))
    return tuple(axes)


def _evaluate(velocity, grid, time, states):
    """Return the vector field at the points of a grid, (n_grid_1, n_grid_0, 2)."""
    points = np.stack([x.ravel() for x in np.meshgrid(*grid)], axis=1)
    if states.shape[1] == 1:  # along the axis of time everything moves at unit speed
        slope = velocity(points[:, 0], points[:, 1:])
        slope = np.column_stack([np.ones(len(points)), slope])
    else:
        slope = velocity(time, points)
    return slope.reshape(len(grid[1]), len(grid[0]), 2)
