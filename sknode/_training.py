"""The minibatch loop that all estimators train with."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from sknode._optimizers import Adam, MuonAndAdam, penalize
from sknode._warning import stacklevel_of_caller
from sknode.ode import SolverError

__all__ = [
    "Average",
    "History",
    "Recipe",
    "train",
    "warn_of_setbacks",
    "warn_unless_converged",
]


# Updates that the median norm of gradients is taken of.
RECENT = 1000
# Epochs that the time of further ones is estimated by: the cost of solves changes.
RECENT_EPOCHS = 10


# Penalty on the square of a weight that leaves nothing of it, short of an overflow.
LARGEST_PENALTY = 1e9


@dataclass(frozen=True)
class Recipe:
    """How to train: the learning parameters of an estimator, resolved."""

    max_iter: int
    batch_size: int
    learning_rate: float
    alpha: float
    tol: float
    n_iter_no_change: int
    total_weight: float | None = None  # that alpha is divided by, if not of the data
    # A step follows a gradient of at most this norm: a batch with an outlier then does
    # not undo what the others taught.
    # None is the median norm so far, for losses whose size differs from data to data:
    # the "AutoClip" of Seetharaman, Wichern, Pardo & Le Roux (MLSP 2020).
    gradient_bound: float | None = 1.0
    ends: bool = True  # whether max_iter is the end, and no later call goes on
    optimizer: str = "adam"
    epoch_rows: int | None = None  # an epoch is so many rows at most, drawn anew
    # Whether the learning rate falls evenly from the first epoch to max_iter.
    decays: bool = False
    # Without progress it falls to zero in n_iter_no_change epochs, or in this share of
    # those before if that is more.
    fall_share: float = 0.0
    # Epochs at the start that are not judged: what is learned still changes.
    settling: int = 0
    # How often training goes back to the best averaged weights, with half the learning
    # rate, when a solve fails.
    most_setbacks: int = 0
    warns: bool = True  # whether a warning says that training had not converged
    verbose: bool = False
    name: str = "estimator"
    part: str = ""  # what is trained, where that is a part of the estimator


@dataclass
class History:
    """What happened: an entry an epoch."""

    loss: list[float] = field(default_factory=list)
    nfe: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    start: float = -math.inf  # score before training, if known
    last_progress: float = -math.inf  # score, or loss with a minus, of that epoch
    stale: int = 0  # epochs without progress
    fall: int = 0  # epochs at the end in which the learning rate falls, once known
    fallen: int = 0  # how many of them have begun
    converged: bool = False  # whether progress had ended by itself
    setbacks: int = 0  # how often a solve failed and training went on

    def latest(self) -> dict:
        """Return what is known of the last epoch, for callbacks."""
        return {
            "loss": self.loss[-1],
            "nfe": self.nfe[-1],
            "validation_score": self.validation[-1] if self.validation else None,
        }


class Average:
    """A module whose weights are the exponential moving average of another one's.

    Parameters
    ----------
    module : torch.nn.Module
        What it follows, copied.
    decay : float
        What remains of the past after an update; less in the first ones.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module)
        self.decay, self.n_updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the weights as they are now."""
        self.n_updates += 1
        decay = min(self.decay, self.n_updates / (self.n_updates + 9))
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        mine, theirs = zip(*pairs, strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - decay)


class Clip:
    """Shortens gradients to a bound.

    Parameters
    ----------
    bound : float or None
        Norm at most; None is the median of the norms so far, the last `RECENT` of them.
    """

    def __init__(self, bound: float | None):
        self.bound, self.norms, self.n = bound, None, 0

    def __call__(self, parameters: list[nn.Parameter]) -> None:
        """Shorten the gradient of parameters, in place."""
        if self.bound is not None:
            nn.utils.clip_grad_norm_(parameters, self.bound)
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.norms is None:
            self.norms = norm.new_empty(RECENT)
        # the oldest one goes; what is not finite does not count
        self.norms[self.n % RECENT] = norm.where(norm.isfinite(), torch.nan)
        self.n += 1
        median = self.norms[: self.n].nanmedian()
        nn.utils.clip_grads_with_norm_(parameters, median, norm)


def train(
    module: nn.Module,
    data: tuple[Tensor, ...],
    weight: Tensor,
    objective: Callable[..., tuple[Tensor, Tensor]],
    optimizer: Adam | MuonAndAdam,
    recipe: Recipe,
    generator: torch.Generator,
    history: History,
    *,
    validate: Callable[[], float] | None = None,
    average: Average | None = None,
    on_epoch: Callable[[int], bool] = lambda epoch: False,
) -> int:
    """Train a module; return the number of epochs.

    Parameters
    ----------
    module : torch.nn.Module
        What is trained, in place.
    data : tuple of Tensor
        Arrays with a row a sample, on the module's device.
    weight : Tensor of shape (n,)
        Sample weights, positive.
    objective : callable
        ``objective(*rows)`` returns the losses (m,) and function evaluations (m,) of a
        batch.
    optimizer : Adam or MuonAndAdam
        From `make_optimizer`.
    recipe : Recipe
        How to train.
    generator : torch.Generator
        Draws the batches, on the CPU.
    history : History
        Continued.
    validate : callable, optional
        Returns a score of the module as it is, larger is better. With it, training
        ends when the score no longer improves and the best weights are restored, also
        after an interruption; without, when the loss no longer does. Either way, and
        also before ``max_iter``, it ends with epochs in which the learning rate falls
        to zero: they take the noise of the minibatches out of the weights.
    average : Average, optional
        Follows the weights. It is then its module that ``validate`` looks at, and the
        best average is what the trained module gets.
    on_epoch : callable
        Called with the epoch; returns True to stop.
    """
    penalty = recipe.alpha / (recipe.total_weight or float(weight.sum()))
    penalize(optimizer, min(penalty, LARGEST_PENALTY))
    followed = module if average is None else average.module
    best: list[Tensor] = []
    n, device = len(weight), weight.device
    n_rows = min(n, recipe.epoch_rows or n)  # of an epoch
    n_batches = math.ceil(n_rows / recipe.batch_size)
    parameters = [p for p in module.parameters() if p.requires_grad]
    clip, level = Clip(recipe.gradient_bound), 1.0
    # whatever the caller has switched off
    with torch.enable_grad(), _best_at_the_end(module, followed, best, average):
        for epoch in range(recipe.max_iter):
            started = time.perf_counter()
            # A single batch stays in order: a weight of 2 is then a row twice.
            order = torch.arange(n)
            if n_batches > 1:
                order = torch.randperm(n, generator=generator)[:n_rows]
            # tensors on the device: read once an epoch
            loss_sum, share_sum, nfe_sum = 0.0, 0.0, 0.0
            for rows in order.to(device).split(recipe.batch_size):
                share = weight[rows]
                while True:
                    optimizer.zero_grad()
                    try:
                        losses, nfe = objective(*(x[rows] for x in data))
                        loss = share @ losses
                        (loss / share.sum()).backward()
                        break
                    except SolverError as error:
                        count_setback(recipe, history, error)
                        restore((module, followed), best or list(followed.parameters()))
                        for group in optimizer.param_groups:
                            group["lr"] /= 2
                clip(parameters)
                optimizer.step()
                if average is not None:
                    average.update(module)
                loss_sum, share_sum = loss_sum + loss.detach(), share_sum + share.sum()
                nfe_sum = nfe_sum + nfe.sum()

            loss = float(loss_sum / share_sum)
            if not np.isfinite(loss):
                raise ValueError(
                    f"{recipe.name}: the training loss is not finite in epoch "
                    f"{len(history.loss) + 1}. Lower learning_rate_init, raise "
                    "alpha, or look for extreme values in X."
                )
            score = None if validate is None else validate()
            # from here on the epoch counts, as a whole
            history.loss.append(loss)
            history.nfe.append(float(nfe_sum) / n_rows)
            if score is not None:
                history.validation.append(score)
                if score >= max(history.validation):
                    best[:] = [p.detach().clone() for p in followed.parameters()]
            history.seconds.append(time.perf_counter() - started)
            report(recipe, history)
            if on_epoch(epoch) or has_finished(recipe, history, validate is not None):
                break
            if recipe.decays and not history.fall:
                level = 1 - len(history.loss) / recipe.max_iter
            share = history.fallen / (history.fall + 1)
            rate = recipe.learning_rate * level * (1 - share) / 2**history.setbacks
            for group in optimizer.param_groups:
                group["lr"] = rate
    if epoch + 1 == recipe.max_iter and recipe.warns:
        warn_unless_converged(recipe.name, recipe.max_iter, history)
    return epoch + 1


@contextlib.contextmanager
def _best_at_the_end(module, followed, best, average):
    """Give a module the best weights in the end, also if that is an interruption."""
    try:
        yield
    finally:
        if average is not None and not best:
            best = list(followed.parameters())
        if best:
            restore((module,), best)


@torch.no_grad()
def restore(modules, values) -> None:
    """Give modules the values of parameters."""
    for module in modules:
        for p, value in zip(module.parameters(), values, strict=True):
            p.copy_(value)


def warn_unless_converged(name: str, max_iter: int, history: History) -> None:
    """Warn that training has ended after ``max_iter`` epochs, and only therefore."""
    if max_iter > 1 and not history.converged:
        warnings.warn(
            f"{name}: max_iter={max_iter} was reached and the training had not "
            "converged yet. Raise max_iter or learning_rate_init.",
            ConvergenceWarning,
            stacklevel=stacklevel_of_caller(),
        )


def count_setback(recipe: Recipe, history: History, error: SolverError) -> None:
    """Count a solve that failed in training; raise an error if there are too many."""
    if history.setbacks == recipe.most_setbacks:
        raise SolverError(
            f"{recipe.name}: the solver failed in epoch {len(history.loss) + 1} of the "
            f"training. {error} If the training diverges, lower learning_rate_init or "
            "raise alpha."
        ) from error
    history.setbacks += 1


def warn_of_setbacks(name: str, history: History) -> None:
    """Warn that solves failed in training, if any did: it went on nevertheless."""
    if history.setbacks:
        warnings.warn(
            f"{name}: solves that failed in training: {history.setbacks}. It went on "
            "from earlier weights at half the learning rate each time. Lower "
            "learning_rate_init or raise alpha.",
            ConvergenceWarning,
            stacklevel=stacklevel_of_caller(),
        )


def has_finished(recipe: Recipe, history: History, validated: bool) -> bool:
    """Keep count of epochs without progress; return whether training is over."""
    if history.fall:
        history.fallen += 1
        return history.fallen > history.fall
    if len(history.loss) <= recipe.settling:
        return False
    now = history.validation[-1] if validated else -history.loss[-1]
    # small gains add up: they are measured from the last epoch that counted
    improved = now >= history.last_progress + recipe.tol
    if improved:
        history.last_progress = now
    history.stale = 0 if improved else history.stale + 1
    epochs = len(history.loss)
    left = recipe.max_iter - epochs
    fall = max(recipe.n_iter_no_change, round(recipe.fall_share * epochs))
    # a training that is cut short spends a third of it on the fall at most
    at_limit = min(fall, recipe.max_iter // 3)
    if history.stale > recipe.n_iter_no_change:
        history.converged = True
        if validated and max(history.validation) < history.start + recipe.tol:
            return True  # there is no gain that a fall could secure
        history.fall, history.fallen = min(fall, left), 1
        if recipe.verbose:
            what = "Validation score" if validated else "Training loss"
            print(
                f"{what} did not improve more than tol={recipe.tol:f} for "
                f"{recipe.n_iter_no_change} consecutive epochs. Ending with a falling "
                "learning rate."
            )
    elif recipe.ends and not recipe.decays and 0 < left <= at_limit:
        history.fall, history.fallen = left, 1
    return False


def report(recipe: Recipe, history: History) -> None:
    """Print a line about the last epoch."""
    if not recipe.verbose:
        return
    epoch, last = len(history.loss), str(recipe.max_iter)
    part = f"{recipe.part}: " if recipe.part else ""
    parts = [
        f"{part}epoch {epoch:{len(last)}d}/{last}",
        f"loss {history.loss[-1]:.6f}",
        f"evaluations {history.nfe[-1]:.1f}",
    ]
    if history.validation:
        parts.append(f"validation score {history.validation[-1]:.4f}")
    parts.append(f"{history.seconds[-1]:.2f} s")
    # training ends before max_iter where there is no more progress
    left, bound = recipe.max_iter - epoch, "at most "
    if history.fall:
        left, bound = history.fall - history.fallen, ""
    if left > 0:
        seconds = left * float(np.mean(history.seconds[-RECENT_EPOCHS:]))
        parts.append(f"{bound}{format_duration(seconds)} left")
    print("  ".join(parts), flush=True)


def format_duration(seconds: float) -> str:
    """Return a time as people say it: 3.2 s, 12 s, 2 min 05 s, 1 h 20 min."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds} s"
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
