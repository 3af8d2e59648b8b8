"""The stream: slot -> tokens, as a pure function of seed, corpora and plan.

Slot s belongs to a corpus by a keyed permutation inside blocks of 10,000 slots, in which every
corpus has exactly its share; the n-th slot of a corpus is sequence n of that corpus in the order of
a keyed permutation, one key per epoch. Nothing is shuffled in memory, and no world size, worker or
restart enters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.experiments.corpora.eod_marks import BOTH, END, START
from motet.experiments.stream.exposure_plan import ExposurePlan, Span
from motet.experiments.stream.noise import EmbeddingNoise
from motet.experiments.stream.random import U64, name_key, permute
from motet.experiments.stream.repeat import Repeat

I64 = npt.NDArray[np.int64]
MIXTURE_BLOCK = 10_000
IGNORED_LABEL = -100


class TokenSource(Protocol):
    """What the stream needs of a corpus (see corpus.Corpus)."""

    fingerprint: str
    n_tokens: int
    eod: int
    eod_terminated: bool
    eod_marks: str  # where eod stands in each document: "end", "start", "both"

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Return the tokens [start, start + length)."""

    def read_many(self, starts: I64, length: int, out: npt.NDArray[np.int32]) -> None:
        """Fill out[i] with the `length` tokens from position starts[i]."""

    def document_starts(self, start: int, stop: int) -> I64:
        """Return the positions in [start, stop) at which a document begins."""


@dataclass(frozen=True)
class Batch:
    """Consecutive slots, ready for the model.

    Attributes:
        first_slot: slot of row 0.
        tokens_BT: int32, after the overlay.
        labels_BT: int64, the next token, or -100 where nothing is predicted.
        document_ids_BT: int32 number of the document inside its sequence, None unless documents are
            masked.
        exposure_ids: uint64, every exposure that was laid over these slots, in order of position.
        noise: what is added to the input embeddings.
    """

    first_slot: int
    tokens_BT: npt.NDArray[np.int32]
    labels_BT: I64
    document_ids_BT: npt.NDArray[np.int32] | None
    exposure_ids: U64
    noise: tuple[EmbeddingNoise, ...] = ()

    def digest(self) -> int:
        """Return a 64-bit digest of what the model consumes here.

        It is the sum, modulo 2^64, of one BLAKE2b hash per slot over (slot, tokens, labels' mask,
        and which noise is added where), so the digest of a step does not depend on how its slots
        are spread over ranks.
        """
        total = 0
        for row, (tokens, labels) in enumerate(zip(self.tokens_BT, self.labels_BT, strict=True)):
            slot = (self.first_slot + row).to_bytes(8, "little")
            digest = hashlib.blake2b(tokens.data, digest_size=8, key=slot)
            digest.update(np.packbits(labels == IGNORED_LABEL).data)
            for one in self.noise:
                if one.row == row:
                    digest.update(one.mark())
            total += int.from_bytes(digest.digest(), "little")
        return total & 0xFFFFFFFFFFFFFFFF


def mixture_counts(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return how many of every 10,000 slots each corpus gets (largest remainders).

    Raises:
        UserError: a weight is not positive, or too small for one slot in 10,000.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if len(shares) == 0 or not np.all(np.isfinite(shares)) or np.any(shares <= 0):
        raise UserError(f"data.corpora: weights {list(weights)} must all be positive numbers")
    exact = shares / shares.sum() * MIXTURE_BLOCK
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: MIXTURE_BLOCK - int(counts.sum())]] += 1
    if np.any(counts == 0):
        raise UserError(
            f"data.corpora: weights {list(weights)} give a corpus less than 1 of {MIXTURE_BLOCK:,} "
            "slots; raise its weight"
        )
    return counts


