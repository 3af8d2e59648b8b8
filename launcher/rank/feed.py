"""What this rank trains on in every step, read one step ahead in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.ledger import Record
from motet.experiments.stream.stream import Batch, Stream
from motet.models.family.base import Choice
from motet.parallel.layout.layout import Layout


@dataclass(frozen=True)
class Share:
    """What one rank trains on in one step.

    Attributes:
        batches: micro-batches of consecutive slots.
        record: the ledger's record of it, as if applied.
        members: who trains on each batch; None: the whole model alone.
    """

    batches: list[Batch]
    record: Record
    members: list[Choice] | None = None


class Feed:
    """Cuts each step into the micro-batches of this data-parallel rank; the next step is read
    while this one trains.
    """

    def __init__(
        self,
        stream: Stream,
        steps: Steps,
        layout: Layout,
        rank: int,
        choose: Callable[[int, int], list[Choice] | None] = lambda step, micro_batches: None,
    ) -> None:
        self.choose = choose
        self.stream, self.steps, self.layout = stream, steps, layout
        self.dp_rank = layout.dp_rank(rank)
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
        offset, count = self.layout.dp_sequences(self.steps.sequences(step), self.dp_rank)
        first, micro = self.steps.slots_before(step) + offset, self.layout.micro_sequences
        batches = [self.stream.batch(start, micro) for start in range(first, first + count, micro)]
        digest = sum(batch.digest() for batch in batches) & 0xFFFFFFFFFFFFFFFF
        ids = [batch.exposure_ids for batch in batches]
        joined = np.concatenate(ids) if ids else np.empty(0, dtype=np.uint64)
        members = self.choose(step, len(batches))
        names = tuple(
            tuple(None if m is None else m.name for m in choice) for choice in members or ()
        )
        return Share(batches, Record(step, first, count, digest, True, joined, names), members)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)
