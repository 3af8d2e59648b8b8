"""Every question is also asked where nothing can be found yet: at the last probe before exposure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.answers import Answer
from motet.experiments.analysis.estimates import estimate
from motet.experiments.analysis.measured import Measured
from motet.experiments.analysis.negative import last_before_exposure
from motet.experiments.design.assignment import assign
from motet.experiments.types import F64, ItemScores, Unit
from tests.experiments.analysis.test_analysis import CONTROLS, QUESTIONS, measured

DRAWS = 1999
CANARIES, QUIZ, FACTS, ONCE = QUESTIONS


def primary_values(m: Measured, place: int) -> F64:
    """What the primary outcome's own series (or the one it is adjusted for) was at one probe."""
    outcome = next(outcome for outcome in m.experiment.outcomes if outcome.primary)
    found = m.experiment.measure(m.units, m.scores[place])
    return found[outcome.baseline or outcome.name]


def sorted_by_difficulty(m: Measured) -> Measured:
    """The same units and numbers per arm, but the arms are dealt from the hardest unit to the
    easiest.
    """
    place = last_before_exposure(m)
    assert place is not None
    arms = np.empty_like(m.arms)
    arms[np.argsort(primary_values(m, place), kind="stable")] = np.sort(m.arms)
    return replace(m, arms=arms)


def control_of(m: Measured, draws: int = DRAWS) -> dict[str, Any]:
    entry = analyze([m], 0, draws, details=False)["experiments"][0]
    json.dumps(entry, allow_nan=False)
    assert entry["negative_control"]["ok"] is not False or entry["verdict"]["kind"] == "invalid"
    return dict(entry["negative_control"])


@pytest.mark.parametrize("entry", QUESTIONS, ids=lambda entry: entry["name"])
def test_arms_that_were_not_dealt_at_random_are_caught(entry: dict[str, Any]) -> None:
    m = measured(entry, lambda dose: float(dose > 0))
    assert control_of(m)["ok"] is True
    answer = analyze([sorted_by_difficulty(m)], 0, DRAWS, details=False)["experiments"][0]
    assert answer["negative_control"]["ok"] is False
    assert answer["negative_control"]["p_corrected"] < 0.01
    assert answer["verdict"]["kind"] == "invalid"
    assert "already differed before anything was shown" in answer["verdict"]["sentence"]


def test_one_bad_question_leaves_the_answers_of_the_others() -> None:
    bad = sorted_by_difficulty(measured(CANARIES, float))
    found = analyze([bad, measured(QUIZ, float)], 0, DRAWS, details=False)["experiments"]
    assert [entry["verdict"]["kind"] for entry in found] == ["invalid", "found"]


def test_units_that_leak_before_their_first_exposure_are_caught() -> None:
    # The held-out units were shown by someone else after step 0: too little against the spread
    # between units, plain against their own values at step 0.
    m = measured(FACTS)
    place = last_before_exposure(m)
    assert place is not None
    assert place > 0
    held_out = np.repeat(m.arms == 0, [len(unit.items) for unit in m.units])
    m.scores[place] = replace(m.scores[place], logprob=m.scores[place].logprob + 1.0 * held_out)
    control = control_of(m)
    assert control["ok"] is False
    assert control["adjusted"]
    assert control["tests"] == 2
    assert "adjusted for step 0" in control["sentence"]


def in_pairs(units: list[Unit]) -> list[Unit]:
    """Clusters of two, in blocks of twelve units."""
    return [
        replace(unit, cluster=f"c{i // 2}", block=f"b{i // 12}") for i, unit in enumerate(units)
    ]


def test_the_blocks_and_clusters_are_those_of_the_question() -> None:
    m = measured(CANARIES, edit=in_pairs)
    answer = Answer(m, 0, DRAWS, 1)
    comparison = answer.repeater.whole(np.array([0.0, 1.0, 1.0, 1.0]))
    expected = estimate(primary_values(m, 0), None, comparison)
    alone = np.arange(len(m.units))
    other = estimate(primary_values(m, 0), None, replace(comparison, blocks=0 * alone))
    control = control_of(m)
    assert (control["effect"], control["p"]) == (expected.effect, expected.p)
    assert control["p"] != other.p
    assert (
        control["p"] != estimate(primary_values(m, 0), None, replace(comparison, clusters=alone)).p
    )


