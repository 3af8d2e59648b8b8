"""The loss of each member of a family on held-out text, cheaply: members take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.held_out import HeldOutSequences
from motet.experiments.stream.stream import IGNORED_LABEL
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.probing import sum_over_ranks
from motet.launcher.runs.kept_models import sequences_read
from motet.launcher.runs.manifest import open_stream
from motet.models.family.base import Member
from motet.parallel.engines.protocol import Engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World

TIMED = 5


@dataclass(frozen=True)
class MemberEvaluation:
    """What is evaluated, and when.

    Attributes:
        held_out: the sequences.
        members: in the order of their turns, None for the whole model.
        every: fraction of the run between evaluations.
        batch_tokens: most tokens in one forward pass, per rank.
    """

    held_out: HeldOutSequences
    members: tuple[Member | None, ...]
    every: float
    batch_tokens: int

    @classmethod
    def of_run(
        cls,
        settings: RunSettings,
        members: Mapping[str, Member],
        stages: Sequence[Mapping[str, Any]] = (),
    ) -> MemberEvaluation | None:
        """Return the evaluation of a run; None for one model, or where it is switched off.

        Args:
            stages: of the run's manifest, where it grows.
        """
        every = settings.metrics.evaluate_every
        if not members or not every:
            return None
        slots, count = sequences_read(settings, stages), settings.metrics.evaluate_sequences
        held_out = HeldOutSequences(open_stream(settings), count, slots)
        return cls(held_out, (None, *members.values()), every, settings.probes.batch_tokens)

    @property
    def count(self) -> int:
        """How many sequences there are."""
        return len(self.held_out.tokens_BT)

    def due(self, step: int, total: int) -> list[Member | None]:
        """Return who is evaluated after a step: a function of step and length of the run alone, so
        that a resumed run goes on with the next member's turn.
        """
        return list(self.members) if step == total else self.turn(step, total, self.members)

    def turn(self, step: int, total: int, members: Sequence[Member | None]) -> list[Member | None]:
        """Return whose turn it is after a step, of some members."""
        turn, rest = divmod(step, max(1, round(self.every * total)))
        return [] if rest else [members[(turn - 1) % len(members)]]

    def loss(self, engine: Engine, layout: Layout, world: World, member: Member | None) -> float:
        """Return the mean cross-entropy over all labels, nats (a collective)."""
        tokens_BT, labels_BT = self.held_out.tokens_BT, self.held_out.labels_BT
        return mean_loss(tokens_BT, labels_BT, self.batch_tokens, engine, layout, world, member)

    def latency_s(self, engine: Engine, member: Member | None) -> float:
        """Return the median time of a forward pass over one sequence, on this run's processes (a
        collective); the first pass, which may compile, is not counted.
        """
        tokens, labels = self.held_out.tokens_BT[:1], self.held_out.labels_BT[:1]
        seconds = []
        for _ in range(1 + TIMED):
            started = time.perf_counter()
            engine.score(tokens, labels, member)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])


def mean_loss(
    tokens_BT: npt.NDArray[np.int64],
    labels_BT: npt.NDArray[np.int64],
    batch_tokens: int,
    engine: Engine,
    layout: Layout,
    world: World,
    member: Member | None = None,
) -> float:
    """Return the mean cross-entropy over all labels, nats (a collective): each data-parallel rank
    scores its share of the sequences.

    Args:
        tokens_BT: all sequences, the same on every rank.
        labels_BT: -100 where nothing is predicted.
        batch_tokens: most tokens in one forward pass, per rank.
        engine, layout, world: of this rank.
        member: of the family; None is the whole model.
    """
    rank, ranks = layout.dp_rank(world.rank), layout.dp_size
    rows = max(1, batch_tokens // tokens_BT.shape[1])
    total = np.zeros(2)
    for start in range(0, len(tokens_BT), rows * ranks):
        mine = slice(start + rank * rows, start + (rank + 1) * rows)
        tokens, labels = tokens_BT[mine], labels_BT[mine]
        if not len(tokens):  # others still score: one row that counts nothing
            tokens, labels = tokens_BT[:1], np.full_like(labels_BT[:1], IGNORED_LABEL)
        logprob, _ = engine.score(tokens, labels, member)
        counted = labels != IGNORED_LABEL
        total += (float(np.where(counted, logprob, 0.0).sum()), float(counted.sum()))
    logprob_sum, n_labels = sum_over_ranks(total, layout, world)
    return -float(logprob_sum) / max(1.0, float(n_labels))
