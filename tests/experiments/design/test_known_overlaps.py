"""Overlaps are looked for once, and anew when anything that they depend on is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.core.cache import cache_file
from motet.experiments.design import known_overlaps as known
from motet.experiments.design.assignment import Question
from motet.experiments.design.overlap import find_overlaps
from tests.experiments.design.desk import Desk, quiz


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Three experiments, two of which share questions; and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "FEWEST_UNITS", 1)
    desk = Desk(tmp_path)
    other = [{**row, "id": f"other-{row['id']}"} for row in quiz(12, seed=9)]
    return desk.questions(
        desk.entry("quiz", "contamination", quiz()),
        desk.entry("again", "contamination", [*quiz()[:8], *other]),
        desk.entry("apart", "contamination", quiz(14, seed=5)),
    )


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def search(questions: Any) -> Any:
        found.append(questions)
        return find_overlaps(questions)

    monkeypatch.setattr(known, "find_overlaps", search)
    return found


def test_what_was_found_is_found_again_without_a_search(
    questions: list[Question], searches: list[Any]
) -> None:
    first = known.known_overlaps(questions)
    assert {(one.told, one.teller) for one in first} == {("quiz", "again"), ("again", "quiz")}
    assert known.known_overlaps(questions) == first == find_overlaps(questions)
    assert len(searches) == 1


def test_another_text_probe_arm_or_cluster_is_another_search(
    questions: list[Question], searches: list[Any]
) -> None:
    quiz_, again, apart = questions
    unit = again.units[0]
    (item, *others) = unit.items
    text = replace(unit, texts=(f"{unit.texts[0]} indeed",))
    probe = replace(unit, items=(replace(item, target=" elsewhere"), *others))
    arms = tuple(replace(arm, variants="cycle") for arm in again.spec.arms)
    spec = replace(again.spec, arms=arms)
    cycled = replace(again, experiment=type(again.experiment)(spec))
    clusters = replace(again.design, cluster_of_unit=again.design.cluster_of_unit[::-1].copy())
    variants = [
        again,
        replace(again, units=[text, *again.units[1:]]),
        replace(again, units=[probe, *again.units[1:]]),
        cycled,
        replace(again, design=clusters),
    ]
    for one in variants:
        assert known.known_overlaps([quiz_, one, apart]) == find_overlaps([quiz_, one, apart])
    known.known_overlaps([quiz_, again])
    assert len(searches) == len(variants) + 1


@pytest.mark.parametrize(
    "text", ["[", "{}", "[[]]", '[{"told": "quiz", "teller": "again", "links": [[99, 0, 0, 0]]}]']
)
def test_a_damaged_file_costs_a_search_only(
    questions: list[Question], searches: list[Any], text: str
) -> None:
    first = known.known_overlaps(questions)
    cache_file("overlaps", known.overlap_key(questions)).write_text(text)
    assert known.known_overlaps(questions) == first
    assert len(searches) == 2


def test_few_units_leave_no_file(questions: list[Question], tmp_path: Path) -> None:
    known.FEWEST_UNITS = 500  # restored by the fixture's monkeypatch
    known.known_overlaps(questions)
    assert not (tmp_path / "cache").exists()
