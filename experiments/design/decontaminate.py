"""What is done about units that the base corpora hold: decided before units are assigned, from
texts and corpora alone, and frozen with the study.

* report: nothing; the warnings say how many they are.
* exclude: they and their clusters leave the study. No arm and no score is known then, so that the
  comparison stays a randomized one, of fewer units.
* replace: the base text at every place is overlaid by other base text, as rows of the exposure plan
  that belong to the reserved experiment `decontaminate`: ledger and audit see them as they see all
  exposures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.corpora.tokenizer import token_dtype
from motet.experiments.design.in_corpus import BY_DEFAULT, CorpusPlace, Found, Sieve, found_json
from motet.experiments.design.requests import Setting, placebo_texts
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.placement import Placed, Request, Texts
from motet.experiments.stream.random import name_key, text_keys
from motet.experiments.types import Unit

I64 = npt.NDArray[np.int64]
POLICIES = ("report", "exclude", "replace")
RESERVED = "decontaminate"
SLOTS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Decision:
    """What is done about units that the corpora hold.

    Attributes:
        policy: one of POLICIES.
        sieve: what counts as held.
        found: by experiment; empty where nothing was searched.
        excluded: ids of the units that leave, by experiment.
        avoid: token ranges of each corpus that nothing is taken from, by its number.
    """

    policy: str = "report"
    sieve: Sieve = BY_DEFAULT
    found: tuple[Found, ...] = ()
    excluded: Mapping[str, frozenset[str]] = field(default_factory=dict)
    avoid: Mapping[int, Claims] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What the frozen definition says of it."""
        held = {one.name: sorted(one.held) for one in self.found if one.held}
        return {
            "policy": self.policy,
            **asdict(self.sieve),
            "held": held,
            "excluded": {name: sorted(ids) for name, ids in self.excluded.items() if ids},
            "places": sum(len(one.places) for one in self.found),
            "places_sha256": sha256_hex(canonical_json(found_json(self.found))),
        }


NOTHING = Decision()


def decide(
    policy: str, sieve: Sieve, asked: Mapping[str, Sequence[Unit]], found: Sequence[Found]
) -> tuple[Decision, list[Problem]]:
    """Return what is done, and why it cannot be.

    Args:
        policy: one of POLICIES.
        sieve: that the search was made with.
        asked: units by the name of their experiment.
        found: what the corpora hold of them.
    """
    problems: list[Problem] = []
    excluded, avoid = {}, {}
    if policy == "exclude":
        excluded = {one.name: with_clusters(asked[one.name], one.held) for one in found}
        problems = [
            Problem(
                f"experiments.{name}",
                f"has no unit that the base text does not hold ({len(ids)} leave by "
                "experiments.decontaminate.policy=exclude); use other items, or policy: replace",
            )
            for name, ids in excluded.items()
            if len(ids) == len(asked[name])
        ]
    if policy == "replace":
        unlisted = {one.name: one.unlisted for one in found if one.unlisted}
        problems = [
            Problem(
                "experiments.decontaminate.policy",
                f"is replace, but base text has {count:,} more places of {name} than are kept; "
                "use exclude, or a larger experiments.decontaminate.tokens",
            )
            for name, count in unlisted.items()
        ]
        avoid = merged([place for one in found for place in one.places])
    return Decision(policy, sieve, tuple(found), excluded, avoid), problems


def with_clusters(units: Sequence[Unit], held: frozenset[str]) -> frozenset[str]:
    """The held units and all that would move together with one of them."""
    clusters = {unit.cluster or unit.id for unit in units if unit.id in held}
    return frozenset(unit.id for unit in units if (unit.cluster or unit.id) in clusters)


def merged(places: Sequence[CorpusPlace]) -> dict[int, Claims]:
    """The token ranges of each corpus, by its number; those that touch are one."""
    found = {}
    for number in sorted({place.corpus for place in places}):
        ranges = sorted(
            (one.start, one.start + one.tokens) for one in places if one.corpus == number
        )
        kept: list[list[int]] = []
        for start, stop in ranges:
            if kept and start <= kept[-1][1]:
                kept[-1][1] = max(kept[-1][1], stop)
            else:
                kept.append([start, stop])
        columns = np.array(kept, dtype=np.int64).T
        found[number] = Claims(columns[0], columns[1])
    return found


