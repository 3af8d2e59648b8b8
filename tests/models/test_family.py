"""Members of a family that cannot be are told, whatever a user's class gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.models.family.base import (
    Family,
    Member,
    TrainingStage,
    choices,
    member_problems,
    stage_of,
)
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


class Strange(Family):
    """Gives whatever it is told to."""

    def members(self) -> list[Member]:
        return [Member("half", HALF, (0,))]

    def choose(self, step: int, draws: int) -> Any:
        return eval(self.options["choose"])

    def stage(self, step: int) -> Any:
        return eval(self.options["stage"])


@pytest.mark.parametrize(
    "text", ["1 / 0", "None", "[None]", "['half']", "[()]", "[([],)]", "exit()"]
)
def test_a_mistake_in_a_choice_is_one_error(text: str) -> None:
    family = Strange(WHOLE, {"choose": text}, 0)
    with pytest.raises(UserError, match=r"family\.kind: Strange\.choose\(0, 1\) (gave|failed)"):
        choices(family, {"half": family.members()[0]}, 0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "1 / 0",
        "'x'",
        "TrainingStage(0, 0)",
        "TrainingStage(9, 8)",
        "TrainingStage(0, 8, float('nan'))",
    ],
)
def test_a_mistake_in_a_stage_is_one_error(text: str) -> None:
    with pytest.raises(UserError, match=r"family\.kind: Strange\.stage\(3\) (gave|failed)"):
        stage_of(Strange(WHOLE, {"stage": text}, 0), 3)


def test_a_stage_that_holds_the_step_is_given() -> None:
    text = "TrainingStage(0, 8, 0.5)"
    assert stage_of(Strange(WHOLE, {"stage": text}, 0), 3) == TrainingStage(0, 8, 0.5)
    assert stage_of(Strange(WHOLE, {"stage": "None"}, 0), 3) is None


class Apart(Strange):
    by_replica = True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[('half',), (None,)]", "leaves out layers, on some replicas alone"),
        ("[(None, None), (None,)]", "other numbers of passes"),
    ],
)
def test_replicas_that_would_wait_for_each_other_are_refused(text: str, said: str) -> None:
    family = Apart(WHOLE, {"choose": text}, 0)
    with pytest.raises(UserError, match=said):
        choices(family, {"half": family.members()[0]}, 0, 2)


NARROW = replace(WHOLE, d_model=16, head_dim=8, n_heads=2, n_kv_heads=1, d_ffn=24)


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (Member("a", replace(NARROW, head_dim=None), (0, 1)), None),
        (Member("a", replace(NARROW, head_dim=4), (0, 1)), "set head_dim=8"),
        (Member("a", replace(NARROW, n_heads=1), (0, 1)), "use n_heads=2"),
        (Member("a", replace(NARROW, d_ffn=64), (0, 1)), "d_ffn=64 is more than the whole model's"),
        (Member("a", NARROW, (0, 1), 2), "n_kv_heads=1 of 2 cannot be cut in 2 equal groups"),
        (Member("a", replace(NARROW, rope_theta=9.0), (0, 1)), "differs from the whole model's"),
        (Member("a", NARROW, (0,)), "n_layers=2 is not the number of its layers, 1"),
        (Member("a", replace(NARROW, layer_ffn=(24,)), (0, 1)), "must have one for each of"),
    ],
)
def test_a_member_is_a_slice_or_its_fault_is_told(member: Member, said: str | None) -> None:
    found = "; ".join(member_problems(WHOLE, [member]))
    assert said in found if said else not found
