"""Members of a family in one step: the loss of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from motet.models.family.base import Choice, Member
from motet.parallel.runtime.mesh import World

if TYPE_CHECKING:
    from motet.parallel.engines.protocol import MicroBatch


class MemberTally:
    """Sums of the cross-entropy of each member over one step.

    Args:
        choices: who trains on each of `batches`, the same on every rank.
    """

    def __init__(self, choices: Sequence[Choice], batches: Sequence[MicroBatch]) -> None:
        self.choices = choices
        self.names = list(dict.fromkeys(_name(m) for choice in choices for m in choice))
        self.labels = [int((batch.labels_BT >= 0).sum()) for batch in batches]
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64)

    def shares(self, number: int) -> Iterator[tuple[Member | None, float, bool]]:
        """Yield (member, its share of the loss, whether it is the last) of a micro-batch."""
        choice = self.choices[number]
        for place, member in enumerate(choice):
            yield member, 1.0 / len(choice), place == len(choice) - 1

    def add(self, number: int, member: Member | None, sums: Tensor) -> None:
        """Take the [cross-entropy, z-loss] of a member on a micro-batch."""
        place = self.names.index(_name(member))
        self._sums[0, place] += sums[0].item()
        self._sums[1, place] += self.labels[number]

    def losses(self, counted: bool, tp: int, world: World) -> dict[str | None, float]:
        """Return the mean cross-entropy of each member over all ranks (a collective).

        Args:
            counted: this rank's labels count: no other rank brings the same.
            tp: ranks that hold the same sums each.
        """
        self._sums[0] /= tp
        self._sums[1] *= float(counted)
        if world.size > 1:
            dist.all_reduce(self._sums, group=world.control)
        cross_entropy, labels = self._sums.tolist()
        return {
            name: cross_entropy[place] / max(labels[place], 1.0)
            for place, name in enumerate(self.names)
        }


def _name(member: Member | None) -> str | None:
    return None if member is None else member.name
