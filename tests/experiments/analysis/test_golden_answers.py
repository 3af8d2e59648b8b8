"""The answers of designs of default size stay what they were: `tests/golden/answers.json`.

The golden file was written before the analysis of small designs, shares and many units was
reworked, by the analysis that an independent review had found right to every printed digit.
Anyone who changes it says in CHANGELOG.md which answers of old runs change, and why:

    python -m tests.experiments.analysis.test_golden_answers

Left out on purpose, because they are not the core's numbers: sentences, notes and `assumption`;
what could have been found (`smallest_detectable`, `power`); ends of intervals of shares that lie
beyond what a share can be, which are to be held inside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.answers import Answer
from motet.experiments.analysis.declared import group_scores, primary_of
from motet.experiments.analysis.estimates import estimate
from motet.experiments.analysis.measured import Measured
from motet.experiments.types import Unit
from tests.experiments.simulated import simulated

GOLDEN = Path(__file__).parents[2] / "golden" / "answers.json"
SEED, DRAWS = 3, 1999
BISECTION = 3e-4
"""An end of an interval is found to 1e-4 of the step it began with, two standard errors."""

NUMBERS = ("effect", "low", "high", "p", "p_corrected", "control_mean", "treated_mean", "n")
OUTCOME = ("name", *NUMBERS)
ROW = ("arm", "dose", "mean", "effect", "low", "high", "p", "n")
SHARES = ("accuracy", "accuracy_per_byte", "extraction")
TREND = ("slope_per_doubling", "low", "high", "p")
QUESTIONS: list[dict[str, Any]] = [
    {"name": "canaries", "use": "memorization", "options": {"n_references": 15}},
    {"name": "quiz", "use": "contamination"},
    {"name": "facts", "use": "knowledge", "options": {"probes_per_kind": 2}},
    {"name": "once", "use": "forgetting"},
]
CONTROLS: list[dict[str, Any]] = [
    {"name": "aa", "use": "placebo"},
    {"name": "must", "use": "positive_control"},
]


def grouped(units: list[Unit]) -> list[Unit]:
    """Clusters of one to four units, in four blocks."""
    sizes, edited = (1, 2, 3, 4), []
    for cluster in range(len(units)):
        for _ in range(sizes[cluster % 4]):
            if len(edited) < len(units):
                name = f"cluster-{cluster:03d}"
                block = f"block-{cluster // 4 % 4}"
                edited.append(replace(units[len(edited)], cluster=name, block=block))
    return edited


def some(count: int) -> float:
    """A gain that is found, and leaves shares away from 0 and 1."""
    return 0.45 * math.log2(1 + count)


def none(count: int) -> float:
    return 0.0


def runs() -> Iterator[tuple[str, list[Measured]]]:
    """Every built-in kind with its default counts, arms and schedule; without effect, with one, and
    in clusters and blocks.
    """
    strong = [simulated(CONTROLS[0], none), simulated(CONTROLS[1], lambda n: n / 16)]
    yield "effects", [simulated(entry, some) for entry in QUESTIONS] + strong
    yield "nothing", [simulated(entry, none, 1) for entry in QUESTIONS] + strong
    yield "clusters in blocks", [simulated(entry, some, 2, grouped) for entry in QUESTIONS]
    margins = zip(QUESTIONS, (1.0, 0.25, 0.5, 0.5), strict=True)
    yield "margins", [simulated({**e, "margin": m}, none, 5) for e, m in margins]


def standard_error(m: Measured) -> float | None:
    """Of the primary outcome; it is not part of the report."""
    answer, outcome = Answer(m, SEED, 99, 1), primary_of(m.experiment)
    comparison = answer.repeater.groups(group_scores(m.experiment, outcome))
    assert comparison is not None
    return estimate(answer.final[outcome.name], answer.baseline(outcome), comparison).standard_error


def told(outcome: dict[str, Any]) -> dict[str, Any]:
    trend = outcome["trend"]
    return {name: outcome[name] for name in OUTCOME} | {
        "trend": trend and {name: trend[name] for name in TREND},
        "per_arm": [{name: row[name] for name in ROW} for row in outcome["per_arm"]],
    }


def kept(measured: list[Measured]) -> dict[str, Any]:
    """The core's numbers of one run, by experiment."""
    answers = analyze(measured, SEED, DRAWS, simulations=0)
    controls = [entry for entry in answers["controls"].values() if entry]
    errors = {m.name: standard_error(m) for m in measured}
    return {
        entry["name"]: {
            "n_units": entry["n_units"],
            "n_clusters": entry["n_clusters"],
            "n_blocks": entry["n_blocks"],
            "verdict": entry["verdict"]["kind"],
            "standard_error": errors[entry["name"]],
            "outcomes": [told(o) for o in (entry["primary"], *entry["secondary"])],
        }
        for entry in [*answers["experiments"], *controls]
    }


def rounded(value: Any) -> Any:
    """Twelve significant digits: more than is compared."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def outside(end: float, outcome: dict[str, Any]) -> bool:
    """Whether a share cannot differ so much from the held-out units' share."""
    control = outcome["control_mean"]
    return outcome["name"] in SHARES and not -control <= end <= 1 - control


def assert_same(now: Any, was: Any, where: str, outcome: dict[str, Any] | None = None) -> None:
    """The draws did not change, so p must be equal, and an end of an interval within what bisection
    leaves open; effects and means to the ninth digit; words and counts exactly.
    """
    if isinstance(was, dict):
        assert set(now) == set(was), where
        outcome = was if "per_arm" in was else outcome
        for name, value in was.items():
            if name in ("low", "high") and value is not None:
                if outcome is None or not outside(value, outcome) or "slope_per_doubling" in was:
                    close = BISECTION * (was["high"] - was["low"])
                    assert now[name] == pytest.approx(value, abs=close), f"{where}.{name}"
            else:
                assert_same(now[name], value, f"{where}.{name}", outcome)
    elif isinstance(was, list):
        assert len(now) == len(was), where
        for number, (one, other) in enumerate(zip(now, was, strict=True)):
            assert_same(one, other, f"{where}[{number}]", outcome)
    elif isinstance(was, float):
        assert now == pytest.approx(was, rel=1e-9, abs=1e-9), where
    else:
        assert now == was, where


@pytest.mark.parametrize("number", range(4), ids=["effects", "nothing", "clusters", "margins"])
def test_the_answers_of_default_sized_designs_are_the_golden_ones(number: int) -> None:
    name, measured = next(run for place, run in enumerate(runs()) if place == number)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert_same(kept(measured), golden, name)


if __name__ == "__main__":
    found = {name: rounded(kept(measured)) for name, measured in runs()}
    lines = [
        f'"{name}": {{\n'
        + ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in run.items())
        + "\n}"
        for name, run in found.items()
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
