"""What neighbours of a family that grows both know, and what a larger one has lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from motet.launcher.report.consistency import neighbours, right

MANIFEST: dict[str, Any] = {
    "stages": [{"name": name} for name in ("tiny", "small", "whole")],
    "members": [{"name": "tiny", "parameters": 1}, {"name": "small", "parameters": 2}],
}


def measured(member: str | None, greedy: list[bool], sizes: tuple[int, ...] = (1, 1, 2)) -> Any:
    units = [SimpleNamespace(items=[None] * size) for size in sizes]
    scores = [SimpleNamespace(greedy=np.zeros(sum(sizes), bool))] if greedy else []
    scores += [SimpleNamespace(greedy=np.array(greedy))] if greedy else []
    return SimpleNamespace(name="facts", member=member, units=units, scores=scores)


def test_a_unit_is_right_when_all_its_items_are_at_the_last_probe() -> None:
    assert right(measured(None, [True, False, True, True])).tolist() == [True, False, True]
    assert right(measured(None, [True, False, True, False])).tolist() == [True, False, False]


def test_flips_are_units_that_the_smaller_has_right_and_the_larger_wrong() -> None:
    rows = neighbours(
        MANIFEST,
        [
            measured("tiny", [True, True, False, True]),
            measured("small", [True, False, True, True]),
            measured(None, [True, True, True, True]),
        ],
    )
    assert [(row["before"], row["after"]) for row in rows] == [
        ("tiny", "small"),
        ("small", "whole"),
    ]
    told = [(row["units"], row["both"], row["lost"], row["gained"]) for row in rows]
    assert told == [(3, 1, 1, 1), (3, 2, 0, 1)]


def test_a_model_that_was_not_measured_has_no_rows() -> None:
    assert neighbours(MANIFEST, [measured("tiny", [True] * 4), measured(None, [True] * 4)]) == []
    assert neighbours(MANIFEST, [measured("tiny", [True] * 4), measured("small", [])]) == []


def test_slices_of_the_last_stage_are_neighbours_by_size_beside_the_models_as_they_grew() -> None:
    slices = [{"name": "thin", "parameters": 5}, {"name": "half", "parameters": 4}]
    stages = [*MANIFEST["stages"][1:-1], {"name": "whole", "members": ["thin", "half"]}]
    nested = {"stages": stages, "members": [MANIFEST["members"][1], *slices]}
    known = [measured(name, [True] * 4) for name in ("small", "thin", "half", None)]
    rows = neighbours(nested, known)
    assert [(row["before"], row["after"]) for row in rows] == [
        ("small", "whole"),
        ("half", "thin"),
        ("thin", "whole"),
    ]
