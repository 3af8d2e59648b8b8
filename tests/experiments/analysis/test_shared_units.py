"""What the analysis says where another experiment showed an experiment's units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.measured import Measured, measure
from motet.experiments.analysis.scores import Probed
from motet.experiments.design.assignment import Question
from motet.experiments.stream.audit import Compliance
from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.types import ItemScores
from motet.launcher.report.page import alarms
from motet.launcher.study.after_training import told_by_others
from tests.experiments.design.desk import STEPS_TOTAL, Desk, quiz

ARMS: dict[str, Any] = {"doses": [0, 4]}


def scores_of(question: Question, known: np.ndarray) -> ItemScores:
    """The right answer first where a unit is known, the last where it is not."""
    gain = {"right": 1.0, "wrong": 0.0}
    values = [
        gain[item.kind] * (1.0 if known[unit] else -1.0)
        for unit, each in enumerate(question.units)
        for item in each.items
    ]
    ones = np.ones(len(values), dtype=np.int64)
    return ItemScores(np.array(values), ones, ones, np.zeros(len(values), dtype=bool))


def carried_out(folder: Path, declared: bool) -> list[Measured]:
    """Two experiments with one quiz, in a model that knows what either of them showed."""
    desk = Desk(folder)
    share = {"shares_units_with": ["first"]}
    made = desk.study(
        desk.entry("first", "contamination", quiz(), **ARMS),
        desk.entry("second", "contamination", quiz(), **ARMS, **share),
    )
    write_plan(made.plan, folder / "exposures.plan")
    plan = ExposurePlan(folder / "exposures.plan")
    n = len(plan.exposures())
    once, due = np.ones(n, dtype=np.int64), np.ones(n, dtype=bool)
    audit = Compliance(STEPS_TOTAL, once, once, due, 0, [], [])
    questions = sorted(made.questions, key=lambda question: question.name)
    known = questions[0].treated() | questions[1].treated()
    nothing = np.zeros(len(known), dtype=bool)
    probed = {
        question.name: Probed(
            [0, STEPS_TOTAL], [scores_of(question, nothing), scores_of(question, known)]
        )
        for question in questions
    }
    if not declared:  # as in a run that was frozen before anybody looked
        for question in questions:
            question.experiment.spec = replace(question.spec, shares_units_with=None)
    return measure(questions, probed, plan, made.setting.steps, audit)


def test_held_out_units_that_another_experiment_showed_are_not_held_out(tmp_path: Path) -> None:
    first, second = carried_out(tmp_path, declared=False)
    held_out, by_second = first.arms == 0, second.arms > 0
    (other,) = first.by_others
    np.testing.assert_array_equal(other.shown, np.where(by_second, 4, 0))
    both = int((held_out & by_second).sum())
    answers = analyze([first, second], seed=0, draws=200)
    for entry in answers["experiments"]:
        assert entry["verdict"]["kind"] == "invalid"
    told = f"{both} of 10 held-out units were shown {4 * both} times by second"
    assert told in answers["experiments"][0]["verdict"]["sentence"]
    arms = answers["experiments"][0]["arms"]
    assert arms[0]["exposures_by_others"] == 4 * both
    (row, _) = told_by_others([first, second])["told_by_others"]
    assert row["held_out_units"] == both
    assert not row["declared"]
    warned = alarms({"compliance": {"told_by_others": [row]}})
    assert any("which nobody declared" in line for line in warned)


def test_a_declared_share_is_told_and_keeps_the_answer(tmp_path: Path) -> None:
    first, second = carried_out(tmp_path, declared=True)
    answers = analyze([first, second], seed=0, draws=200)
    for entry in answers["experiments"]:
        assert entry["verdict"]["kind"] in ("found", "not_found")
        assert any("averaged over the arms of" in note for note in entry["notes"])
    # The marginal effect is what half of the held-out units, known from the other, leave of it.
    primary = answers["experiments"][0]["primary"]
    known = float(((second.arms > 0) & (first.arms == 0)).sum()) / 10
    assert primary["control_mean"] == pytest.approx(known)
    assert primary["treated_mean"] == 1.0
    rows = told_by_others([first, second])["told_by_others"]
    assert all(row["declared"] for row in rows)
    assert not any("nobody" in line for line in alarms({"compliance": {"told_by_others": rows}}))


def test_nothing_is_said_where_nothing_is_shared(tmp_path: Path) -> None:
    first, second = carried_out(tmp_path, declared=True)
    for m in (first, second):
        m.by_others.clear()
    assert told_by_others([first, second]) == {}
    (entry, _) = analyze([first, second], seed=0, draws=50)["experiments"]
    assert all("exposures_by_others" not in arm for arm in entry["arms"])
