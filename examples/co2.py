"""Gaps and future of a time series: carbon dioxide above Mauna Loa.

Of 2284 weeks from 1958 to 2001 the data have 59 gaps. Half-year blocks and the last two
years are hidden as well, to see how well `LatentODEImputer` fills them in, beside
linear interpolation in time (the last value, for the future), and whether 90 % of what
was hidden lies where it says. Then the same imputer, not trained again, sees all the
data and forecasts two years more.

    python examples/co2.py
    python examples/co2.py --plot co2.png
"""

import argparse
import itertools
import time

import numpy as np
import pandas as pd
from scipy.stats import norm

from sknode import LatentODEImputer
from sknode.datasets import load_co2

BLOCK_WEEKS = 26
N_BLOCKS = 8
FUTURE = "2000"
COVERAGE = 0.9


def main():
    args = parse()
    co2 = load_co2()
    blocks, future = hide(co2, args.seed)
    seen = co2.copy()
    seen[blocks | future] = np.nan
    print(
        f"Weekly carbon dioxide above Mauna Loa, {co2.index[0]:%B %Y} to "
        f"{co2.index[-1]:%B %Y}: {len(co2)} weeks,\n{co2['co2'].isna().sum()} of them "
        f"without a measurement. Hidden as well: {N_BLOCKS} blocks of {BLOCK_WEEKS} "
        f"weeks, and all\nfrom {FUTURE} on.\n"
    )
    started = time.process_time()
    imputer = LatentODEImputer(calendar="yearday", random_state=args.seed).fit(seen)
    print(f"Fitted in {time.process_time() - started:.0f} s of processor time.\n")
    compare(imputer, co2, seen, {"hidden blocks": blocks, f"{FUTURE} on": future})
    forecast(imputer, co2)
    if args.plot is not None:
        draw(imputer, co2, seen, args.plot)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="file to draw into")
    return parser.parse_args()


def hide(co2, seed):
    """Return which weeks to hide: blocks, one in every stretch, and the future."""
    future = np.asarray(co2.index >= FUTURE)
    rng = np.random.default_rng(seed)
    blocks = np.zeros(len(co2), dtype=bool)
    # none at an end, where there would be nothing to interpolate
    edges = np.linspace(BLOCK_WEEKS, (~future).sum() - BLOCK_WEEKS, N_BLOCKS + 1)
    for low, high in itertools.pairwise(edges):
        start = int(rng.uniform(low, high - BLOCK_WEEKS))
        blocks[start : start + BLOCK_WEEKS] = True
    return blocks, future


def compare(imputer, co2, seen, hidden):
    """Print errors where the truth is known but was hidden."""
    filled, std = imputer.impute(seen, return_std=True)
    fillings = {
        "LatentODEImputer": filled,
        "linear interpolation": seen.interpolate("time"),
    }
    print(
        "Mean absolute error, ppm".ljust(26) + "".join(f"{name:>16}" for name in hidden)
    )
    for name, filling in fillings.items():
        errors = (filling - co2)["co2"].abs()
        cells = "".join(f"{errors[rows].mean():16.2f}" for rows in hidden.values())
        print(f"   {name:23}" + cells)
    z = norm.ppf((1 + COVERAGE) / 2)
    inside = ((filled - co2).abs() <= z * std)["co2"]
    known = co2["co2"].notna()
    shares = [inside[rows & known].mean() for rows in hidden.values()]
    print(
        f"   within the {COVERAGE:.0%} band".ljust(26)
        + "".join(f"{share:16.0%}" for share in shares)
    )


def extend(co2):
    """Return the data with two more years of weeks, not measured."""
    weeks = pd.date_range(co2.index[0], "2003-12-31", freq="W-SAT", name="date")
    return co2.reindex(weeks)


def forecast(imputer, co2):
    """Print what the two years after the data will bring."""
    ahead = extend(co2)
    weeks = ahead.index.difference(co2.index)
    mean, std = (
        part.loc[weeks, "co2"] for part in imputer.impute(ahead, return_std=True)
    )
    print("\nForecast from all the data, ppm")
    for year, of_year in mean.groupby(mean.index.year):
        for word, week in ("highest", of_year.idxmax()), ("lowest", of_year.idxmin()):
            print(
                f"   {year} {word:8} {of_year[week]:6.1f} +- {std[week]:.1f} in "
                f"{week:%B}"
            )
    last = co2["co2"].groupby(co2.index.year).agg(["max", "min"]).iloc[-1]
    print(f"   (in 2001 {last['max']:.1f} and {last['min']:.1f} were measured)")


def draw(imputer, co2, seen, path):
    """Draw the band: around the longest gap, and from the years that were hidden on."""
    import matplotlib.pyplot as plt

    from sknode.plotting import SeriesDisplay

    figure, axes = plt.subplots(2, 1, figsize=(8, 6), layout="constrained")
    views = ("1958", "1968"), ("1994", "2003")
    for ax, (start, end) in zip(axes, views, strict=True):
        display = SeriesDisplay.from_estimator(
            imputer, extend(seen), extend(co2), coverage=COVERAGE, ax=ax
        )
        view = display.frame().set_index("time").loc[start:end]
        ax.set_xlim(view.index[0], view.index[-1])
        ax.set_ylim(view["lower"].min() - 1, view["upper"].max() + 1)
        ax.set_ylabel("CO2, ppm")
    figure.savefig(path, dpi=150)
    print(f"\nDrawn into {path}")


if __name__ == "__main__":
    main()
