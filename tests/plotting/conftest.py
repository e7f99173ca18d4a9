"""Figures are drawn without a window, and closed."""

import matplotlib
import pytest


@pytest.fixture(autouse=True)
def figures_of_no_window():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield
    plt.close("all")
