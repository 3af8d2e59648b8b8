"""More units than a run has room for are refused by arithmetic, before one of them is made."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from motet.core.errors import UserError
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.room import FEW_UNITS, room_problem
from motet.experiments.design.study import Draft, draft_study
from motet.experiments.library import generate
from motet.experiments.library.kinds import Library
from tests.experiments.design import desk


def draft(where: Path, **entry: Any) -> Draft:
    setting = desk.setting(where)
    specs, problems = parse_experiments(
        [{"name": "many", "use": "memorization", **entry}], where, Library(where)
    )
    assert not problems, problems
    return draft_study(specs, replace(setting, kinds=Library(where)))


def rows(path: Path, count: int) -> str:
    lines = (
        json.dumps({"id": f"u{n}", "prefix": f"the code of house {n} is"}) for n in range(count)
    )
    path.write_text("\n".join(lines))
    return path.name


@pytest.mark.parametrize("count", [100_000, 1_000_000, 10**12])
def test_invented_units_that_cannot_fit_are_refused_before_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("motet.experiments.design.study.ask", None)  # what makes all units
    found = draft(tmp_path, generate={"count": count})
    (problem,) = found.problems
    assert problem.setting == "experiments.many"
    assert f"has {count:,} units" in problem.message
    assert "the whole run has" in problem.message


def test_before_there_is_a_corpus_every_text_counts_as_one_token(tmp_path: Path) -> None:
    entry = {"name": "many", "use": "memorization", "generate": {"count": 100_000}}
    library = Library(tmp_path)
    (spec,), _ = parse_experiments([entry], tmp_path, library)
    found = room_problem(spec, library, None, 245_760)
    assert found is not None
    assert "has 100,000 units" in found.message
    assert room_problem(spec, library, None, 10**9) is None


def test_so_are_those_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = rows(tmp_path / "many.jsonl", 60_000)
    monkeypatch.setattr("motet.experiments.design.study.ask", None)
    (problem,) = draft(tmp_path, items=name).problems
    assert "has 60,000 units" in problem.message


def test_units_that_may_fit_are_made_and_counted(tmp_path: Path) -> None:
    found = draft(tmp_path, generate={"count": FEW_UNITS + 1}, doses=[0, 1])
    assert len(found.questions) == 1 or "units" not in str(found.problems)


def test_a_file_that_is_not_there_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises((UserError, AssertionError), match="many"):
        draft(tmp_path, items="nowhere-many.jsonl")


def looks(at_desk: desk.Desk, count: int, units: int, **settings: Any) -> list[dict[str, Any]]:
    """Experiments whose texts of some 60 tokens all ask for the same steps."""
    names = generate.Names("room")
    return [
        at_desk.entry(
            f"look-{n}",
            "forgetting",
            [
                {"id": f"d{i}", "text": " ".join(names.word(n, i, word) for word in range(12))}
                for i in range(units)
            ],
            **settings,
        )
        for n in range(count)
    ]


def test_experiments_that_ask_for_the_same_steps_are_told_steps_that_fit(tmp_path: Path) -> None:
    at_desk = desk.Desk(tmp_path)
    entries = looks(at_desk, 4, 24)
    every = {"kind": "every", "every": 10, "start": 30}
    for number, entry in enumerate(entries[:2]):
        rows = [
            {"id": f"c{i}", "prefix": f"{generate.Names('c', number, i).person()} of {i} knows"}
            for i in range(40)
        ]
        entries[number] = at_desk.entry(
            entry["name"], "memorization", rows, schedule=every, doses=[0, 3]
        )
    with pytest.raises(UserError, match="found no free place") as refused:
        at_desk.study(*entries)
    proposed = {}
    for problem in refused.value.problems:
        schedule = re.search(r"schedule: (\{.*?\}) fits", problem.message)
        assert re.search(r"\bfits\b", problem.message)
        if schedule:
            proposed[problem.setting.removeprefix("experiments.")] = yaml.safe_load(schedule[1])
    assert {schedule["kind"] for schedule in proposed.values()} == {"steps", "every"}
    for entry in entries:
        if entry["name"] in proposed:
            entry["schedule"] = proposed[entry["name"]]
    at_desk.study(*entries)


def test_where_nothing_fits_no_schedule_is_proposed(tmp_path: Path) -> None:
    at_desk = desk.Desk(tmp_path)
    with pytest.raises(UserError, match="found no free place") as refused:
        at_desk.study(*looks(at_desk, 9, 30), steps=4)
    assert not re.search(r"\bfits\b", str(refused.value))
