"""How often do 95 % intervals of small designs hold the true effect? By simulation.

Real assignment and analysis; both potential outcomes of every unit are drawn, so the mean effect of
a study's own units is known. "shipped" is the interval that a report prints, made by the code that
prints it; "noted" counts those of them that say how often they miss
(`experiments/analysis/coverage.py` keeps the figures). Ways that were tried stand beside it
(`bench/interval_ways.py`): by the rule that reports use for shares (held within what is possible,
joined with Newcombe's interval) and "alone", as the test says.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from interval_ways import TRIED, estimate_by

from motet.experiments.analysis.coverage import known_coverage
from motet.experiments.analysis.estimates import Estimate, estimate
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.shares import BlockShares, share_interval
from motet.experiments.design.assignment import Design, assign

Array = np.ndarray
SCORE = np.array([0.0, 1.0])
Draw = Callable[[np.random.Generator, int], tuple[Array, Array]]


def shares(low: float, high: float) -> Draw:
    def draw(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        place = rng.random(n)
        return 1.0 * (place < low), 1.0 * (place < high)

    return draw


def alike(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """One effect for all units."""
    y = rng.normal(size=n)
    return y, y + 1.0


def skewed(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Skewed outcomes, effects that differ between units."""
    y = rng.exponential(size=n)
    return y, y + rng.exponential(size=n)


def few(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """One unit of ten responds, by four standard deviations."""
    y = rng.normal(size=n)
    return y, y + 4.0 * (rng.random(n) < 0.1)


KINDS: dict[str, Draw] = {
    "share .5 to .8": shares(0.5, 0.8),
    "share .25 to .5": shares(0.25, 0.5),
    "share .92 to .99": shares(0.92, 0.99),
    "one effect": alike,
    "skewed effects": skewed,
    "effect in one of ten": few,
}
SIZES = (4, 6, 8, 12, 16, 24)
ALPHA = 0.05
ROUNDING = 1e-9
"""An end that lies on the true effect holds it: both are sums of the same shares."""


def one(
    kind: str, smaller: int, ratio: int, seed: int, draws: int, setting: str, ways: list[str]
) -> dict[str, tuple[bool, float]]:
    """Whether each way's interval holds the true effect of one study, and how wide it is.

    A way without an interval is left out.
    """
    size = smaller * (1 + ratio)
    cluster = np.repeat(np.arange(size), np.arange(size) % 12 + 1 if setting == "clusters" else 1)
    n = len(cluster)
    rng = np.random.default_rng([seed, smaller, ratio, list(KINDS).index(kind)])
    weights = (ratio, 1) if setting == "treated" else (1, ratio)
    keys = np.arange(size).astype(np.uint64)
    design = Design(cluster, np.zeros(size, np.int64), keys, weights)
    arms = assign(design, seed)
    without, exposed = (x[cluster] for x in KINDS[kind](rng, size))
    binary = kind.startswith("share")
    if setting == "clusters" and not binary:
        noise = 0.5 * rng.normal(size=n)
        without, exposed = without + noise, exposed + noise
    y, truth = np.where(arms == 1, exposed, without), float((exposed - without).mean())
    comparison = Repeater(design, arms, seed + 1_000_000, draws).whole(SCORE)
    made: dict[str, tuple[bool, float]] = {}

    def count(name: str, low: float | None, high: float | None) -> None:
        if low is not None and high is not None:
            made[name] = (low - ROUNDING <= truth <= high + ROUNDING, high - low)

    def printed(found: Estimate) -> Estimate:
        return share_interval(found, y, comparison, ALPHA) if binary else found

    bare = estimate(y, None, comparison, ALPHA)
    shipped = printed(bare)
    count("shipped", shipped.low, shipped.high)
    if known_coverage(shipped, y, comparison, binary) is not None:
        count("noted", shipped.low, shipped.high)
    for way in ways:
        other = estimate_by(way, y, comparison, ALPHA)
        found = printed(other)
        count(way, found.low, found.high)
        if binary:
            count(f"{way} alone", other.low, other.high)
    strata = BlockShares.of(y, comparison)
    if binary and strata is not None and bare.low is not None and bare.high is not None:
        control = float(y[arms == 0].mean())
        count("inverted alone", bare.low, bare.high)
        count("inverted, cut at the controls' share", bare.low, min(bare.high, 1 - control))
        count("Newcombe", *strata.newcombe(ALPHA))
    return made


def summary(rows: list[dict[str, tuple[bool, float]]]) -> dict[str, dict[str, float]]:
    """Coverage with its binomial error, mean width and number of intervals, by way."""
    out = {}
    for way in dict.fromkeys(way for row in rows for way in row):
        held, width = zip(*(row[way] for row in rows if way in row), strict=True)
        share = float(np.mean(held))
        error = (share * (1 - share) / len(held)) ** 0.5
        mean = float(np.mean(width))
        out[way] = {"covered": share, "error": error, "width": mean, "n": len(held)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--draws", type=int, default=499)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--ratios", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--ways", nargs="*", default=list(TRIED), choices=list(TRIED))
    parser.add_argument(
        "--setting",
        choices=("controls", "treated", "clusters"),
        default="controls",
        help="which group is the smaller one; clusters: few controls, of clusters of 1 to 12 units",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began, table = time.perf_counter(), []
    for kind in options.kinds:
        for ratio in options.ratios:
            for size in options.sizes:
                where = (options.draws, options.setting, options.ways)
                rows = [one(kind, size, ratio, s, *where) for s in range(options.studies)]
                ways = summary(rows)
                row = {"setting": options.setting, "kind": kind, "smaller": size, "ratio": ratio}
                table.append(row | {"ways": ways})
                if not options.json:
                    text = "  ".join(
                        f"{way} {v['covered']:.3f} (width {v['width']:.2f}, {v['n']})"
                        for way, v in ways.items()
                    )
                    print(f"{kind:22} {size:3} against {size * ratio:3}: {text}", flush=True)
    if options.json:
        print(json.dumps({"rows": table, "seconds": time.perf_counter() - began}, indent=1))


if __name__ == "__main__":
    main()
