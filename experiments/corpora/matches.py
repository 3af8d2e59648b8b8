"""Where given texts lie in a corpus: exact runs of tokens, and stretches that are nearly a text.

One pass over the corpus finds the places where it has five tokens in a row (a *shingle*) of some
text, by a rolled hash and then token for token. From each of them a run is extended to both sides
as long as tokens agree (seed and extend, as in Altschul et al., "Basic local alignment search
tool", J. Mol. Biol. 1990), so every run of at least five tokens that holds a shingle of the text's
own is found, wherever it begins. A stretch is nearly a text when it has a given share of the
text's own shingles. That is containment, counted exactly: one side is small enough to be kept
whole, so nothing has to be sketched. Memory is that of a chunk and of what is found.

Shapes: N positions of a chunk, S shingles of all texts, M places where one of them lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]
SHINGLE = 5
FEWEST_TOKENS = 8
"""Shorter texts are found everywhere."""
FEWEST_SHINGLES = 4
CHUNK = 1 << 20
PIECE = 1 << 15
"""Positions hashed at once: their words stay in the processor's cache."""
THREADS = 2
_BASE = np.uint32(0x9E3779B1)
_WIDE_BASE = np.uint64(0xBF58476D1CE4E5B9)
_LEAST_BITS, _MOST_BITS = 20, 27
_BORDER = np.uint32(0xFFFFFFFF)
WINDOW = 1.5
"""A stretch that is nearly a text has at most so many times its tokens."""
EXACT, NEAR = "exact", "near"


