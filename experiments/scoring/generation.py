"""Probes that write: greedy decoding after a prompt, batched, on all ranks, without disturbing
training.

The same text comes out whatever the batch and whoever shares it. A pass has `BATCH_ROWS` rows or
what fits, always the same for an item, however few are left, and a width that follows from the
item's own prompt and what it may write: sums are then made in the same order. Padding is on the
right, where causal attention does not look; nearly equal tokens are told apart by their number
(`models.loss.TIE`).

There is no cache of keys and values, so that every engine can write: a pass is over the prompt and
what was written. It also tells what follows each of the next `GUESSED` tokens, which are guessed
from what stood after the same two words before; as many as come true are written at once, and one
more (greedy speculative decoding: Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", ICML 2023, section 2.3, with guesses from the text itself). The text is that
of one token a pass. The cost is bounded by as many passes as tokens, and ends with the last row
that has not met its end of document; text that repeats itself, as small models' does, takes few.

This module is torch-free: the model and the agreement of ranks are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.types import Generated, ProbeItem

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Likeliest = Callable[[I64, I64], I64]
"""(tokens [B, T], places [B, K]) -> the most likely token after each of these places, [B, K]."""

BATCH_ROWS = 16
WIDTHS = 32
"""Widths are multiples of it: few shapes, so that what is compiled is compiled seldom."""
GUESSED = 8
"""Tokens that one pass looks beyond the next."""
CONTEXT = 2
"""Tokens that must have stood together before, for a guess at what follows; or the last alone."""


@dataclass(frozen=True)
class Prompts:
    """What is written after; G items ask for it.

    Attributes:
        item: int64 [G], their numbers among all items.
        tokens: per prompt, int64 [end-of-document, prompt...].
        max_tokens: int64 [G].
        n_items: of which these are some.
    """

    item: I64
    tokens: tuple[I64, ...]
    max_tokens: I64
    n_items: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PromptBatch:
    """One batch: which prompts, and the shape of its passes.

    Attributes:
        members: int64 [at most `rows`], numbers of prompts.
        rows: of every pass, filled up with empty ones.
        width: of every pass: of the prompts and of what may be written, padded each.
        max_tokens: most passes.
    """

    members: I64
    rows: int
    width: int
    max_tokens: int


def encode_prompts(
    items: Sequence[ProbeItem], tokenizer: Tokenizer, sequence_length: int, where: str
) -> tuple[Prompts, list[Problem]]:
    """Tokenize the prompts of items that ask for text, each by itself; also return what does not
    fit into a sequence.
    """
    asking = [number for number, item in enumerate(items) if item.max_tokens > 0]
    encoded = tokenizer.encode_with_ends([items[number].prompt for number in asking])
    eod = np.array([tokenizer.eod], dtype=np.int64)
    tokens = tuple(np.concatenate([eod, ids]) for ids, _ in encoded)
    most = np.array([items[number].max_tokens for number in asking], dtype=np.int64)
    problems = [
        Problem(
            where,
            f"the probe {items[number].id!r} has {len(ids):,} tokens and asks for "
            f"{items[number].max_tokens:,} more, over data.sequence_length={sequence_length:,}; "
            "ask for fewer, shorten it or lengthen the sequence",
        )
        for number, ids in zip(asking, tokens, strict=True)
        if len(ids) + items[number].max_tokens > sequence_length
    ]
    return Prompts(np.array(asking, dtype=np.int64), tokens, most, len(items)), problems


def batches_of(prompts: Prompts, batch_tokens: int) -> list[PromptBatch]:
    """Group prompts of one padded length and one bound; the most passes come first.

    Args:
        prompts: each is in exactly one batch.
        batch_tokens: most padded tokens of a pass; a batch of one row may exceed it.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (ids, most) in enumerate(zip(prompts.tokens, prompts.max_tokens, strict=True)):
        groups.setdefault((int(most), _padded(len(ids))), []).append(number)
    shapes = []
    for (most, width), members in sorted(groups.items(), reverse=True):
        width += _padded(most)
        rows = min(BATCH_ROWS, max(1, batch_tokens // width))
        shapes += [
            PromptBatch(np.array(members[start : start + rows], dtype=np.int64), rows, width, most)
            for start in range(0, len(members), rows)
        ]
    return shapes


def most_tokens(prompts: Prompts, batch_tokens: int) -> int:
    """Return how many tokens, padding too, pass through the model where nothing ends early: the
    bound on what one probe costs.
    """
    return sum(
        shape.rows * shape.width * shape.max_tokens for shape in batches_of(prompts, batch_tokens)
    )


def _padded(length: int) -> int:
    return -(-length // WIDTHS) * WIDTHS


def guess(text: Sequence[int], count: int) -> list[int]:
    """Return `count` tokens that may follow a text: what stood after the last place of its last
    `CONTEXT` tokens, or of the last one; [] where that is new. A guess goes on into itself.
    """
    known = list(text)
    for n in range(min(CONTEXT, len(known) - 1), 0, -1):
        tail = known[-n:]
        for at in range(len(known) - n - 1, -1, -1):
            if known[at : at + n] == tail:
                for place in range(at + n, at + n + count):
                    known.append(known[place])
                return known[len(text) :]
    return []


class _Turn:
    """The rows that one rank writes in one turn."""

    def __init__(self, prompts: Prompts, shape: PromptBatch | None, eod: int) -> None:
        self.shape, self.eod = shape, eod
        members = () if shape is None else shape.members
        self.rows = [prompts.tokens[number] for number in members]
        self.written: list[list[int]] = [[] for _ in members]
        self.ended = [False] * len(members)
        self.guessed: list[list[int]] = [[] for _ in members]

    def goes_on(self) -> bool:
        """Whether a row of this rank still writes."""
        most = 0 if self.shape is None else self.shape.max_tokens
        return any(
            not ended and len(written) < most
            for ended, written in zip(self.ended, self.written, strict=True)
        )

    def batch(self) -> tuple[I64, I64]:
        """Return tokens [B, T], guesses among them, and the places [B, K] after which the next
        tokens are asked for: the last of each row, and those of its guesses. A rank that has
        nothing to write brings one empty row.
        """
        if self.shape is None:
            return np.zeros((1, WIDTHS), dtype=np.int64), np.zeros((1, 1), dtype=np.int64)
        tokens_BT = np.zeros((self.shape.rows, self.shape.width), dtype=np.int64)
        at_BK = np.zeros((self.shape.rows, 1 + GUESSED), dtype=np.int64)
        for row, (ids, written) in enumerate(zip(self.rows, self.written, strict=True)):
            room = 0 if self.ended[row] else self.shape.max_tokens - len(written) - 1
            known = [*ids.tolist(), *written]
            guessed = guess(known, min(GUESSED, room)) if room > 0 else []
            self.guessed[row] = guessed
            tokens_BT[row, : len(known) + len(guessed)] = [*known, *guessed]
            at_BK[row] = len(known) - 1 + np.minimum(np.arange(1 + GUESSED), len(guessed))
        return tokens_BT, at_BK

    def take(self, next_BK: I64) -> None:
        """Write the next token of every row that still writes, and those after it whose guess came
        true.
        """
        if self.shape is None:
            return
        for row, written in enumerate(self.written):
            for token, guessed in zip(
                next_BK[row].tolist(), [*self.guessed[row], None], strict=False
            ):
                if self.ended[row] or len(written) == self.shape.max_tokens:
                    break
                if token == self.eod:
                    self.ended[row] = True
                else:
                    written.append(token)
                if token != guessed:
                    break

    def put(self, found: F64) -> None:
        """Put each row's number of tokens, whether it ended, and the tokens, into the row of its
        prompt.
        """
        members = () if self.shape is None else self.shape.members
        for number, written, ended in zip(members, self.written, self.ended, strict=True):
            found[number, : 2 + len(written)] = [len(written), ended, *written]


def generate(
    prompts: Prompts,
    likeliest: Likeliest,
    tokenizer: Tokenizer,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[F64], F64] = lambda values: values,
    any_rank: Callable[[bool], bool] = lambda mine: mine,
    before_batch: Callable[[], None] = lambda: None,
) -> Generated:
    """Write after all prompts: batches are dealt to ranks in turn, and every rank makes the same
    number of passes.

    Args:
        prompts: G of I items.
        likeliest: the model (a collective when it is sharded).
        tokenizer: the run's.
        batch_tokens: most padded tokens in one pass.
        rank, world_size: which share is this process's.
        sum_over_ranks: adds float64 arrays of all ranks.
        any_rank: whether any rank says so (a collective).
        before_batch: called before each pass, equally often on every rank; what it raises ends the
            writing on all.
    """
    shapes = batches_of(prompts, batch_tokens)
    longest = int(prompts.max_tokens.max(initial=0))
    # Per prompt: how many tokens, whether it ended, the tokens; those of other ranks are 0.
    found = np.zeros((len(prompts), 2 + longest), dtype=np.float64)
    for first in range(0, len(shapes), world_size):
        mine = first + rank
        turn = _Turn(prompts, shapes[mine] if mine < len(shapes) else None, tokenizer.eod)
        while any_rank(turn.goes_on()):
            before_batch()
            turn.take(likeliest(*turn.batch()))
        turn.put(found)
    return _generated(prompts, sum_over_ranks(found), tokenizer)


def _generated(prompts: Prompts, found: F64, tokenizer: Tokenizer) -> Generated:
    """Return what was written by item, from one row per prompt."""
    texts, ended = [""] * prompts.n_items, np.zeros(prompts.n_items, dtype=bool)
    tokens: list[I64] = [np.empty(0, dtype=np.int64)] * prompts.n_items
    for item, row in zip(prompts.item.tolist(), found, strict=True):
        tokens[item] = row[2 : 2 + int(row[0])].astype(np.int64)
        ended[item] = row[1] > 0
        texts[item] = tokenizer.decode(tokens[item])
    return Generated(tuple(texts), tuple(tokens), ended)
