"""Classes of treatment: what may share a run, and that a global one has no answer in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.measured import Measured
from motet.experiments.design.assignment import ask, make_design
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.treatments import treatment_problems
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.types import ItemScores
from tests.experiments.simulated import simulated

CLASS = """
from motet import Experiment, ItemTable, OutcomeSpec, ProbeItem, Unit, per_token

class Broad(Experiment):
    description, protocol, treatment = "d", "p", {treatment!r}
    fields = {{"text": (str,)}}
    defaults = {{"generate": {{"count": 24, "seed": 0}}, {arms}}}
    outcomes = (OutcomeSpec("logprob", "log-probability", "nats/token", "better", primary=True),)

    def unit_of(self, row):
        return Unit(row["id"], (row["text"],), (ProbeItem("e", "e", row["text"], " word"),))

    def generate_rows(self, count, seed):
        return [{{"id": f"u{{i}}", "text": f"{{self.spec.name}} text {{seed}} {{i}}"}} for i in range(count)]

    def measure(self, units, scores):
        return {{"logprob": ItemTable(units).mean(per_token(scores), "e")}}
"""


def questions(folder: Path, treatment: str, arms: str, *more: dict[str, Any]) -> list[Any]:
    (folder / "broad.py").write_text(CLASS.format(treatment=treatment, arms=arms))
    entries = [{"name": f"q{n}", "use": "broad.py:Broad", **extra} for n, extra in enumerate(more)]
    library = Library(folder)
    specs, problems = parse_experiments(entries, folder, library)
    assert not problems, problems
    return [ask(spec, 0, library) for spec in specs]


TWO_ARMS = "'doses': [0, 4]"
ONE_ARM = "'arms': [{'name': 'repeated', 'dose': 0}]"


def test_local_experiments_share_a_run_freely(tmp_path: Path) -> None:
    assert {kind.treatment for kind in LIBRARY.values()} <= {"local", "semi-global", "global"}
    assert treatment_problems(questions(tmp_path, "local", TWO_ARMS, {}, {}, {})) == []


def test_two_semi_global_experiments_need_a_declared_factorial(tmp_path: Path) -> None:
    two = questions(tmp_path, "semi-global", TWO_ARMS, {}, {})
    (problem,) = treatment_problems(two)
    assert problem.setting == "experiments.q1.use"
    assert "as q0 does" in problem.message
    assert "shares_units_with: [q0]" in problem.message
    declared = questions(tmp_path, "semi-global", TWO_ARMS, {}, {"shares_units_with": ["q0"]})
    assert treatment_problems(declared) == []
    three = questions(tmp_path, "semi-global", TWO_ARMS, {}, {"shares_units_with": ["q0"]}, {})
    assert len(treatment_problems(three)) == 2


def test_a_run_has_one_global_treatment_with_one_arm(tmp_path: Path) -> None:
    (problem,) = treatment_problems(questions(tmp_path, "global", ONE_ARM, {}, {}))
    assert "a run has one arm of one global treatment" in problem.message
    (tmp_path / "broad.py").write_text(CLASS.format(treatment="global", arms=TWO_ARMS))
    entry = {"name": "x", "use": "broad.py:Broad"}
    _, (wrong,) = parse_experiments([entry], tmp_path, Library(tmp_path))
    assert wrong.setting == "experiments.x.doses"
    assert "has 2 arms; a global treatment has one in a run" in wrong.message


def test_a_global_treatment_is_told_without_a_p_value_and_moves_no_correction(
    tmp_path: Path,
) -> None:
    (question,) = questions(tmp_path, "global", ONE_ARM, {})
    count = len(question.units)
    ones = np.ones(count, dtype=np.int64)
    scores = [ItemScores(np.full(count, level), ones, ones, ones > 1) for level in (-9.0, -2.0)]
    m = Measured(
        question.experiment, question.units, question.arms, None,
        make_design(question.units, question.spec.arms), np.array([0, 100]), scores,
        0 * ones, 0 * ones, [np.empty(0, dtype=np.int64)] * count,
    )  # fmt: skip
    local = simulated({"name": "canaries", "use": "memorization"}, lambda dose: 0.5 * dose)
    alone = analyze([local], 0, 200, simulations=0)
    both = analyze([local, m], 0, 200, simulations=0)
    (told,) = both.pop("whole_run")
    assert both == alone
    assert (told["arm"], told["mean"], told["n"], told["step"]) == ("repeated", -2.0, count, 100)
    assert "p" not in told
    assert "nothing inside it can say what the treatment does" in told["sentence"]


def test_another_word_for_a_treatment_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "broad.py").write_text(CLASS.format(treatment="broad", arms=TWO_ARMS))
    with pytest.raises(UserError, match=r"broad\.py:4: Broad has treatment='broad'; it must be"):
        Library(tmp_path).kind("broad.py:Broad", "experiments.x.use")
