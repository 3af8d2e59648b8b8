"""Which pairs of experiments can tell of each other's units, in one pass over the words of all.

A run of 200 experiments has 40,000 ordered pairs, and `overlap.links_between` takes milliseconds
for one. Here all texts of a run are joined at once, and only pairs of experiments that hold one of
the four relations, or may hold it, are left for it to look at. Where a join would be too large,
whatever shares a key is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.design.wording import Told
from motet.experiments.stream.random import U64, mix64

I64 = npt.NDArray[np.int64]

SIMILAR, CONTAINED = 0.5, 0.8
FEWEST_SHINGLES = 4
"""A text with fewer shingles of its own is not looked for as a part of a longer one."""
FEWEST_NAMES, NAMES_SHARE = 4, 0.5
FEWEST_LONE, LONE_SHARE = 4, 0.2
CHANCE_SHARE = 0.002
MOST_PAIRS = 20_000_000
"""A larger exact join is not made."""
CHUNK = 1 << 20

Pairs = set[tuple[int, int]]


@dataclass(frozen=True)
class Keyed:
    """Keys and what holds them: uint64 [rows], int64 [rows], and how many holders there are."""

    keys: U64
    holder: I64
    n_holders: int


def fewest_spoken_of(told: Told, teller: Told) -> float:
    """How many units must be told of by a name and a target for it not to be chance.

    Among very many units a few agree by chance. Items that two experiments invented do so by
    nothing else, and many experiments have many pairs.
    """
    if told.invented and teller.invented and told is not teller:
        return fewest_lone(told)
    return max(1, CHANCE_SHARE * len(told.question.units))


def fewest_lone(told: Told) -> float:
    """How many units must be told of by a target alone: one in common is chance."""
    return max(FEWEST_LONE, LONE_SHARE * len(told.question.units))


def pairs_in_common(sides: Sequence[Told]) -> list[tuple[int, int]]:
    """Return (told, teller) of the sides of which one may tell of the other's units, ascending.

    Tellers show their units, and nobody tells of itself.
    """
    shown = [side if side.question.experiment.inserts_units else None for side in sides]
    told = _all((side.whole_texts, None) for side in sides)
    theirs = _all((_NONE if side is None else side.whole_texts, None) for side in shown)
    found = _sharing(told, theirs)
    found |= _near(sides, shown)
    found |= _asked_and_told(sides, shown)
    found |= _facts(sides, shown)
    return sorted((one, other) for one, other in found if one != other)


_NONE: U64 = np.empty(0, dtype=np.uint64)


def _all(sets: Iterator[tuple[U64, I64 | None]] | Sequence[tuple[U64, I64 | None]]) -> Keyed:
    """Keys of all sides end to end; a key's holder is what is given, or else the side."""
    parts = list(sets)
    holders = [
        np.full(len(keys), number, np.int64) if holder is None else holder
        for number, (keys, holder) in enumerate(parts)
    ]
    holder = np.concatenate([np.empty(0, np.int64), *holders])
    count = len(parts) if all(holder is None for _, holder in parts) else 0
    keys = np.concatenate([_NONE, *(keys for keys, _ in parts)])
    return Keyed(keys, holder, max(count, int(holder.max(initial=-1)) + 1))


def _product(one: Keyed, other: Keyed) -> tuple[I64, I64, I64] | None:
    """(holder of one, holder of the other, how many distinct keys both have); None if too large."""
    from scipy.sparse import csr_array

    common = np.intersect1d(one.keys, other.keys)
    tables, counts = [], []
    for side in (one, other):
        kept = np.isin(side.keys, common)
        at = np.searchsorted(common, side.keys[kept])
        pairs = np.unique(side.holder[kept] * np.int64(max(1, len(common))) + at)
        holder, at = np.divmod(pairs, max(1, len(common)))
        counts.append(np.bincount(at, minlength=len(common)))
        ones = np.ones(len(at), dtype=np.int32)
        tables.append(csr_array((ones, (holder, at)), (side.n_holders, len(common))))
    if int(counts[0] @ counts[1]) > MOST_PAIRS:
        return None
    both = (tables[0] @ tables[1].T).tocoo()
    first, second = (axis.astype(np.int64) for axis in both.coords)
    return first, second, both.data.astype(np.int64)


def _sharing(one: Keyed, other: Keyed) -> Pairs:
    """Pairs of holders that have a key in common; all that there are if that is too many."""
    found = _product(one, other)
    if found is None:
        return {(i, j) for i in range(one.n_holders) for j in range(other.n_holders)}
    return set(zip(found[0].tolist(), found[1].tolist(), strict=True))


def _near(sides: Sequence[Told], shown: Sequence[Told | None]) -> Pairs:
    """(told, teller) of which two texts are nearly alike, or one holds the other."""
    first_text = _firsts([len(side.unit_of_text) for side in sides])
    mine = _all((s.shingles[0], s.shingles[1] + f) for s, f in zip(sides, first_text, strict=True))
    theirs = _all(
        (_NONE, _NONE.astype(np.int64)) if s is None else (s.shingles[0], s.shingles[1] + f)
        for s, f in zip(shown, first_text, strict=True)
    )
    found = _product(mine, theirs)
    if found is None:
        return _sharing(
            _all((side.shingles[0], None) for side in sides),
            _all((_NONE if side is None else side.shingles[0], None) for side in shown),
        )
    one, other, shared = found
    sizes = np.bincount(mine.holder, minlength=max(mine.n_holders, theirs.n_holders))
    a, b = sizes[one], sizes[other]
    least = np.minimum(a, b)
    alike = shared >= SIMILAR * (a + b - shared)
    held = (least >= FEWEST_SHINGLES) & (shared >= CONTAINED * least)
    return _of_sides(one, other, alike | held, first_text, first_text)


