"""Where given runs of tokens occur in a corpus: every place, exactly, in one pass.

The last `ANCHOR` tokens of every run have a hash that is rolled over the corpus (Karp and Rabin,
"Efficient randomized pattern-matching algorithms", IBM J. Res. Dev. 1987, over all positions of a
chunk at once); where it meets one of theirs, the whole run is compared. Memory is that of a chunk,
whatever the corpus; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
ANCHOR = 8
CHUNK = 1 << 20
PIECE = 1 << 15
"""Positions hashed at once: their words stay in the processor's cache."""
_BASE = np.uint32(0x9E3779B1)
_BITS = 22


class TokenReader(Protocol):
    """What is searched; `corpora.corpus.Corpus` is one."""

    n_tokens: int

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Return tokens [start, start + length)."""
        ...


class TokenArray:
    """Tokens in memory, as a `TokenReader`."""

    def __init__(self, tokens: npt.NDArray[Any]) -> None:
        self.tokens = tokens
        self.n_tokens = len(tokens)

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        return self.tokens[start : start + length]


def occurrences(
    corpus: TokenReader,
    runs: Sequence[npt.NDArray[np.integer]],
    advance: Callable[[int], None] | None = None,
) -> I64:
    """How often each run occurs in the corpus, int64 [runs]; overlapping places count each.

    Args:
        corpus: what is searched.
        runs: of `ANCHOR` tokens or more each.
        advance: called with the number of tokens of every chunk that was searched.

    Raises:
        ValueError: a run is too short.
    """
    if any(len(run) < ANCHOR for run in runs):
        raise ValueError(f"a run has fewer than {ANCHOR} tokens")
    counts = np.zeros(len(runs), dtype=np.int64)
    if not runs:
        return counts
    search = _Search(runs)
    kept = max(len(run) for run in runs) - 1
    for start in range(0, corpus.n_tokens, CHUNK):
        first = max(0, start - kept)
        stop = min(start + CHUNK, corpus.n_tokens)
        search.count(corpus.read(first, stop - first).astype(np.uint32), start - first, counts)
        if advance is not None:
            advance(stop - start)
    return counts


class _Search:
    """The runs by the hash of their last tokens."""

    def __init__(self, runs: Sequence[npt.NDArray[np.integer]]) -> None:
        self.runs = [np.asarray(run, dtype=np.uint32) for run in runs]
        ends = np.array([_hashes(run[-ANCHOR:])[0] for run in self.runs], dtype=np.uint32)
        self.order = np.argsort(ends, kind="stable")
        self.ends = ends[self.order]
        self.seen = np.zeros(1 << _BITS, dtype=bool)
        self.seen[self.ends >> np.uint32(32 - _BITS)] = True

    def count(self, tokens: U32, new: int, counts: I64) -> None:
        """Add the runs of a chunk that end at its token `new` or later."""
        first = max(0, new - ANCHOR + 1)
        for start in range(first, len(tokens) - ANCHOR + 1, PIECE):
            hashes = _hashes(tokens[start : start + PIECE + ANCHOR - 1])
            place = np.flatnonzero(self.seen[hashes >> np.uint32(32 - _BITS)])
            if len(place):
                self._compare(tokens, start + place, hashes[place], counts)

    def _compare(self, tokens: U32, place: I64, hashes: U32, counts: I64) -> None:
        low = np.searchsorted(self.ends, hashes, side="left")
        high = np.searchsorted(self.ends, hashes, side="right")
        found = low < high
        for at, one, other in zip(place[found], low[found], high[found], strict=True):
            end = int(at) + ANCHOR
            for number in self.order[one:other].tolist():
                run = self.runs[number]
                if len(run) <= end and np.array_equal(tokens[end - len(run) : end], run):
                    counts[number] += 1


def _hashes(tokens: U32) -> U32:
    """The polynomial hash of every `ANCHOR` tokens in a row, modulo 2^32."""
    count = len(tokens) - ANCHOR + 1
    hashes = tokens[:count].copy()
    for place in range(1, ANCHOR):
        hashes *= _BASE
        hashes += tokens[place : place + count]
    # The high bits choose the place in the table, and must depend on every token.
    hashes ^= hashes >> np.uint32(15)
    hashes *= _BASE
    return hashes
