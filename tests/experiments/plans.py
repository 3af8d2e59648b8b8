"""Small requests and corpora for tests of plan and stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.placement import Request, Texts
from motet.experiments.stream.random import text_keys

EOD = 0


def request(
    name: str,
    n_units: int,
    repetitions: int,
    window: tuple[int, int],
    length: int = 5,
    placement: str = "anywhere",
    first_token: int = 1000,
) -> Request:
    """Units `NAME-0`, ...; each text is EOD, its unit's own token repeated, EOD."""
    unit = np.repeat(np.arange(n_units, dtype=np.int32), repetitions)
    texts = [
        np.array([EOD, *[first_token + number] * (length - 2), EOD]) for number in range(n_units)
    ]
    return Request(
        experiment=name,
        unit_keys=text_keys([f"{name}-{number}" for number in range(n_units)]),
        unit=unit,
        repetition=np.tile(np.arange(repetitions, dtype=np.int32), n_units),
        text=unit.copy(),
        first_slot=np.full(len(unit), window[0], dtype=np.int64),
        last_slot=np.full(len(unit), window[1], dtype=np.int64),
        texts=Texts.of(texts, np.uint16),
        placement=placement,
    )


@dataclass
class ArrayCorpus:
    """A corpus in memory; documents start where `starts` says."""

    tokens: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.int64]
    eod: int = EOD
    eod_terminated: bool = True
    eod_marks: str = "end"
    fingerprint: str = "array"
    n_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_tokens = len(self.tokens)

    def read(self, start: int, length: int) -> npt.NDArray[np.uint16]:
        return self.tokens[start : start + length]

    def read_many(
        self, starts: npt.NDArray[np.int64], length: int, out: npt.NDArray[np.int32]
    ) -> None:
        for row, start in enumerate(starts):
            out[row] = self.tokens[start : start + length]

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def corpus(n_tokens: int = 4000, seed: int = 0, **changes: object) -> ArrayCorpus:
    """Random tokens 1..999, with documents of random length, each ended by EOD."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 1000, n_tokens).astype(np.uint16)
    ends = np.sort(generator.choice(n_tokens, n_tokens // 20, replace=False))
    if changes.get("eod_terminated", True):
        tokens[ends] = EOD
    starts = np.concatenate([[0], ends[ends < n_tokens - 1] + 1])
    return ArrayCorpus(tokens, starts, **changes)  # type: ignore[arg-type]
