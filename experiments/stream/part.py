"""Some documents of a corpus, end to end: what training keeps, and what validation holds out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.stream.random import name_key, permute

I64 = npt.NDArray[np.int64]


class CorpusPart:
    """The tokens of some documents of a corpus, in its order; a `TokenSource` of the stream.

    Args:
        corpus: the whole.
        documents: ordinals, ascending, at least one.
        facts: what the choice was made by; the fingerprint holds it.
    """

    def __init__(self, corpus: Corpus, documents: I64, facts: dict[str, Any]) -> None:
        self.corpus = corpus
        self.fingerprint = sha256_hex(canonical_json({"of": corpus.fingerprint, **facts}))
        self.eod, self.eod_marks = corpus.eod, corpus.eod_marks
        self.eod_terminated = corpus.eod_terminated
        self.n_documents = len(documents)
        # Documents that follow each other are one piece.
        begins = np.flatnonzero(np.diff(documents, prepend=documents[0] - 2) != 1)
        ends = np.append(begins[1:], len(documents)) - 1
        spans = [
            (corpus.document_span(int(first))[0], corpus.document_span(int(last))[1])
            for first, last in zip(documents[begins], documents[ends], strict=True)
        ]
        self._source: I64 = np.array([start for start, _ in spans], dtype=np.int64)
        lengths = np.array([stop - start for start, stop in spans], dtype=np.int64)
        self._edges: I64 = np.concatenate([[0], np.cumsum(lengths)])
        self.n_tokens = int(self._edges[-1])

    def read_many(self, starts: I64, length: int, out: npt.NDArray[np.int32]) -> None:
        """Fill out[i] with the `length` tokens from position starts[i] of the part."""
        for row, start in zip(out, starts.tolist(), strict=True):
            at = 0
            for source, count, _ in self._pieces(start, start + length):
                row[at : at + count] = self.corpus.read(source, count)
                at += count

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Return tokens [start, start + length) of the part."""
        pieces = [
            self.corpus.read(source, n) for source, n, _ in self._pieces(start, start + length)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)

    def place_of(self, position: int) -> tuple[int, int]:
        """Return (ordinal of its document in the whole corpus, token of the document) of a token
        of the part.
        """
        ((source, _, _),) = self._pieces(position, position + 1)
        return self.corpus.place_of(source)

    def document_starts(self, start: int, stop: int) -> I64:
        """Return the positions in [start, stop) of the part at which a document begins."""
        found = [
            self.corpus.document_starts(source, source + count) - source + at
            for source, count, at in self._pieces(start, stop)
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def documents_between(self, start: int, stop: int) -> list[int]:
        """Return the ordinals, in the whole corpus, of the documents in [start, stop)."""
        return [
            document
            for source, count, _ in self._pieces(start, stop)
            for document in self.corpus.documents_between(source, source + count)
        ]

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (position in the corpus, tokens, position in the part) of what [start, stop)
        covers.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens}")
        found, number = [], int(np.searchsorted(self._edges, start, side="right")) - 1
        while start < stop:
            count = min(stop, int(self._edges[number + 1])) - start
            inside = start - int(self._edges[number])
            found.append((int(self._source[number]) + inside, count, start))
            start, number = start + count, number + 1
        return found


def hold_out(
    corpus: Corpus, count: int, seed: int, setting: str, where: str
) -> tuple[CorpusPart, CorpusPart]:
    """Split a corpus into (what is left, `count` documents drawn at random by `seed`).

    Raises:
        UserError: that is more than half of its documents; `setting` asked for them, and the
            corpus is that of `where`.
    """
    most = corpus.n_documents // 2
    if count > most:
        hint = f"at most half of them, {most:,}" if most else "index it with a split"
        raise UserError(
            f"{setting}={count:,}: {where} has {corpus.n_documents:,} "
            f"document{'' if corpus.n_documents == 1 else 's'}, too few to leave out so many; "
            f"{hint}, or give validation.corpora"
        )
    key = name_key(seed, "validation", corpus.fingerprint)
    drawn = permute(np.arange(count, dtype=np.int64), corpus.n_documents, key)
    held = np.zeros(corpus.n_documents, dtype=bool)
    held[drawn] = True
    facts = {"held_out": count, "seed": seed}
    return (
        CorpusPart(corpus, np.flatnonzero(~held), {"part": "rest", **facts}),
        CorpusPart(corpus, np.flatnonzero(held), {"part": "held_out", **facts}),
    )
