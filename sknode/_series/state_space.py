"""Linear stochastic differential equations, and what observations say about them.

A :class:`LinearProcess` is a vector of channels, each a linear combination of
independent stationary Gaussian processes that have a finite state: constants,
Ornstein-Uhlenbeck processes, once differentiable ones (Matern 3/2) and damped
oscillators. Everything here is exact and linear in the number of observations: the
Kalman filter, one cell of the table after the other, and the smoother of Bryson and
Frazier, which inverts nothing and needs no process noise (G. J. Bierman, "Fixed
interval smoothing with discrete measurements", International Journal of Control 18,
1973).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammainc

from sknode._series.panel import Panel

__all__ = ["LinearProcess"]

LOG_2PI = math.log(2 * math.pi)
# What one batch of series may take, in bytes, if it has more than one series.
MEMORY = 2**28


@dataclass(frozen=True)
class _Cells:
    """Series of similar length, padded: a grid of nodes in time, and cells on it.

    A node is a time of a series, however many rows have it. The cells of a node stand
    in slots; of an empty slot ``active`` is False.
    """

    step: np.ndarray  # (n_nodes, batch), time since the node before, 0 at the first
    channel: np.ndarray  # (n_nodes, n_slots, batch)
    value: np.ndarray  # (n_nodes, n_slots, batch, n_sides), right-hand sides
    active: np.ndarray  # (n_nodes, n_slots, batch)


class _Layout:
    """Where the rows of a panel and of a query meet on the time axis of a series."""

    def __init__(self, panel, query):
        rows, channels = np.nonzero(~np.isnan(panel.values))
        used = np.unique(rows)
        n_series = len(panel.offsets) - 1
        series = np.concatenate([_series_of(panel)[used], _series_of(query)])
        time = np.concatenate([panel.time[used], query.time])
        order = np.lexsort((time, series))
        s, t = series[order], time[order]
        new = np.ones(len(s), bool)
        new[1:] = (s[1:] != s[:-1]) | (t[1:] != t[:-1])
        node = np.empty(len(s), np.int64)
        node[order] = np.cumsum(new) - 1
        self.time = t[new]
        self.start = np.searchsorted(s[new], np.arange(n_series + 1))
        self.query_node = node[len(used) :]
        self.query_start = query.offsets
        self.rows, self.channels = rows, channels
        cell_node = node[: len(used)][np.searchsorted(used, rows)]
        # Rows are sorted by series and time, so cells are sorted by node.
        self.cell_node = cell_node
        self.slot = np.arange(len(rows)) - np.searchsorted(cell_node, cell_node)
        self.cell_start = np.searchsorted(cell_node, self.start)

    def batches(self, bytes_per_node):
        """Yield indices of series that are smoothed together, of similar length."""
        length = np.diff(self.start)
        order = np.argsort(length, kind="stable")
        order = order[length[order] > 0]
        while len(order):
            # The longest decides how many fit.
            longest = length[order[-1]] * bytes_per_node
            size = max(1, min(len(order), int(MEMORY // longest)))
            yield order[-size:]
            order = order[:-size]

    def nodes(self, batch):
        """Return (n_nodes, batch) of node numbers, -1 as padding at the end."""
        length = np.diff(self.start)[batch]
        grid = np.arange(length.max())[:, None]
        return np.where(grid < length, self.start[batch] + grid, -1)

    def cells(self, batch, values):
        """Return the padded cells of a batch; values of shape (n_cells, n_sides)."""
        nodes = self.nodes(batch)
        step = np.zeros(nodes.shape)
        step[1:] = np.where(
            nodes[1:] >= 0, self.time[nodes[1:]] - self.time[nodes[:-1]], 0.0
        )
        index, column = self.cells_of(batch)
        node = self.cell_node[index] - self.start[batch][column]
        slot = self.slot[index]
        shape = (len(nodes), slot.max() + 1 if len(slot) else 0, len(batch))
        channel = np.zeros(shape, np.int64)
        value = np.zeros((*shape, values.shape[1]))
        active = np.zeros(shape, bool)
        where = node, slot, column
        channel[where] = self.channels[index]
        value[where] = values[index]
        active[where] = True
        return _Cells(step, channel, value, active)

    def cells_of(self, batch):
        """Return the numbers of the cells of a batch, and whose they are."""
        return _ranges(self.cell_start[batch], self.cell_start[batch + 1])

    def queries_of(self, batch):
        """Return the rows of the query that are a batch's, and their (node, series)."""
        row, column = _ranges(self.query_start[batch], self.query_start[batch + 1])
        return row, (self.query_node[row] - self.start[batch][column], column)


