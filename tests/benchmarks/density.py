"""CNFDensity beside a Gaussian mixture, kernel density and a neural spline flow.

On toys the figure is the mean of exact minus model log-density over 10,000 test rows,
the divergence of Kullback and Leibler in nats (smaller is better); on tables the mean
log-density of their test rows (larger is better). Tables are .npz files with `train`,
`val` and `test`. Times are CPU seconds of fit and of scoring. zuko takes part if it is
installed: on the rows as they are and on whitened ones.

With `--small` few rows are held out in ten folds, and the figure is how many nats per
feature the estimator is above the Gaussian of maximum likelihood.

    python tests/benchmarks/density.py --toys moons circles --tables data/magic.npz
    python tests/benchmarks/density.py --toys --small
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.stats import multivariate_normal
from sklearn.datasets import load_iris, load_wine
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknode import CNFDensity
from sknode.datasets import make_density


class Mixture:
    """GaussianMixture with the number of components of least BIC, on scaled columns."""

    def fit(self, X):
        """Fit for all numbers."""
        models = []
        for k in (1, 2, 4, 8, 16, 32, 64):
            model = make_pipeline(
                StandardScaler(), GaussianMixture(k, random_state=0, max_iter=200)
            ).fit(X)
            models.append((model[-1].bic(model[0].transform(X)), k, model))
        _, self.chosen, self.model = min(models, key=lambda entry: entry[:2])
        return self

    def score_samples(self, X):
        """Return log-densities in the units of X."""
        return self.model.score_samples(X) - np.log(self.model[0].scale_).sum()


class Kernel:
    """KernelDensity with a bandwidth by cross-validation, on scaled columns."""

    def fit(self, X):
        """Search coarsely on 2000 rows, finely on 10,000; fit on all."""
        self.scaler = StandardScaler().fit(X)
        Z = self.scaler.transform(X)
        rows = np.random.default_rng(0).permutation(Z)[:10_000]
        coarse = self._search(rows[:2000], np.geomspace(0.02, 1.0, 12))
        fine = self._search(rows, coarse * np.geomspace(0.4, 1.2, 9))
        # the best bandwidth shrinks as n^(-1 / (d + 4))
        rate = (len(rows) * 4 / 5 / len(Z)) ** (1 / (X.shape[1] + 4))
        self.chosen = round(fine * rate, 4)
        self.model = KernelDensity(bandwidth=self.chosen).fit(Z)
        return self

    def _search(self, rows, bandwidths):
        search = GridSearchCV(KernelDensity(), {"bandwidth": bandwidths}, cv=5)
        return search.fit(rows).best_params_["bandwidth"]

    def score_samples(self, X):
        """Return log-densities in the units of X."""
        logs = self.model.score_samples(self.scaler.transform(X))
        return logs - np.log(self.scaler.scale_).sum()


class Spline:
    """zuko's neural spline flow, for as long as it is given.

    Its splines end at -5 and 5, beyond which they are the identity: on rows that are
    spread over that range they have more knots than on whitened ones, on which in turn
    columns of any scale are learned.
    """

    def __init__(self, seconds, whitened):
        self.seconds, self.whitened, self.chosen = seconds, whitened, ""

    def fit(self, X):
        """Train with Adam, a falling learning rate and batches of 512."""
        import zuko

        torch.manual_seed(0)
        self.mean, self.root = np.zeros(X.shape[1]), np.eye(X.shape[1])
        if self.whitened:
            self.mean, self.root = X.mean(0), np.linalg.cholesky(np.cov(X.T))
        Z = self._whiten(X)
        self.flow = zuko.flows.NSF(X.shape[1], transforms=3, hidden_features=(64, 64))
        optimizer = torch.optim.Adam(self.flow.parameters(), lr=2e-3)
        started = time.process_time()
        while (used := (time.process_time() - started) / self.seconds) < 1:
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - used)
            loss = -self.flow().log_prob(Z[torch.randint(len(Z), (512,))]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self

    def _whiten(self, X):
        return torch.from_numpy(np.linalg.solve(self.root, (X - self.mean).T).T).float()

    @torch.no_grad()
    def score_samples(self, X):
        """Return log-densities in the units of X."""
        logs = self.flow().log_prob(self._whiten(X)).double().numpy()
        return logs - np.log(np.diag(self.root)).sum()


def estimators(seed, seconds):
    """Yield names and estimators; zuko's only where it can be imported."""
    yield "CNFDensity", CNFDensity(random_state=seed)
    yield "GaussianMixture", Mixture()
    yield "KernelDensity", Kernel()
    try:
        import zuko  # noqa: F401
    except ImportError:
        return
    yield "zuko NSF", Spline(seconds, whitened=False)
    yield "zuko NSF whitened", Spline(seconds, whitened=True)


def report(data, X, test, exact, args):
    """Fit all and print a line for each."""
    for name, estimator in estimators(args.seed, args.seconds):
        if args.only and name not in args.only:
            continue
        started = time.process_time()
        estimator.fit(X)
        fit = time.process_time() - started
        logs = estimator.score_samples(test)
        score = time.process_time() - started - fit
        values = logs if exact is None else exact - logs
        chosen = getattr(estimator, "chosen", getattr(estimator, "n_components_", ""))
        print(
            f"{data:12s} {name:17s} {values.mean():9.4f} "
            f"+- {values.std() / np.sqrt(len(values)):.4f} "
            f"{fit:8.1f} s {score:7.2f} s  {chosen}",
            flush=True,
        )


def small_sets(seed):
    """Yield names and rows of sets of 150 to 200 rows."""
    yield "iris", load_iris().data
    yield "wine", load_wine().data
    for name in ("moons", "8gaussians", "checkerboard"):
        yield f"{name} 200", make_density(name, 200, random_state=seed)[0]
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(5, 5))
    yield "normal 200", rng.normal(size=(200, 5)) @ mixing
    yield "t3 200", rng.standard_t(3, size=(200, 5)) @ mixing


def report_small(name, X, seed):
    """Print how far above the Gaussian rows are that were held out."""
    gains, seconds = [], 0.0
    for train, test in KFold(10, shuffle=True, random_state=seed).split(X):
        started = time.process_time()
        logs = CNFDensity(random_state=seed).fit(X[train]).score_samples(X[test])
        seconds += time.process_time() - started
        covariance = np.cov(X[train].T, bias=True)
        gaussian = multivariate_normal(X[train].mean(0), covariance)
        gains.append(logs - gaussian.logpdf(X[test]))
    gains = np.concatenate(gains) / X.shape[1]
    print(
        f"{name:16s} {gains.mean():9.4f} +- {gains.std() / np.sqrt(len(gains)):.4f} "
        f"{seconds / 10:8.2f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toys", nargs="*", default=["moons", "circles"])
    parser.add_argument("--tables", nargs="*", default=[], type=Path)
    parser.add_argument("--only", nargs="+", help="names of estimators")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="for zuko")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.small:
        print("small data       nats per feature above a Gaussian     fit")
        for name, X in small_sets(args.seed):
            report_small(name, X, args.seed)
    if args.toys or args.tables:
        print(
            "data         estimator         KL or log-density    fit     score  chosen"
        )
    for name in args.toys:
        X, _ = make_density(name, args.rows, random_state=args.seed)
        test, exact = make_density(name, 10_000, random_state=args.seed + 1)
        report(name, X, test, exact, args)
    for path in args.tables:
        table = np.load(path)
        # estimators that hold rows out do so themselves
        X = np.concatenate([table["train"], table["val"]]).astype(float)
        report(path.stem, X, table["test"].astype(float), None, args)


if __name__ == "__main__":
    main()
