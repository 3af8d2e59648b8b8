"""Is the printed "80 %" 80 %? Smallest detectable effects against independent simulated studies.

Every design is assigned once. How often `estimate` (or `omnibus`) finds an effect of some size in
outcomes that are drawn here, with numpy alone, is measured on a grid of sizes; the code that
simulates power is not used for it. Before training the printed effect is looked up there. After
training each of many studies prints its own figure from what it measured: where it says that 4 of 5
runs would find it, the mean over studies is shown; where it gives a range of power, how many of the
ranges hold what the grid says.

    python bench/power.py [--studies 2000] [--keep FILE] [--json]

What must hold: printed against simulated within 5 points everywhere; at least 85 % of the ranges
(they are meant to be from the 5th to the 95th percentile); where it is printed that no possible
effect is found in 80 % of runs, the largest possible effect is not. `formula` is what the same
design was said to find when clusters were counted and the t-test asked. With --keep, designs that
are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm
from statsmodels.stats.power import NormalIndPower, TTestIndPower

from motet.experiments.analysis.arm_studies import ArmStudies
from motet.experiments.analysis.detectable import detectable
from motet.experiments.analysis.estimates import Comparison, Estimate, estimate
from motet.experiments.analysis.marginals import latent_correlation
from motet.experiments.analysis.omnibus import omnibus
from motet.experiments.analysis.power import expected
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.simulation import Studies, enough, repetitions
from motet.experiments.design.assignment import assign, make_design
from motet.experiments.design.spec import Arm
from motet.experiments.types import OutcomeSpec, Unit

ALPHA = 0.05
DRAWS, TESTED = 9999, 999
"""Repeated assignments that figures are simulated with, and that every study is tested with."""
MARGIN = 0.05
RANGES_HOLD = 0.85
FEW_OF_A_KIND = 0.2
"""A kind of sentence that fewer studies print is not judged."""
GRID = 8
PRINTED_STUDIES = 60
"""Studies that print a figure after training."""

Group = Callable[[int], int]


@dataclass(frozen=True)
class Row:
    """One design: so many units in so many arms, their clusters and blocks, and the outcome."""

    name: str
    units: int
    arms: int = 2
    cluster: Group | None = None
    block: Group | None = None
    share: float | None = None
    controls: int = 1
    icc: float = 0.5
    omnibus: bool = False

    def outcome(self) -> OutcomeSpec:
        binary = self.share is not None
        return OutcomeSpec("y", "y", "share" if binary else "sd", "more", binary, self.share)


def one_to_twelve(unit: int) -> int:
    """Cluster of a unit, when clusters hold 1, 2, ... 12, 1, 2, ... units."""
    return 12 * (unit // 78) + int((math.sqrt(8 * (unit % 78) + 1) - 1) / 2)


ROWS = (
    Row("64 units in 4 arms (default of canaries)", 64, 4),
    Row("160 units in 4 arms (default of facts)", 160, 4),
    Row("200 questions in 5 arms and 8 blocks, 25 %", 200, 5, block=lambda n: n % 8, share=0.25),
    Row("20 pairs as blocks in 5 arms", 40, 5, block=lambda n: n // 2),
    Row("20 pairs as blocks in 2 arms", 40, 2, block=lambda n: n // 2),
    Row("clusters of 1 to 12 units", 156, 2, cluster=one_to_twelve),
    Row("clusters of 1 to 12 units, shares at 25 %", 312, 2, cluster=one_to_twelve, share=0.25),
    Row("16 units in 5 arms", 16, 5),
    Row("8 controls of 48, shares at 25 %", 48, 2, share=0.25, controls=5),
    Row("64 units in 4 arms, omnibus", 64, 4, omnibus=True),
    Row("clusters of 1 to 12 in 4 arms, omnibus", 312, 4, cluster=one_to_twelve, omnibus=True),
    Row("80 controls of 400, shares at 60 %", 400, 2, share=0.6, controls=4),
    Row("100 shares at 80 %", 100, 2, share=0.8),
    Row("40 shares at 95 %", 40, 2, share=0.95),
    Row("one unit per block", 24, 2, block=lambda n: n),
)


def comparison_of(row: Row) -> Comparison:
    """The row's assignment and its repetitions."""
    units = [
        Unit(
            f"u{number:04d}",
            ("text",),
            (),
            cluster=f"c{row.cluster(number)}" if row.cluster else "",
            block=f"b{row.block(number)}" if row.block else "",
        )
        for number in range(row.units)
    ]
    arms = [Arm(f"arm{n}", n, weight=row.controls if n else 1) for n in range(row.arms)]
    design = make_design(units, arms)
    repeater = Repeater(design, assign(design, 11), 12, DRAWS)
    if row.omnibus:
        return repeater.whole(np.arange(float(row.arms)))
    found = repeater.groups(np.minimum(np.arange(row.arms), 1.0))
    assert found is not None
    return found


