"""A trained network with all that it takes to ask it for paths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sknode._network import SolverSettings
from sknode._series.network import LatentODENetwork, Posterior
from sknode._series.panel import Panel
from sknode._series.posterior import (
    Laplace,
    normal_points,
    paths_at_rows,
    posterior,
    states_at_rows,
)

__all__ = ["NeuralMean"]


@dataclass(frozen=True)
class NeuralMean:
    """The latent ODE as a function from observations to paths.

    Attributes
    ----------
    network : LatentODENetwork
        The network, in the precision of predictions.
    settings : SolverSettings
        How to solve.
    n_draws : int
        Draws of the latent state of a series, the same noise for all of them.
    seed : int
        Of this noise.
    refine : bool
        Whether the encoder's answers are refined.
    strict : bool
        Whether a solve that fails is an error; if not, what it does not reach is NaN.
    """

    network: LatentODENetwork
    settings: SolverSettings
    n_draws: int
    seed: int
    refine: bool
    strict: bool = True

    def posterior(self, panel: Panel) -> Posterior | Laplace:
        """Return what is believed of the latent states of series."""
        return posterior(self.network, panel, self.settings, refine=self.refine)

    def paths(self, states: Posterior | Laplace, query: Panel) -> np.ndarray:
        """Return the means of the channels (n_draws, n_rows, n_channels)."""
        dim = self.network.latent_dim
        noise = normal_points(self.n_draws, dim, self.seed, states.mean)
        return paths_at_rows(
            self.network, states, query, self.settings, noise, self.strict
        ).numpy()

    def latent(self, states: Posterior | Laplace, query: Panel) -> np.ndarray:
        """Return the latent states (n_rows, latent_dim) at the rows of a panel."""
        return states_at_rows(
            self.network, states, query, self.settings, self.strict
        ).numpy()
