"""All ranks must train the same members: what a family chooses is compared before training."""

from __future__ import annotations

from collections.abc import Mapping

from motet.core.errors import UserError
from motet.core.hashing import canonical_json, sha256_hex
from motet.models.family.base import Choice, Family, Member, choices
from motet.parallel.runtime.mesh import World, first_complaint, tell_all

STEPS_COMPARED = 64


def refuse_chance(
    family: Family, members: Mapping[str, Member], steps: range, draws: int, world: World
) -> None:
    """Compare the choices of the first of `steps` between ranks, and between two calls on each.

    Ranks that train different members wait for each other in collectives that never meet, so a
    choice by chance would hang the run without a word (a collective itself).

    Raises:
        UserError: on every rank, when choices differ or one is a mistake.
    """
    if not members:
        return
    complaint = mine = ""
    try:
        mine, again = (digest(family, members, steps[:STEPS_COMPARED], draws) for _ in range(2))
        if mine != again:
            complaint = "two calls of choose() with the same step gave different members"
    except UserError as error:
        complaint = str(error)
    if tell_all(mine, world) != mine and not complaint:
        complaint = "choose() gave other members than on rank 0"
    if told := first_complaint(complaint or None, world):
        raise UserError(
            f"family.kind: {type(family).__name__}: {told}\n"
            "choose() must depend on the step, the options and the seed alone (self.seed)"
        )


def digest(family: Family, members: Mapping[str, Member], steps: range, draws: int) -> str:
    """Return a hash of who trains on what in some steps."""
    asked = [choices(family, members, step, draws) for step in steps]
    return sha256_hex(canonical_json([[_told(choice) for choice in step or ()] for step in asked]))


def _told(choice: Choice) -> list[object]:
    return [[_spec(t.member), t.labels, t.distill, _spec(t.teacher)] for t in choice]


def _spec(member: Member | None) -> object:
    return None if member is None else [member.name, vars(member.config), member.layers]
