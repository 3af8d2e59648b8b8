"""A small set of sequences that a run reads again and again, mixed with fresh ones.

* Repeated data (Hernandez et al., "Scaling laws and interpretability of learning from repeated
  data", arXiv 2205.10487): a small part of the data is read many times, so that it makes a given
  share of all tokens; the rest is read once.
* Two-set training (Charton and Kempe, "Emergent properties with repeated examples", 2410.07041):
  every batch has the same number of rows from the small set, drawn with replacement.

Which slots read the set, and which of its sequences, is a pure function of the slot; the set is the
first sequences in the run's own random order, and fresh slots go on after them, so no sequence of
the set is read as a fresh one within an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.random import mix64, name_key, permute, philox, uniform_int

I64 = npt.NDArray[np.int64]
BLOCK = 10_000
MIXED = ("block", "batch")
DRAWN = ("passes", "replacement")


@dataclass(frozen=True)
class Repeat:
    """What is repeated.

    Attributes:
        share: of all slots, that read the set.
        sequences: in the set.
        mixed: "block", exactly so many of every 10,000 slots; "batch", of those of every step.
        drawn: "passes", all of the set in a new order each time; "replacement", each by itself.
        steps: which slots a step has.
    """

    share: float
    sequences: int
    mixed: str
    drawn: str
    steps: Steps

    def times(self, slots: int) -> float:
        """How often the first `slots` slots read each sequence of the set, on average; about, in
        the middle of a block or a step.
        """
        first, _, chosen = self._group(np.array([slots]))
        inside = min(self.share * float(slots - first[0]), float(chosen[0]))
        return (float(self._of_set_before(first)[0]) + inside) / self.sequences

    def ordinals(self, slots: I64, seed: int) -> I64:
        """Return the place of each slot's sequence in the order of a run without repetition."""
        first, size, chosen = self._group(slots)
        key = np.uint64(name_key(seed, "repeat places"))
        rank = np.empty_like(slots)
        # A group of each size has its own domain; there are few sizes.
        for count in np.unique(size).tolist():
            mine = size == count
            keys = mix64(first[mine].astype(np.uint64) + key)
            rank[mine] = permute(slots[mine] - first[mine], count, keys)
        before = self._of_set_before(first)
        of_set = rank < chosen
        fresh = self.sequences + (first - before) + rank - chosen
        return np.where(of_set, self._drawn(np.where(of_set, before + rank, 0), seed), fresh)

    def of_set(self, slots: I64, seed: int) -> npt.NDArray[np.bool_]:
        """Return which slots read the set."""
        return self.ordinals(slots, seed) < self.sequences

    def _group(self, slots: I64) -> tuple[I64, I64, I64]:
        """(first slot, slots, slots of the set) of the block or step that each slot is in."""
        if self.mixed == "block":
            first = slots // BLOCK * BLOCK
            size = np.full_like(slots, BLOCK)
        else:
            _, sizes, bases = self._stages()
            stage = np.searchsorted(bases, slots, side="right") - 1
            size = sizes[stage]
            first = bases[stage] + (slots - bases[stage]) // size * size
        return first, size, _rounded(self.share * size)

    def _of_set_before(self, slots: I64) -> I64:
        """How many slots before the first of a group read the set."""
        if self.mixed == "block":
            return slots // BLOCK * int(_rounded(np.array([self.share * BLOCK]))[0])
        _, sizes, bases = self._stages()
        chosen = _rounded(self.share * sizes)
        whole = np.diff(bases) // sizes[:-1]
        before = np.concatenate([[0], np.cumsum(whole * chosen[:-1])])
        stage = np.searchsorted(bases, slots, side="right") - 1
        return before[stage] + (slots - bases[stage]) // sizes[stage] * chosen[stage]

    def _stages(self) -> tuple[I64, I64, I64]:
        """(first step, sequences a step, first slot) of the stages of the batch ramp."""
        firsts, sizes = np.array(self.steps.changes, dtype=np.int64).T
        bases = np.array([self.steps.slots_before(int(first)) for first in firsts], dtype=np.int64)
        return firsts, sizes, bases

    def _drawn(self, turn: I64, seed: int) -> I64:
        """Which sequence of the set is read the n-th time that the set is read."""
        key, count = name_key(seed, "repeat order"), self.sequences
        if self.drawn == "replacement":
            bits, _ = philox(key, turn.astype(np.uint64), np.zeros(len(turn), dtype=np.uint64))
            return uniform_int(bits, 0, count)
        keys = mix64((turn // count).astype(np.uint64) + np.uint64(key))
        return permute(turn % count, count, keys)


def _rounded(exact: npt.NDArray[np.floating]) -> I64:
    return np.floor(exact + 0.5).astype(np.int64)
