"""Members are chosen alike on all ranks, or training does not begin."""

from __future__ import annotations

import random

import pytest

from motet.core.errors import UserError
from motet.launcher.rank.choices import refuse_chance
from motet.models.config import ModelConfig
from motet.models.family.base import Family, Member, WhoTrains
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


def said(world: World, kind: type[Family]) -> str:
    family = kind(WHOLE, {}, 0)
    if isinstance(family, ByRank):
        family.rank = world.rank
    try:
        refuse_chance(family, {"half": Member("half", WHOLE, (0,))}, range(3, 9), 2, world)
    except UserError as error:
        return str(error)
    return ""


def test_choices_that_are_a_function_of_the_step_are_fine() -> None:
    assert run_ranks(2, said, Turns) == ["", ""]


@pytest.mark.parametrize(
    ("kind", "why"), [(ByChance, "two calls"), (ByRank, "rank 1: choose() gave other members")]
)
def test_a_choice_by_chance_is_refused_on_all_ranks(kind: type[Family], why: str) -> None:
    first, second = run_ranks(2, said, kind)
    assert first == second
    assert why in first
