"""The members of a family in the report: front, cost from passes that ran, losses over time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.launcher.report import family
from motet.launcher.report.collect import Sources, assemble
from motet.launcher.report.page import render

MANIFEST: dict[str, Any] = {
    "name": "r",
    "parameters": 1000,
    "parameters_non_embedding": 800,
    "flops_per_token": 6000.0,
    "sequence_length": 10,
    "members": [
        {"name": "half", "parameters": 500, "flops_per_token": 3000.0},
        {"name": "odd", "parameters": 700, "flops_per_token": 4500.0},
    ],
}
ROWS: list[dict[str, Any]] = [
    {"kind": "evaluation", "step": 5, "losses": {"whole": 3.0}, "unseen": True},
    {"kind": "evaluation", "step": 10, "losses": {"half": 3.2}, "unseen": True},
    {
        "kind": "evaluation",
        "step": 20,
        "losses": {"whole": 2.0, "half": 2.5, "odd": 2.6},
        "latency_ms": {"whole": 9.0, "half": 5.0, "odd": 4.0},
        "latency_of": {"tokens": 10, "processes": 2, "device": "cpu"},
        "sequences": 32,
        "unseen": True,
        "seconds": 1.5,
    },
]
LEDGER = {
    "sequences": 80,
    "trained_sequences": {"whole": 30, "half": 60},
    "flops": {"whole": 10 * 6000 * 35.0, "half": 10 * 3000 * 60.0},
}


@pytest.fixture(scope="module")
def part() -> dict[str, Any]:
    return family.family_part(MANIFEST, ROWS, LEDGER)


def test_the_front_holds_those_that_no_other_member_beats(part: dict[str, Any]) -> None:
    on = {row["member"]: row["front"] for row in part["members"]}
    assert on["whole"] == {"parameters": True, "flops_per_token": True, "latency_ms": True}
    assert on["half"] == on["whole"]
    assert on["odd"] == {"parameters": False, "flops_per_token": False, "latency_ms": True}
    assert [row["member"] for row in part["members"]] == ["half", "odd", "whole"]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8))
def test_a_front_is_never_empty_and_every_other_member_is_beaten_by_one_on_it(
    points: list[tuple[int, int]],
) -> None:
    rows = [{"parameters": x, "loss": loss} for x, loss in points]
    on = family.front(rows, "parameters")
    chosen = [point for point, best in zip(points, on, strict=True) if best]
    assert chosen
    for (x, loss), best in zip(points, on, strict=True):
        better = [(a, b) for a, b in chosen if a <= x and b <= loss and (a, b) != (x, loss)]
        assert bool(better) != best


def test_cost_is_that_of_the_passes_that_ran(
    part: dict[str, Any],
) -> None:
    cost = part["cost"]
    assert cost["by_member"] == {"whole": 10 * 6000 * 35, "half": 10 * 3000 * 60, "odd": 0}
    assert cost["flops"] == 10 * 6000 * 35 + 10 * 3000 * 60
    assert cost["separate_flops"] == 10 * 80 * (6000 + 3000 + 4500)
    assert cost["of_the_largest"] == pytest.approx(cost["flops"] / (10 * 80 * 6000))
    assert family.family_part(MANIFEST, ROWS, {})["cost"] is None


def test_the_page_shows_losses_over_time_fronts_and_cost(part: dict[str, Any]) -> None:
    assert part["losses"]["half"] == {"steps": [10, 20], "loss": [3.2, 2.5]}
    report = assemble(Sources(manifest=MANIFEST, rows=ROWS)) | {"family": part}
    page = render(report)
    for key in ("member-loss", "front-parameters", "front-flops_per_token", "front-latency_ms"):
        assert f'id="{key}-' in page, key
    assert "the family took 36 % of that" in page.replace("\u202f", " ").replace("\xa0", " ")
    assert "which no step has read" in page
    assert report["training"]["seconds"]["probe"] == 1.5


def test_a_run_of_one_model_says_nothing_of_members() -> None:
    assert family.family_part({"name": "r"}, ROWS, {}) == {}
    report = assemble(Sources(manifest={"name": "r"}))
    assert "family" not in report
    assert 'id="family"' not in render(report)


def test_before_all_members_were_evaluated_at_one_step_there_is_no_front() -> None:
    part = family.family_part(MANIFEST, ROWS[:2], LEDGER)
    assert {row["loss"] for row in part["members"]} == {None}
    assert {on for row in part["members"] for on in row["front"].values()} == {None}
    assert 'id="member-loss-' in render({"family": part})