class TokenReader(Protocol):
    """What is searched; `corpora.corpus.Corpus` is one."""

    n_tokens: int

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Return tokens [start, start + length)."""
        ...


class TokenArray:
    """Tokens in memory, or in a mapped file, as a `TokenReader`."""

    def __init__(self, tokens: npt.NDArray[Any]) -> None:
        self.tokens = tokens
        self.n_tokens = len(tokens)

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        return self.tokens[start : start + length]


class Match(NamedTuple):
    """A place of the corpus that holds a text, or a part of it.

    text: number of the text. how: EXACT or NEAR. start, stop: tokens of the corpus. share: of the
    text's own shingles, how many lie there. first: token of the text with which a run begins, 0
    for what is near.
    """

    text: int
    how: str
    start: int
    stop: int
    share: float
    first: int = 0


@dataclass(frozen=True)
class Sought:
    """One text to look for.

    Attributes:
        tokens: the text, `FEWEST_TOKENS` or more.
        least: tokens of a run in the corpus that count, at most as many as the text has.
        own: bool [tokens - SHINGLE + 1], False where a shingle says nothing (a template's).
        similar: share of its own shingles that makes a stretch nearly the text; None looks for
            exact runs only.
    """

    tokens: npt.NDArray[np.integer]
    least: int
    own: Bools
    similar: float | None


def matches(
    corpus: TokenReader,
    sought: Sequence[Sought],
    advance: Callable[[int], None] | None = None,
) -> Iterator[list[Match]]:
    """Yield what a corpus holds of some texts, chunk by chunk.

    Args:
        corpus: what is searched. Its `document_starts`, if it has any, keep what is near inside
            one document.
        sought: the texts.
        advance: called with the number of tokens of every chunk that was searched.

    Raises:
        ValueError: a text is too short.
    """
    if any(len(one.tokens) < FEWEST_TOKENS for one in sought):
        raise ValueError(f"a text has fewer than {FEWEST_TOKENS} tokens")
    if not any(one.own.any() for one in sought):
        return
    search = _Search(sought)
    starts = range(0, corpus.n_tokens, CHUNK)

    def found(start: int) -> list[Match]:
        first = max(0, start - search.before)
        stop = min(start + CHUNK, corpus.n_tokens)
        last = min(stop + search.after, corpus.n_tokens)
        tokens = corpus.read(first, last - first).astype(np.uint32)
        borders = _borders(corpus, first, last)
        return search.found(tokens, first, start, stop, borders)

    with ThreadPoolExecutor(THREADS) as pool:
        for begin in range(0, len(starts), 8 * THREADS):  # few at a time: results are kept
            part = starts[begin : begin + 8 * THREADS]
            for start, result in zip(part, pool.map(found, part), strict=True):
                if advance is not None:
                    advance(min(start + CHUNK, corpus.n_tokens) - start)
                if result:
                    yield result


def _borders(corpus: TokenReader, first: int, last: int) -> I64:
    """Positions in [first, last) at which a document begins."""
    ask = getattr(corpus, "document_starts", None)
    return np.empty(0, dtype=np.int64) if ask is None else ask(first, last)


class _Search:
    """All texts end to end, and their own shingles by hash.

    text_of: int64 [tokens of all texts and borders]. keys: uint32, ascending, of distinct own
    shingles' places `place`; several places may have one key.
    """

    def __init__(self, sought: Sequence[Sought]) -> None:
        lengths = np.array([len(one.tokens) for one in sought], dtype=np.int64)
        self.start = np.cumsum(lengths + 1) - lengths
        self.tokens = np.full(int(lengths.sum()) + len(sought) + 1, _BORDER, dtype=np.uint32)
        self.text_of = np.repeat(np.arange(len(sought)), lengths + 1)
        places = []
        for at, one in zip(self.start.tolist(), sought, strict=True):
            self.tokens[at : at + len(one.tokens)] = one.tokens
            places.append(at + np.flatnonzero(one.own))
        self.text_of = np.concatenate([self.text_of[:1], self.text_of])
        self.least = np.array([one.least for one in sought], dtype=np.int64)
        self.lengths = lengths
        self.similar = np.array([np.nan if s.similar is None else s.similar for s in sought])
        place = np.concatenate(places)
        keys = _hashes(self.tokens)[place]
        order = np.argsort(keys, kind="stable")
        self.keys, self.place = keys[order], place[order]
        self.own = np.zeros(len(self.tokens) + 1, dtype=np.int64)
        self.own[place + 1] = 1
        self.own = np.cumsum(self.own)  # how many own shingles begin before a place
        bits = int(np.clip(np.log2(len(place) + 1) + 5, _LEAST_BITS, _MOST_BITS))
        self.shift = np.uint32(32 - bits)
        self.seen = np.zeros(1 << bits, dtype=bool)
        self.seen[self.keys >> self.shift] = True
        # The same shingle twice in one text counts once.
        self.kind = self._kinds()
        distinct = np.unique(np.stack([self.text_of[place], self.kind[place]]), axis=1)[0]
        self.n_own = np.bincount(distinct, minlength=len(sought))
        longest = int(lengths.max())
        self.before, self.after = longest, int(WINDOW * longest) + 1

    def _kinds(self) -> I64:
        """A number for every place of a shingle, the same where its tokens are the same."""
        count = len(self.tokens) - SHINGLE + 1
        mixed = np.zeros(count, dtype=np.uint64)
        for step in range(SHINGLE):  # modulo 2^64: no two of a million agree by chance
            mixed = (mixed + self.tokens[step : step + count] + np.uint64(1)) * _WIDE_BASE
            mixed ^= mixed >> np.uint64(29)
        _, kind = np.unique(mixed, return_inverse=True)
        return kind.reshape(-1).astype(np.int64)

    def found(self, tokens: U32, first: int, start: int, stop: int, borders: I64) -> list[Match]:
        """Matches that begin in [start, stop); `tokens` begin at `first`."""
        at, place = self._seeds(tokens)
        if not len(at):
            return []
        runs = self._runs(tokens, at, place)
        near = self._near(at + first, place, borders)
        exact = [one._replace(start=one.start + first, stop=one.stop + first) for one in runs]
        return [one for one in [*exact, *near] if start <= one.start < stop]

    def _seeds(self, tokens: U32) -> tuple[I64, I64]:
        """(position in `tokens`, place in the texts) of every shingle that both have, [M] each."""
        positions, hashes = [], []
        for begin in range(0, len(tokens) - SHINGLE + 1, PIECE):
            part = _hashes(tokens[begin : begin + PIECE + SHINGLE - 1])
            here = np.flatnonzero(self.seen[part >> self.shift])
            positions.append(begin + here)
            hashes.append(part[here])
        if not positions:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        at, keys = np.concatenate(positions), np.concatenate(hashes)
        low = np.searchsorted(self.keys, keys, side="left")
        count = np.searchsorted(self.keys, keys, side="right") - low
        at = np.repeat(at, count)
        number = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
        place = self.place[np.repeat(low, count) + number]
        same = np.ones(len(at), dtype=bool)
        for step in range(SHINGLE):
            same &= tokens[at + step] == self.tokens[place + step]
        return at[same], place[same]

    def _runs(self, tokens: U32, at: I64, place: I64) -> list[Match]:
        """The longest runs around the seeds, each once, where they are long enough."""
        # Seeds of one diagonal that follow each other are one run: its first stands for all.
        order = np.lexsort((at, place - at))
        at, place = at[order], place[order]
        follows = (np.diff(at) == 1) & (np.diff(place) == 1)
        head = np.concatenate([[True], ~follows])
        at, place = at[head], place[head]
        left = self._extend(tokens, at - 1, place - 1, -1)
        right = self._extend(tokens, at, place, 1)
        text = self.text_of[place]
        long_enough = left + right >= self.least[text]
        rows = np.stack([text, at - left, place - left, left + right])[:, long_enough]
        found = []
        for number, start, begin, length in np.unique(rows, axis=1).T.tolist():
            share = self._own_share(number, begin, length)
            first = begin - int(self.start[number])
            found.append(Match(number, EXACT, start, start + length, share, first))
        return found

    def _extend(self, tokens: U32, at: I64, place: I64, step: int) -> I64:
        """How many tokens agree from the given ones on, in steps of 1 or -1."""
        length = np.zeros(len(at), dtype=np.int64)
        alive = np.arange(len(at))
        while len(alive):
            here = at[alive] + step * length[alive]
            there = place[alive] + step * length[alive]
            inside = (here >= 0) & (here < len(tokens))
            alive, here, there = alive[inside], here[inside], there[inside]
            alive = alive[tokens[here] == self.tokens[there]]  # a border agrees with no token
            length[alive] += 1
        return length

    def _own_share(self, text: int, begin: int, length: int) -> float:
        """Which part of a text's own shingles a run of it holds, which begins at place `begin`."""
        places = np.arange(begin, begin + length - SHINGLE + 1)
        own = self.own[places + 1] > self.own[places]
        return len(np.unique(self.kind[places[own]])) / max(1, int(self.n_own[text]))

    def _near(self, at: I64, place: I64, borders: I64) -> list[Match]:
        """Stretches that hold enough of a text's own shingles, the first of those that overlap."""
        text = self.text_of[place]
        document = np.searchsorted(borders, at, side="right")
        order = np.lexsort((at, document, text))
        at, kind, text, document = at[order], self.kind[place[order]], text[order], document[order]
        new = (np.diff(text, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0)
        begins = np.flatnonzero(new)
        ends = np.append(begins[1:], len(at))
        number = text[begins]
        wanted = self.similar[number] * self.n_own[number]  # not a number: not asked for
        kept = (ends - begins >= wanted) & (self.n_own[number] >= FEWEST_SHINGLES)
        found: list[Match] = []
        for begin, end in zip(begins[kept], ends[kept], strict=True):
            one = int(text[begin])
            own, width = int(self.n_own[one]), int(WINDOW * self.lengths[one])
            least = float(self.similar[one]) * own
            found += _stretches(one, at[begin:end], kind[begin:end], least, width, own)
        return found


def _stretches(
    text: int, at: I64, kind: I64, wanted: float, width: int, own: int
) -> Iterator[Match]:
    """Stretches of at most `width` tokens that hold at least `wanted` kinds of shingles."""
    stop = np.searchsorted(at, at + width - SHINGLE, side="right")
    enough = np.flatnonzero(stop - np.arange(len(at)) >= wanted)
    done = -1
    for begin in enough.tolist():
        if at[begin] < done:
            continue
        end = int(stop[begin])
        kinds = len(np.unique(kind[begin:end]))
        if kinds >= wanted:
            done = int(at[end - 1]) + SHINGLE
            yield Match(text, NEAR, int(at[begin]), done, kinds / own)


def _hashes(tokens: U32) -> U32:
    """The polynomial hash of every `SHINGLE` tokens in a row, modulo 2^32."""
    count = len(tokens) - SHINGLE + 1
    hashes = tokens[:count].copy()
    for place in range(1, SHINGLE):
        hashes *= _BASE
        hashes += tokens[place : place + count]
    # The high bits choose the place in the table, and must depend on every token.
    hashes ^= hashes >> np.uint32(15)
    hashes *= _BASE
    return hashes
