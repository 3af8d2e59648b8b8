"""What this rank trains on in every step, read one step ahead in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.ledger import Record
from motet.experiments.stream.stream import Batch, Stream
from motet.models.family.base import Choice, StepChoices, TeacherUpdate
from motet.models.member import names_in, trained_by
from motet.parallel.layout.layout import Layout


@dataclass(frozen=True)
class Share:
    """What one rank trains on in one step.

    Attributes:
        batches: micro-batches, each of consecutive slots.
        records: the ledger's records of them, as if applied: one for each run of consecutive slots.
        members: who trains on each; None: the whole model alone.
        draws: who trains on each equal share of the whole step; None likewise.
    """

    batches: list[Batch]
    records: list[Record]
    members: StepChoices | None = None
    draws: list[Choice] | None = None


class Draws(NamedTuple):
    """How a family says who trains (`models.family.base.Family`).

    Attributes:
        choose: step -> who trains on each of `number` equal shares of its sequences, in order; None
            for the whole model alone.
        by_replica: replicas work on different shares at the same time, instead of all on each.
        teacher: step -> what happens to the kept teacher before it.
        told: (step, who trains) -> what the engine is told of it, None: nothing. Where a family
            grows, the model that trains is the engine's whole one.
    """

    number: int = 1
    choose: Callable[[int], list[Choice] | None] = lambda step: None
    by_replica: bool = False
    teacher: Callable[[int], TeacherUpdate | None] = lambda step: None
    told: Callable[[int, list[Choice]], list[Choice] | None] = lambda step, chosen: chosen


class Feed:
    """Cuts each step into the micro-batches of this data-parallel rank; the next step is read
    while this one trains.
    """

    def __init__(
        self, stream: Stream, steps: Steps, layout: Layout, rank: int, draws: Draws | None = None
    ) -> None:
        self.stream, self.steps, self.layout = stream, steps, layout
        self.draws = draws or Draws()
        self.dp_rank = layout.dp_rank(rank)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[Share]] | None = None

    def take(self, step: int) -> Share:
        """Return this rank's share of a step, and start reading the next."""
        ahead, self._ahead = self._ahead, None
        share = ahead[1].result() if ahead and ahead[0] == step else self.read(step)
        self._ahead = (step + 1, self._pool.submit(self.read, step + 1))
        return share

    def forget(self) -> None:
        """Drop what was read ahead: who trains on it has changed."""
        self._ahead = None

    def under(self, layout: Layout, rank: int) -> Feed:
        """Close this one, and return one that cuts the same steps for a rank of another layout."""
        self.close()
        return Feed(self.stream, self.steps, layout, rank, self.draws)

    def read(self, step: int) -> Share:
        """Read this rank's share of a step."""
        chosen = self.draws.choose(step)
        first, micro = self.steps.slots_before(step), self.layout.micro_sequences
        starts = micro_batches(self.layout, self.dp_rank, self.steps.sequences(step), self.draws)
        batches = [self.stream.batch(first + start, micro) for start, _ in starts]
        mine = None if chosen is None else [chosen[draw] for _, draw in starts]
        members = None
        told = None if chosen is None else self.draws.told(step, chosen)
        if told is not None:
            own, update = tuple(told[draw] for _, draw in starts), self.draws.teacher(step)
            members = StepChoices(own, names_of(told), tuple(told), update)
        return Share(batches, _records(step, batches, mine), members, chosen)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)


def micro_batches(
    layout: Layout, dp_rank: int, sequences: int, draws: Draws
) -> list[tuple[int, int]]:
    """Return (first sequence of the step, share of the family's) of each micro-batch of a
    data-parallel rank, in order.

    Which share a sequence lies in does not depend on the layout: of `sequences` in `draws.number`
    equal shares each has the next. All ranks work on a share together, or each on its own.
    """
    number = 1 if draws.by_replica else draws.number
    size, found = sequences // number, []
    for share in range(number):
        offset, count = layout.dp_sequences(size, dp_rank)
        first = share * size + offset
        starts = range(first, first + count, layout.micro_sequences)
        found += [(start, start * draws.number // sequences) for start in starts]
    return found


def names_of(choices: list[Choice] | tuple[Choice, ...]) -> tuple[str | None, ...]:
    """Return the names of all who train in a step, each once, in the order of the shares."""
    return names_in(tuple(term for choice in choices for term in choice))


def _records(step: int, batches: list[Batch], choices: list[Choice] | None) -> list[Record]:
    """Return one record for each run of micro-batches that follow each other."""
    runs: list[list[int]] = []
    for number, batch in enumerate(batches):
        before = batches[number - 1] if number else None
        if before is None or before.first_slot + len(before.tokens_BT) != batch.first_slot:
            runs.append([])
        runs[-1].append(number)
    found = []
    for run in runs:
        own = [batches[number] for number in run]
        count = sum(len(batch.tokens_BT) for batch in own)
        digest = sum(batch.digest() for batch in own) & 0xFFFFFFFFFFFFFFFF
        ids = np.concatenate([batch.exposure_ids for batch in own])
        names = tuple(trained_by(choices[number]) for number in run if choices)
        found.append(Record(step, own[0].first_slot, count, digest, True, ids, names))
    return found
