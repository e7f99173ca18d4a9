"""How candidates are chosen, and what happens to those that cannot be solved."""

import math

import numpy as np
import pytest

from sknode._series.calibration import Cells, Inflation
from sknode._series.fitting import _choose, _correct
from sknode._series.model import AFTER, Regime, SeriesModel
from sknode._series.panel import Panel
from sknode.ode import SolverError

CONTEXT = Panel.from_rows(
    np.repeat([0, 1], 30), np.tile(np.linspace(0, 1, 30), 2), np.zeros((60, 1))
)[0]
QUERY = Panel.from_rows(
    np.repeat([0, 1], 5), np.tile(np.linspace(1.1, 1.5, 5), 2), np.full((10, 1), np.nan)
)[0]
TRUTH = np.zeros((10, 1))
CELLS = np.ones((10, 1), bool)


class Off(SeriesModel):
    """A model that is off by as much as it is told, or cannot be solved."""

    def predict(self, mean, context, query):
        self.calls.append(len(context.time))
        if mean == "fails":
            raise SolverError("Too many steps.")
        # up or down by how much it is told
        off = 0.2 if len(context.time) == 60 else -0.15
        return np.full(query.values.shape, off), np.ones(query.values.shape)


def make_model():
    model = Off(None, None, np.ones(1), Inflation.none(1), None, True)
    object.__setattr__(model, "calls", [])
    return model


def choose(options):
    return _choose(options, CONTEXT, QUERY, TRUTH, CELLS, 0.0)


def test_what_is_less_off_is_chosen_and_mixtures_ask_nothing_twice():
    model = make_model()
    spans = [(math.inf,), (0.5,), (math.inf, 0.5)]
    options = [(Regime(model, True, span), "mean") for span in spans]
    regime, mean, error, deviation = choose(options)
    assert regime.recent == (math.inf, 0.5) and mean == "mean"
    np.testing.assert_allclose(error, 0.025)
    np.testing.assert_allclose(deviation, 0.025 / np.sqrt(1 + 0.175**2))
    assert len(model.calls) == 2


def test_what_cannot_be_solved_is_not_chosen():
    options = [(Regime(make_model()), None), (Regime(make_model(), True), "fails")]
    regime, *_ = choose(options)
    assert not regime.network
    with pytest.raises(SolverError):
        choose(options[1:])


def test_intervals_are_corrected_by_what_can_be_solved():
    deviation = np.linspace(0, 6, 50)
    judged = Cells(deviation, np.full(50, 0.1), np.zeros(50, int))
    rng = np.random.default_rng(0)
    model = make_model()
    regime = _correct(Regime(model, True), "fails", CONTEXT, AFTER, judged, rng)
    assert model.calls  # it was asked
    assert (regime.model.inflation.factors > 1).all()