def _series_of(panel):
    """Return (n_rows,) numbers of series."""
    return np.repeat(np.arange(len(panel.offsets) - 1), np.diff(panel.offsets))


def _ranges(start, stop):
    """Return the concatenated ranges, and for each element the range it is from."""
    length = stop - start
    which = np.repeat(np.arange(len(start)), length)
    first = np.cumsum(length) - length
    return np.arange(len(which)) - first[which] + start[which], which


@dataclass(frozen=True)
class LinearProcess:
    """A Gaussian process of several channels with a finite state.

    The state ``x`` has independent components of unit variance; channel ``c`` is
    ``mean[c] + loadings[c] @ x(t)``, observed with Gaussian noise. A component is alone
    (``partner`` is itself) or one of a pair. Over a time ``dt`` the mean of the state
    goes to ``a * x + b * x[partner]`` with, for ``decay = rate * dt``,

    ``a = exp(-decay) * (cos(frequency * dt) + smooth * decay)``,
    ``b = exp(-decay) * (sign * sin(frequency * dt) + smooth * decay)``,

    so that a single one is an Ornstein-Uhlenbeck process (a constant for rate 0), a
    pair with ``smooth`` of (1, -1) a Matern 3/2 process and its scaled derivative, and
    a pair with ``sign`` of (1, -1) a damped oscillator.

    Attributes
    ----------
    mean : ndarray of shape (n_channels,)
    loadings : ndarray of shape (n_channels, n_states)
    rate, frequency : ndarray of shape (n_states,)
        In one over the unit of time.
    smooth, sign : ndarray of shape (n_states,)
        1, -1 or 0.
    partner : ndarray of shape (n_states,), int64
    noise_variance : ndarray of shape (n_channels,)
        Variance of what is observed around the channel.

    Notes
    -----
    The result of a series depends on no other series of the panel.
    """

    mean: np.ndarray
    loadings: np.ndarray
    rate: np.ndarray
    frequency: np.ndarray
    smooth: np.ndarray
    sign: np.ndarray
    partner: np.ndarray
    noise_variance: np.ndarray

    @classmethod
    def from_blocks(cls, mean, noise_variance, blocks):
        """Build a process from independent parts.

        Parameters
        ----------
        mean, noise_variance : ndarray of shape (n_channels,)
        blocks : list of (kind, loadings, rate, frequency)
            ``kind`` is "ou", "matern" or "cycle"; the columns of ``loadings`` are
            independent processes of that kind.
        """
        parts = []
        for kind, loadings, rate, frequency in blocks:
            for column in np.asarray(loadings, float).T:
                parts.append((kind, column, rate, frequency))
        columns, rows, first = [], [], 0
        for kind, column, rate, frequency in parts:
            if kind == "ou":
                columns.append(column)
                rows.append((rate, 0.0, 0.0, 0.0, first))
                first += 1
                continue
            smooth, sign = (1.0, 0.0) if kind == "matern" else (0.0, 1.0)
            columns += [column, np.zeros_like(column)]
            rows.append((rate, frequency, smooth, sign, first + 1))
            rows.append((rate, frequency, -smooth, -sign, first))
            first += 2
        n_channels = len(mean)
        table = np.array(rows, float).reshape(len(rows), 5)
        return cls(
            np.asarray(mean, float),
            np.array(columns, float).reshape(len(rows), n_channels).T.copy(),
            *table[:, :4].T.copy(),
            table[:, 4].astype(np.int64),
            np.asarray(noise_variance, float),
        )

    def posterior(self, panel, query):
        """Return mean and variance of the channels, without noise, at other times.

        Parameters
        ----------
        panel : Panel
            Observations.
        query : Panel
            Times of the same series in the same order; values are not looked at.

        Returns
        -------
        mean, variance : ndarray of shape (n_queries, n_channels)
        """
        means, variance = self.posteriors(panel, panel.values[None], query)
        return means[0], variance

    def posteriors(self, panel, values, query):
        """Return means for several sets of values at the same times.

        Parameters
        ----------
        panel : Panel
            Tells when what is observed.
        values : ndarray of shape (n_sets, n_rows, n_channels)
            In place of those of the panel.
        query : Panel
            As in ``posterior``.

        Returns
        -------
        means : ndarray of shape (n_sets, n_queries, n_channels)
        variance : ndarray of shape (n_queries, n_channels)
            That of all of them: it does not depend on values.
        """
        layout = _Layout(panel, query)
        cells = values[:, layout.rows, layout.channels] - self.mean[layout.channels]
        means = np.empty((len(values), len(query.time), len(self.mean)))
        variance = np.empty(means.shape[1:])
        for batch in layout.batches(self._bytes_per_node(len(values))):
            smooth = _Smoother(self, layout.cells(batch, cells.T), variance=True)
            row, place = layout.queries_of(batch)
            means[:, row] = np.moveaxis(smooth.mean[place], -1, 0) + self.mean
            variance[row] = np.maximum(smooth.variance[place], 0.0)
        return means, variance

    def sample(self, panel, query, n_draws, rng):
        """Draw channels, without noise, at other times given observations.

        A draw is coherent over time and channels: a path of the prior is corrected by
        what the smoother makes of its difference to the observations (J. Durbin &
        S. J. Koopman, "A simple and efficient simulation smoother", 2002).

        Parameters
        ----------
        panel, query : Panel
            As in ``posterior``.
        n_draws : int
        rng : numpy.random.Generator
            Asked for one number; each series has a stream of its own from there.

        Returns
        -------
        draws : ndarray of shape (n_draws, n_queries, n_channels)
        """
        layout = _Layout(panel, query)
        values = self._centred(panel, layout)
        seed = int(rng.integers(2**63))
        draws = np.empty((n_draws, len(query.time), len(self.mean)))
        for batch in layout.batches(self._bytes_per_node(n_draws)):
            rngs = [np.random.default_rng([seed, series]) for series in batch]
            index, column = layout.cells_of(batch)
            node = layout.cell_node[index] - layout.start[batch][column]
            channel = layout.channels[index]
            # Before the path, as only the end of that depends on the padding.
            counts = np.bincount(column, minlength=len(batch))
            noise = [
                rng.standard_normal((count, n_draws))
                for rng, count in zip(rngs, counts, strict=True)
            ]
            cells = layout.cells(batch, values[:, None])
            path = self._prior(cells.step, n_draws, rngs)
            simulated = path[node, column, channel]
            scale = np.sqrt(self.noise_variance[channel])[:, None]
            simulated = simulated + scale * np.concatenate(noise)
            difference = np.empty((len(values), n_draws))
            difference[index] = values[index, None] - simulated
            smooth = _Smoother(self, layout.cells(batch, difference))
            row, place = layout.queries_of(batch)
            path = smooth.mean[place] + path[place] + self.mean[:, None]
            draws[:, row] = np.moveaxis(path, -1, 0)
        return draws

    def log_density(self, panel):
        """Return the log-density of the observations of each series, (n_series,)."""
        return self.log_density_and_gradient(panel)[0]

    def log_density_and_gradient(self, panel):
        """Return log-densities and how they change with the values.

        Returns
        -------
        log_density : ndarray of shape (n_series,)
        gradient : ndarray of shape (n_rows, n_channels)
            Of the log-density of a series to its values; 0 where nothing is observed.
        """
        layout = _Layout(panel, _nothing(panel))
        values = self._centred(panel, layout)[:, None]
        log_density = np.zeros(len(panel.offsets) - 1)
        gradient = np.zeros(panel.values.shape)
        for batch in layout.batches(self._bytes_per_node(1)):
            smooth = _Smoother(self, layout.cells(batch, values))
            log_density[batch] = smooth.log_density
            index, column = layout.cells_of(batch)
            node = layout.cell_node[index] - layout.start[batch][column]
            where = layout.rows[index], layout.channels[index]
            gradient[where] = -smooth.weight[node, layout.slot[index], column, 0]
        return log_density, gradient

    def predictive_log_density(self, panel, query):
        """Return the log-density of each row of a query given a panel.

        Parameters
        ----------
        panel : Panel
            Observations.
        query : Panel
            Rows of the same series, each scored alone; NaN is not scored.

        Returns
        -------
        log_density : ndarray of shape (n_queries,)
            Jointly over the observed channels of a row; 0 for a row without any.
        """
        layout = _Layout(panel, query)
        values = self._centred(panel, layout)[:, None]
        result = np.zeros(len(query.time))
        for batch in layout.batches(self._bytes_per_node(1) + 8 * len(self.mean) ** 2):
            smooth = _Smoother(self, layout.cells(batch, values), variance="full")
            row, place = layout.queries_of(batch)
            error = query.values[row] - self.mean - smooth.mean[place][..., 0]
            covariance = smooth.variance[place]
            result[row] = _masked_normal(error, covariance, self.noise_variance)
        return result

    def _centred(self, panel, layout):
        """Return (n_cells,) observations without the mean."""
        return panel.values[layout.rows, layout.channels] - self.mean[layout.channels]

    def _bytes_per_node(self, n_sides):
        """Return about how much the smoother keeps per node of a series."""
        n_channels, n_states = self.loadings.shape
        return 8 * (n_channels * (n_states + n_sides + 2) + 12 * n_states + 64)

    def _transition(self, step):
        """Return a, b and the process noise for steps, each (*step.shape, n_states).

        The noise of a pair is a symmetric 2 by 2 matrix: what stands on its diagonal,
        and beside it. Written without cancellation, as small steps need.
        """
        decay = step[..., None] * self.rate
        angle = step[..., None] * self.frequency
        shrink = np.exp(-decay)
        a = shrink * (np.cos(angle) + self.smooth * decay)
        b = shrink * (self.sign * np.sin(angle) + self.smooth * decay)
        rough = -np.expm1(-2 * decay)
        smooth = gammainc(3, 2 * decay)
        smooth += (self.smooth < 0) * 4 * decay * shrink**2
        noise = np.where(self.smooth != 0, smooth, rough)
        beside = np.where(self.smooth != 0, 2 * (decay * shrink) ** 2, 0.0)
        return a, b, noise, beside

    def _prior(self, step, n_draws, rngs):
        """Return draws of the channels, (n_nodes, batch, n_channels, n_draws)."""
        n_nodes, n_batch = step.shape
        n_states = self.loadings.shape[1]
        a, b, noise, beside = self._transition(step)
        # The root of the 2 by 2 noise of a pair: its second state has two entries.
        second = self.partner < np.arange(n_states)
        root = np.sqrt(np.maximum(noise[..., self.partner], np.finfo(float).tiny))
        across = np.where(second, beside / root, 0.0)
        own = np.sqrt(np.maximum(noise - across**2, 0.0))
        size = (n_nodes, n_states, n_draws)
        shock = np.stack([rng.standard_normal(size) for rng in rngs], 1)
        path = np.empty((n_nodes, n_batch, len(self.mean), n_draws))
        state = shock[0]
        for k in range(n_nodes):
            if k:
                partner = state[:, self.partner]
                state = a[k][..., None] * state + b[k][..., None] * partner
                state += own[k][..., None] * shock[k]
                state += across[k][..., None] * shock[k][:, self.partner]
            path[k] = self.loadings @ state
        return path