@pytest.mark.parametrize("role", [0, 1])
def test_a_control_whose_units_differed_vouches_for_nothing(role: int) -> None:
    controls = [measured(CONTROLS[0]), measured(CONTROLS[1], lambda dose: dose / 4)]
    question = measured(CANARIES, float)
    sound = analyze([question, *controls], 0, DRAWS, details=False)
    assert sound["experiments"][0]["verdict"]["kind"] == "found"
    controls[role] = sorted_by_difficulty(controls[role])
    found = analyze([question, *controls], 0, DRAWS, details=False)
    control = found["controls"][("placebo", "positive")[role]]
    assert control["ok"] is False
    assert "cannot be relied on" in control["sentence"]
    assert found["experiments"][0]["verdict"]["kind"] == "invalid"


def same_for_all(scores: ItemScores) -> ItemScores:
    return replace(scores, logprob=np.full(len(scores.logprob), -20.0))


def test_a_control_that_could_not_have_failed_is_not_called_passed() -> None:
    m = measured(ONCE, float)
    place = last_before_exposure(m)
    assert place is not None
    m.scores[: place + 1] = [same_for_all(one) for one in m.scores[: place + 1]]
    control = control_of(m)
    assert control["ok"] is None
    assert control["p"] == 1.0
    assert "could not have failed" in control["sentence"]
    assert "does not vary" in control["sentence"]


def test_a_design_too_small_for_the_control_to_fail_says_so() -> None:
    control = control_of(measured({**ONCE, "generate": {"count": 8, "seed": 0}}))
    assert control["ok"] is None
    assert "no p-value below" in control["sentence"]


def test_one_right_answer_among_many_wrong_ones_is_no_control() -> None:
    # Accuracy 1 of 200: whichever arm holds it, no p-value can be small.
    m = measured(QUIZ)
    counts = [len(unit.items) for unit in m.units]
    right = np.array([item.kind == "right" for unit in m.units for item in unit.items])
    first = np.repeat(np.arange(len(m.units)) == 0, counts)
    m.scores[0] = replace(m.scores[0], logprob=-20.0 + right * np.where(first, 1.0, -1.0))
    control = control_of(m)
    assert control["ok"] is None
    assert "no p-value below" in control["sentence"]


def test_without_a_probe_before_exposure_there_is_none_and_that_is_said() -> None:
    m = measured(CANARIES, float)
    m.steps, m.scores = m.steps[1:], m.scores[1:]
    control = control_of(m)
    assert control["ok"] is None
    assert control["p"] is None
    assert "no probe was made before the first exposure" in control["sentence"]
    m.steps, m.scores = m.steps[:0], []
    assert control_of(m)["ok"] is None


def test_an_outcome_without_a_value_before_exposure_is_stood_in_for_by_all_that_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = sorted_by_difficulty(measured(FACTS))

    def renamed(
        units: Sequence[Unit], arms: Any, steps: Any, series: Mapping[str, F64], shown: Any
    ) -> dict[str, F64]:
        return {"kept": series["semantic"][-1]}

    outcome = next(outcome for outcome in m.experiment.outcomes if outcome.primary)
    kind = type("Kept", (type(m.experiment),), {"outcomes": (replace(outcome, name="kept"),)})
    m.experiment = kind(m.experiment.spec)
    monkeypatch.setattr(m.experiment, "summarize", renamed)
    control = control_of(m)
    assert control["ok"] is False
    assert control["tests"] == 6  # three series, each as it is and adjusted for step 0
    assert control["series"] == "semantic"
    assert "which has no value before exposure" in control["sentence"]


@pytest.mark.parametrize("edit", [lambda units: units, in_pairs], ids=["units", "pairs in blocks"])
def test_one_sound_question_in_a_hundred_fails(edit: Callable[[list[Unit]], list[Unit]]) -> None:
    # 400 assignments of the same units; 11 failures or more have a probability of .003 at 1 %.
    m, failed = measured({**ONCE, "generate": {"count": 48, "seed": 0}}, edit=edit), 0
    until = (last_before_exposure(m) or 0) + 1
    m.steps, m.scores = m.steps[:until], m.scores[:until]
    primary = next(outcome for outcome in m.experiment.outcomes if outcome.primary)
    for seed in range(400):
        answer = Answer(replace(m, arms=assign(m.design, seed)), seed, 399, 1)
        failed += answer.negative_control(primary)["ok"] is False
    assert failed <= 10
