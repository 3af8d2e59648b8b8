"""Members of a family that cannot be are told, whatever a user's class gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motet.models.family.base import Member, member_problems
from tests.models.families import tiny

WHOLE = tiny()
HALF = replace(WHOLE, n_layers=1)


def test_a_choice_of_layers_is_a_member() -> None:
    assert member_problems(WHOLE, [Member("half", HALF, (WHOLE.n_layers - 1,))]) == []


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (["half"], "has 'half' among its members; each must be a Member"),
        ([Member(3, HALF, (0,))], "its name must be text"),  # type: ignore[arg-type]
        ([Member("half", None, (0,))], "it must be a ModelConfig"),  # type: ignore[arg-type]
        ([Member("half", HALF, [0])], "must be a tuple of numbers"),  # type: ignore[arg-type]
        ([Member("half", HALF, (0.0,))], "must be a tuple of numbers"),  # type: ignore[arg-type]
        ([Member("half", HALF, None)], "must be a tuple of numbers"),  # type: ignore[arg-type]
        ([Member("half", HALF, (9,))], "are not a rising choice"),
        ([Member("Half", HALF, (0,))], "is no name"),
        ([Member("half", HALF, (0,))] * 2, "is there twice"),
    ],
)
def test_a_mistake_is_told_with_the_member(members: list[Any], said: str) -> None:
    assert said in member_problems(WHOLE, members)[0]
