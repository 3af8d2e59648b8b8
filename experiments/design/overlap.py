"""What one experiment's texts tell of another one's units: the same text, nearly the same, a probe
with its answer, or the same facts in other words.

Such a unit is shown although it is held out: the comparison of its experiment stays a randomized
one, but what it compares is no longer "never shown". Four relations are looked for, each on words
without regard to case and with templates set aside (`wording`):

* equal: two texts have the same words.
* near: their sets of 3-word shingles have a Jaccard similarity of at least .5, or .8 of the shorter
  text's shingles are in the longer one. Pairs come from an exact join of the shingles that tell
  units apart; where that join would be too large, from MinHash with banding (Broder, "On the
  resemblance and containment of documents", 1997; `datasketch`), verified exactly.
* probe: a probe's target with the words before it is in the text, word for word.
* facts: the target is in the text, and so is a name that the unit is about; or half of all names
  that the unit is about, at least four, are in it; or the targets of a fifth of all units, at
  least four, are in the other's texts, each a name that few units have and its own text holds.

docs/decisions.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.design.assignment import Question
from motet.experiments.design.in_common import (
    CONTAINED,
    FEWEST_NAMES,
    FEWEST_SHINGLES,
    MOST_PAIRS,
    NAMES_SHARE,
    SIMILAR,
    fewest_lone,
    fewest_spoken_of,
    pairs_in_common,
)
from motet.experiments.design.wording import Told, each_once
from motet.experiments.stream.random import U64, mix64

I64 = npt.NDArray[np.int64]

COMMON_TARGET = 0.2
"""A target in more than this share of the other's clusters (yes, no, A, B) tells nothing alone."""
HOW = ("equal", "near", "probe", "facts")


@dataclass(frozen=True)
class Telling:
    """Unit `unit` of the experiment that is told of is told by text `text` of unit `teller`.

    `how` is one of HOW, the strongest that holds.
    """

    unit: int
    teller: int
    text: int
    how: str


@dataclass(frozen=True)
class Overlap:
    """Experiment `teller` shows texts that tell of units of experiment `told`."""

    told: str
    teller: str
    links: tuple[Telling, ...]

    @property
    def units(self) -> list[int]:
        """The units that are told of, ascending."""
        return sorted({link.unit for link in self.links})


def find_overlaps(questions: Sequence[Question]) -> list[Overlap]:
    """Return every ordered pair of experiments of which one tells of the other's units."""
    sides = [Told(question) for question in questions]
    return [
        Overlap(sides[told].question.name, sides[teller].question.name, tuple(links))
        for told, teller in pairs_in_common(sides)
        if (links := links_between(sides[told], sides[teller]))
    ]


def find_leaks(questions: Sequence[Question]) -> list[Overlap]:
    """Return the experiments whose own texts hold the probe of a unit in another cluster."""
    found = []
    for question in questions:
        if not question.experiment.inserts_units:
            continue
        if links := _leaks(Told(question, least=2)):
            found.append(Overlap(question.name, question.name, tuple(links)))
    return found


def _leaks(side: Told) -> list[Telling]:
    """What texts of other clusters tell of units, other than by being nearly the same text."""
    cluster = side.question.design.cluster_of_unit

    def elsewhere(pairs: Iterator[tuple[int, int]], how: str) -> dict[tuple[int, int], str]:
        return {
            (unit, text): how
            for unit, text in pairs
            if cluster[unit] != cluster[side.unit_of_text[text]]
        }

    found = elsewhere(_facts(side, side), "facts") | elsewhere(_probes(side, side), "probe")
    if found:
        alike = {*_equal(side, side), *_near(side, side)}
        found = {pair: how for pair, how in found.items() if pair not in alike}
    return _tellings(found, side)


def links_between(told: Told, teller: Told) -> list[Telling]:
    """Return what `teller`'s texts tell of `told`'s units, each (unit, text) once."""
    found: dict[tuple[int, int], str] = {}
    for how, pairs in (
        ("equal", _equal(told, teller)),
        ("near", _near(told, teller)),
        ("probe", _probes(told, teller)),
        ("facts", _facts(told, teller)),
    ):
        for unit, text in pairs:
            found.setdefault((unit, text), how)
    return _tellings(found, teller)


def _tellings(found: Mapping[tuple[int, int], str], teller: Told) -> list[Telling]:
    return [
        Telling(unit, int(teller.unit_of_text[text]), int(teller.number_of_text[text]), how)
        for (unit, text), how in sorted(found.items())
    ]


def _equal(told: Told, teller: Told) -> Iterator[tuple[int, int]]:
    """(unit, text of the teller) with the same words."""
    of: dict[bytes, set[int]] = {}
    for text, unit in enumerate(told.unit_of_text.tolist()):
        if len(words := told.shown.text(text)):
            of.setdefault(words.tobytes(), set()).add(unit)
    for text in range(len(teller.unit_of_text)):
        for unit in sorted(of.get(teller.shown.text(text).tobytes(), ())):
            yield unit, text


def _near(told: Told, teller: Told) -> Iterator[tuple[int, int]]:
    """(unit, text of the teller) that are nearly alike, or of which one holds the other."""
    mine, theirs = told.shingles, teller.shingles
    sizes = [
        np.bincount(text, minlength=len(side.unit_of_text))
        for side, (_, text) in ((told, mine), (teller, theirs))
    ]
    for one, other, shared in _shared(mine, theirs):
        a, b = int(sizes[0][one]), int(sizes[1][other])
        alike = shared >= SIMILAR * (a + b - shared)
        held = min(a, b) >= FEWEST_SHINGLES and shared >= CONTAINED * min(a, b)
        if alike or held:
            yield int(told.unit_of_text[one]), other


