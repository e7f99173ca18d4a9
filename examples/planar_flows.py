"""Section 4 of "Neural Ordinary Differential Equations": planar flows.

Compares continuous normalizing flows (CNF) of M planar units with normalizing flows
(NF) of K = M planar layers. Both start from a standard normal distribution and train
for the same time: the NF for as long as the CNF took.

Figure 4: both learn unnormalised densities by minimising the divergence of Kullback and
Leibler from the flow. Table and picture have that divergence with the normaliser, by
quadrature: 0 is perfect.

Figure 5: both learn two circles and two moons by maximum likelihood. Here the planar
layers lead from the data to the normal distribution, as their inverse is no closed
form: densities are exact, but such a flow cannot draw samples. The divergence is from
the exact density, on rows of a test set. The CNF is trained as `CNFDensity` does it:
one field of 64 units by the likelihood, a second one by flow matching. It is shown from
a normal distribution, as in the paper, and from the mixture that held-out rows choose.
The NF trains for as long as the slower of the two.

    python examples/planar_flows.py                      # some minutes, one thread
    python examples/planar_flows.py --seconds 60 --plot planar_flows.png
    python examples/planar_flows.py --iterations 10000   # and 50 times more for the NF
    python examples/planar_flows.py --figures 5 --iterations 10000 --equal-time

Times are processor times of one thread, so that other work on the machine does not
count.
"""

import argparse
import itertools
import math
import time
import warnings
from functools import partial

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn
from torch.nn import functional as F

from sknode import CNFDensity
from sknode.datasets import log_density, make_density

# The planar flow takes so many iterations in the paper while the CNF takes one.
NF_ITERATIONS = 50
BATCH_SIZE = 256
NF_RATE = 1e-3
# Epochs by which the time of more of them is estimated.
N_TRY = 3
# Rows of an epoch of `CNFDensity.fit_target`.
TARGET_ROWS = 2048
N_TEST, N_SAMPLES = 4096, 10_000
FIGURE_5_UNITS = 64


def main():
    args = parse()
    torch.set_num_threads(1)
    # a training that is cut off by the time does not converge
    warnings.simplefilter("ignore", ConvergenceWarning)
    # the first of all fits is slow, which is not to be anyone's time
    CNFDensity(dynamics="planar", max_iter=1).fit_target(partial(log_target, 1), 2)
    figure_4, figure_5 = [], []
    if 4 in args.figures:
        print("Figure 4: divergence from the flow to the target, in nats")
        figure_4 = [
            fit_target(args, number, size)
            for number, size in itertools.product(args.targets, args.sizes)
        ]
    if 5 in args.figures:
        print("\nFigure 5: divergence from the exact density to the flow, in nats")
        figure_5 = [fit_rows(args, name) for name in ("circles", "moons")]
    if args.plot is not None:
        draw(args, figure_4, figure_5)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="about how long a CNF trains"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        help="train a CNF by so many iterations and an NF by 50 times as many instead",
    )
    parser.add_argument(
        "--equal-time",
        action="store_true",
        help="with --iterations, train an NF for as long as the CNF took",
    )
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adam"])
    parser.add_argument(
        "--figures", type=int, nargs="+", default=[4, 5], choices=[4, 5]
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument(
        "--targets", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3, 4]
    )
    parser.add_argument(
        "--rows", type=int, default=4096, help="rows to train on in figure 5"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="file to draw into")
    return parser.parse_args()


# --- targets --------------------------------------------------------------------------


