"""Section 5 of the paper: noisy spirals, a latent ODE and recurrent networks.

1000 spirals, half of them clockwise, each observed at 30, 50 or 100 of 100 points with
noise. 800 of them, with the 100 points after these, are for training; of the others the
next 100 points are to be forecast. The figure is the root mean square error against the
curves without noise, as in Table 2 of the paper; its data and settings are not known
exactly, so that its figures are a hint only.

The recurrent networks read one observed point after the other and predict the next one;
beyond the last one they read what they predicted. They do not know how much time there
is between two points, or are told, "with time gaps".

    python examples/spirals.py
    python examples/spirals.py --observed 30 --jobs 2 --plot spirals.png
"""

import argparse
import time
import warnings

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sknode import LatentODERegressor
from sknode.datasets import make_spirals

N_TIMES, NOISE = 100, 0.3
WHERE, COORDINATES, TRUTH = ["series", "time"], ["x1", "x2"], ["x1_true", "x2_true"]
RNNS = "RNN", "RNN, with time gaps"
# Table 2: the latent ODE, the recurrent network.
PAPER = {30: (0.1642, 0.3937), 50: (0.1502, 0.3202), 100: (0.1346, 0.1813)}


def main():
    args = parse()
    print("RMSE of the 100 points ahead, and seconds of processor time\n")
    print(f"{'observed':10}{'model':22}{'RMSE':>8}{'paper':>9}{'time':>8}")
    for n_observed in args.observed:
        train, given, future = make_data(n_observed, args.series, args.seed)
        data = train, given, future, args.seed
        (model, *row), *others = Parallel(args.jobs)(
            [
                delayed(latent_ode)(*data, args.epochs),
                delayed(recurrent)(*data, False, args.updates),
                delayed(recurrent)(*data, True, args.updates),
            ]
        )
        rows = dict(zip(("latent ODE", *RNNS), (row, *others), strict=True))
        paper = (*PAPER.get(n_observed, (np.nan, np.nan)), np.nan)
        for (name, (forecast, seconds)), figure in zip(
            rows.items(), paper, strict=True
        ):
            rmse = np.sqrt(((forecast - future[TRUTH].to_numpy()) ** 2).mean())
            known = "" if np.isnan(figure) else f"{figure:.4f}"
            print(
                f"{n_observed:8}  {name:22}{rmse:8.4f}{known:>9}{seconds:6.0f} s",
                flush=True,
            )
        if args.plot is not None and n_observed == args.observed[0]:
            draw(model, given, future, args.plot)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--observed", type=int, nargs="+", default=[30, 50, 100])
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=100, help="of the latent ODE")
    parser.add_argument("--updates", type=int, default=3000, help="of the RNNs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--plot", help="file to draw into, for the first --observed")
    return parser.parse_args()


def make_data(n_observed, n_series, seed):
    """Return series for training, and of the others the given and the later rows."""
    spirals = make_spirals(
        n_series,
        n_times=N_TIMES,
        n_future=N_TIMES,
        n_observed=n_observed,
        noise=NOISE,
        random_state=seed,
    )
    test = spirals[spirals["series"] >= 0.8 * n_series]
    future = test["future"]
    return spirals[spirals["series"] < 0.8 * n_series], test[~future], test[future]


def latent_ode(train, given, future, seed, epochs):
    """Return a model that knows the given points, its forecasts, and the time taken."""
    warnings.simplefilter("ignore", ConvergenceWarning)  # in a process of its own, too
    started = time.process_time()
    model = LatentODERegressor(series="series", max_iter=epochs, random_state=seed)
    model.fit(train[WHERE], train[COORDINATES])
    model = model.condition(given[WHERE], given[COORDINATES])
    forecast = model.predict(future[WHERE])
    return model, forecast, time.process_time() - started


