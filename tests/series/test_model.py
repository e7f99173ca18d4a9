"""Which model answers where."""

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


@pytest.mark.parametrize("recent", [None, 1.0])
def test_each_place_has_its_model_which_is_told_what_it_may_know(recent):
    models = [Says(1.0), Says(2.0), Says(3.0)]
    before, inside, outside = (Regime(model) for model in models)
    outside = Regime(models[2], network=True, recent=recent)
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
    assert models[2].told.tolist() == ([5, 3] if recent else [1, 2, 5, 3])