def log_target(number, x):
    """Return minus the energy of Rezende & Mohamed (2015), table 1.

    Energies 2 to 4 do not grow along the first axis. A factor that falls there makes
    densities of them.
    """
    x0, x1 = x[:, 0], x[:, 1]
    if number == 1:
        ring = ((x.norm(dim=1) - 2) / 0.4) ** 2
        return -ring / 2 + either((x0 - 2) / 0.6, (x0 + 2) / 0.6)
    inside = -((x0 / 3) ** 4) / 2
    off = x1 - torch.sin(math.pi * x0 / 2)
    if number == 2:
        return inside - (off / 0.4) ** 2 / 2
    if number == 3:
        bump = 3 * torch.exp(-(((x0 - 1) / 0.6) ** 2) / 2)
        return inside + either(off / 0.35, (off + bump) / 0.35)
    step = 3 * torch.sigmoid((x0 - 1) / 0.3)
    return inside + either(off / 0.4, (off + step) / 0.35)


def either(a, b):
    """Return the logarithm of a sum of two bells."""
    return torch.logaddexp(-a.square() / 2, -b.square() / 2)


def log_normaliser(number):
    """Return the logarithm of what a target integrates to, by the trapezoidal rule."""
    points, area = grid_points(8.0, 1601)
    logs = log_target(number, torch.from_numpy(points))
    return float(logs.logsumexp(0)) + math.log(area)


def grid_points(bound, n):
    """Return points of a square grid, and the area that each of them has."""
    x = np.linspace(-bound, bound, n)
    points = np.stack([a.ravel() for a in np.meshgrid(x, x)], axis=1)
    return points, (x[1] - x[0]) ** 2


# --- the planar normalizing flow ------------------------------------------------------


class PlanarFlow(nn.Module):
    """Layers ``z + u tanh(w . z + b)`` of Rezende & Mohamed (2015), one by one."""

    def __init__(self, n_layers, dim=2):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_layers, dim) / math.sqrt(dim))
        self.u = nn.Parameter(0.1 * torch.randn(n_layers, dim))
        self.b = nn.Parameter(torch.rand(n_layers) * 2 - 1)

    def forward(self, z):
        """Return where rows get to, and the logarithm of the change of volume."""
        # w . u > -1 makes every layer invertible (their appendix A.1)
        product = (self.w * self.u).sum(1, keepdim=True)
        along = F.softplus(product) - 1 + 1e-4 - product
        u = self.u + along * self.w / self.w.square().sum(1, keepdim=True)
        values = []
        layers = zip(self.w.unbind(), u.unbind(), self.b.unbind(), strict=True)
        for w, step, b in layers:
            h = torch.tanh(torch.addmv(b, z, w))
            z = torch.addr(z, h, step)
            values.append(h)
        slopes = 1 - torch.stack(values, 1).square()
        return z, torch.log1p(slopes * (self.w * u).sum(1)).sum(1)


def log_normal(z):
    """Return the log-density of the standard normal distribution."""
    return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def count_iterations(args, n_cnf):
    """Return how many iterations an NF trains for, None where time decides."""
    if args.iterations is None or args.equal_time:
        return None
    return NF_ITERATIONS * n_cnf


def train_planar_flow(n_layers, loss, seconds, iterations, seed):
    """Train by RMSprop for a time, or if given by a number of iterations.

    As that of the CNF does, the learning rate falls to zero in the last third. Returns
    the flow and its number of iterations.
    """
    torch.manual_seed(seed)
    flow, n = PlanarFlow(n_layers), 0
    optimizer = torch.optim.RMSprop(flow.parameters(), lr=NF_RATE, momentum=0.9)
    start = time.process_time()
    while True:
        if iterations is None:
            share = (time.process_time() - start) / seconds
        else:
            share = n / iterations
        if share >= 1:
            return flow.eval(), n
        optimizer.param_groups[0]["lr"] = NF_RATE * min(1.0, 3 * (1 - share))
        optimizer.zero_grad()
        loss(flow).backward()
        optimizer.step()
        n += 1


# --- the continuous normalizing flow --------------------------------------------------


