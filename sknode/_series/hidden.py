"""Which observed cells `fit` hides from itself, to judge what it has learned."""

from __future__ import annotations

import numpy as np

from sknode._series.panel import Panel

__all__ = ["BLOCK", "KINDS", "POINT", "TAIL", "hide_cells", "hide_ends"]

POINT, BLOCK, TAIL = 1, 2, 3
KINDS = {"points": POINT, "blocks": BLOCK, "tails": TAIL}
# Of a panel of so many series, some lose their tails as a whole; of fewer, all of them
# lose a short one.
MANY_SERIES = 20
# Share of a series that is its tail, where only some series lose it.
TAIL_SHARE = 0.3
# Where all series are cut short they are so at a time in this part of theirs.
CUTS = 0.5, 0.95
# Blocks are up to so large a share of the cells of a series.
LONGEST_BLOCK = 0.1
# Series with fewer observed cells of a channel than this keep them.
FEWEST_CELLS = 4


def hide_cells(panel: Panel, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose observed cells to hide: single points, blocks and tails, a third each.

    Points and blocks are of one channel, as when a sensor fails; tails are of all, as
    in forecasting.

    Parameters
    ----------
    panel : Panel
        Observations.
    fraction : float
        Share of the observed cells to hide.
    rng : Generator
        Draws them.

    Returns
    -------
    ndarray of shape (n_rows, n_channels), uint8
        0 for what is not hidden or not observed, else `POINT`, `BLOCK` or `TAIL`.
    """
    kinds = np.zeros(panel.values.shape, np.uint8)
    observed = np.isfinite(panel.values)
    share = fraction / 3
    many = panel.n_series >= MANY_SERIES
    for i in range(panel.n_series):
        rows = slice(panel.offsets[i], panel.offsets[i + 1])
        here, kind = observed[rows], kinds[rows]
        n = len(here)
        if n < FEWEST_CELLS:
            continue
        tail = TAIL_SHARE if many else share
        if not many or rng.uniform() < share / TAIL_SHARE:
            kind[n - max(1, round(tail * n)) :] = TAIL
        for c in range(here.shape[1]):
            _hide_in_channel(kind[:, c], np.flatnonzero(here[:, c]), share, rng)
    kinds[~observed] = 0
    # a channel that would lose nearly all of its cells keeps them
    for c in range(kinds.shape[1]):
        if (observed[:, c] & (kinds[:, c] == 0)).sum() < FEWEST_CELLS:
            kinds[:, c] = 0
    return kinds


def _hide_in_channel(kind, cells, share, rng):
    """Hide a block and single points among the observed cells of a channel."""
    if len(cells) < FEWEST_CELLS:
        return
    # as many blocks as it takes; a part of one with that probability
    wanted = share * len(cells)
    while wanted > 0:
        longest = max(1, round(LONGEST_BLOCK * len(cells)))
        length = int(np.exp(rng.uniform(0, np.log(longest + 0.5))))
        if rng.uniform() >= wanted / length:
            break
        start = rng.integers(1, max(2, len(cells) - length))
        block = cells[start : start + length]
        kind[block[kind[block] == 0]] = BLOCK
        wanted -= length
    points = cells[rng.uniform(size=len(cells)) < share]
    kind[points[kind[points] == 0]] = POINT


def hide_ends(panel: Panel, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut all series short.

    Parameters
    ----------
    panel : Panel
        Observations.
    rng : Generator
        Draws where.

    Returns
    -------
    hidden : ndarray of shape (n_rows, 1), bool
        Which rows come after the cut.
    far : ndarray of shape (n_rows, 1), bool
        Which of them come more than a share of `TAIL_SHARE` after it.
    """
    filled = panel.lengths > 0
    first, span = np.zeros(panel.n_series), np.zeros(panel.n_series)
    first[filled] = panel.time[panel.offsets[:-1][filled]]
    span[filled] = panel.time[panel.offsets[1:][filled] - 1] - first[filled]
    cut = first + span * rng.uniform(*CUTS, panel.n_series)
    series = panel.series_of_rows()
    ahead = (panel.time - cut[series])[:, None]
    return ahead > 0, ahead > TAIL_SHARE * span[series][:, None]
