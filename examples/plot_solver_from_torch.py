"""
The solver by itself, from torch
================================

`solve_ode` solves ordinary differential equations in batches and lets gradients
through: any torch code can be fitted through it, without scikit-learn. Here a vector
field is learned from noisy data of predators and prey, first two ways when the equation
is known, then by a network when it is not. An event function finds out how long a cycle
lasts.
"""

# %%
# Hares and lynxes follow the equations of Lotka and Volterra,
#
# .. math::
#
#     \dot x = \alpha x - \beta x y, \qquad \dot y = -\gamma y + \delta x y .
#
# Four valleys start with different numbers. All are solved in one call, each with steps
# of its own, and at times of its own: ``t`` may have a row for every sample.

import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from sknode.fields import MLPField
from sknode.ode import Event, odeint_adjoint, solve_ode

torch.manual_seed(0)
TRUE = torch.tensor([1.0, 0.5, 0.8, 0.3], dtype=torch.float64)


class LotkaVolterra(torch.nn.Module):
    """Equations with rates that can be learned."""

    def __init__(self, rates):
        super().__init__()
        # rates are positive
        self.log_rates = torch.nn.Parameter(rates.log())

    def forward(self, t, y):
        alpha, beta, gamma, delta = self.log_rates.exp()
        prey, predators = y.unbind(-1)
        return torch.stack(
            [
                prey * (alpha - beta * predators),
                predators * (delta * prey - gamma),
            ],
            -1,
        )


y0 = torch.tensor([[2.0, 1.0], [4.0, 1.5], [1.5, 3.0], [3.0, 3.0]]).double()
times = torch.sort(torch.rand(4, 30).double() * 12, dim=1).values
times[:, 0] = 0
with torch.no_grad():
    truth = solve_ode(LotkaVolterra(TRUE), y0, times, rtol=1e-8, atol=1e-8)
data = truth.y * torch.exp(0.1 * torch.randn(truth.y.shape))
print("evaluations of each valley", truth.stats["n_f_evals"].tolist())

# %%
# Fit the rates
# -------------
#
# Rates start at one. The gradient of the error goes through the solver in one of two
# ways: ``"discrete"`` is the exact reverse of the steps that were taken,
# ``"continuous"`` solves the adjoint equation backwards in time, as in the paper, in
# memory that does not depend on the number of steps. We begin with the first points: of
# a whole cycle that is out of phase a gradient tells little.


def misfit(field, gradient, n_points):
    """Return the mean square error of logarithms, as numbers are positive."""
    tolerances = {"rtol": 1e-5, "atol": 1e-5}
    found = solve_ode(field, y0, times[:, :n_points], gradient=gradient, **tolerances)
    errors = found.y.clamp(min=1e-3).log() - data[:, :n_points].log()
    return errors.square().mean()


def minimise(loss, parameters):
    """Change parameters such that a loss is small."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=30, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


print(f"{'true':10} rates {TRUE.numpy()}")
for gradient in ("discrete", "continuous"):
    started = time.process_time()
    model = LotkaVolterra(torch.ones(4).double())
    for n_points in (6, 12, 30):
        minimise(partial(misfit, model, gradient, n_points), model.parameters())
    rates = np.round(model.log_rates.detach().exp().numpy(), 3)
    print(f"{gradient:10} rates {rates}, {time.process_time() - started:.1f} s")

# %%
# ``odeint_adjoint`` has the arguments of torchdiffeq, so that code that was written for
# it runs on.

t = torch.linspace(0, 12, 200).double()
with torch.no_grad():
    curves = odeint_adjoint(model, y0, t, rtol=1e-6, atol=1e-6)  # (200, 4, 2)

# %%
# Fit a network
# -------------
#
# If nothing were known of the equations, a network could take their place. `MLPField`
# is one with closed forms for its derivatives and compiled kernels. It learns
# logarithms, so that numbers stay positive. Learning begins with the first quarter of
# the time: a network that has not learned anything yet cannot tell what is far ahead.

network = MLPField(2, (32, 32)).double()
optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
n_epochs = 600
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs)
losses = []
for epoch in range(n_epochs):
    until = min(30, 8 + 22 * epoch // (n_epochs // 2))
    solution = solve_ode(network, y0.log(), times[:, :until], rtol=1e-4, atol=1e-4)
    loss = (solution.y - data[:, :until].log()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
print(f"root mean square error {losses[-1] ** 0.5:.3f}, of the noise alone 0.100")

with torch.no_grad():
    learned = solve_ode(network, y0.log(), t, rtol=1e-6, atol=1e-6).y.exp()
figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
for i, ax in enumerate(axes.flat):
    for j, (name, colour) in enumerate((("hares", "C0"), ("lynxes", "C3"))):
        ax.plot(times[i], data[i, :, j], ".", color=colour, label=f"{name}, data")
        ax.plot(t, curves[:, i, j], color=colour, lw=1, label="fitted rates")
        ax.plot(t, learned[i, :, j], "--", color=colour, lw=1, label="network")
    ax.set_title(f"valley {i + 1}")
for ax in axes[1]:
    ax.set_xlabel("time, years")
for ax in axes[:, 0]:
    ax.set_ylabel("animals, thousands")
_ = figure.legend(
    *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6
)

# %%
# The two fields
# --------------
#
# The arrows are the directions of the slopes. The two agree where there are data. What
# a network says elsewhere need not be right.

grid = np.meshgrid(np.linspace(0.3, 8, 18), np.linspace(0.3, 6, 18))
points = torch.from_numpy(np.stack([x.ravel() for x in grid], -1))
with torch.no_grad():
    known = model(torch.tensor(0.0), points)
    guessed = network(torch.tensor(0.0), points.log()) * points
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, slopes, name in zip(
    axes, (known, guessed), ("fitted rates", "network"), strict=True
):
    slopes = slopes / slopes.norm(dim=1, keepdim=True)
    ax.quiver(*points.T, *slopes.T, color="0.5", scale=30)
    ax.plot(*data.reshape(-1, 2).T, ".", color="C0", ms=4)
    ax.set(title=name, xlabel="hares, thousands")
_ = axes[0].set_ylabel("lynxes, thousands")

# %%
# How long is a cycle?
# --------------------
#
# Hares are most numerous where their slope falls through zero: that is an event. The
# second one ends a solution. Its time can be differentiated, here by the rates: how
# many years longer is a cycle if a rate is one per cent larger?

peak = Event(lambda t, y: model(t, y)[:, 0], direction=-1, terminal=2)
solution = solve_ode(
    model, y0, torch.tensor([0.0, 30.0]).double(), event=peak, rtol=1e-8, atol=1e-8
)
peaks = solution.events[0]
for valley in range(4):
    first, second = peaks.t[peaks.sample == valley]
    cycle = second - first
    (effects,) = torch.autograd.grad(cycle, model.log_rates, retain_graph=True)
    changes = ", ".join(f"{0.01 * effect:+.3f}" for effect in effects.tolist())
    print(f"valley {valley + 1}: {cycle.item():.2f} years ({changes})")
plt.show()