def train_cnf(fit, n_epochs, args, **parameters):
    """Train a planar `CNFDensity`; return it and the seconds that it took."""
    # as many epochs without progress as there are: only their number ends it
    estimator = CNFDensity(
        dynamics="planar",
        batch_size=BATCH_SIZE,
        alpha=0.0,
        optimizer=args.optimizer,
        max_iter=n_epochs,
        n_iter_no_change=n_epochs,
        random_state=args.seed,
        **parameters,
    )
    start = time.process_time()
    fit(estimator)
    seconds = time.process_time() - start
    # results need not be exact to the seventh digit
    return estimator.set_params(rtol=1e-5, atol=1e-5), seconds


def count_epochs(fit, n_updates, args, n_networks=1, **parameters):
    """Return for how many epochs, of so many updates, to train each network."""
    if args.iterations is not None:
        return math.ceil(args.iterations / n_updates / n_networks)
    # what every fit does once cancels out
    few, more = (train_cnf(fit, n, args, **parameters)[1] for n in (1, 1 + N_TRY))
    # an epoch takes longer, the more the flow has to do
    seconds = 1.5 * max(more - few, more / 4) / N_TRY
    return max(2, round(args.seconds / seconds))


# --- figures --------------------------------------------------------------------------


def fit_target(args, number, size):
    """Fit both flows to a target; return names, divergences and samples."""

    def fit(estimator):
        estimator.fit_target(partial(log_target, number), 2)

    n_updates = TARGET_ROWS // BATCH_SIZE
    parameters = {"hidden_layer_sizes": size, "learning_rate_init": 2e-2}
    n_epochs = count_epochs(fit, n_updates, args, **parameters)
    cnf, seconds = train_cnf(fit, n_epochs, args, **parameters)
    n_cnf = n_epochs * n_updates
    x = cnf.sample(N_SAMPLES, random_state=args.seed)
    logs = torch.from_numpy(cnf.score_samples(x))
    off = logs - log_target(number, torch.from_numpy(x))

    def divergences(flow, z):
        x, log_det = flow(z)
        return log_normal(z) - log_det - log_target(number, x), x

    nf, n_nf = train_planar_flow(
        size,
        lambda flow: divergences(flow, torch.randn(BATCH_SIZE, 2))[0].mean(),
        seconds,
        count_iterations(args, n_cnf),
        args.seed,
    )
    with torch.no_grad():
        off_nf, x_nf = divergences(nf, torch.randn(N_SAMPLES, 2))
    results = [float(v.mean()) + log_normaliser(number) for v in (off, off_nf)]
    report(f"target {number}, size {size:2d}", results, (n_cnf, n_nf), seconds)
    return number, size, results, (x, x_nf.numpy())


def fit_rows(args, name):
    """Fit both flows to rows; return the name, divergences and flows."""
    X, _ = make_density(name, args.rows, random_state=args.seed)
    X_test, exact = make_density(name, N_TEST, random_state=args.seed + 1)
    n_updates = math.ceil(args.rows * 0.9 / BATCH_SIZE)  # a tenth is held out

    def fit(estimator):
        estimator.fit(X)

    parameters = {"hidden_layer_sizes": FIGURE_5_UNITS, "learning_rate_init": 1e-2}
    normal = {"n_components": 1, "marginals": False, **parameters}
    n_epochs = count_epochs(fit, n_updates, args, n_networks=2, **normal)
    cnf, seconds = train_cnf(fit, n_epochs, args, **normal)
    mixture, seconds_mixture = train_cnf(fit, n_epochs, args, **parameters)
    n_cnf = len(cnf.loss_curve_) * n_updates
    mean, scale = X.mean(0), X.std(0)
    rows = torch.tensor((X - mean) / scale, dtype=torch.float32)

    def log_densities(flow, z):
        z, log_det = flow(z)
        return log_normal(z) + log_det

    def loss(flow):
        return -log_densities(
            flow, rows[torch.randint(len(rows), (BATCH_SIZE,))]
        ).mean()

    nf, n_nf = train_planar_flow(
        FIGURE_5_UNITS,
        loss,
        max(seconds, seconds_mixture),
        count_iterations(args, n_cnf),
        args.seed,
    )

    @torch.no_grad()
    def score_samples(X):
        z = torch.tensor((X - mean) / scale, dtype=torch.float32)
        return log_densities(nf, z).numpy() - np.log(scale).sum()

    scores = [flow.score(X_test) for flow in (cnf, mixture)]
    scores.append(float(score_samples(X_test).mean()))
    results = [exact.mean() - score for score in scores]
    what = f"{name}, size {FIGURE_5_UNITS}"
    report(what, [results[0], results[2]], (n_cnf, n_nf), seconds)
    print(
        f"{'':20s} CNF {results[1]:7.4f} from a mixture of {mixture.n_components_}, "
        f"{seconds_mixture:.1f} s",
        flush=True,
    )
    return name, results, X_test, mixture, score_samples


