"""Studies of designs that are small, uneven or at the edge of what they can tell, for
`validity_null.py --designs`.

A study is one run that holds all of these experiments and the smallest A/A control that a run may
have: real classes, units, assignment and analysis (Holm over all questions); only the scores are
simulated. Every experiment's outcome is drawn twice
for every unit, as it would be without exposure and with it, so the true effect is known:

    nothing   both are the same. Counted: how often the primary is rejected at .05, and how often
              the question's negative control fails at .01, of those that could fail; of the whole
              run, how often any question is found after Holm's correction, how often any negative
              control fails, and how often the A/A control does (.01 too).
    effects   they differ. Counted: how often the 95 % interval holds the true mean difference of
              these units, and that of units that were drawn anew ("another draw of units").

Shapes: U units, I probe items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.measured import PLACEBO_THRESHOLD, Measured
from motet.experiments.design.assignment import assign, assignment_key, make_design
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.types import ItemScores, OutcomeSpec, Unit

Array = np.ndarray
Edit = Callable[[list[Unit]], list[Unit]]
STEPS_TOTAL = 1000
REFERENCES = 14
CLUSTER_SHARE = 0.5
BASELINE_SHARE = 0.5
UNITS_DRAWN_ANEW = 400_000
KINDS = {
    "shares": "contamination",
    "bits": "memorization",
    "nats": "forgetting",
    "control": "placebo",
}


def alone(units: list[Unit]) -> list[Unit]:
    """Every unit for itself, one block."""
    return [replace(unit, cluster="", block="") for unit in units]


def pairs(units: list[Unit]) -> list[Unit]:
    """Blocks of two."""
    return [replace(unit, cluster="", block=f"{i // 2:03d}") for i, unit in enumerate(units)]


def own_blocks(units: list[Unit]) -> list[Unit]:
    return [replace(unit, cluster="", block=f"{i:03d}") for i, unit in enumerate(units)]


def one_to_twelve(units: list[Unit]) -> list[Unit]:
    """Clusters of 1, 2, ... 12, 1, 2, ... units."""
    labels = [f"{n:03d}" for n in range(len(units)) for _ in range(n % 12 + 1)]
    return [replace(u, cluster=label, block="") for u, label in zip(units, labels, strict=False)]


@dataclass(frozen=True)
class Small:
    """One design.

    Attributes:
        outcome: "shares" (accuracy), "bits" (exposure, skewed), "nats" (gain, skewed) or "control"
            (A/A, log-probability, normal, and no effect in any study).
        units: how many; weights: how many clusters go to each arm, the first is held out.
        without, exposed: shares: probability of a right answer. Others: in standard deviations; an
            exposed unit also responds differently from the next one (sd 1).
        further: settings of the experiment's own. Of a declared `test` no coverage is counted: its
            effect is no mean difference.
    """

    outcome: str
    units: int
    weights: tuple[int, ...] = (1, 1)
    edit: Edit = alone
    without: float = 0.0
    exposed: float = 1.0
    further: dict[str, Any] = field(default_factory=dict)

    def entry(self, name: str) -> dict[str, Any]:
        """The experiment in run.yaml."""
        doses = [0, *(2**n for n in range(len(self.weights) - 1))]
        arms = [
            {"name": f"dose-{dose}", "dose": dose, "weight": weight}
            for dose, weight in zip(doses, self.weights, strict=True)
        ]
        options = {"n_references": REFERENCES} if self.outcome == "bits" else {}
        generate = {"count": self.units, "seed": 1}
        entry = {"name": name, "use": KINDS[self.outcome], "arms": arms, "generate": generate}
        return entry | {"options": options} | self.further


EVEN, FIVE = (1, 1), (1, 1, 1, 1, 1)
DESIGNS: dict[str, Small] = {
    "shares_4_controls": Small("shares", 40, (1, 9), without=0.5, exposed=0.8),
    "shares_8_controls": Small("shares", 40, (1, 4), without=0.5, exposed=0.8),
    "shares_16_controls": Small("shares", 80, (1, 4), without=0.5, exposed=0.8),
    "bits_4_controls": Small("bits", 40, (1, 9)),
    "bits_8_controls": Small("bits", 40, (1, 4)),
    "shares_clusters_1_to_12": Small("shares", 156, (1, 1, 1), one_to_twelve, 0.3, 0.6),
    "bits_clusters_1_to_12": Small("bits", 78, EVEN, one_to_twelve),
    "shares_pairs_5_arms": Small("shares", 40, FIVE, pairs, 0.3, 0.7),
    "bits_pairs_5_arms": Small("bits", 40, FIVE, pairs),
    "shares_near_1": Small("shares", 100, EVEN, without=0.92, exposed=0.99),
    "shares_near_0": Small("shares", 100, EVEN, without=0.02, exposed=0.10),
    "bits_16_units_5_arms": Small("bits", 16, FIVE),
    "nats_6_and_6": Small("nats", 12),
    "nats_16_and_16": Small("nats", 32),
    "nats_one_unit_per_block": Small("nats", 24, EVEN, own_blocks),
    "bits_trend_5_arms": Small("bits", 60, FIVE, further={"test": "trend"}),
    "bits_omnibus_5_arms": Small("bits", 60, FIVE, further={"test": "omnibus"}),
    "shares_omnibus_4_per_arm": Small(
        "shares", 20, FIVE, without=0.3, exposed=0.6, further={"test": "omnibus"}
    ),
    "aa_5_and_5": Small("control", 10),
}
Prepared = dict[str, tuple[Experiment, list[Unit]]]


@cache
def prepared() -> Prepared:
    """The experiments and their units."""
    entries = [design.entry(name) for name, design in DESIGNS.items()]
    specs, problems = parse_experiments(entries, Path(), Library(Path()))
    assert not problems, problems
    experiments = {spec.name: with_primary_only(LIBRARY[spec.use])(spec) for spec in specs}
    return {name: (e, DESIGNS[name].edit(e.units())) for name, e in experiments.items()}


def with_primary_only(kind: type[Experiment]) -> type[Experiment]:
    """A built-in class without its secondary outcomes: nothing is counted of them here, and p of
    the primary does not depend on them; a study takes half the time.
    """

    class PrimaryOnly(kind):  # type: ignore[misc, valid-type]
        @property
        def outcomes(self) -> tuple[OutcomeSpec, ...]:
            return tuple(outcome for outcome in super().outcomes if outcome.primary)

    return PrimaryOnly


def potential(
    design: Small, cluster_U: Array, effects: bool, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """(before, without exposure, exposed), the outcome of every unit, float64 [U] each.

    Half of the variance is the cluster's, and half of it lasts from the first probe on. Bits and
    nats are skewed; in bits the effect is what is left of it below the most that can be measured.
    """
    n, clusters = len(cluster_U), int(cluster_U.max()) + 1
    share = CLUSTER_SHARE if clusters < n else 0.0

    def normal() -> Array:
        cluster, unit = rng.normal(size=clusters)[cluster_U], rng.normal(size=n)
        return np.sqrt(share) * cluster + np.sqrt(1 - share) * unit

    lasting, kept = normal(), BASELINE_SHARE
    before, after = (np.sqrt(kept) * lasting + np.sqrt(1 - kept) * normal() for _ in range(2))
    if design.outcome == "shares":
        low = norm.ppf(design.without)
        high = norm.ppf(design.exposed) if effects else low
        return tuple(1.0 * (z < edge) for z, edge in ((before, low), (after, low), (after, high)))
    response = (design.exposed + rng.normal(size=n)) if effects else 0.0
    if design.outcome == "control":
        return before, after, after
    if design.outcome == "bits":
        found = (in_bits(norm.cdf(z)) for z in (before, after, after + response))
        return tuple(found)
    skewed = [-np.log(norm.cdf(z)) for z in (before, after)]
    return skewed[0], skewed[1], skewed[1] + response


def in_bits(place: Array) -> Array:
    """Exposure of a secret that outranks this share of its references."""
    above = np.floor((1 - place) * (REFERENCES + 1)).clip(0, REFERENCES)
    return np.log2(REFERENCES + 1) - np.log2(1 + above)


@cache
def effect_anew(name: str) -> float:
    """The mean effect over units that are drawn anew."""
    alone_U = np.arange(UNITS_DRAWN_ANEW)
    _, without, exposed = potential(DESIGNS[name], alone_U, True, np.random.default_rng(11))
    return float((exposed - without).mean())


def item_scores(design: Small, units: list[Unit], values_U: Array) -> ItemScores:
    """Scores from which the experiment's own class measures these values."""
    own = {"shares": "right", "bits": "secret", "nats": "rest", "control": "secret"}[design.outcome]
    logprob = []
    for unit, value in zip(units, values_U, strict=True):
        rank = 0.0
        if design.outcome == "bits":  # references lie at 1, 2, ...; the secret just above its rank
            rank = REFERENCES + 1 - round((REFERENCES + 1) / 2**value) + 0.5
        target = {"shares": 2 * value - 1, "bits": rank}.get(design.outcome, value)
        others = iter(range(1, len(unit.items)))
        for item in unit.items:
            other = next(others) if item.kind == "reference" else 0.0
            logprob.append(target if item.kind == own else other)
    count = np.ones(len(logprob), dtype=np.int64)
    return ItemScores(np.array(logprob, dtype=np.float64), count, count, np.zeros(len(count), bool))


