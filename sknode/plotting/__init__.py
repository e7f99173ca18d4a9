"""Displays: pictures of fitted estimators, after those of scikit-learn.

They need matplotlib: ``pip install sknode[plot]``.
"""

from sknode.plotting.density import DensityDisplay
from sknode.plotting.series import SeriesDisplay
from sknode.plotting.tolerance import ToleranceDisplay
from sknode.plotting.trajectory import TrajectoryDisplay

__all__ = ["DensityDisplay", "SeriesDisplay", "ToleranceDisplay", "TrajectoryDisplay"]
