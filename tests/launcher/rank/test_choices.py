"""Members are chosen alike on all ranks, or training does not begin."""

from __future__ import annotations

import random

import pytest

from motet.core.errors import UserError
from motet.launcher.rank.choices import DrawCheck
from motet.models.config import ModelConfig
from motet.models.family.base import Family, Member, WhoTrains, choices
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks

WHOLE = ModelConfig(32, 16, 2, 2, 1, 32)


class Turns(Family):
    """Its choice is a function of the step."""

    def members(self) -> list[Member]:
        return []

    def choose(self, step: int, draws: int) -> list[tuple[WhoTrains, ...]]:
        return [(("half",) if self.odd(step) else (None,))] * draws

    def odd(self, step: int) -> bool:
        return step % 2 == 1


class ByChance(Turns):
    def odd(self, step: int) -> bool:
        return random.random() < 0.5


class ByRank(Turns):
    rank = 0

    def odd(self, step: int) -> bool:
        return (step + self.rank) % 2 == 1


class LateByRank(ByRank):
    def odd(self, step: int) -> bool:
        return (step + (self.rank if step > 100 else 0)) % 2 == 1


class Forgetful(Turns):
    """Gives something else once it was asked often enough."""

    asked = 0

    def odd(self, step: int) -> bool:
        self.asked += 1
        return (step + self.asked // 150) % 2 == 1


def said(world: World, kind: type[Family]) -> str:
    family = kind(WHOLE, {}, 0)
    if isinstance(family, ByRank):
        family.rank = world.rank
    members = {"half": Member("half", WHOLE, (0,))}
    check = DrawCheck(family, members, 2, 200, world)
    try:
        check.ahead(3)
        for step in range(3, 140):
            check.ahead(step)
            check.checked(step, choices(family, members, step, 2))
    except UserError as error:
        return str(error)
    return ""


def test_choices_that_are_a_function_of_the_step_are_fine() -> None:
    assert run_ranks(2, said, Turns) == ["", ""]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (ByChance, "two calls"),
        (ByRank, "step 3: choose() gave other members on rank 1 than on rank 0"),
        (LateByRank, "step 101: choose() gave other members on rank 1 than on rank 0"),
    ],
)
def test_a_choice_by_chance_is_refused_on_all_ranks(kind: type[Family], why: str) -> None:
    first, second = run_ranks(2, said, kind)
    assert first == second
    assert why in first


def test_a_draw_that_changes_after_it_was_compared_stops_before_it_trains() -> None:
    (told,) = run_ranks(1, said, Forgetful)
    assert "step " in told
    assert "on rank 0: choose() gave other members than when it was compared" in told