@dataclass(frozen=True)
class Fixed:
    """Exposures whose places are not drawn: what they are, where, and the names of their units."""

    request: Request
    placed: Placed
    names: tuple[str, ...]


def overlays(decision: Decision, setting: Setting) -> Fixed | None:
    """Return the rows that replace the base text of every place, in every slot of the run that
    reads one; None where there is nothing to replace.

    Each row is of one sequence: a place that two sequences share becomes two. Its text is other
    base text of the same length, with end-of-document tokens at its ends, as a placebo is.
    """
    pieces = pieces_of(decision.avoid, setting.sequence_length)
    slot, piece = slots_of(pieces, setting)
    if not len(slot):
        return None
    order = np.lexsort((piece, slot))
    slot, piece = slot[order], piece[order]
    used, unit = np.unique(piece, return_inverse=True)
    by_unit = np.argsort(unit, kind="stable")
    repetition = np.empty(len(unit), dtype=np.int64)
    count = np.bincount(unit)
    repetition[by_unit] = np.arange(len(unit)) - np.repeat(np.cumsum(count) - count, count)
    names = [f"{pieces.corpus[i]}:{pieces.start[i]}+{pieces.length[i]}" for i in used.tolist()]
    keys = text_keys(names)
    lengths = pieces.length[piece]
    key = name_key(setting.seed, "placebo", RESERVED)
    texts = placebo_texts(key, keys[unit], repetition, lengths, setting)
    request = Request(
        experiment=RESERVED,
        unit_keys=keys,
        unit=unit.astype(np.int32),
        repetition=repetition.astype(np.int32),
        text=np.arange(len(unit), dtype=np.int32),
        first_slot=slot,
        last_slot=slot + 1,
        texts=Texts.of(list(texts), token_dtype(setting.tokenizer.vocabulary_size)),
        placebo=np.ones(len(unit), dtype=bool),
    )
    offset = pieces.offset[piece]
    start = slot * setting.sequence_length + offset
    claims = Claims.none().add(start, start + lengths)
    return Fixed(request, Placed(slot, offset, claims), tuple(names))


@dataclass(frozen=True)
class Pieces:
    """Parts of places inside one sequence each: columns, int64 [pieces]."""

    corpus: I64
    start: I64
    sequence: I64
    offset: I64
    length: I64


def pieces_of(avoid: Mapping[int, Claims], sequence_length: int) -> Pieces:
    rows = []
    for corpus, claims in avoid.items():
        for first, last in zip(claims.start.tolist(), claims.stop.tolist(), strict=True):
            at = first
            while at < last:
                sequence, offset = divmod(at, sequence_length)
                stop = min(last, (sequence + 1) * sequence_length)
                rows.append((corpus, at, sequence, offset, stop - at))
                at = stop
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return Pieces(*columns)


def slots_of(pieces: Pieces, setting: Setting) -> tuple[I64, I64]:
    """(slot, piece) of every time that the run reads a piece."""
    end = setting.steps.slots_before(setting.steps_total)
    slots, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for first in range(0, end if len(pieces.start) else 0, SLOTS_AT_ONCE):
        part = np.arange(first, min(first + SLOTS_AT_ONCE, end), dtype=np.int64)
        corpus, _, sequence = setting.stream.locate(part)
        for number in np.unique(pieces.corpus).tolist():
            mine = np.flatnonzero(pieces.corpus == number)
            wanted = pieces.sequence[mine]  # ascending
            here = np.flatnonzero((corpus == number) & np.isin(sequence, wanted))
            low = np.searchsorted(wanted, sequence[here], side="left")
            count = np.searchsorted(wanted, sequence[here], side="right") - low
            inner = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            slots.append(part[np.repeat(here, count)])
            found.append(mine[np.repeat(low, count) + inner])
    return np.concatenate(slots), np.concatenate(found)
