"""This rank's share of every step, read one step ahead in the background."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from motet.experiments.ledger import Record
from motet.experiments.steps import Steps, rank_slots
from motet.experiments.stream import Batch, Stream


@dataclass(frozen=True)
class Share:
    """What one rank trains on in one step.

    Attributes:
        batches: micro-batches of consecutive slots.
        record: the ledger's record of it, as if applied.
    """

    batches: list[Batch]
    record: Record


class Feed:
    """Cuts each step into this rank's micro-batches; the next step is read while this one trains."""

    def __init__(
        self, stream: Stream, steps: Steps, rank: int, world_size: int, micro_sequences: int
    ) -> None:
        self.stream, self.steps = stream, steps
        self.rank, self.world_size, self.micro_sequences = rank, world_size, micro_sequences
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[Share]] | None = None

    def take(self, step: int) -> Share:
        """Return this rank's share of a step, and start reading the next."""
        ahead, self._ahead = self._ahead, None
        share = ahead[1].result() if ahead and ahead[0] == step else self.read(step)
        self._ahead = (step + 1, self._pool.submit(self.read, step + 1))
        return share

    def read(self, step: int) -> Share:
        """Read this rank's share of a step."""
        first, count = rank_slots(
            self.steps.slots_before(step), self.steps.sequences(step), self.rank, self.world_size
        )
        batches = [
            self.stream.batch(start, min(self.micro_sequences, first + count - start))
            for start in range(first, first + count, self.micro_sequences)
        ]
        digest = sum(batch.digest() for batch in batches) & 0xFFFFFFFFFFFFFFFF
        ids = [batch.exposure_ids for batch in batches]
        joined = np.concatenate(ids) if ids else np.empty(0, dtype=np.uint64)
        return Share(batches, Record(step, first, count, digest, True, joined))

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)
