"""Long series in pieces: what a latent state can carry ends somewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sknode._series.panel import Panel

__all__ = ["Windows", "window_rows"]

# Longer series are cut, into windows of so many rows that overlap by half.
LONGEST_SERIES, WINDOW_ROWS = 300, 200
# Where there are few series, windows are short enough for this many in all, but not
# shorter than this.
FEW_WINDOWS, FEWEST_ROWS = 16, 24


def window_rows(panel: Panel) -> int | None:
    """Return the rows of a window, or None if no series of the panel is to be cut."""
    total, longest = panel.offsets[-1], panel.lengths.max(initial=0)
    if panel.n_series >= FEW_WINDOWS:
        return WINDOW_ROWS if longest > LONGEST_SERIES else None
    rows = int(np.clip(2 * total // FEW_WINDOWS, FEWEST_ROWS, WINDOW_ROWS))
    return rows if longest > 1.5 * rows else None


@dataclass(frozen=True)
class Windows:
    """The windows of the series of a panel.

    Attributes
    ----------
    series : ndarray of shape (n_windows,)
        Which series they are of, in ascending order.
    first, last : ndarray of shape (n_windows,)
        Their rows in the panel.
    origin : ndarray of shape (n_windows,)
        Time that is zero in a window: that of its first row, or that of the panel.
    centre : ndarray of shape (n_windows,)
        Their middle; a time belongs to the window whose middle is nearest.
    """

    series: np.ndarray
    first: np.ndarray
    last: np.ndarray
    origin: np.ndarray
    centre: np.ndarray

    @classmethod
    def cut(cls, panel: Panel, rows: int | None, anchored: bool) -> Windows:
        """Cut the series of a panel.

        Parameters
        ----------
        panel : Panel
            What is to be cut.
        rows : int or None
            Rows of a window; None leaves series whole.
        anchored : bool
            Whether the time of a window starts at its first row.
        """
        pieces = []
        for i in range(panel.n_series):
            start, stop = panel.offsets[i], panel.offsets[i + 1]
            if rows is None or stop - start <= 1.5 * rows:
                pieces.append((i, start, stop))
                continue
            n = int(np.ceil((stop - start - rows) / (rows / 2))) + 1
            firsts = np.linspace(start, stop - rows, n).round().astype(int)
            pieces += [(i, first, first + rows) for first in firsts]
        series, first, last = np.array(pieces, dtype=np.int64).T
        empty = first == last
        time = np.append(panel.time, 0.0)  # an empty series may come last
        begin = np.where(empty, 0.0, time[first])
        end = np.where(empty, 0.0, time[last - 1])
        origin = begin if anchored else np.zeros_like(begin)
        return cls(series, first, last, origin, (begin + end) / 2)

    def panel(self, panel: Panel) -> tuple[Panel, np.ndarray]:
        """Return the rows of a panel by window, and where they come from."""
        lengths = self.last - self.first
        rows = np.concatenate(
            [np.arange(a, b) for a, b in zip(self.first, self.last, strict=True)]
        )
        return self._take(panel, rows, lengths), rows

    def assign(self, query: Panel) -> tuple[Panel, np.ndarray]:
        """Return the rows of a query by the window that answers, and which they are."""
        window = np.empty(len(query.time), np.int64)
        bounds = np.searchsorted(self.series, np.arange(query.n_series + 1))
        for i in range(query.n_series):
            rows = slice(query.offsets[i], query.offsets[i + 1])
            centres = self.centre[bounds[i] : bounds[i + 1]]
            middles = (centres[1:] + centres[:-1]) / 2
            window[rows] = bounds[i] + np.searchsorted(middles, query.time[rows])
        lengths = np.bincount(window, minlength=len(self.series))
        rows = np.argsort(window, kind="stable")
        return self._take(query, rows, lengths), rows

    def _take(self, panel, rows, lengths):
        return Panel(
            np.concatenate([[0], np.cumsum(lengths)]),
            panel.time[rows] - np.repeat(self.origin, lengths),
            panel.values[rows],
            panel.covariates[rows],
        )