def report(what, results, iterations, seconds):
    cnf, nf = results
    print(
        f"{what:20s} CNF {cnf:7.4f}  NF {nf:7.4f}  "
        f"iterations {iterations[0]:6,d} and {iterations[1]:8,d}  {seconds:6.1f} s",
        flush=True,
    )


def draw(args, figure_4, figure_5):
    """Draw samples of figure 4, and densities and the flow of figure 5."""
    import matplotlib.pyplot as plt

    from sknode.plotting import DensityDisplay

    n_sizes = len(args.sizes)
    n_columns = max(5, 1 + 2 * n_sizes)
    n_targets = len(figure_4) // n_sizes
    n_rows = n_targets + len(figure_5)
    figure, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(1.5 * n_columns, 1.6 * n_rows),
        layout="constrained",
        squeeze=False,
    )
    box = {"bins": 60, "range": [[-4, 4], [-4, 4]]}
    for i, (number, size, results, samples) in enumerate(figure_4):
        row, column = axes[i // n_sizes], 1 + i % n_sizes
        show(row[0], lambda x, n=number: log_target(n, torch.tensor(x)).numpy(), 4.0)
        row[0].set_title(f"target {number}", fontsize=8)
        places = (row[column], row[column + n_sizes])
        kinds = zip(("CNF", "NF"), places, results, samples, strict=True)
        for kind, ax, divergence, x in kinds:
            ax.hist2d(*x.T, **box)
            ax.set_title(f"{kind} {size}: {divergence:.3f}", fontsize=8)
    for row, (name, results, X, cnf, score_samples) in zip(
        axes[n_targets:], figure_5, strict=True
    ):
        DensityDisplay.from_estimator(
            cnf, X[:1000], n_times=n_columns - 2, ax=row[1:-1], plot_method="pcolormesh"
        )
        for ax in row[1:-1]:
            ax.set(xlabel="", ylabel="", title=ax.get_title())
            ax.title.set_fontsize(8)
        row[-2].set_title(f"t = 1, CNF: {results[1]:.3f}", fontsize=8)
        bounds = (*row[1].get_xlim(), *row[1].get_ylim())
        show(row[0], lambda x, n=name: log_density(n, x), bounds)
        row[0].set_title(name, fontsize=8)
        show(row[-1], score_samples, bounds)
        row[-1].set_title(f"NF: {results[2]:.3f}", fontsize=8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.savefig(args.plot, dpi=60)
    print(f"\nThe picture is in {args.plot}.")


def show(ax, log_density, bounds):
    """Draw a density."""
    x0, x1, y0, y1 = (
        (-bounds, bounds, -bounds, bounds) if np.isscalar(bounds) else bounds
    )
    x, y = np.linspace(x0, x1, 100), np.linspace(y0, y1, 100)
    points = np.stack([a.ravel() for a in np.meshgrid(x, y)], axis=1)
    ax.pcolormesh(x, y, np.exp(log_density(points)).reshape(100, 100))


if __name__ == "__main__":
    main()
