"""Sequences that a run has not read: the last of the first epoch, without exposures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.random import permute
from motet.experiments.stream.stream import IGNORED_LABEL, MIXTURE_BLOCK, Stream

I64 = npt.NDArray[np.int64]


class HeldOutSequences:
    """The corpora's last sequences in the order of their first epoch, each corpus with its share.

    Args:
        stream: of the run; exposures are not laid over.
        sequences: how many, about; at least one of each corpus, at most half of one.
        slots: that the run reads in all.

    Attributes:
        tokens_BT, labels_BT: int64; a label is the next token, -100 at the end.
        unseen: whether no slot of the run reads one of them: False in a run of an epoch and more.
    """

    def __init__(self, stream: Stream, sequences: int, slots: int) -> None:
        parts, unseen = [], True
        for number, source in enumerate(stream.corpora):
            total = stream.sequences_of(number)
            share = sequences * int(stream.counts[number]) / MIXTURE_BLOCK
            count = min(max(1, round(share)), max(1, total // 2))
            ordinals = np.arange(total - count, total, dtype=np.int64)
            chosen = permute(ordinals, total, stream.epoch_key(number, 0))
            part = np.empty((count, stream.sequence_length), dtype=np.int32)
            source.read_many(chosen * stream.sequence_length, stream.sequence_length, part)
            parts.append(part)
            unseen = unseen and not is_read(stream, number, chosen, slots)
        self.tokens_BT: I64 = np.concatenate(parts).astype(np.int64)
        self.labels_BT: I64 = np.full(self.tokens_BT.shape, IGNORED_LABEL, dtype=np.int64)
        self.labels_BT[:, :-1] = self.tokens_BT[:, 1:]
        self.unseen = unseen


def is_read(stream: Stream, corpus: int, sequences: I64, slots: int) -> bool:
    """Return whether any of the first `slots` slots reads one of these sequences, which are the
    last of their corpus's first epoch.

    A mixture puts the slots of a block in an order of its own, so those of the last block, which
    the run may not finish, are looked up.
    """
    whole, rest = divmod(slots, MIXTURE_BLOCK)
    if whole * int(stream.counts[corpus]) > stream.sequences_of(corpus) - len(sequences):
        return True
    tail = np.arange(whole * MIXTURE_BLOCK, whole * MIXTURE_BLOCK + rest, dtype=np.int64)
    if not rest:
        return False
    corpora, _, found = stream.locate(tail)
    return bool(np.isin(found[corpora == corpus], sequences).any())
