"""Cross-validation of time series whose rows are observations.

`sklearn.model_selection.KFold` hides single points and scores how well they are
interpolated, `PanelBlockKFold` hides blocks of time, and `PanelTimeSeriesSplit` hides
the future. `sklearn.model_selection.GroupKFold` hides whole series.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from numbers import Integral, Real

import numpy as np
import pandas as pd
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils import check_random_state, indexable

from sknode._series.keys import encode_series
from sknode._series.layout import SeriesLayout

__all__ = ["PanelBlockKFold", "PanelTimeSeriesSplit"]


class _PanelSplitter(BaseCrossValidator):
    """Splits by the times and series that are in X."""

    def get_n_splits(self, X=None, y=None, groups=None):
        """Return the number of splits.

        Parameters
        ----------
        X, y, groups : object
            Ignored, as scikit-learn's splitters do.

        Returns
        -------
        int
            The number.
        """
        return self.n_splits

    def split(self, X, y=None, groups=None):
        """Yield the rows to train on and those to test, split by split.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            Observations in any order, with their time and series.
        y : array-like of shape (n_samples,) or (n_samples, n_channels), optional
            Ignored but for its length.
        groups : array-like of shape (n_samples,), optional
            Ignored, with a warning: ``series`` says what is in X.

        Yields
        ------
        train : ndarray of int
            Positions of the rows to train on, ascending.
        test : ndarray of int
            Positions of the rows to test, ascending.
        """
        if groups is not None:
            warnings.warn(
                f"{type(self).__name__} ignores groups: series says what is in X.",
                UserWarning,
                stacklevel=2,
            )
        X, y = indexable(X, y)
        for train, test in self._iter_masks(*_read(X, self.time, self.series)):
            yield np.flatnonzero(train), np.flatnonzero(test)


class PanelTimeSeriesSplit(_PanelSplitter):
    """Train on the past and test the future, of one time series or many.

    Unlike `sklearn.model_selection.TimeSeriesSplit`, which cuts where it finds a row,
    this one cuts at times. Rows may have any order and any gaps between their times,
    and those of one time are never on both sides of a cut.

    Every split has a cut: it trains on rows at or before that, and tests those after
    it, up to the next cut. The last test ends with the data.

    Parameters
    ----------
    n_splits : int, default=5
        Number of splits.
    time : str, int or other label, default="auto"
        Where time is: a column by label or position, an index level by name, or
        "index". "auto" takes an index level with datetimes, periods or timedeltas, else
        the first such column, else the first column that does not name series.
    series : str, int, other label, or list of them, optional
        Columns or index levels that name the series. If time is one of several index
        levels and this is None, then the others are it.
    test_size : float, str, timedelta or pandas.Timedelta, optional
        How long the time is that is tested in a split, as a number if time is one, else
        as a timedelta or what `pandas.Timedelta` makes one of, such as ``"26W"``. By
        default the time is cut such that ``n_splits + 1`` stretches have equally many
        distinct times: the first one is only trained on.
    gap : float, str, timedelta or pandas.Timedelta, default=0
        How much time before a cut is left out of training.
    max_train_size : float, str, timedelta or pandas.Timedelta, optional
        How long the time is that is trained on; by default all the past.
    per_series : bool, default=False
        Whether each series is cut at times of its own, which count back from its own
        end. Cuts that are common to all series do not let the future of one be known
        when another one is forecast; choose them where series share a calendar. Choose
        cuts of their own where times count from a start of each, such as days in
        hospital. Series that are too short for ``n_splits`` then are only trained on
        in some splits; with ``test_size`` they may be only tested, as new ones are.

    See Also
    --------
    PanelBlockKFold : Hides blocks of time within series.
    sklearn.model_selection.TimeSeriesSplit : Cuts rows that are sorted by time.

    Examples
    --------
    >>> import pandas as pd
    >>> from sknode.model_selection import PanelTimeSeriesSplit
    >>> days = pd.to_datetime(["2024-03-09", "2024-03-01", "2024-03-02", "2024-03-20"])
    >>> X = pd.DataFrame({"day": days, "depth": [3.0, 1.0, 2.0, 4.0]})
    >>> cv = PanelTimeSeriesSplit(2, test_size="9D")
    >>> for train, test in cv.split(X):
    ...     print("train on", train, "test", test)
    train on [1 2] test [0]
    train on [0 1 2] test [3]
    """

    def __init__(
        self,
        n_splits=5,
        *,
        time="auto",
        series=None,
        test_size=None,
        gap=0,
        max_train_size=None,
        per_series=False,
    ):
        _check_n_splits(n_splits, 1)
        self.n_splits = n_splits
        self.time = time
        self.series = series
        self.test_size = test_size
        self.gap = gap
        self.max_train_size = max_train_size
        self.per_series = per_series

    def _iter_masks(self, series, time, dated):
        """Yield which rows are trained on and which are tested."""
        size = _duration(self.test_size, dated, "test_size")
        length = _duration(self.max_train_size, dated, "max_train_size")
        gap = _duration(self.gap, dated, "gap", zero=True)
        slack = _rounding(time)
        clock = series if self.per_series else np.zeros(len(time), dtype=int)
        cuts = self._cuts(clock, time, size, slack)[:, clock]
        for k, (cut, end) in enumerate(pairwise(cuts)):
            last = cut - max(gap - slack, 0)
            train = time <= last
            if length is not None:
                train &= time > last - length
            test = (cut < time) & (time <= end)
            for rows, purpose in ((train, "train on"), (test, "test")):
                if not rows.any():
                    raise ValueError(
                        f"There are no rows to {purpose} in split {k + 1} of "
                        f"n_splits={self.n_splits}. X has {len(np.unique(time))} "
                        "distinct times: take fewer splits, another test_size, or a "
                        "smaller gap."
                    )
            yield train, test

    def _cuts(self, clock, time, size, slack):
        """Return ends of all stretches, of shape (n_splits + 1, n_clocks)."""
        cuts = np.full((self.n_splits + 1, clock.max() + 1), -np.inf)
        if size is None:
            _, rank, n_distinct = _number(clock, time)
            stretch = rank * (self.n_splits + 1) // n_distinct
            np.maximum.at(cuts, (stretch, clock), time)
            return np.maximum.accumulate(cuts)
        np.maximum.at(cuts[-1], clock, time)
        before_end = size * np.arange(self.n_splits, -1, -1)
        return cuts[-1] - np.maximum(before_end - slack, 0)[:, None]


class PanelBlockKFold(_PanelSplitter):
    """Test contiguous blocks of time within series, every row once.

    A score of such folds says how well long gaps are filled. That of
    `sklearn.model_selection.KFold`, whose test rows have close neighbours on both
    sides, is much better and says little about gaps.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, at least 2.
    time : str, int or other label, default="auto"
        Where time is: a column by label or position, an index level by name, or
        "index". "auto" takes an index level with datetimes, periods or timedeltas, else
        the first such column, else the first column that does not name series.
    series : str, int, other label, or list of them, optional
        Columns or index levels that name the series. If time is one of several index
        levels and this is None, then the others are it.
    block_length : float, str, timedelta or pandas.Timedelta, optional
        How long a block is, as a number if time is one, else as a timedelta or what
        `pandas.Timedelta` makes one of, such as ``"12h"``: as long as the gaps that
        are to be filled. Blocks count from the start of each series and go to the folds
        in turn. By default every series has ``n_splits`` blocks with equally many
        distinct times.
    shuffle : bool, default=False
        Whether blocks go to the folds in random order: of ``n_splits`` successive ones
        each goes to another fold.
    random_state : int, RandomState instance or None, default=None
        Draws the order, with ``shuffle``.

    See Also
    --------
    PanelTimeSeriesSplit : Hides the future.
    sklearn.model_selection.GroupKFold : Hides whole series.

    Examples
    --------
    >>> import numpy as np
    >>> from sknode.model_selection import PanelBlockKFold
    >>> time = np.array([0.0, 0.5, 1.0, 3.0, 3.5, 4.0, 7.0, 7.1])
    >>> for train, test in PanelBlockKFold(2, block_length=2.0).split(time[:, None]):
    ...     print("train on", train, "test", test)
    train on [3 4 6 7] test [0 1 2 5]
    train on [0 1 2 5] test [3 4 6 7]
    """

    def __init__(
        self,
        n_splits=5,
        *,
        time="auto",
        series=None,
        block_length=None,
        shuffle=False,
        random_state=None,
    ):
        _check_n_splits(n_splits, 2)
        if not shuffle and random_state is not None:
            raise ValueError(
                "random_state has no effect without shuffle=True. "
                f"Got random_state={random_state!r}."
            )
        self.n_splits = n_splits
        self.time = time
        self.series = series
        self.block_length = block_length
        self.shuffle = shuffle
        self.random_state = random_state

    def _iter_masks(self, series, time, dated):
        """Yield which rows are trained on and which are tested."""
        length = _duration(self.block_length, dated, "block_length")
        if length is None:
            _, rank, n_distinct = _number(series, time)
            block = rank * self.n_splits // n_distinct
        else:
            start = np.full(series.max() + 1, np.inf)
            np.minimum.at(start, series, time)
            block = np.floor((time - start[series] + _rounding(time)) / length)
        # blocks without rows do not count
        number, _, _ = _number(series, block)
        n_blocks = number.max() + 1
        if n_blocks < self.n_splits:
            raise ValueError(
                f"n_splits={self.n_splits} folds need as many blocks, but X has "
                f"{n_blocks}: take fewer folds or a shorter block_length."
            )
        fold = number % self.n_splits
        if self.shuffle:
            rng = check_random_state(self.random_state)
            rounds = -(-n_blocks // self.n_splits)
            fold = rng.uniform(size=(rounds, self.n_splits)).argsort(1).ravel()[number]
        for k in range(self.n_splits):
            yield fold != k, fold == k


def _number(series, values):
    """Number the distinct values of every series.

    Returns, for every row, the number of its pair of series and value among all in
    order, that of its value among those of the series, and how many those are.
    """
    order = np.lexsort((values, series))
    s, v = series[order], values[order]
    fresh = np.r_[True, (s[1:] != s[:-1]) | (v[1:] != v[:-1])]
    number = np.empty(len(s), dtype=int)
    number[order] = np.cumsum(fresh) - 1
    count = np.bincount(s[fresh])
    first = np.cumsum(count) - count
    return number, number - first[series], count[series]


def _rounding(time):
    """Return by how much sums of times may be off: 0.3 is not three times 0.1."""
    return 4 * np.spacing(np.abs(time).max() + np.ptp(time))


def _check_n_splits(n_splits, least):
    if not isinstance(n_splits, Integral) or n_splits < least:
        raise ValueError(f"n_splits must be an integer >= {least}. Got {n_splits!r}.")


def _duration(value, dated, name, zero=False):
    """Return a duration in the units of times, which are seconds for dates."""
    if value is None or (zero and _is_number(value) and value == 0):
        return value
    length = _seconds(value) if dated else value
    if not _is_number(length) or not 0 <= length < np.inf or (length == 0 and not zero):
        expected = "a timedelta or a string such as '26W', as times are dates"
        if not dated:
            expected = "a number >= 0" if zero else "a positive number"
        raise ValueError(f"{name} must be {expected}. Got {value!r}.")
    return float(length)


def _seconds(duration):
    """Return the seconds of what pandas makes a timedelta of, None of anything else."""
    if _is_number(duration):  # of nanoseconds, to pandas
        return None
    try:
        return pd.Timedelta(duration) / pd.Timedelta(1, "s")
    except (TypeError, ValueError):
        return None


def _is_number(value):
    # which numpy's durations are as well, by their class
    return isinstance(value, Real) and not isinstance(value, np.timedelta64)


def _read(X, time, series):
    """Return codes of series, times as numbers, and whether those are seconds."""
    layout = SeriesLayout.learn(X, time=time, series=series)
    # other columns may be anything, for a pipeline may make numbers of them
    ids, times = layout.read_keys(layout.conform(X)[0])
    codes, _ = encode_series(ids)
    return codes, times, layout.clock.kind != "numbers"
