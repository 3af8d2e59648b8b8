"""All ranks must train the same members: what a family chooses is compared before it trains.

Ranks that train different members wait for each other in collectives that never meet, so a choice
by chance would hang the run without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch.distributed as dist

from motet.core.errors import UserError
from motet.core.hashing import canonical_json, sha256_hex
from motet.models.family.base import Choice, Family, Member, choices
from motet.parallel.runtime.mesh import World, first_complaint

STEPS_COMPARED = 64
"""Steps whose choices are compared between ranks at once, before the first of them trains."""
HASH_DIGITS = 16
PURE = "choose() must depend on the step, the options and the seed alone (self.seed)"


class DrawCheck:
    """Compares who trains in the next `STEPS_COMPARED` steps between ranks, by hash; and each step
    as it trains with what was compared.

    Args:
        family, members, draws: as `models.family.base.choices` takes them; without members nothing
            is compared.
        end: the run's number of steps.
    """

    def __init__(
        self, family: Family, members: Mapping[str, Member], draws: int, end: int, world: World
    ) -> None:
        self.family, self.members, self.draws, self.end = family, members, draws, end
        self.world = world
        self._agreed: dict[int, str] = {}

    def ahead(self, step: int) -> None:
        """Compare the steps from `step` on, where they were not yet (a collective then).

        Raises:
            UserError: on every rank, naming the first step that differs and the ranks; or a choice
                that is a mistake.
        """
        if not self.members or step in self._agreed:
            return
        steps, complaint = range(step, min(step + STEPS_COMPARED, self.end)), ""
        mine: list[str] = []
        try:
            mine, again = (list(map(self._hash, steps)) for _ in range(2))
            if mine != again:
                complaint = "two calls of choose() with the same step gave different members"
        except UserError as error:
            complaint = str(error)
        told = first_complaint(complaint or None, self.world) or self._difference(steps, mine)
        if told:
            raise UserError(f"family.kind: {type(self.family).__name__}: {told}\n{PURE}")
        self._agreed = dict(zip(steps, mine, strict=True))

    def forget(self) -> None:
        """Compare anew from the next step on: what the family chooses has changed, on all ranks."""
        self._agreed = {}

    def checked(self, step: int, drawn: Sequence[Choice] | None) -> str:
        """Return the hash of what a step trains.

        Raises:
            UserError: on this rank alone: it is not what was compared.
        """
        found = draw_hash(drawn)
        if self._agreed.get(step, found) != found:
            raise UserError(
                f"family.kind: {type(self.family).__name__}: step {step} on rank "
                f"{self.world.rank}: choose() gave other members than when it was compared with "
                f"the other ranks\n{PURE}"
            )
        return found

    def _hash(self, step: int) -> str:
        return draw_hash(choices(self.family, self.members, step, self.draws))

    def _difference(self, steps: Sequence[int], mine: Sequence[str]) -> str:
        """Say at which step which ranks differ from rank 0, on all ranks alike; "" if none does (a
        collective).
        """
        if len(set(self._gathered(sha256_hex("".join(mine))))) == 1:
            return ""
        of_rank = [told.split() for told in self._gathered(" ".join(mine))]
        for at, step in enumerate(steps):
            others = [r for r, hashes in enumerate(of_rank) if hashes[at] != of_rank[0][at]]
            if others:
                ranks = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
                return f"step {step}: choose() gave other members on {ranks} than on rank 0"
        return ""

    def _gathered(self, mine: str) -> list[str]:
        boxes = [""] * self.world.size
        dist.all_gather_object(boxes, mine, group=self.world.control)
        return boxes


def draw_hash(drawn: Sequence[Choice] | None) -> str:
    """Return a short hash of who trains on each share of a step; of the whole model alone too."""
    return sha256_hex(canonical_json(_told(drawn or ())))[:HASH_DIGITS]


def _told(value: object) -> object:
    """Return what JSON can say of terms: members as they are, everything else in lists."""
    if isinstance(value, Member):
        return _spec(value)
    return list(map(_told, value)) if isinstance(value, list | tuple) else value


@lru_cache(maxsize=4096)
def _spec(member: Member) -> object:
    return [member.name, vars(member.config), member.layers, member.groups]
