"""How the networks of `CNFDensity` are trained and judged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from sknode._density_flow import (
    DensityFlow,
    FlowWithEnergy,
    finish_loss,
    flow_matching_loss,
    make_finish_grid,
    make_grid,
)
from sknode._density_start import is_better
from sknode._network import SolverSettings
from sknode._optimizers import make_optimizer
from sknode._training import Average, History, Recipe, train
from sknode._warning import stacklevel_of_caller
from sknode.ode import SolverError

__all__ = ["FlowTrainer", "check_target_density"]

# Rows are evaluated in blocks of so many.
CHUNK_ROWS = 4096
# Held-out rows at which an epoch is judged; all of them judge the result.
VALIDATION_ROWS = 1000
# Steps of the likelihood in validation until t = 1; from then on in validation and in
# training.
VALIDATION_STEPS = 16
FINISH_VALIDATION_STEPS, FINISH_STEPS = 12, 4
# The result is judged with so many times more steps: what a field gained from the
# error of its steps is lost then.
REFINEMENT = 4
# Times and noises for a row in an epoch of flow matching.
N_DRAWS = 8
# What the moving average of the weights keeps in an update: flow matching is noisier.
MATCHING_DECAY, LIKELIHOOD_DECAY = 0.998, 0.998
# From the data back to the base.
TIMES = torch.tensor([1.0, 0.0], dtype=torch.float64)
# Steepness of the units that a finish starts with, on whitened rows.
UNIT_SLOPE = 6.0
# Rows of an epoch, if there are more.
EPOCH_ROWS = 10_000
# Share of the epochs before in which the learning rate falls to zero.
FALL_SHARE = 0.3
# Rows of an epoch of `fit_target`, all fresh.
TARGET_ROWS = 2048


@dataclass
class FlowTrainer:
    """Trains the networks of a flow, one after the other.

    All of it is in single precision.

    Attributes
    ----------
    make : callable
        ``make(residual, finish)`` returns a flow that starts as the mixture.
    recipe : callable
        ``recipe(n_rows)`` returns how to train on so many rows.
    settings : SolverSettings
        For objectives that simulate.
    objective : {"flow_matching", "likelihood"}
        That of the residual network.
    hutchinson : bool
        Whether divergences are estimated in training.
    penalties : tuple of float
        Strengths of the penalties on kinetic energy and on the Jacobian, of objectives
        that simulate.
    generator : torch.Generator
        Draws batches, times and noises.
    history : History
        Gets an entry an epoch.
    on_epoch : callable, optional
        Called with the history of a network; returns True to end its training.
    cut_short : bool
        Whether the training of a network that is of use ended for its epochs only.
    best : float or None
        Validation score of the flow as it is now, if there is one.
    """

    make: Callable[[bool, bool], DensityFlow]
    recipe: Callable[[int], Recipe]
    settings: SolverSettings
    objective: str
    hutchinson: bool
    penalties: tuple[float, float]
    generator: torch.Generator
    history: History
    on_epoch: Callable[[History], bool] | None = None
    cut_short: bool = False
    best: float | None = None

    def fit(self, data, refine, before=None):
        """Train on rows; return the finish and the residual, None where no good.

        Parameters
        ----------
        data : pair of (rows, conditions, weights, log_dets)
            For training and held out: whitened rows (n, dim), what their density
            depends on (n, condition_dim), their weights (n,) and log-determinants (n,)
            of the map to them.
        refine : bool
            Whether a finish is trained before the residual.
        before : DensityFlow, optional
            Flow whose networks are trained on.
        """
        finish = residual = None
        # what was of use before is kept, as it was if it got no better
        had_finish = before is not None and before.finish is not None
        had_residual = before is not None and before.residual is not None
        if refine:
            flow = self.make(False, True)
            if had_finish:
                flow.finish.load_state_dict(before.finish.state_dict())
            elif hasattr(flow.finish.field, "place_units"):
                rows = data[0][0]
                flow.finish.field.place_units(rows, UNIT_SLOPE, self.generator)
            if self._fit_finish(flow, data) or had_finish:
                finish = flow.finish
                # the residual is trained on the rows as they are at its end
                data = [_undo_finish(flow, part) for part in data]
        flow = self.make(True, False)
        if had_residual:
            flow.residual.load_state_dict(before.residual.state_dict())
        if self._fit_residual(flow, data) or had_residual:
            residual = flow.residual
        return finish, residual

    def log_density(self, finish, residual, data):
        """Return the log-density of rows, in the units of X, by trained networks."""
        flow = self.make(residual is not None, finish is not None)
        flow.finish, flow.residual = finish, residual
        return _log_density(flow, data, REFINEMENT)

    def fit_target(self, flow, log_density):
        """Minimise the reverse divergence to an unnormalised log-density."""
        times = TIMES.flip(0)

        def loss(rows, _):
            # where the flow carries N(0, I), its log-density against the other; steps
            # of fixed length would reward a field for what they get wrong
            z = torch.randn(rows.shape, generator=self.generator).to(rows)
            solution, penalty = self._solve(flow, z, times)
            x, change = solution.y[:, -1, : flow.dim], solution.y[:, -1, flow.dim]
            logs = log_density(x)
            if not torch.isfinite(logs).all():
                raise ValueError(
                    "log_density must be finite wherever the flow gets to, also where "
                    "there is next to no mass. Got NaN or infinite values."
                )
            losses = flow.log_mixture(x) + change - logs.to(x) + penalty
            return losses, solution.stats["n_f_evals"]

        rows = torch.zeros(TARGET_ROWS, flow.dim, device=flow.mixture.axes.device)
        weight = torch.ones_like(rows[:, 0])
        data = tuple((x, x[:, :0], weight, None) for x in (rows, rows[:0]))
        self._run(flow, data, loss, LIKELIHOOD_DECAY, "flow")

    def _fit_finish(self, flow, data):
        """Train what is next to the data by its likelihood."""

        def loss(rows, condition):
            given = self._estimated(flow.given(condition), rows)
            losses = finish_loss(given, rows, FINISH_STEPS, self.generator)
            return losses, torch.full_like(losses, 6 * FINISH_STEPS)

        return self._run(flow, data, loss, LIKELIHOOD_DECAY, "refine")

    def _fit_residual(self, flow, data):
        """Train what is added to the velocity of the mixture, by the objective."""

        def matching(rows, condition):
            arguments = rows, condition, N_DRAWS, self.generator
            losses = flow_matching_loss(flow, *arguments)
            return losses, torch.full_like(losses, N_DRAWS)

        def likelihood(rows, condition):
            given = flow.given(condition)
            solution, penalty = self._solve(given, rows, TIMES)
            losses = solution.y[:, -1, flow.dim] - given.log_mixture(rows) + penalty
            return losses, solution.stats["n_f_evals"]

        if self.objective == "likelihood":
            return self._run(flow, data, likelihood, LIKELIHOOD_DECAY, "flow")
        return self._run(flow, data, matching, MATCHING_DECAY, "flow")

    def _signs(self, *shape):
        return 2.0 * torch.randint(2, shape, generator=self.generator) - 1.0

    def _estimated(self, flow, rows):
        """Return the flow as it is trained: on request with estimated divergences."""
        if not self.hutchinson:
            return flow
        # a row has its own: the noise is then less in the mean
        return flow.estimated(self._signs(1, *rows.shape).to(rows))

    def _solve(self, flow, rows, times):
        """Return the solution from rows, through which gradients can be taken, and the
        penalty on what the velocity has spent (n,), or zero.
        """
        flow, n_more, penalty = self._estimated(flow, rows), 0, 0.0
        kinetic, jacobian = self.penalties
        if kinetic or jacobian:
            probe = self._signs(flow.dim).to(rows) if jacobian else None
            flow = FlowWithEnergy(flow, probe)
            n_more = flow.n_integrals
        state = nn.functional.pad(rows, (0, 1 + n_more))
        solution = self.settings.solve(flow, state, times)
        if not solution.success:
            raise SolverError(solution.failure_report())
        # backwards in time the integrals are negative
        spent = solution.y[:, -1, rows.shape[1] + 1 :].abs()
        for strength, integral in zip((kinetic, jacobian), spent.T, strict=False):
            penalty = penalty + strength * integral
        return solution, penalty

    def _run(self, flow, data, loss, decay, part):
        """Train a part of the flow, which gets the best average of its weights.

        Returns whether that is better than it was, as far as held-out rows can tell;
        it is left as it was if not.
        """
        (rows, conditions, weight, _), held_out = data
        # the loss is a sum over features whose size differs from data to data
        recipe = replace(
            self.recipe(len(rows)),
            gradient_bound=None,
            ends=True,
            decays=True,
            fall_share=FALL_SHARE,
            epoch_rows=EPOCH_ROWS,
            part=part,
            warns=False,
        )
        average, validate, current = Average(flow, decay), None, History()
        untrained = copy.deepcopy(flow.state_dict())
        if len(held_out[0]):
            few = tuple(x[:VALIDATION_ROWS] for x in held_out)
            shares = few[2].cpu().numpy()

            def validate():
                logs = _log_density(average.module, few)
                return float(np.average(logs, weights=shares))

            current.start = validate()
            before = _log_density(flow, held_out, REFINEMENT)
        optimizer = make_optimizer(flow, recipe.optimizer, recipe.learning_rate)
        data = (rows, conditions)
        arguments = (flow, data, weight, loss, optimizer, recipe, self.generator)
        try:
            train(
                *arguments,
                current,
                validate=validate,
                average=average,
                on_epoch=lambda _: self.on_epoch is not None and self.on_epoch(current),
            )
        except KeyboardInterrupt:
            if not (self.history.loss or current.loss):
                raise  # nothing was learned yet
            warnings.warn(
                "Training interrupted by user.", stacklevel=stacklevel_of_caller()
            )
        self.history.loss += current.loss
        self.history.nfe += current.nfe
        self.history.validation += current.validation
        better = validate is None
        if validate is not None:
            after = _log_density(flow, held_out, REFINEMENT)
            better = is_better(after, before, held_out[2].cpu().numpy())
        cut_short = len(current.loss) == recipe.max_iter and not current.converged
        self.cut_short |= better and cut_short
        if not better:
            flow.load_state_dict(untrained)
        if validate is not None:
            scores = current.validation if better else []
            self.best = max(scores, default=current.start)
        return better


def _log_density(flow, data, refinement=1) -> np.ndarray:
    """Return the log-density of rows in the units of X."""
    z, conditions, _, log_det = data
    pairs = zip(z.split(CHUNK_ROWS), conditions.split(CHUNK_ROWS), strict=True)
    grids = (
        make_grid(refinement * VALIDATION_STEPS),
        make_finish_grid(refinement * FINISH_VALIDATION_STEPS),
    )
    with torch.no_grad():
        parts = [flow.given(c).log_density_on(x, *grids) for x, c in pairs]
    return (torch.cat(parts).cpu().double() + log_det).numpy()


def _undo_finish(flow, data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, conditions, weights and log-determinants at t = 1."""
    z, conditions, weight, log_det = data
    if not len(z):
        return data
    pairs = zip(z.split(CHUNK_ROWS), conditions.split(CHUNK_ROWS), strict=True)
    grid = make_finish_grid(FINISH_VALIDATION_STEPS)
    with torch.no_grad():
        parts = [flow.given(c).undo_finish(x, grid) for x, c in pairs]
    rows, changes = (torch.cat(x) for x in zip(*parts, strict=True))
    return rows, conditions, weight, log_det - changes.cpu().double()


def check_target_density(log_density, n_features, device) -> None:
    """Raise an error unless a function maps rows to log-densities that can be learned.

    Parameters
    ----------
    log_density : callable
        What `CNFDensity.fit_target` was given.
    n_features : int
        Number of columns.
    device : torch.device
        Where it will be evaluated.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, n_features, generator=generator).to(device).requires_grad_()
    what = f"log_density must map a torch tensor of shape (n, {n_features}) to one of"
    try:
        with torch.enable_grad():
            logs = log_density(rows)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{what} shape (n,), by operations of torch. That failed: {error}"
        ) from error
    if not isinstance(logs, Tensor):
        raise TypeError(f"{what} shape (n,). Got {type(logs).__name__} instead.")
    if logs.shape != rows.shape[:1]:
        raise ValueError(
            f"{what} shape (n,). For n = {len(rows)} its shape is {tuple(logs.shape)}."
        )
    if not logs.requires_grad:
        raise ValueError(
            f"{what} shape (n,) by operations that torch can differentiate. What it "
            "returns does not depend on the rows, as far as torch can see."
        )
