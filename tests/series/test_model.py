"""Which model answers where."""

import math

import numpy as np
import pytest

from sknode._series.model import (
    AFTER,
    BEFORE,
    BETWEEN,
    Regime,
    SwitchedModel,
    places,
)
from sknode._series.panel import Panel

NAN = np.nan


def make_panel(codes, time, values):
    return Panel.from_rows(codes, np.array(time), np.array(values)[:, None])[0]


class Says:
    """A model that says a number, and remembers when what it was told is from."""

    def __init__(self, number):
        self.number, self.told = number, None

    def predict(self, mean, context, query):
        self.told, self.mean = context.time, mean
        return np.full(query.values.shape, self.number), np.ones(query.values.shape)

    def sample(self, mean, context, query, n_draws, rng):
        return np.full((n_draws, *query.values.shape), self.number)


CONTEXT = make_panel([0, 0, 0, 1], [1.0, 2.0, 5.0, 3.0], [NAN, 0.0, 0.0, 0.0])
QUERY = make_panel(
    [0, 0, 0, 0, 0, 1, 1, 2], [1.0, 2.0, 3.0, 5.0, 6.0, 2.0, 3.0, 9.0], [NAN] * 8
)


def test_places_are_before_between_and_after_observations():
    context = Panel(
        np.append(CONTEXT.offsets, CONTEXT.offsets[-1]),
        *(CONTEXT.time, CONTEXT.values, CONTEXT.covariates),
    )
    expected = [BEFORE, BETWEEN, BETWEEN, BETWEEN, AFTER, BEFORE, BETWEEN, BEFORE]
    assert places(context, QUERY).tolist() == expected


@pytest.mark.parametrize("recent", [math.inf, 1.0])
def test_each_place_has_its_model_which_is_told_what_it_may_know(recent):
    models = [Says(1.0), Says(2.0), Says(3.0)]
    before, inside, outside = (Regime(model) for model in models)
    outside = Regime(models[2], network=True, recent=(recent,))
    switched = SwitchedModel(before, inside, outside)
    query = QUERY.take([0, 1])
    centre, std = switched.predict("network", CONTEXT, query)
    assert centre.ravel().tolist() == [1, 2, 2, 2, 3, 1, 2]
    assert (std == 1).all()
    draws = switched.sample("network", CONTEXT, query, 2, None)
    assert draws[1].ravel().tolist() == centre.ravel().tolist()
    assert models[0].mean is models[1].mean is None
    assert models[2].mean == "network"
    assert models[1].told.tolist() == [1, 2, 5, 3]
    assert models[2].told.tolist() == ([5, 3] if recent == 1 else [1, 2, 5, 3])


class Last:
    """A model that says the mean time of what it is told, with that as the spread."""

    def predict(self, mean, context, query):
        number = context.time.mean()
        return np.full(query.values.shape, number), np.full(query.values.shape, number)

    def sample(self, mean, context, query, n_draws, rng):
        return np.full((n_draws, *query.values.shape), context.time.mean())


def test_what_is_told_more_and_less_is_mixed():
    context = make_panel([0] * 3, [1.0, 5.0, 6.0], [0.0] * 3)
    query = make_panel([0, 0], [7.0, 8.0], [NAN] * 2)
    regime = Regime(Last(), network=True, recent=(math.inf, 1.0, 0.5))
    centre, std = regime.predict("network", context, query)
    told = np.array([4.0, 5.5, 6.0])
    assert np.allclose(centre, told.mean())
    # the variance of a mixture: what its parts have, and what lies between them
    assert np.allclose(std**2, (told**2).mean() + told.var())
    draws = regime.sample("network", context, query, 7, np.random.default_rng(0))
    numbers, counts = np.unique(draws[:, 0, 0], return_counts=True)
    assert numbers.tolist() == told.tolist() and sorted(counts) == [2, 2, 3]
    assert (draws == draws[:, :1]).all()  # a path is of one of them
