"""Runs side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from motet.launcher import cli
from motet.launcher.commands import compare
from motet.launcher.report.compared import compared, difference, flattened
from tests.launcher import sample_report
from tests.launcher.guests import make_corpus
from tests.launcher.invented import InventedRun


def report(name: str = "a", shift: float = 0.0) -> dict[str, Any]:
    made = copy.deepcopy(sample_report.small())
    made["run"]["name"] = name
    entries = made["answers"]["experiments"]
    made["definition"]["experiments"] = [{"spec": {"name": one["name"]}} for one in entries]
    for entry in entries:
        for end in ("effect", "low", "high"):
            if entry["primary"][end] is not None:
                entry["primary"][end] += shift
    return made


def test_a_difference_of_two_effects_has_the_interval_of_independent_estimates() -> None:
    one = {"effect": 1.0, "low": 0.7, "high": 1.3, "confidence": 0.95}
    other = {"effect": 1.5, "low": 1.1, "high": 1.9, "confidence": 0.95}
    found = difference(one, other)
    assert found is not None
    assert [found[end] for end in ("effect", "low", "high")] == pytest.approx([0.5, 0.0, 1.0])
    assert difference(one, {**other, "low": None}) is None


def test_settings_that_are_not_alike_are_listed_and_names_are_not() -> None:
    settings = [{"name": n, "data": {"seed": s, "corpora": []}} for n, s in (("a", 1), ("b", 2))]
    found = compared([report("a"), report("b")], settings)
    assert found["differing"] == {"data.seed": [1, 2]}
    assert flattened({"a": {"b": {}, "c": [1]}}) == {"a.b": {}, "a.c": [1]}


def test_effects_of_the_same_question_are_held_against_each_other_and_others_are_not() -> None:
    one, other = report("a"), report("b", 0.25)
    found = compared([one, other], [{}, {}])["experiments"]
    assert {tuple(row["asked_alike"]) for row in found} == {(True,)}
    moved = [row["differences"][0] for row in found if row["differences"][0]]
    assert moved
    assert all(one["effect"] == pytest.approx(0.25) for one in moved)
    asked = other["definition"]["experiments"]
    asked[0]["spec"] = {**asked[0]["spec"], "hypothesis": "another one"}
    name = asked[0]["spec"]["name"]
    rows = {row["name"]: row for row in compared([one, other], [{}, {}])["experiments"]}
    assert rows[name]["differences"] == [None]
    shown = {
        row["experiment"]: row for row in compare.effect_rows(compared([one, other], [{}] * 2))
    }
    assert shown[name]["b less a"] == "another question"


def test_runs_of_one_name_are_told_apart() -> None:
    found = compared([report("a"), report("a"), report("b")], [{}] * 3)
    assert compare.column_names(found) == ["a (1)", "a (2)", "b"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_the_command_compares_runs_and_says_what_is_missing(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = InventedRun(folder, corpus, lambda text, seed=seed: text.replace("seed: 3", f"seed: {seed}"))  # fmt: skip
        runs.append(run)
    words = [str(run.run.root) for run in runs]
    assert cli.main(["compare", words[0]]) == 2
    assert "give two or more" in capsys.readouterr().err
    assert cli.main(["compare", *words]) == 2
    assert "no report yet" in capsys.readouterr().err
    for run in runs:
        run.train(40)
        run.report(page=True)
    assert cli.main(["compare", *words]) == 0
    said = capsys.readouterr().out
    assert "canaries" in said
    assert "r (2) less r (1)" in said
    assert "no chance between runs" in said
    assert cli.main(["compare", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differing"]["seed"] == [3, 4]
    assert found["experiments"][0]["differences"][0]["low"] < 0