class Recurrent(nn.Module):
    """Predict the next point from those before, and from the gap to it on request."""

    def __init__(self, with_gaps, hidden=25):
        super().__init__()
        self.with_gaps = with_gaps
        self.rnn = nn.RNN(2 + with_gaps, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, 2)
        self.log_noise = nn.Parameter(torch.zeros(2))

    def forward(self, points, gaps, state=None):
        inputs = torch.cat([points, gaps[..., None]], -1) if self.with_gaps else points
        hidden, state = self.rnn(inputs, state)
        return self.readout(hidden), state

    def forecast(self, points, gaps, future_gaps):
        """Return what follows, point by point."""
        found, state = [], None
        # the last gap is that to the first point of the future
        for gap in [gaps, *future_gaps.T[1:, :, None]]:
            step, state = self(points, gap, state)
            points = step[:, -1:]
            found.append(points)
        return torch.cat(found, 1)


def recurrent(train, given, future, seed, with_gaps, n_updates):
    """Return the forecasts of a recurrent network, and the time taken."""
    started = time.process_time()
    values = train[COORDINATES].to_numpy()
    mean, scale, span = values.mean(0), values.std(0), train["time"].max() / N_TIMES

    def tensors(frame):
        n = frame["series"].nunique()
        x = ((frame[COORDINATES].to_numpy() - mean) / scale).reshape(n, -1, 2)
        t = frame["time"].to_numpy().reshape(n, -1) / span
        return torch.from_numpy(x).float(), torch.from_numpy(t).float()

    torch.manual_seed(seed)
    network = Recurrent(with_gaps)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)
    x, t = tensors(train)
    for _ in range(n_updates):
        rows = torch.randint(len(x), (50,))
        points, gaps = x[rows], t[rows].diff()
        predicted, _ = network(points[:, :-1], gaps)
        error = (points[:, 1:] - predicted) / network.log_noise.exp()
        loss = (0.5 * error**2 + network.log_noise).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    (points, before), (_, after) = tensors(given), tensors(future)
    steps = torch.cat([before, after], 1).diff()
    n = before.shape[1]
    with torch.no_grad():
        found = network.forecast(points, steps[:, :n], steps[:, n - 1 :])
    forecast = found.double().numpy().reshape(-1, 2) * scale + mean
    return forecast, time.process_time() - started


def draw(model, given, future, path):
    """Draw reconstructions and forecasts, and latent paths by direction."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 3, figsize=(11, 7), layout="constrained", gridspec_kw={"hspace": 0.08}
    )
    clockwise = given.groupby("series")["clockwise"].first()
    shown = [k for way in (True, False) for k in clockwise.index[clockwise == way][:2]]
    for ax, series in zip(axes[:, :2].flat, shown, strict=True):
        seen = given[given["series"] == series]
        ahead = future[future["series"] == series]
        for part, colour, label in (
            (seen, "tab:blue", "reconstruction"),
            (ahead, "tab:red", "forecast"),
        ):
            ax.plot(*part[TRUTH].to_numpy().T, color="0.8", lw=4)
            # between the observations: at them predictions know their noise, too
            times = np.linspace(part["time"].min(), part["time"].max(), 203)[1:-1]
            where = pd.DataFrame({"series": series, "time": times})
            ax.plot(*model.predict(where).T, color=colour, label=label)
        ax.plot(*seen[COORDINATES].to_numpy().T, "k.", ms=4, label="observed")
        ax.set_aspect("equal", "datalim")
        way = "clockwise" if clockwise[series] else "counterclockwise"
        ax.set_title(f"series {series}, {way}")
    axes[0, 0].legend(fontsize="small")
    draw_latent(model, given, axes[:, 2])
    figure.savefig(path, dpi=150)
    print(f"\nDrawn into {path}")


def draw_latent(model, given, axes):
    """Draw the latent paths and where they start, in the plane of largest variance."""
    states = model.trajectory(given[WHERE])
    plane = PCA(2).fit_transform(states)
    for _, rows in given.reset_index(drop=True).groupby("series"):
        colour = "tab:orange" if rows["clockwise"].iloc[0] else "tab:green"
        axes[0].plot(*plane[rows.index].T, color=colour, lw=0.5)
        axes[1].plot(*plane[rows.index[:1]].T, ".", color=colour)
    axes[0].set_title("latent paths, by direction")
    axes[1].set_title("latent states at the start")
    for ax in axes:
        ax.set_xlabel("first principal component")
        ax.set_ylabel("second")


if __name__ == "__main__":
    main()
