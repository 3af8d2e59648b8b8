"""Members of a family in one step: their passes, and the loss of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from motet.models.family.base import StepChoices, Term
from motet.models.member import name_of
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.passes import Pass
from motet.parallel.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from motet.parallel.engines.protocol import MicroBatch

PassInputs = tuple[Tensor, Tensor, Tensor | None]
"""Tokens, labels and document ids of a micro-batch, int64 [B, T] each."""


class MemberTally:
    """Sums of the cross-entropy of each member over one step.

    Args:
        step: who trains on each of `batches`, and who does anywhere.
        n_layers: of the whole model.
    """

    def __init__(self, step: StepChoices, batches: Sequence[MicroBatch], n_layers: int) -> None:
        self.choices, self.names = step.mine, step.names
        self.labels = [int((batch.labels_BT >= 0).sum()) for batch in batches]
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64)
        trained = [
            (number, place)
            for number, choice in enumerate(self.choices)
            for place, term in enumerate(choice)
            if term.trains
        ]
        self._last = max(trained, default=(-1, -1))
        layers = {self.choices[number][place].layers(n_layers) for number, place in trained}
        self.same_layers = len(layers) < 2
        """Whether every pass with a gradient runs the same blocks."""

    def passes(self, number: int) -> Iterator[Pass]:
        """Yield the passes over a micro-batch, in order."""
        choice = self.choices[number]
        weights = [term.weight for term in choice]
        total = sum(weights)
        for place, (term, weight) in enumerate(zip(choice, weights, strict=True)):
            later = choice[place + 1 :]
            teaches = any(t.distill > 0 and t.teacher == term.member for t in later)
            share = weight / total if total else 1.0 / len(choice)
            yield Pass(term, share, term.trains, teaches, (number, place) == self._last)

    def add(self, number: int, term: Term, *sums: Tensor) -> None:
        """Take the [cross-entropy, z-loss] of a member, and of its exits, on a micro-batch."""
        for member, each in zip(term.members, sums, strict=True):
            place = self.names.index(name_of(member))
            self._sums[0, place] += each[0].item()
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


def through_stages(
    pipeline: Pipeline, inputs: Sequence[PassInputs], scale: float, tally: MemberTally | None
) -> Tensor:
    """Run a step through a pipeline, every pass of a member as a micro-batch of the schedule;
    return [cross-entropy, z-loss], their mean over the members of each.
    """
    if tally is None:
        return pipeline.run(inputs, scale).sum(0)
    passes = [(number, one) for number in range(len(inputs)) for one in tally.passes(number)]
    batches = [inputs[number] for number, _ in passes]
    total = torch.zeros(2, dtype=torch.float64)
    found = pipeline.run(batches, scale, [one for _, one in passes])
    for (number, one), sums in zip(passes, found, strict=True):
        tally.add(number, one.term, sums)
        total += sums * one.share
    return total
