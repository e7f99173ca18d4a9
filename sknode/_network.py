"""The torch module behind the ODE-Net estimators."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sknode.fields import MLPField
from sknode.ode import Solution, SolverError
from sknode.ode.solve import solve

__all__ = ["ODENetwork", "SolverSettings"]


@dataclass(frozen=True)
class SolverSettings:
    """The solver parameters of an estimator at the time of a call."""

    method: str
    rtol: float
    atol: float
    max_steps: int
    gradient: str
    step_size: float | None

    def solve(self, field, y0: Tensor, t: Tensor) -> Solution:
        """Solve without warning about failed samples: the caller looks at them."""
        return solve(
            field,
            y0,
            t,
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            gradient=self.gradient,
            step_size=self.step_size,
        )


class ODENetwork(nn.Module):
    """Standardise, map into the state space, flow from t = 0 to 1, map out.

    Parameters
    ----------
    n_features, n_outputs : int
        Sizes of input and output.
    hidden_layer_sizes : tuple of int
        Hidden layers of the vector field.
    activation : str
        Activation of the vector field.
    augment_dim : int
        State dimensions beyond the features, zero at t = 0.
    """

    def __init__(
        self, n_features, n_outputs, hidden_layer_sizes, activation, augment_dim
    ):
        super().__init__()
        self.augment_dim = augment_dim
        state = n_features + augment_dim
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.input_map = nn.Linear(n_features, n_features)
        self.field = MLPField(state, hidden_layer_sizes, activation, True)
        self.output_map = nn.Linear(state, n_outputs)
        with torch.no_grad():
            # start from the features themselves
            self.input_map.weight.copy_(torch.eye(n_features))
            self.input_map.bias.zero_()
            # Uniform with variance 1 / fan_in, three times torch's own, as LeCun et
            # al., "Efficient BackProp" (1998): else the hidden units start out all but
            # linear, and a field of a few features stays so for many epochs.
            for parameter in self.field.layers[0].parameters():
                parameter.mul_(math.sqrt(3.0))

    def initial_state(self, x: Tensor) -> Tensor:
        """Return the states at t = 0 of (n, n_features) rows in the units of X."""
        state = self.input_map((x - self.mean) / self.scale)
        return nn.functional.pad(state, (0, self.augment_dim))

    def flow(self, x: Tensor, solver: SolverSettings, t: Tensor | None = None):
        """Solve for (n, n_features) rows; return the `Solution`."""
        if t is None:
            t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return solver.solve(self.field, self.initial_state(x), t)

    def forward(self, x: Tensor, solver: SolverSettings) -> tuple[Tensor, Tensor]:
        """Return outputs (n, n_outputs) and function evaluations (n,).

        Raises
        ------
        SolverError
            If a sample did not get to t = 1.
        """
        solution = self.flow(x, solver)
        if not solution.success:
            raise SolverError(solution.failure_report())
        return self.output_map(solution.y[:, -1]), solution.stats["n_f_evals"]
