"""Probes: how likely a model finds each target after its prompt, on all ranks, without disturbing
training.

Prompt and target are tokenized together, exactly as an exposure's text is, and a token belongs to
the target when it ends after the prompt does. Scores are teacher-forced; `greedy` is true when the
most likely token is the right one at every target position, which is the same as greedy decoding
reproducing the target. Sequences are padded on the right: under causal attention padding cannot
reach a score, so batch size and company change it by rounding only.

This module is torch-free: the scoring function and the sum over ranks are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, raise_problems
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.scoring.generation import Prompts, encode_prompts
from motet.experiments.stream.stream import IGNORED_LABEL
from motet.experiments.types import LOWEST_SHARE, ItemScores, ProbeItem

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

Score = Callable[[I64, I64], tuple[F64, npt.NDArray[np.bool_]]]
"""(tokens [B, T], labels [B, T]) -> (log-probability of each label, whether it is the most likely),
zeros where label = -100.
"""
SumOverRanks = Callable[[F64], F64]

PAD_MULTIPLE = 8
SMALLEST_T = 8


@dataclass(frozen=True)
class EncodedItems:
    """Probe items as tokens; I items.

    Attributes:
        tokens: per item, int64 [end-of-document, prompt..., target...].
        target_start: int64 [I], index into the item's tokens at which its target begins.
        n_tokens, n_bytes: int64 [I], size of the target.
        prompts: of the items that ask for text.
    """

    tokens: tuple[I64, ...]
    target_start: I64
    n_tokens: I64
    n_bytes: I64
    prompts: Prompts

    def __len__(self) -> int:
        return len(self.tokens)


def surely_fit(items: Sequence[ProbeItem], tokenizer: Tokenizer, sequence_length: int) -> bool:
    """Whether no item can be too long for `encode_items`, known without tokenizing any."""
    sizes = (
        len(item.prompt.encode()) + max(len(item.target.encode()), item.max_tokens)
        for item in items
    )
    return tokenizer.spells_bytes and max(sizes, default=0) + 2 <= sequence_length


def encode_items(
    items: Sequence[ProbeItem], tokenizer: Tokenizer, sequence_length: int, where: str
) -> EncodedItems:
    """Tokenize items.

    Args:
        items: what to score.
        tokenizer: the run's.
        sequence_length: the longest item that the model was trained for.
        where: the setting to blame.

    Raises:
        UserError: items longer than a sequence, all of them named.
    """
    encoded = tokenizer.encode_with_ends([item.prompt + item.target for item in items])
    tokens, starts, problems = [], [], []
    for item, (ids, ends) in zip(items, encoded, strict=True):
        start = int(np.searchsorted(ends, len(item.prompt), side="right"))
        tokens.append(np.concatenate([np.array([tokenizer.eod], dtype=np.int64), ids]))
        starts.append(1 + start)
        if len(ids) + 1 > sequence_length:
            problems.append(
                Problem(
                    where,
                    f"the probe {item.id!r} has {len(ids) + 1:,} tokens, more than "
                    f"data.sequence_length={sequence_length:,}; "
                    "shorten it or lengthen the sequence",
                )
            )
    prompts, unfit = encode_prompts(items, tokenizer, sequence_length, where)
    raise_problems([*problems, *unfit])
    target_start = np.array(starts, dtype=np.int64)
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    n_bytes = np.array([len(item.target.encode()) for item in items], dtype=np.int64)
    return EncodedItems(tuple(tokens), target_start, lengths - target_start, n_bytes, prompts)


def probe_batches(lengths: I64, batch_tokens: int) -> list[I64]:
    """Group items of similar length so that a padded batch holds at most `batch_tokens` tokens.

    Args:
        lengths: int64 [I], tokens per item.
        batch_tokens: a batch of one item may exceed it.

    Returns:
        item numbers of every batch; each item is in exactly one.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[I64] = []
    start = 0
    while start < len(order):
        width = _padded(int(lengths[order[start]]))
        count = max(1, batch_tokens // width)
        batches.append(order[start : start + count])
        start += count
    return batches


def _padded(length: int) -> int:
    return max(SMALLEST_T, -(-length // PAD_MULTIPLE) * PAD_MULTIPLE)


def score_items(
    items: EncodedItems,
    score: Score,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: SumOverRanks = lambda values: values,
    before_batch: Callable[[], None] = lambda: None,
) -> ItemScores:
    """Score every item; batches are dealt to ranks in turn, and every rank makes the same number of
    forward passes.

    Args:
        items: I items.
        score: the model (a collective when it is sharded).
        batch_tokens: most padded tokens in one forward pass.
        rank, world_size: which share is this process's.
        sum_over_ranks: adds float64 arrays of all ranks.
        before_batch: called before each forward pass, equally often on every rank; what it raises
            ends the scoring on all.
    """
    lengths = np.array([len(ids) for ids in items.tokens], dtype=np.int64)
    batches = probe_batches(lengths, batch_tokens)
    results = np.zeros((3, len(items)), dtype=np.float64)
    for turn in range(0, len(batches), world_size):
        before_batch()
        mine = turn + rank
        members = batches[mine] if mine < len(batches) else np.empty(0, dtype=np.int64)
        tokens_BT, labels_BT = padded_batch(items, members)
        logprob_BT, greedy_BT = score(tokens_BT, labels_BT)
        counted_BT = labels_BT != IGNORED_LABEL
        results[0, members] = np.where(counted_BT, logprob_BT, 0.0).sum(axis=1)[: len(members)]
        results[1, members] = (greedy_BT | ~counted_BT).all(axis=1)[: len(members)]
        for row, item in enumerate(members):
            results[2, item] = lowest_mean(logprob_BT[row, counted_BT[row]])
    logprob, greedy, lowest = sum_over_ranks(results)
    return ItemScores(logprob, items.n_tokens, items.n_bytes, greedy > 0.5, lowest=lowest)


def lowest_mean(logprob_N: F64) -> float:
    """The mean of the lowest `LOWEST_SHARE` of some log-probabilities, of at least one; 0 of
    none.
    """
    count = max(1, int(LOWEST_SHARE * len(logprob_N)))
    return float(np.sort(logprob_N)[:count].mean()) if len(logprob_N) else 0.0


def padded_batch(items: EncodedItems, members: I64) -> tuple[I64, I64]:
    """Return tokens and labels [B, T], padded on the right; a batch without members is one row that
    counts nothing.
    """
    width = _padded(max((len(items.tokens[item]) for item in members), default=0))
    tokens_BT = np.zeros((max(1, len(members)), width), dtype=np.int64)
    labels_BT = np.full(tokens_BT.shape, IGNORED_LABEL, dtype=np.int64)
    for row, item in enumerate(members):
        ids, start = items.tokens[item], int(items.target_start[item])
        tokens_BT[row, : len(ids)] = ids
        labels_BT[row, start - 1 : len(ids) - 1] = ids[start:]
    return tokens_BT, labels_BT