class _Smoother:
    """Filter forwards, smooth backwards; all series of a batch at once.

    Attributes
    ----------
    log_density : ndarray of shape (batch,)
        Of the first right-hand side.
    mean : ndarray of shape (n_nodes, batch, n_channels, n_sides)
    variance : ndarray of shape (n_nodes, batch, n_channels[, n_channels]), optional
    weight : ndarray of shape (n_nodes, n_slots, batch, n_sides)
        The inverse of the covariance of all cells times their values.
    """

    def __init__(self, process, cells, variance=False):
        self.process, self.cells = process, cells
        self.transition = process._transition(cells.step)
        self.diagonal = np.arange(len(process.rate))
        self.pairs = np.flatnonzero(process.partner != self.diagonal)
        self._filter(variance)
        self._smooth(variance)

    def _slots(self, node):
        """Return (slot, which series of the batch have a cell there) of a node."""
        active = self.cells.active[node]
        everyone = slice(None)
        slots = []
        for k in range(active.shape[0]):
            who = np.flatnonzero(active[k])
            if not len(who):
                break
            slots.append((k, everyone if len(who) == active.shape[1] else who))
        return slots

    def _forward(self, node, mean, covariance):
        """Move the state to a node, in place."""
        a, b, noise, beside = (part[node] for part in self.transition)
        pairs, partner = self.pairs, self.process.partner
        other = partner[pairs]
        b = b[:, pairs]
        moved = a[..., None] * mean
        moved[:, pairs] += b[..., None] * mean[:, other]
        mean[:] = moved
        if len(pairs):
            extra = b[:, :, None] * covariance[:, other]
            covariance *= a[:, :, None]
            covariance[:, pairs] += extra
            extra = covariance[:, :, other] * b[:, None, :]
            covariance *= a[:, None, :]
            covariance[:, :, pairs] += extra
            covariance[:, pairs, other] += beside[:, pairs]
        else:
            covariance *= a[:, :, None]
            covariance *= a[:, None, :]
        covariance[:, self.diagonal, self.diagonal] += noise

    def _backward(self, node, gradient, information):
        """Move the adjoint state from a node to the one before, in place."""
        a, b = self.transition[0][node], self.transition[1][node]
        pairs, partner = self.pairs, self.process.partner
        other = partner[pairs]
        back = b[:, other]
        moved = a[..., None] * gradient
        moved[:, pairs] += back[..., None] * gradient[:, other]
        gradient[:] = moved
        if information is None:
            return
        if len(pairs):
            extra = back[:, :, None] * information[:, other]
            information *= a[:, :, None]
            information[:, pairs] += extra
            extra = information[:, :, other] * back[:, None, :]
            information *= a[:, None, :]
            information[:, :, pairs] += extra
        else:
            information *= a[:, :, None]
            information *= a[:, None, :]

    def _filter(self, variance):
        process, cells = self.process, self.cells
        n_nodes, _, n_batch, n_sides = cells.value.shape
        n_channels, n_states = process.loadings.shape
        loadings, noise = process.loadings, process.noise_variance
        self.mean = np.empty((n_nodes, n_batch, n_channels, n_sides))
        self.reach = np.empty((n_nodes, n_batch, n_channels, n_states))
        self.innovation = np.zeros(cells.value.shape)
        self.spread = np.ones(cells.active.shape)
        self.gain = {}
        self.log_density = np.zeros(n_batch)
        mean = np.zeros((n_batch, n_states, n_sides))
        covariance = np.tile(np.eye(n_states), (n_batch, 1, 1))
        for node in range(n_nodes):
            if node:
                self._forward(node, mean, covariance)
            self.mean[node] = loadings @ mean
            self.reach[node] = loadings @ covariance
            for slot, who in self._slots(node):
                channel = cells.channel[node, slot, who]
                row = loadings[channel]
                shared = (covariance[who] @ row[..., None])[..., 0]
                spread = (row * shared).sum(-1) + noise[channel]
                predicted = (row[:, None] @ mean[who])[:, 0]
                innovation = cells.value[node, slot, who] - predicted
                gain = shared / spread[:, None]
                mean[who] += gain[..., None] * innovation[:, None]
                covariance[who] -= gain[:, :, None] * shared[:, None]
                self.innovation[node, slot, who] = innovation
                self.spread[node, slot, who] = spread
                self.gain[node, slot] = gain
                self.log_density[who] -= 0.5 * (
                    np.log(spread) + innovation[:, 0] ** 2 / spread + LOG_2PI
                )
        if variance:
            reach = self.reach
            self.variance = (
                reach @ loadings.T
                if variance == "full"
                else np.einsum("nbcd,cd->nbc", reach, loadings)
            )

    def _smooth(self, variance):
        process, cells = self.process, self.cells
        n_nodes, _, n_batch, n_sides = cells.value.shape
        n_states = len(process.rate)
        self.weight = np.zeros(cells.value.shape)
        gradient = np.zeros((n_batch, n_states, n_sides))
        information = np.zeros((n_batch, n_states, n_states)) if variance else None
        for node in reversed(range(n_nodes)):
            for slot, who in reversed(self._slots(node)):
                row = process.loadings[cells.channel[node, slot, who]]
                gain = self.gain[node, slot]
                spread = self.spread[node, slot, who][:, None]
                weight = self.innovation[node, slot, who] / spread
                weight -= (gain[:, None] @ gradient[who])[:, 0]
                gradient[who] += row[..., None] * weight[:, None]
                self.weight[node, slot, who] = weight
                if variance:
                    shared = (information[who] @ gain[..., None])[..., 0]
                    scale = ((gain * shared).sum(-1, keepdims=True) + 1 / spread) / 2
                    shared = scale * row - shared
                    update = row[:, :, None] * shared[:, None]
                    information[who] += update + np.swapaxes(update, 1, 2)
            reach = self.reach[node]
            self.mean[node] += reach @ gradient
            if variance == "full":
                self.variance[node] -= reach @ information @ np.swapaxes(reach, 1, 2)
            elif variance:
                self.variance[node] -= ((reach @ information) * reach).sum(-1)
            if node:
                self._backward(node, gradient, information)


def _nothing(panel):
    """Return a query of no times for the series of a panel."""
    return Panel(
        np.zeros(len(panel.offsets), np.int64),
        np.empty(0),
        np.empty((0, panel.values.shape[1])),
        np.empty((0, panel.covariates.shape[1])),
    )


def _masked_normal(error, covariance, noise):
    """Return log-densities of the entries of each row that are not NaN."""
    seen = ~np.isnan(error)
    both = seen[:, :, None] & seen[:, None, :]
    identity = np.eye(error.shape[1])
    covariance = np.where(both, covariance + identity * noise, identity)
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, np.where(seen, error, 0.0)[..., None])[..., 0]
    log_root = np.log(np.einsum("nii->ni", root)).sum(-1)
    return -0.5 * ((white**2).sum(-1) + seen.sum(-1) * LOG_2PI) - log_root
