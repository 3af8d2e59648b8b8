"""The slope of an effect over the sizes of members, and controls that are judged at each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.by_size import slope_weights, unit_slopes
from motet.experiments.analysis.estimates import estimate
from motet.experiments.analysis.measured import Measured
from motet.experiments.analysis.members import secondaries
from motet.experiments.analysis.standing import without_verdicts
from motet.experiments.design.assignment import Question, assign
from motet.experiments.design.declared import member_problems
from motet.experiments.types import ItemScores
from tests.experiments.analysis.test_analysis import CONTROLS, QUESTIONS, compare, design_of
from tests.experiments.analysis.test_members import on

DRAWS = 499
SIZES = {None: 800_000, "middle": 200_000, "small": 50_000}


def sized(entry: dict[str, Any], gains: dict[str | None, float], **spec: Any) -> list[Measured]:
    """One experiment on members of known sizes."""
    found = []
    for member, gain in gains.items():
        one = replace(on(member, entry, gain), parameters=SIZES[member])
        one.experiment.spec = replace(one.experiment.spec, **spec)
        found.append(one)
    return found


def moved(one: Measured, amount: float) -> Measured:
    """The same with units of the last arm `amount` higher at the last probe: a fault of whatever
    measures, not of a treatment.
    """
    counts = [len(unit.items) for unit in one.units]
    last = one.arms == len(one.experiment.spec.arms) - 1
    more_I = amount * np.repeat(last, counts)
    scores = list(one.scores)
    held = scores[-1]
    scores[-1] = ItemScores(held.logprob + more_I, held.n_tokens, held.n_bytes, held.greedy)
    return replace(one, scores=scores)


def test_the_slope_of_effects_is_the_effect_on_each_units_slope() -> None:
    rng = np.random.default_rng(4)
    design = design_of(60, 3, 2)
    arms, sizes = assign(design, 1), [1e5, 3e5, 2e6, 7e6]
    values_MU = rng.normal(size=(4, 60)) + np.outer([0.1, 0.5, 0.4, 1.2], arms)
    comparison = compare(design, arms)
    effects = [estimate(values_U, None, comparison).effect for values_U in values_MU]
    expected = np.polyfit(np.log2(sizes), effects, 1)[0]
    weights_M = slope_weights(sizes)
    assert weights_M is not None
    found = estimate(unit_slopes(list(values_MU), weights_M), None, comparison)
    assert found.effect == pytest.approx(expected, rel=1e-9)
    assert found.low is not None
    assert found.high is not None
    assert found.low < expected < found.high
    assert slope_weights([5.0, 5.0]) is slope_weights([5.0]) is None


def test_an_effect_that_is_the_same_at_every_size_is_found_to_grow_as_often_as_alpha_says() -> None:
    design, n = design_of(24), 400
    weights_M = slope_weights([1e5, 4e5, 1.6e6])
    assert weights_M is not None
    p = []
    for seed in range(n):
        rng = np.random.default_rng(seed)
        arms = assign(design, seed)
        shared_U = rng.normal(size=24)  # members see the same units: their scores hang together
        values = [shared_U + rng.normal(size=24) + 2.0 * arms for _ in range(3)]
        slopes_U = unit_slopes(values, weights_M)
        p.append(estimate(slopes_U, None, compare(design, arms, 199, seed)).p)
    found = np.mean(np.array(p) <= 0.05)
    assert abs(found - 0.05) < 3.5 * np.sqrt(0.05 * 0.95 / n)


def test_a_declared_slope_is_one_more_question_for_holm_and_has_a_verdict() -> None:
    gains = {None: 3.0, "middle": 1.5, "small": 0.0}
    plain = analyze(sized(QUESTIONS[0], gains), 0, DRAWS)
    declared = analyze(sized(QUESTIONS[0], gains, size_slope=True), 0, DRAWS)
    assert (plain["multiplicity"]["questions"], declared["multiplicity"]["questions"]) == (1, 2)
    (a,), (b,) = plain["experiments"], declared["experiments"]
    slope = b["size_slope"]
    assert slope["verdict"]["kind"] == "found"
    assert "grows by" in slope["verdict"]["sentence"]
    assert "per doubling of parameters" in slope["verdict"]["sentence"]
    assert "over 2 questions" in slope["verdict"]["sentence"]
    assert slope["p_corrected"] == pytest.approx(min(1.0, 2 * min(slope["p"], b["primary"]["p"])))
    assert slope["low"] < slope["effect"] < slope["high"]
    assert {one["member"]: one["parameters"] for one in slope["sizes"]} == SIZES
    assert slope not in secondaries(b)
    undeclared = a["size_slope"]
    assert undeclared in secondaries(a)
    assert undeclared["verdict"]["kind"] == "exploratory"
    for name in ("effect", "low", "high", "p"):
        assert undeclared[name] == slope[name]
    effects = {m["member"]: m["primary"]["effect"] for m in b["members"]}
    effects[None] = b["primary"]["effect"]
    xs = np.log2(list(SIZES.values()))
    by_hand = np.polyfit(xs, [effects[member] for member in SIZES], 1)[0]
    assert slope["effect"] == pytest.approx(by_hand, rel=0.2)  # effects have a covariate each


def test_there_is_no_slope_without_sizes_or_for_a_test_without_a_single_effect() -> None:
    gains = {None: 1.0, "small": 0.5}
    omnibus = analyze(sized(QUESTIONS[1], gains, test="omnibus"), 0, DRAWS)["experiments"][0]
    unknown = [replace(one, parameters=None) for one in sized(QUESTIONS[0], gains)]
    assert "size_slope" not in omnibus
    assert "size_slope" not in analyze(unknown, 0, DRAWS)["experiments"][0]


@pytest.fixture(scope="module")
def failing() -> dict[str | None, dict[str, Any]]:
    """Answers at the whole model and at member small, of a run whose A/A fails at small alone."""
    found = {}
    for at in (None, "small"):
        asked = sized(QUESTIONS[0], {None: 3.0, "middle": 2.0, "small": 1.5}, member=at)
        for one in asked:
            one.experiment.spec = replace(one.experiment.spec, size_slope=True)
        aa = sized(CONTROLS[0], dict.fromkeys(SIZES, 0.0))
        aa[2] = moved(aa[2], 9.0)
        must = sized(CONTROLS[1], dict.fromkeys(SIZES, 4.0))
        found[at] = analyze([*asked, *aa, *must], 0, DRAWS)
    return found


def test_a_control_that_fails_at_one_member_takes_the_answers_of_that_member_alone(
    failing: dict[str | None, dict[str, Any]],
) -> None:
    rows = {row["member"]: row for row in failing[None]["controls"]["placebo"]["by_member"]}
    assert {member: row["ok"] for member, row in rows.items()} == {
        None: True,
        "middle": True,
        "small": False,
    }
    assert all(row["ok"] for row in failing[None]["controls"]["positive"]["by_member"])
    (whole,), (small,) = failing[None]["experiments"], failing["small"]["experiments"]
    assert whole["verdict"]["kind"] == "found"
    assert small["verdict"]["kind"] == "invalid"
    assert "A/A control found a difference" in small["verdict"]["sentence"]
    invalid = {one["member"]: one["invalid"] for one in whole["members"]}
    assert invalid["middle"] == ""
    assert "A/A control found a difference" in invalid["small"]
    assert {one["member"]: bool(one["invalid"]) for one in small["members"]} == {
        None: False,
        "middle": False,
    }


def test_a_slope_is_not_valid_where_a_member_is_not(
    failing: dict[str | None, dict[str, Any]],
) -> None:
    for answers in failing.values():
        verdict = answers["experiments"][0]["size_slope"]["verdict"]
        assert verdict["kind"] == "invalid"
        assert "At member small: The A/A control" in verdict["sentence"]


def test_a_positive_control_and_a_negative_control_are_judged_at_every_member() -> None:
    must = sized(CONTROLS[1], {None: 4.0, "middle": 4.0, "small": 0.0})
    asked = sized(QUESTIONS[0], {None: 3.0, "middle": 3.0, "small": 3.0})
    spoiled = asked[1]
    counts = [len(unit.items) for unit in spoiled.units]
    treated = np.repeat(spoiled.arms > 0, counts)
    first = np.isin(np.arange(sum(counts)), np.cumsum([0, *counts[:-1]]))
    early = spoiled.scores[0]
    scores = [replace(early, logprob=early.logprob + 9.0 * (treated & first)), *spoiled.scores[1:]]
    asked[1] = replace(spoiled, scores=scores)
    answers = analyze([*asked, *must], 0, DRAWS)
    (entry,) = answers["experiments"]
    assert entry["verdict"]["kind"] == "found"
    rows = {row["member"]: row["ok"] for row in answers["controls"]["positive"]["by_member"]}
    assert rows == {None: True, "middle": True, "small": False}
    invalid = {one["member"]: one["invalid"] for one in entry["members"]}
    assert "already differed before anything was shown" in invalid["middle"]
    assert "positive control was not found" in invalid["small"]


def test_before_the_step_of_judgement_no_member_has_a_verdict(
    failing: dict[str | None, dict[str, Any]],
) -> None:
    answers = without_verdicts(failing[None], "interim", "it is too early")
    assert all(row["ok"] is None for row in answers["controls"]["placebo"]["by_member"])
    (entry,) = answers["experiments"]
    assert entry["size_slope"]["verdict"]["kind"] == "interim"
    assert failing[None]["controls"]["placebo"]["by_member"][2]["ok"] is False, "it was a copy"


@pytest.mark.parametrize(
    ("spec", "sizes", "said"),
    [
        ({"member": "smal"}, {"whole": 9, "small": 4}, "is 'smal'; there are whole, small (did"),
        ({"member": "small"}, {}, "this run trains one model; leave it out"),
        ({"size_slope": True}, {}, "it needs a family with members of different sizes"),
        (
            {"size_slope": True, "test": "omnibus"},
            {"whole": 9, "small": 4},
            "test: omnibus has no single effect",
        ),
        (
            {"size_slope": True, "role": "placebo"},
            {"whole": 9, "small": 4},
            "a control is judged at every member instead",
        ),
        ({"member": "small", "size_slope": True}, {"whole": 9, "small": 4}, ""),
    ],
)
def test_a_member_that_is_not_there_and_a_slope_that_cannot_be_are_refused(
    spec: dict[str, Any], sizes: dict[str, int], said: str
) -> None:
    (one,) = sized(QUESTIONS[0], {None: 0.0}, **spec)
    question = Question(one.experiment, one.units, one.design, one.arms, None)
    found = member_problems([question], sizes)
    assert said in " ".join(str(problem) for problem in found)
    assert bool(found) == bool(said)