class Stream:
    """Random access to the sequences of a run."""

    def __init__(
        self,
        corpora: Sequence[TokenSource],
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        plan: ExposurePlan | None = None,
        document_masks: bool = False,
        repeat: Repeat | None = None,
    ) -> None:
        """Describe a stream; nothing is read yet.

        Args:
            corpora: where tokens come from; they must share one vocabulary.
            weights: share of the slots that each corpus gets; any positive scale.
            sequence_length: tokens per slot.
            seed: keys the order.
            plan: exposures to lay over the base tokens.
            document_masks: number the documents of a sequence, and predict nothing across their
                borders.
            repeat: what is read again and again.

        Raises:
            UserError: unusable weights, a corpus shorter than one sequence, or a plan for another
                sequence length.
        """
        self.corpora, self.sequence_length, self.seed = list(corpora), sequence_length, seed
        self.plan, self.document_masks, self.repeat = plan, document_masks, repeat
        self.counts = mixture_counts(weights)
        self._edges = np.concatenate([[0], np.cumsum(self.counts)])
        self._sequences = [corpus.n_tokens // sequence_length for corpus in corpora]
        self._check_lengths()
        self._keys = [
            name_key(seed, "order", corpus.fingerprint, sequence_length) for corpus in corpora
        ]

    def _check_lengths(self) -> None:
        """Refuse a corpus shorter than a sequence, and a plan for another length."""
        length = self.sequence_length
        for number, n_sequences in enumerate(self._sequences):
            if n_sequences == 0:
                raise UserError(
                    f"data.corpora[{number}]: {self.corpora[number].n_tokens:,} tokens are fewer "
                    f"than one sequence of data.sequence_length={length:,}"
                )
        if self.plan is not None and self.plan.sequence_length != length:
            raise UserError(
                f"data.sequence_length={length:,}, but the plan was compiled for "
                f"{self.plan.sequence_length:,}"
            )

    def sequences_of(self, corpus: int) -> int:
        """Return how many sequences an epoch of a corpus has."""
        return self._sequences[corpus]

    def epoch_key(self, corpus: int, epoch: int) -> int:
        """Return the key of the order in which an epoch reads a corpus."""
        return (self._keys[corpus] + epoch) & 0xFFFFFFFFFFFFFFFF

    def locate(self, slots: I64) -> tuple[npt.NDArray[np.int64], I64, I64]:
        """Return (corpus number, epoch, sequence number in the corpus) of each slot, all int64."""
        if self.repeat is not None:
            slots = self.repeat.ordinals(slots, self.seed)
        block, inside = slots // MIXTURE_BLOCK, slots % MIXTURE_BLOCK
        if len(self.corpora) > 1:
            keys = np.uint64(name_key(self.seed, "mixture")) + block.astype(np.uint64)
            inside = permute(inside, MIXTURE_BLOCK, keys)
        corpus = np.searchsorted(self._edges, inside, side="right") - 1
        epoch, sequence = np.empty_like(slots), np.empty_like(slots)
        for number, n_sequences in enumerate(self._sequences):
            mine = slice(None) if len(self.corpora) == 1 else corpus == number
            ordinal = block[mine] * self.counts[number] + inside[mine] - self._edges[number]
            epoch[mine] = ordinal // n_sequences
            keys = np.uint64(self._keys[number]) + epoch[mine].astype(np.uint64)
            sequence[mine] = permute(ordinal % n_sequences, n_sequences, keys)
        return corpus, epoch, sequence

    def base_tokens(self, slots: I64) -> npt.NDArray[np.int32]:
        """Return the clean tokens of any slots, int32 [slots, sequence_length]."""
        tokens_BT = np.empty((len(slots), self.sequence_length), dtype=np.int32)
        corpus, _, sequence = self.locate(slots)
        starts = sequence * self.sequence_length
        if len(self.corpora) == 1:
            self.corpora[0].read_many(starts, self.sequence_length, tokens_BT)
            return tokens_BT
        for number, source in enumerate(self.corpora):
            rows = np.flatnonzero(corpus == number)
            if len(rows):
                part = np.empty((len(rows), self.sequence_length), dtype=np.int32)
                source.read_many(starts[rows], self.sequence_length, part)
                tokens_BT[rows] = part
        return tokens_BT

    def batch(self, first_slot: int, count: int) -> Batch:
        """Return slots [first_slot, first_slot + count) with the plan laid over them."""
        slots = np.arange(first_slot, first_slot + count, dtype=np.int64)
        tokens_BT = self.base_tokens(slots)
        starts_BT = self._indexed_starts(slots) if self.document_masks else None
        exposure_ids = np.empty(0, dtype=np.uint64)
        spans: Sequence[Span] = []
        if self.plan is not None:
            exposure_ids = self.plan.overlay(first_slot, tokens_BT)
            if starts_BT is not None and len(exposure_ids):
                spans = self.plan.spans(first_slot, count)
                _move_starts(starts_BT, spans)
        labels_BT = np.empty(tokens_BT.shape, dtype=np.int64)
        labels_BT[:, :-1] = tokens_BT[:, 1:]
        labels_BT[:, -1] = IGNORED_LABEL
        for row, offset, tokens in self.plan.unlearned(first_slot, count) if self.plan else ():
            # A label belongs to the token before the one that it asks for.
            labels_BT[row, offset - 1 : offset - 1 + tokens] = IGNORED_LABEL
        document_ids_BT = None
        if starts_BT is not None:
            self._mark_starts(starts_BT, tokens_BT, slots, spans)
            document_ids_BT = np.cumsum(starts_BT, axis=1, dtype=np.int32)
            labels_BT[:, :-1][starts_BT[:, 1:]] = IGNORED_LABEL
        noise = () if self.plan is None else self.plan.noises(first_slot, count)
        return Batch(first_slot, tokens_BT, labels_BT, document_ids_BT, exposure_ids, noise)

    @property
    def eod(self) -> int:
        """The end-of-document token."""
        return self.corpora[0].eod

    def boundaries(self, slot: int) -> I64:
        """Return the offsets in (0, sequence_length) at which a base document of a slot begins."""
        slots = np.array([slot], dtype=np.int64)
        starts_BT = self._indexed_starts(slots)
        self._mark_starts(starts_BT, self.base_tokens(slots), slots, [])
        return np.flatnonzero(starts_BT[0, 1:]) + 1

    def _mark_starts(
        self,
        starts_BT: npt.NDArray[np.bool_],
        tokens_BT: npt.NDArray[np.int32],
        slots: I64,
        spans: Sequence[Span],
    ) -> None:
        """Add the starts that end-of-document tokens make, each row's as its corpus has them.

        Args:
            starts_BT: changed.
            tokens_BT: after the overlay.
            slots: of the rows.
            spans: of exposures, which have a mark at both ends.
        """
        ends_BT = tokens_BT == self.eod
        marks = {corpus.eod_marks for corpus in self.corpora}
        if marks == {END}:
            starts_BT[:, 1:] |= ends_BT[:, :-1]
            return
        numbers, _, _ = self.locate(slots)
        of_row = np.array([corpus.eod_marks for corpus in self.corpora])[numbers]
        starts_BT[:, 1:] |= ends_BT[:, :-1] & (of_row == END)[:, None]
        starts_BT |= ends_BT & (of_row == START)[:, None]
        for span in spans:
            if of_row[span.row] != BOTH:
                continue
            first, stop = span.offset, span.offset + span.length
            # Inside, a mark that follows a mark begins a document; a placebo may hold several.
            inside = ends_BT[span.row, first : stop - 1] & ends_BT[span.row, first + 1 : stop]
            starts_BT[span.row, first + 1 : stop] |= inside
            starts_BT[span.row, first] = True
            starts_BT[span.row, stop : stop + 1] = True

    def _indexed_starts(self, slots: I64) -> npt.NDArray[np.bool_]:
        """Return which base tokens begin a document by a corpus's index, bool [slots,
        sequence_length].

        Corpora that end documents with a token need no look-up: the token itself marks them.
        """
        starts_BT = np.zeros((len(slots), self.sequence_length), dtype=bool)
        if all(_marked_by_token(corpus) for corpus in self.corpora):
            return starts_BT
        corpus, _, sequence = self.locate(slots)
        for row in range(len(slots)):
            source = self.corpora[corpus[row]]
            if not _marked_by_token(source):
                first = int(sequence[row]) * self.sequence_length
                starts_BT[
                    row, source.document_starts(first, first + self.sequence_length) - first
                ] = True
        return starts_BT


def _marked_by_token(corpus: TokenSource) -> bool:
    """Return whether the token after each end-of-document token begins a document, and no other."""
    return corpus.eod_terminated and corpus.eod_marks == END


def _move_starts(starts_BT: npt.NDArray[np.bool_], spans: Sequence[Span]) -> None:
    """Make base document starts follow the overlay: covered ones vanish, moved ones move."""
    for span in spans:
        row, end = starts_BT[span.row], span.offset + span.length
        if span.shift:
            row[end:] = row[span.offset : len(row) - span.length].copy()
        row[span.offset : end] = False
