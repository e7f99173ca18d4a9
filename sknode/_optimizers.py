"""What training follows gradients with: Adam, and Muon for matrices.

The arithmetic of Adam is torch's. Its optimizers themselves are not used: the first one
of a process makes torch import its compiler, which takes a second, more than many a fit
does otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

__all__ = ["Adam", "Muon", "MuonAndAdam", "make_optimizer", "penalize"]


class _Optimizer:
    """Parameters in groups, with what is known of each from earlier gradients.

    Parameters
    ----------
    groups : list of dict
        With ``"params"``; for `penalize` with ``"decay"``: whether it counts.
    lr : float
        Step size.

    Attributes
    ----------
    param_groups : list of dict
        With ``"lr"`` and ``"penalty"``, which may be changed between steps: the
        gradient of ``penalty / 2 |p|^2`` is added to that of the loss.
    state : dict of int to tuple of Tensor
        By the place of a parameter among all.
    """

    def __init__(self, groups: list[dict], lr: float):
        self.param_groups = [{"lr": lr, "penalty": 0.0} | group for group in groups]
        self.state: dict[int, tuple[Tensor, ...]] = {}

    def _start(self, p: Tensor) -> tuple[Tensor, ...]:
        """Return the state of a parameter before its first step."""
        raise NotImplementedError

    def _follow(self, parameters, gradients, states, lr: float, penalty: float):
        """Take a step with some parameters of a group, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Follow the gradients; parameters without one stay."""
        place = 0
        for group in self.param_groups:
            used = []
            for p in group["params"]:
                if p.grad is not None:
                    if place not in self.state:
                        self.state[place] = self._start(p)
                    used.append((p, p.grad, self.state[place]))
                place += 1
            if used:
                columns = (list(x) for x in zip(*used, strict=True))
                self._follow(*columns, group["lr"], group["penalty"])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict:
        """Return what it takes to go on later."""
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.param_groups
        ]
        return {"param_groups": settings, "state": dict(self.state)}

    def load_state_dict(self, saved: dict) -> None:
        """Go on from an earlier state."""
        for group, settings in zip(
            self.param_groups, saved["param_groups"], strict=True
        ):
            group.update(settings)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state = {
            place: tuple(
                x.to(
                    parameters[place] if x.ndim else parameters[place].device, copy=True
                )
                for x in values
            )
            for place, values in saved["state"].items()
        }


class Adam(_Optimizer):
    """Adam [1]_, with torch's fused arithmetic.

    Parameters
    ----------
    groups : list of dict
        Groups of parameters.
    lr : float
        Step size.
    betas : tuple of float
        What remains of the means of gradients and of their squares in a step.

    References
    ----------
    .. [1] Kingma & Ba, "Adam: A method for stochastic optimization", ICLR 2015.
    """

    def __init__(self, groups: list[dict], lr: float, betas=(0.9, 0.999)):
        super().__init__(groups, lr)
        self.betas = betas

    def _start(self, p):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        return step, torch.zeros_like(p), torch.zeros_like(p)

    def _follow(self, parameters, gradients, states, lr, penalty):
        steps, means, squares = (list(x) for x in zip(*states, strict=True))
        adam(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=penalty,
            eps=1e-8,
            maximize=False,
        )


class Muon(_Optimizer):
    """Muon for matrices, which orthogonalises their updates [1]_.

    An update has the root mean square of one by Adam [2]_. As `torch.optim.Muon`, but
    that the penalty is part of the gradient, as it is with Adam.

    References
    ----------
    .. [1] Jordan, Jin, Boza, You, Cesista, Newhouse & Bernstein, "Muon: An optimizer
       for hidden layers in neural networks", 2024.
    .. [2] Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982 (2025).
    """

    MOMENTUM = 0.95

    def _start(self, p):
        return (torch.zeros_like(p),)

    def _follow(self, parameters, gradients, states, lr, penalty):
        for p, gradient, (momentum,) in zip(parameters, gradients, states, strict=True):
            if penalty:
                gradient = gradient.add(p, alpha=penalty)
            momentum.lerp_(gradient, 1 - self.MOMENTUM)
            update = orthogonalize(gradient.lerp(momentum, self.MOMENTUM))
            p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix with singular values of 1.

    Five steps of a Newton-Schulz iteration whose coefficients are the steepest at zero:
    singular values end between 0.7 and 1.2. In the precision of the matrix: for those
    of some dozen rows, a processor takes three to five times as long in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonAndAdam:
    """Muon for matrices, Adam for the rest.

    Parameters
    ----------
    matrices : list of Parameter
        What Muon updates.
    groups : list of dict
        Groups of parameters for Adam.
    lr : float
        Step size of both.
    """

    def __init__(self, matrices: list[nn.Parameter], groups: list[dict], lr: float):
        muon = Muon([{"params": matrices, "decay": True}], lr)
        self.parts = muon, Adam(groups, lr)

    @property
    def param_groups(self) -> list[dict]:
        """The groups of both."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Follow the gradients."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """Return the states of both."""
        return dict(enumerate(part.state_dict() for part in self.parts))

    def load_state_dict(self, state: dict) -> None:
        """Go on from the states of both."""
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[i])


def make_optimizer(
    module: nn.Module, name: str, lr: float, state: dict | None = None
) -> Adam | MuonAndAdam:
    """Return the optimizer, with a group that is penalised: that of the matrices.

    Parameters
    ----------
    module : torch.nn.Module
        What is trained.
    name : {"adam", "muon"}
        Which one.
    lr : float
        Step size.
    state : dict, optional
        The state of an earlier optimizer, to go on with; of another kind it is of no
        use.
    """
    weights = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    matrices = []
    if name == "muon":
        # not convolutions; and what time and conditions do to units is a bias, not a
        # direction of states: rings are learned to 0.08 nats rather than 0.10 that way
        matrices = [
            p
            for key, p in module.named_parameters()
            if p.ndim == 2 and "modulation" not in key
        ]
    taken = {id(p) for p in matrices}
    rest = [p for p in weights if id(p) not in taken]
    groups = [{"params": rest, "decay": True}, {"params": others, "decay": False}]
    optimizer = MuonAndAdam(matrices, groups, lr) if matrices else Adam(groups, lr)
    if state is not None and state.keys() == optimizer.state_dict().keys():
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = lr
    return optimizer


def penalize(optimizer: Adam | MuonAndAdam, alpha: float) -> None:
    """Let the next steps add the gradient of ``alpha / 2 |W|^2``."""
    for group in optimizer.param_groups:
        group["penalty"] = alpha if group["decay"] else 0.0
