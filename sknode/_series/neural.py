"""A trained network with all that it takes to ask it for paths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sknode._network import SolverSettings
from sknode._series.network import LatentODENetwork, Posterior
from sknode._series.panel import Panel
from sknode._series.training import _at_rows, normal_points, posterior

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
    """

    network: LatentODENetwork
    settings: SolverSettings
    n_draws: int
    seed: int

    def posterior(self, panel: Panel) -> Posterior:
        """Return what is believed of the latent states of series.

        By the encoder alone: steps that raise the bound of each series enlarge the
        rounding in which a series depends on those solved beside it.
        """
        return posterior(self.network, panel, self.settings, n_steps=0)

    def paths(self, states: Posterior, query: Panel) -> np.ndarray:
        """Return the means of the channels (n_draws, n_rows, n_channels)."""
        dim = self.network.latent_dim
        noise = normal_points(self.n_draws, dim, self.seed, states.mean)
        with torch.no_grad():
            paths = _at_rows(self.network, states, query, self.settings, noise)
        return paths.numpy()