def _shared(mine: tuple[U64, I64], theirs: tuple[U64, I64]) -> Iterator[tuple[int, int, int]]:
    """(my row, their row, how many keys both have), for rows that share any."""
    common = np.intersect1d(mine[0], theirs[0])
    left = [column[np.isin(mine[0], common)] for column in mine]
    right = [column[np.isin(theirs[0], common)] for column in theirs]
    if not len(common):
        return
    codes = [np.searchsorted(common, keys) for keys, _ in (left, right)]
    counts = [np.bincount(code, minlength=len(common)) for code in codes]
    if int(counts[0] @ counts[1]) > MOST_PAIRS:
        yield from _shared_by_minhash(left, right)
        return
    from scipy.sparse import csr_array

    tables = [
        csr_array((np.ones(len(code), np.int32), (rows, code)), (int(rows.max()) + 1, len(common)))
        for code, (_, rows) in zip(codes, (left, right), strict=True)
    ]
    product = (tables[0] @ tables[1].T).tocoo()
    yield from zip(
        product.coords[0].tolist(), product.coords[1].tolist(), product.data.tolist(), strict=True
    )


def _shared_by_minhash(
    left: Sequence[npt.NDArray], right: Sequence[npt.NDArray]
) -> Iterator[tuple[int, int, int]]:
    """As `_shared`, for those rows that banding brings together."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILAR, num_perm=128)
    sets = [_by_row(*side) for side in (left, right)]
    for row, keys in sets[0].items():
        index.insert(row, _sketch(MinHash, keys))
    for row, keys in sets[1].items():
        for found in index.query(_sketch(MinHash, keys)):
            yield found, row, len(np.intersect1d(sets[0][found], keys, assume_unique=True))


def _sketch(kind: type, keys: U64):  # type: ignore[no-untyped-def]
    """The MinHash of a set of keys."""
    sketch = kind(num_perm=128, hashfunc=lambda key: key)
    sketch.update_batch((keys & np.uint64(0xFFFFFFFF)).tolist())
    return sketch


def _by_row(keys: U64, rows: I64) -> dict[int, U64]:
    """The keys of each row."""
    order = np.argsort(rows, kind="stable")
    distinct, first = np.unique(rows[order], return_index=True)
    parts = np.split(keys[order], first[1:])
    return {int(row): np.sort(part) for row, part in zip(distinct, parts, strict=True)}


def _key(words: U64) -> int:
    """The key that `Wording.grams` gives these words as one run."""
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        key = mix64(key + word)
    return int(key[0])


def _probes(told: Told, teller: Told) -> Iterator[tuple[int, int]]:
    """(unit, text of the teller) where the text holds the end of a probe's prompt and its target,
    word for word.
    """
    last = np.flatnonzero(np.isin(teller.shown.words, told.last_words))
    for n, (asked, units) in told.probe_ends.items():
        keys, text = teller.shown.runs_to(last, n)
        hit = np.isin(keys, asked)
        for key, place in zip(keys[hit], text[hit].tolist(), strict=True):
            for unit in units[asked == key].tolist():
                yield unit, place


def _facts(told: Told, teller: Told) -> Iterator[tuple[int, int]]:
    """(unit, text of the teller) where the text tells the unit's facts in other words."""
    names = np.intersect1d(told.own_names[0], teller.rare)
    if not len(names):
        return
    kept = np.isin(teller.shown.words, names)
    theirs = each_once(teller.shown.words[kept], teller.shown.owner[kept])
    mine = told.own_names
    about = np.bincount(mine[1], minlength=len(told.question.units))
    held, spoken = _by_row(*mine), _by_row(*theirs)
    itself, cluster = told is teller, told.question.design.cluster_of_unit
    lone: list[tuple[int, int]] = []
    spoken_of: list[tuple[int, int]] = []
    for unit, text, count in _shared(mine, theirs):
        if itself and cluster[unit] == cluster[told.unit_of_text[text]]:
            continue
        if count >= FEWEST_NAMES and count >= NAMES_SHARE * about[unit]:
            yield unit, text
            continue
        targets = _targets_in(told.targets[unit], text, teller)
        if not targets:
            continue
        both = np.intersect1d(held[unit], spoken[text], assume_unique=True)
        if any(len(np.setdiff1d(both, target)) for target in targets):
            spoken_of.append((unit, text))
        elif any(_in_own_text(told, unit, target) for target in targets):
            lone.append((unit, text))
    if len({unit for unit, _ in lone}) >= fewest_lone(told):
        yield from lone
    fewest = 1 if itself else fewest_spoken_of(told, teller)
    if spoken_of and len({unit for unit, _ in spoken_of}) >= fewest:
        yield from spoken_of


def _targets_in(targets: Sequence[U64], text: int, teller: Told) -> list[U64]:
    """The targets that a text holds, without those that are common among all texts."""
    words = teller.shown.text(text)
    return [one for one in targets if _has(words, one) and not _common(one, teller)]


def _in_own_text(told: Told, unit: int, target: U64) -> bool:
    own = np.flatnonzero(told.unit_of_text == unit).tolist()
    return any(_has(told.shown.text(number), target) for number in own)


def _has(words: U64, run: U64) -> bool:
    """Whether `run` is in `words`, without a gap."""
    n = len(run)
    if not 0 < n <= len(words):
        return False
    starts = np.flatnonzero(words[: len(words) - n + 1] == run[0])
    return any(np.array_equal(words[start : start + n], run) for start in starts)


def _common(target: U64, teller: Told) -> bool:
    """Whether the target is so common among the teller's texts that it tells nothing."""
    if not len(target):
        return True
    return teller.n_holding(len(target), _key(target)) > max(1, COMMON_TARGET * teller.n_groups)