def alone(row: Row) -> np.ndarray | None:
    """Of an omnibus test: the first arm with a dose is the one that has an effect."""
    return (np.arange(row.arms) == 1).astype(float) if row.omnibus else None


def outcomes(
    row: Row, comparison: Comparison, effect: float, count: int, rng: np.random.Generator
) -> np.ndarray:
    """New outcomes [count, units] with an effect on the share or in standard deviations."""
    amount = comparison.score if alone(row) is None else alone(row)
    treated = amount[comparison.arms]
    icc = row.icc if row.cluster else 0.0
    if row.share is not None:
        icc = latent_correlation(icc, row.share)
    shared = rng.normal(size=(count, comparison.clusters.max() + 1))[:, comparison.clusters]
    latent = math.sqrt(icc) * shared + math.sqrt(1 - icc) * rng.normal(size=(count, row.units))
    if row.share is None:
        return latent + effect * treated
    share = np.clip(row.share + effect * treated, 0.0, 1.0)
    return (latent < norm.ppf(share)).astype(np.float64)


def test_of(row: Row, values: np.ndarray, comparison: Comparison) -> Estimate:
    """The analysis of one outcome."""
    few = replace(comparison, draws=comparison.draws[:TESTED])
    return (omnibus if row.omnibus else estimate)(values, None, few, ALPHA)


def found_share(row: Row, comparison: Comparison, values: np.ndarray) -> float:
    """How many of the outcomes the analysis finds."""
    return float(np.mean([test_of(row, one, comparison).p <= ALPHA for one in values]))


class Grid:
    """The share of studies that find an effect, by its size.

    Sizes are near the printed one, and the largest possible; all see the same latent outcomes.
    """

    def __init__(self, row: Row, comparison: Comparison, about: float, studies: int) -> None:
        most = 1 - row.share if row.share is not None else math.inf
        sizes = about * np.linspace(0.4, 1.8, GRID)
        last = most if row.share is not None else sizes[-1]
        self.sizes = np.unique(np.minimum(np.append(sizes, last), most))
        self.found = np.array([self._at(row, comparison, size, studies) for size in self.sizes])

    @staticmethod
    def _at(row: Row, comparison: Comparison, size: float, studies: int) -> float:
        rng = np.random.default_rng([7, row.units, row.arms])
        return found_share(row, comparison, outcomes(row, comparison, size, studies, rng))

    def __call__(self, size: float) -> float:
        return float(np.interp(size, self.sizes, self.found))


def formula(row: Row, comparison: Comparison) -> float | None:
    """The effect that counting clusters gives, or None."""
    if row.omnibus:
        return None
    treated = comparison.score[comparison.arms] > 0
    n1, n0 = (len(np.unique(comparison.clusters[side])) for side in (treated, ~treated))
    if row.share is None:
        return float(TTestIndPower().solve_power(None, n0, ALPHA, 0.8, n1 / n0))
    h = float(NormalIndPower().solve_power(None, n0, ALPHA, 0.8, n1 / n0))
    angle = math.asin(math.sqrt(row.share)) + h / 2
    return math.sin(angle) ** 2 - row.share if angle <= math.pi / 2 else None


