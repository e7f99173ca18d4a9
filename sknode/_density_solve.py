"""Solves of the flow of `CNFDensity`: to the base and back, and log-densities."""

from __future__ import annotations

import torch
from torch import nn

from sknode.ode import kernels

__all__ = ["carry", "count_evaluations", "follow", "log_density", "slopes"]

# From the data back to where densities are known.
FINISH_TIMES = torch.tensor([2.0, 1.0], dtype=torch.float64)
TIMES = torch.tensor([1.0, 0.0], dtype=torch.float64)


def legs_of(module):
    """Return the parts of the flow: fields, and the times that they begin and end."""
    legs = [(module.velocity, 0.0, 1.0)]
    if module.finish is not None:
        legs.append((module.finish.field, 1.0, 2.0))
    return legs


def follow(module, z, settings, n_times):
    """Return where rows were at times from first to last, and the solutions."""
    legs = legs_of(module)
    times = legs[-1][2] * torch.arange(n_times - 1, -1, -1, dtype=torch.float64)
    times = times / (n_times - 1)
    states, solutions = [z[:, None]], []
    for field, start, end in legs[::-1]:
        inside = times[(start <= times) & (times < end)]
        between = inside[inside > start].tolist()
        solution = settings.solve(field, z, torch.tensor([end, *between, start]))
        z = solution.y[:, -1]
        states.append(solution.y[:, 1 : 1 + len(inside)])
        solutions.append(solution)
    return torch.cat(states, 1).flip(1), solutions


def carry(module, z, settings, forwards):
    """Return where rows get to, and the solutions on the way."""
    legs = legs_of(module)
    solutions = []
    for field, start, end in legs if forwards else legs[::-1]:
        times = torch.tensor([start, end] if forwards else [end, start])
        fused = _with_kernel(module if start < 1 else module.finish, z.device)
        if fused is not None:
            solution = settings.solve(fused, nn.functional.pad(z, (0, 1)), times)
        else:
            solution = settings.solve(field, z, times)
        solutions.append(solution)
        z = solution.y[:, -1, : module.dim]
    return z, solutions


def _with_kernel(part, device):
    """Return a part of the flow with log-densities if a kernel solves it, or None.

    That takes less time than torch takes for the rows alone.
    """
    if device.type != "cpu" or not kernels.available():
        return None
    return part if part.density_network() is not None else None


def log_density(module, z, settings):
    """Return log-densities of whitened rows, and the solutions on the way."""
    change, solutions = 0.0, []
    if module.finish is not None:
        state = nn.functional.pad(z, (0, 1))
        solutions.append(settings.solve(module.finish, state, FINISH_TIMES))
        z, change = solutions[-1].y[:, -1].split([module.dim, 1], 1)
        change = change[:, 0]
    mixture = module.log_mixture(z)
    if module.residual is not None:
        state = nn.functional.pad(z, (0, 1))
        solutions.append(settings.solve(module, state, TIMES))
        change = change + solutions[-1].y[:, -1, -1]
    return mixture - change, solutions


def count_evaluations(module, z, settings):
    """Return how often log-densities evaluate the fields (n,), and the solutions."""
    _, solutions = log_density(module, z, settings)
    count = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for solution in solutions:
        count += solution.stats["n_f_evals"]
    return count, solutions


def slopes(module, z, settings, share):
    """Return the velocities (n, dim) after a share of the way to the data, which takes
    a time of 1, and no solutions.
    """
    legs = legs_of(module)
    last = legs[-1][2]
    field = next(field for field, _, end in legs if share * last <= end)
    return last * field(z.new_tensor(share * last), z), []
