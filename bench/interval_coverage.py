"""How often do 95 % intervals of small designs hold the true effect? By simulation.

Real assignment and analysis; both potential outcomes of every unit are drawn, so the mean effect of
a study's own units is known. `experiments/analysis/coverage.py` keeps the figures that reports show.
Ways that were tried stand beside the way that is used.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from motet.experiments.analysis.cells import Projection, Residuals
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.shares import BlockShares
from motet.experiments.analysis.sums import terms_of
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
WAYS = ("inverted", "cut at the control group's share", "Newcombe", "the wider of both")


def one(
    kind: str, smaller: int, ratio: int, seed: int, draws: int, setting: str = "controls"
) -> dict[str, bool | None]:
    """Whether each way's interval holds the true effect of one study; None where there is none.

    An interval holds the effects that the test does not reject, so the test of the true effect
    tells without making the interval.
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
    if setting == "clusters" and not kind.startswith("share"):
        noise = 0.5 * rng.normal(size=n)
        without, exposed = without + noise, exposed + noise
    y, truth = np.where(arms == 1, exposed, without), float((exposed - without).mean())
    comparison = Repeater(design, arms, seed + 1_000_000, draws).whole(SCORE)
    everyone, one_block = np.arange(n), Projection(np.zeros(n, np.int64), None)
    residual, treatment = one_block.residual(y), one_block.residual(arms.astype(np.float64))
    if not np.abs(residual).max() > 1e-9:
        return dict.fromkeys(WAYS)
    made = Residuals(residual, treatment, one_block, cluster, everyone, SCORE)
    terms = terms_of(made, comparison.draws)
    bounded = all(terms.p(terms.observed[0] + end) <= ALPHA for end in (-1e6, 1e6))
    if terms.observed[2] <= 0 or not bounded:
        return dict.fromkeys(WAYS)
    inverted = terms.p(truth) > ALPHA
    if not kind.startswith("share"):
        return {"inverted": inverted}
    control = float(y[arms == 0].mean())
    strata = BlockShares.of(y, comparison)
    assert strata is not None
    low, high = strata.newcombe(ALPHA)
    newcombe = low <= truth <= high
    seen_sign = terms.p(0.0) > ALPHA or truth * terms.observed[0] > 0
    return {
        "inverted": inverted,
        "cut at the control group's share": inverted and -control <= truth <= 1 - control,
        "Newcombe": newcombe,
        "the wider of both": inverted or (newcombe and seen_sign),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--draws", type=int, default=399)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--ratios", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
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
                rows = [
                    one(kind, size, ratio, s, options.draws, options.setting)
                    for s in range(options.studies)
                ]
                row = {"setting": options.setting, "kind": kind, "smaller": size, "ratio": ratio}
                for way in dict.fromkeys(way for r in rows for way in r):
                    known = [r[way] is True for r in rows if r.get(way) is not None]
                    row[way] = {
                        "covered": float(np.mean(known)) if known else None,
                        "n": len(known),
                    }
                table.append(row)
                if not options.json:
                    ways = {k: v for k, v in row.items() if isinstance(v, dict)}
                    text = "  ".join(
                        f"{way} {v['covered']:.3f} ({v['n']})" for way, v in ways.items() if v["n"]
                    )
                    print(f"{kind:22} {size:3} against {size * ratio:3}: {text}", flush=True)
    if options.json:
        print(json.dumps({"rows": table, "seconds": time.perf_counter() - began}, indent=1))


if __name__ == "__main__":
    main()