def simulate(name: str, seed: int, effects: bool) -> tuple[Measured, float]:
    """One experiment of one study, and the true mean effect on its units."""
    design, (experiment, units) = DESIGNS[name], prepared()[name]
    rng = np.random.default_rng([12, seed, effects, list(DESIGNS).index(name)])
    spec = experiment.spec
    made = make_design(units, spec.arms)
    arms = assign(made, assignment_key(seed, name))
    doses = np.array([arm.dose for arm in spec.arms], dtype=np.int64)[arms]
    first = spec.schedule.first_step(STEPS_TOTAL)
    planned = doses if experiment.inserts_units else np.zeros_like(doses)
    shown = [first + np.arange(count, dtype=np.int64) for count in planned]
    before, without, exposed = potential(design, made.cluster_of_unit, effects, rng)
    values = np.where(doses > 0, exposed, without)
    if design.outcome == "nats":  # a gain is the difference of two probes
        values = values + before
    probes = [item_scores(design, units, v) for v in (before, values, values)]
    steps = np.array([first, first + 1, STEPS_TOTAL], dtype=np.int64)
    measured = Measured(
        experiment, units, arms, None, made, steps, probes, planned, planned.copy(), shown
    )
    return measured, float((exposed - without).mean())


def study(seed: int, effects: bool, draws: int) -> dict[str, Any]:
    """What one run that holds all designs says of each."""
    measured, truths = zip(*(simulate(name, seed, effects) for name in DESIGNS), strict=True)
    answers = analyze(measured, seed, draws, details=False, simulations=0)
    true = dict(zip(DESIGNS, truths, strict=True))
    placebo = answers["controls"]["placebo"]
    rows = {}
    for entry in (*answers["experiments"], placebo):
        kept = ("effect", "low", "high", "p", "p_corrected")
        row = {key: entry["primary"][key] for key in kept} | {"truth": true[entry["name"]]}
        row["negative_control"] = entry.get("negative_control", {}).get("ok")
        rows[entry["name"]] = row
    rows[placebo["name"]]["control_ok"] = placebo["ok"]
    return rows