def simulated(row: Row, comparison: Comparison, icc: float) -> Studies:
    """Studies as `motet experiments power` makes them."""
    how = (ALPHA, icc, None, 1, None, enough(row.share is not None))
    each = repetitions(ALPHA)
    one = alone(row)
    if one is None:
        return Studies(comparison, *how, draws=each)
    return ArmStudies(comparison, one, *how, draws=each)


def measure(row: Row, studies: int) -> dict[str, Any]:
    """One line of the table."""
    comparison, outcome = comparison_of(row), row.outcome()
    icc = row.icc if row.share is None else latent_correlation(row.icc, row.share)
    printed, _ = simulated(row, comparison, icc).smallest(expected(outcome))
    counted = formula(row, comparison)
    largest = 1 - row.share if row.share is not None else 1000.0
    about = printed or min(largest, 2.0)
    grid = Grid(row, comparison, about, studies)
    before = grid(largest if printed is None else printed)
    after = after_training(row, comparison, outcome, grid)
    holds = before < 0.8 + MARGIN if printed is None else abs(before - 0.8) <= MARGIN
    if after["said"] is not None and after["said_by"] >= FEW_OF_A_KIND:
        holds = holds and abs(after["said"] - 0.8) <= MARGIN
    if after["ranges"] is not None and after["ranges_by"] >= FEW_OF_A_KIND:
        holds = holds and after["ranges"] >= RANGES_HOLD
    return {
        "design": row.name,
        "printed": printed,
        "power": before,
        "formula_power": None if counted is None else grid(counted),
        **after,
        "holds": bool(holds),
    }


def after_training(
    row: Row, comparison: Comparison, outcome: OutcomeSpec, grid: Grid
) -> dict[str, float | None]:
    """What studies without an effect print, against the grid.

    said: mean power of what "4 of 5 such runs would have found", and said_by how many studies say
    so. ranges: how many of the ranges of power hold the true one (with a size or for the largest
    effect), and ranges_by how many studies give one. The rest say that none is possible.
    """
    rng = np.random.default_rng([8, row.units, row.arms])
    said, ranges = [], []
    for key, values in enumerate(outcomes(row, comparison, 0.0, PRINTED_STUDIES, rng)):
        first = test_of(row, values, comparison)
        how = (ALPHA, key, None, alone(row), repetitions(ALPHA))
        told = detectable(outcome, values, None, comparison, first, *how)
        power = grid(grid.sizes[-1] if told.size is None else told.size)
        if told.power is not None:
            ranges.append(told.power[0] - 0.02 <= power <= told.power[1] + 0.02)
        elif told.size is not None:
            said.append(power)
    return {
        "said": float(np.mean(said)) if said else None,
        "said_by": len(said) / PRINTED_STUDIES,
        "ranges": float(np.mean(ranges)) if ranges else None,
        "ranges_by": len(ranges) / PRINTED_STUDIES,
    }


def kept_rows(file: Path | None) -> list[dict[str, Any]]:
    """Lines that were measured before."""
    return json.loads(file.read_text()) if file is not None and file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--only", default="", help="designs whose name holds this")
    parser.add_argument("--keep", type=Path, help="file of lines that are measured once only")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = kept_rows(asked.keep)
    known = {row["design"] for row in rows}
    for row in ROWS:
        if asked.only in row.name and row.name not in known:
            rows.append(measure(row, asked.studies))
            print(row.name, rows[-1]["holds"], file=sys.stderr, flush=True)
            if asked.keep is not None:
                asked.keep.write_text(json.dumps(rows, indent=1))
    if asked.json:
        print(json.dumps(rows, indent=1))
    else:
        names = ("printed", "power", "formula_power", "said", "said_by", "ranges", "ranges_by")
        print(f"{'design':46} printed   power formula    said by      ranges by       holds")
        for row in rows:
            cells = [row[name] for name in names]
            shown = ["   none" if cell is None else f"{cell:7.3f}" for cell in cells]
            print(f"{row['design']:46}" + " ".join(shown) + f"  {row['holds']}", flush=True)
    raise SystemExit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()