def _asked_and_told(sides: Sequence[Told], shown: Sequence[Told | None]) -> Pairs:
    """(told, teller) where a text of the teller ends a run as a probe of the other does."""
    found: Pairs = set()
    last = np.unique(np.concatenate([_NONE, *(side.last_words for side in sides)]))
    places = [
        np.empty(0, np.int64) if side is None else np.flatnonzero(np.isin(side.shown.words, last))
        for side in shown
    ]
    for n in sorted({n for side in sides for n in side.probe_ends}):
        asked = [side.probe_ends[n][0] if n in side.probe_ends else _NONE for side in sides]
        runs = [
            _NONE if side is None else side.shown.runs_to(at, n)[0]
            for side, at in zip(shown, places, strict=True)
        ]
        found |= _sharing(_all((one, None) for one in asked), _all((one, None) for one in runs))
    return found


def _facts(sides: Sequence[Told], shown: Sequence[Told | None]) -> Pairs:
    """(told, teller) where texts of the teller hold names of a unit, and enough of them, or of a
    unit's targets.
    """
    first_unit = _firsts([len(side.question.units) for side in sides])
    first_text = _firsts([len(side.unit_of_text) for side in sides])
    names = _all(
        (s.own_names[0], s.own_names[1] + f) for s, f in zip(sides, first_unit, strict=True)
    )
    words = []
    for side, first in zip(shown, first_text, strict=True):
        if side is None:
            words.append((_NONE, np.empty(0, np.int64)))
            continue
        kept = np.isin(side.shown.words, side.rare)
        words.append((side.shown.words[kept], side.shown.owner[kept] + first))
    found = _product(names, _all(words))
    if found is None:
        return {(i, j) for i in range(len(sides)) for j, side in enumerate(shown) if side}
    unit, text, count = found
    about = np.bincount(names.holder, minlength=max(1, names.n_holders))
    many = (count >= FEWEST_NAMES) & (count >= NAMES_SHARE * about[unit])
    pairs = _of_sides(unit, text, many, first_unit, first_text)
    of = np.searchsorted(first_unit, unit, side="right") - 1
    by = np.searchsorted(first_text, text, side="right") - 1
    rest = ~many & (of != by)
    return pairs | _spoken_of(sides, shown, unit[rest], text[rest], first_unit, first_text)


def _spoken_of(
    sides: Sequence[Told],
    shown: Sequence[Told | None],
    unit: I64,
    text: I64,
    first_unit: I64,
    first_text: I64,
) -> Pairs:
    """(told, teller) of which enough of these units have a target in these texts."""
    holds = np.zeros(len(unit), dtype=bool)
    for n in sorted({n for side in sides for n in side.target_keys}):
        targets = [
            (side.target_keys[n][0], side.target_keys[n][1] + first)
            if n in side.target_keys
            else (_NONE, np.empty(0, np.int64))
            for side, first in zip(sides, first_unit, strict=True)
        ]
        asked = _all(targets)
        runs = np.concatenate(
            [_NONE]
            + [
                _at(*(keys, owner + first))
                for side, first in zip(shown, first_text, strict=True)
                if side is not None
                for keys, owner in [side.shown.grams(n)]
            ]
        )
        runs.sort()
        holds |= _any_held(asked, unit, text, runs)
    of = np.searchsorted(first_unit, unit[holds], side="right") - 1
    by = np.searchsorted(first_text, text[holds], side="right") - 1
    rows = np.unique(np.stack([of, by, unit[holds]], axis=1), axis=0)
    pairs, units = np.unique(rows[:, :2], axis=0, return_counts=True)
    return {
        (i, j)
        for (i, j), count in zip(pairs.tolist(), units.tolist(), strict=True)
        if count >= fewest_spoken_of(sides[i], sides[j])
    }


def _any_held(asked: Keyed, unit: I64, text: I64, runs: U64) -> npt.NDArray[np.bool_]:
    """Whether any key of the unit is in the text, bool [rows]; `runs` is sorted, from `_at`."""
    order = np.argsort(asked.holder, kind="stable")
    keys, count = (
        asked.keys[order],
        np.bincount(asked.holder, minlength=int(unit.max(initial=0)) + 1),
    )
    start = np.cumsum(count) - count
    held = np.zeros(len(unit), dtype=bool)
    step = max(1, CHUNK // max(1, int(count.max(initial=1))))
    for first in range(0, len(unit), step):
        rows = np.arange(first, min(first + step, len(unit)))
        each = count[unit[rows]]
        row = np.repeat(rows, each)
        inside = np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
        wanted = _at(keys[start[unit[row]] + inside], text[row])
        place = np.minimum(np.searchsorted(runs, wanted), max(0, len(runs) - 1))
        if len(runs):
            held[row[runs[place] == wanted]] = True
    return held


def _at(keys: U64, holder: I64) -> U64:
    """One key for a key in its holder."""
    return mix64(keys ^ mix64(holder.astype(np.uint64)))


def _firsts(counts: Sequence[int]) -> I64:
    """The number of the first of each side's things, when all are numbered through."""
    return np.cumsum([0, *counts])[:-1].astype(np.int64)


def _of_sides(
    one: I64, other: I64, kept: npt.NDArray[np.bool_], first_one: I64, first_other: I64
) -> Pairs:
    of = np.searchsorted(first_one, one[kept], side="right") - 1
    by = np.searchsorted(first_other, other[kept], side="right") - 1
    return set(map(tuple, np.unique(np.stack([of, by], axis=1), axis=0).tolist()))