def share_of(hits: Sequence[bool]) -> dict[str, float] | None:
    """A share with its exact 95 % binomial interval."""
    from scipy.stats import binomtest

    if not hits:
        return None
    interval = binomtest(int(sum(hits)), len(hits)).proportion_ci(0.95)
    share = sum(hits) / len(hits)
    return {"rate": share, "low": float(interval.low), "high": float(interval.high), "n": len(hits)}


def covers(row: dict[str, Any], effect: float) -> bool:
    return row["low"] - 1e-9 <= effect <= row["high"] + 1e-9


def summarize(studies: list[dict[str, Any]], effects: bool) -> dict[str, Any]:
    """Per design: rejections without an effect, or coverage of the interval with one; without an
    effect also what is said of whole runs.
    """
    found: dict[str, Any] = {}
    for name in studies[0]:
        rows = [study[name] for study in studies]
        answered = [row for row in rows if row["p"] is not None]
        bounded = [row for row in answered if row["low"] is not None and row["high"] is not None]
        found[name] = {"studies": len(rows), "answered": len(answered), "bounded": len(bounded)}
        found[name]["rejected"] = share_of([row["p"] <= 0.05 for row in answered])
        controls = [row["negative_control"] for row in rows]
        found[name]["invalid"] = share_of([not ok for ok in controls if ok is not None])
        if effects and _has_effect(DESIGNS[name]):
            true = {"covered": None, "covered_anew": effect_anew(name)}
            for label, anew in true.items():
                inside = [covers(row, row["truth"] if anew is None else anew) for row in bounded]
                found[name][label] = share_of(inside)
    return found if effects else found | whole_runs(studies)


def _has_effect(design: Small) -> bool:
    """Whether an effect is made in it that is a mean difference."""
    return "test" not in design.further and design.outcome != "control"


def whole_runs(studies: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs without an effect: how often any question is found, and any control fails."""
    questions = [[row for row in s.values() if "control_ok" not in row] for s in studies]
    smallest = [min(_p(row["p_corrected"]) for row in rows) for rows in questions]
    unsound = [any(row["negative_control"] is False for row in s.values()) for s in studies]
    placebo = [row for s in studies for row in s.values() if "control_ok" in row]
    failed = [_p(row["p"]) < PLACEBO_THRESHOLD for row in placebo]
    return {
        "any primary, after Holm": {"rejected": share_of([p <= 0.05 for p in smallest])},
        "the A/A control fails": {"invalid": share_of(failed)},
        "... or its negative control": {"void": share_of([not r["control_ok"] for r in placebo])},
        "any negative control fails": {"some_invalid": share_of(unsound)},
    }


def _p(value: float | None) -> float:
    return 1.0 if value is None else value


def show(found: dict[str, Any], effects: bool) -> None:
    """Print the table of `summarize`."""

    def text(cell: dict[str, float] | None) -> str:
        if cell is None:
            return f"{'-':22}"
        return f"{cell['rate']:6.1%} ({cell['low']:.1%} to {cell['high']:.1%})".ljust(22)

    names = ("covered", "covered_anew", "rejected") if effects else ("rejected", "invalid")
    heads = {"covered": "covers these units'", "covered_anew": "covers another draw's"}
    heads["invalid"] = "control fails at .01"
    print(f"{'':28}{'no interval':>12}  " + "  ".join(f"{heads.get(n, n):22}" for n in names))
    for name, row in found.items():
        lacking = (
            f"{row['studies'] - row['bounded']} of {row['studies']}" if "bounded" in row else ""
        )
        cells = "  ".join(text(row.get(n)) for n in names)
        if some := row.get("void") or row.get("some_invalid"):  # of several: other levels
            cells = text(some)
        print(f"{name:28}{lacking:>12}  {cells}".rstrip())
