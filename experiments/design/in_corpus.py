"""Which units the base corpora hold: their texts, or a probe with its target, token for token or
nearly so, each with its place.

A held-out unit that the base text tells of anyway makes a contrast smaller, not wrong: whether the
corpora hold a unit has nothing to do with its arm. So it is a warning, with counts; what else is
done is `decontaminate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.format import percent
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.corpora.matches import (
    FEWEST_TOKENS,
    NEAR,
    SHINGLE,
    Match,
    Sought,
    TokenReader,
    matches,
)
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.assignment import Question
from motet.experiments.design.wording import TEMPLATE_SHARE
from motet.experiments.types import Unit

I64 = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer]
PROBE_TOKENS = 40
VERSION = 2
MOST_NAMED = 3
MOST_PLACES = 100_000
"""Places that are kept of one experiment; more are counted."""
PROBE = "probe"


@dataclass(frozen=True)
class Sieve:
    """What counts as being in a corpus.

    tokens: in a row that a text and the corpus must share to be listed (Brown et al., "Language
    Models are Few-Shot Learners", 2020, appendix C, has 13 words). share: of a text's own
    5-token shingles in one run, to call its unit held. similar: the same for a stretch that is
    changed here and there; questions of one form are alike in more than half.
    """

    tokens: int = 13
    share: float = 0.5
    similar: float = 0.8


BY_DEFAULT = Sieve()


class CorpusPlace(NamedTuple):
    """Where a corpus holds a unit, or a part of it.

    how: "exact", "near" or "probe". corpus: its number in data.corpora. document: ordinal in the
    corpus, -1 where it has no documents; token: of the document. start: token of what training
    reads of the corpus. tokens: how many. share: of the text's own shingles.
    """

    unit: str
    how: str
    corpus: int
    document: int
    token: int
    start: int
    tokens: int
    share: float


@dataclass(frozen=True)
class Found:
    """What the corpora hold of one experiment.

    by_text, by_probe: ids of the held units, in order. too_short: units with nothing long enough
    to look for. unlisted: places beyond the first `MOST_PLACES`.
    """

    name: str
    places: tuple[CorpusPlace, ...]
    by_text: tuple[str, ...]
    by_probe: tuple[str, ...]
    too_short: int
    unlisted: int = 0

    @property
    def held(self) -> frozenset[str]:
        """The ids of the units that the corpora hold."""
        return frozenset(self.by_text) | frozenset(self.by_probe)


@dataclass(frozen=True)
class CorpusHits:
    """What base text holds of one experiment's units.

    texts: units that are held by their text. probes: units of which a probe with its target
    occurs. units, held_out: with either, of all and of those held out. n_units, n_held_out: how
    many there are. too_short: units with nothing long enough to look for. places: of probes.
    named: the first of the units.
    """

    name: str
    n_units: int
    n_held_out: int
    units: int
    held_out: int
    texts: int
    probes: int
    places: int
    too_short: int
    named: tuple[str, ...]

    def __str__(self) -> str:
        share = percent(self.units / max(self.n_units, 1))
        held = f"{self.held_out} of {self.n_held_out} held out"
        return (
            f"the base text holds {self.units} of the {self.n_units} units ({share}; {held}): "
            f"{self.texts} by their text, {self.probes} by a probe with its answer (first: "
            f"{', '.join(map(repr, self.named))}); the effect of showing them again can be smaller"
        )


class _Wanted(NamedTuple):
    """One text to look for: of which experiment and unit, and whether it is a probe's end."""

    experiment: int
    unit: int
    is_probe: bool
    sought: Sought


def scan(
    asked: Mapping[str, Sequence[Unit]],
    tokenizer: Tokenizer,
    corpora: Sequence[TokenReader],
    sieve: Sieve = BY_DEFAULT,
    advance: Callable[[int], None] | None = None,
) -> list[Found]:
    """Return what the corpora hold of each experiment's units, in one pass over each corpus.

    Args:
        asked: units by the name of their experiment.
        tokenizer: of the corpora.
        corpora: searched to their end.
        sieve: what counts.
        advance: called with the number of tokens of every chunk that was searched.
    """
    wanted = [
        one
        for number, units in enumerate(asked.values())
        for one in _wanted(number, units, tokenizer, sieve)
    ]
    tally = [_Tally(sieve) for _ in asked]
    for number, corpus in enumerate(corpora):
        for part in matches(corpus, [one.sought for one in wanted], advance):
            for match in part:
                one = wanted[match.text]
                unit = list(asked.values())[one.experiment][one.unit]
                tally[one.experiment].add(unit, one.is_probe, match, number, corpus)
    looked = {(one.experiment, one.unit) for one in wanted}
    return [
        each.found(name, units, sum((number, i) not in looked for i in range(len(units))))
        for number, (each, (name, units)) in enumerate(zip(tally, asked.items(), strict=True))
    ]


class _Tally:
    """Collects the places of one experiment."""

    def __init__(self, sieve: Sieve) -> None:
        self.sieve = sieve
        self.places: list[CorpusPlace] = []
        self.unlisted = 0
        self.by_text: set[str] = set()
        self.by_probe: set[str] = set()

    def add(
        self, unit: Unit, is_probe: bool, match: Match, number: int, corpus: TokenReader
    ) -> None:
        """Note one place."""
        if is_probe:
            self.by_probe.add(unit.id)
        elif match.how == NEAR or match.share >= self.sieve.share:
            self.by_text.add(unit.id)
        if len(self.places) >= MOST_PLACES:
            self.unlisted += 1
            return
        ask = getattr(corpus, "place_of", None)
        document, token = (-1, match.start) if ask is None else ask(match.start)
        how, length = PROBE if is_probe else match.how, match.stop - match.start
        share = round(match.share, 4)
        where = (number, document, token, match.start, length, share)
        self.places.append(CorpusPlace(unit.id, how, *where))

    def found(self, name: str, units: Sequence[Unit], too_short: int) -> Found:
        """What was collected."""
        by_text = tuple(unit.id for unit in units if unit.id in self.by_text)
        by_probe = tuple(unit.id for unit in units if unit.id in self.by_probe)
        return Found(name, tuple(self.places), by_text, by_probe, too_short, self.unlisted)


def _wanted(
    number: int, units: Sequence[Unit], tokenizer: Tokenizer, sieve: Sieve
) -> list[_Wanted]:
    """What to look for of one experiment.

    A text's first token is left out: after a space it is another one. What many clusters of the
    experiment have in common says nothing of any of them.
    """
    rows = _runs(units, tokenizer)
    labels = {unit.cluster or unit.id: None for unit in units}
    common = max(1, int(TEMPLATE_SHARE * len(labels)))
    clusters = [units[unit].cluster or units[unit].id for unit, _, _ in rows]
    own = _own_shingles([run for _, _, run in rows], clusters, common)
    found = []
    for (unit, is_probe, run), mask in zip(rows, own, strict=True):
        least = len(run) if is_probe else min(sieve.tokens, len(run))
        similar = None if is_probe else sieve.similar
        if mask.any():
            found.append(_Wanted(number, unit, is_probe, Sought(run, least, mask, similar)))
    return found


def _runs(units: Sequence[Unit], tokenizer: Tokenizer) -> list[tuple[int, bool, Tokens]]:
    """(unit, whether it is a probe with its answer, tokens) of every text that is long enough."""
    texts = [(i, text) for i, unit in enumerate(units) for text in unit.texts]
    probes = sorted(
        {
            (i, item.prompt + item.target)
            for i, unit in enumerate(units)
            for item in unit.items
            if (target := item.target.strip()) and any(target in text for text in unit.texts)
        }
    )
    rows: list[tuple[int, bool, Tokens]] = []
    for is_probe, part in ((False, texts), (True, probes)):
        encoded = tokenizer.encode_batch([text for _, text in part])
        for (unit, _), tokens in zip(part, encoded, strict=True):
            run = tokens[1:][-PROBE_TOKENS:] if is_probe else tokens[1:]
            if len(run) >= FEWEST_TOKENS:
                rows.append((unit, is_probe, run))
    return rows


def _own_shingles(
    runs: Sequence[Tokens], clusters: Sequence[str], common: int
) -> Iterator[npt.NDArray[np.bool_]]:
    """Which shingles of each run at most `common` clusters have; of a run that has none and is
    rare as a whole, all.
    """
    having: dict[bytes, set[str]] = {}
    whole: dict[bytes, set[str]] = {}
    for run, cluster in zip(runs, clusters, strict=True):
        whole.setdefault(run.tobytes(), set()).add(cluster)
        for shingle in _shingles(run):
            having.setdefault(shingle, set()).add(cluster)
    for run in runs:
        mask = np.array([len(having[shingle]) <= common for shingle in _shingles(run)])
        rare = len(whole[run.tobytes()]) <= common
        yield np.ones_like(mask) if rare and not mask.any() else mask


def _shingles(run: Tokens) -> Iterator[bytes]:
    data, width = np.ascontiguousarray(run).tobytes(), run.dtype.itemsize
    for at in range(0, len(data) - (SHINGLE - 1) * width, width):
        yield data[at : at + SHINGLE * width]


def hits_of(found: Found, question: Question) -> CorpusHits:
    """Count what was found by the arms of a question, whose units may be fewer than were
    searched.
    """
    treated = question.treated()
    held = [i for i, unit in enumerate(question.units) if unit.id in found.held]
    ids = {unit.id for unit in question.units}
    return CorpusHits(
        name=question.name,
        n_units=len(question.units),
        n_held_out=int((~treated).sum()),
        units=len(held),
        held_out=int((~treated[held]).sum()),
        texts=len(ids & set(found.by_text)),
        probes=len(ids & set(found.by_probe)),
        places=sum(one.how == PROBE and one.unit in ids for one in found.places),
        too_short=found.too_short,
        named=tuple(question.units[i].id for i in held[:MOST_NAMED]),
    )


def scan_key(
    asked: Mapping[str, Sequence[Unit]],
    tokenizer: Tokenizer,
    corpora: Sequence[Any],
    sieve: Sieve,
) -> str:
    """A hash of everything that the result of `scan` depends on.

    `corpora` have a fingerprint each.
    """
    units = {
        name: [
            [unit.id, unit.texts, [(item.prompt, item.target) for item in unit.items], unit.cluster]
            for unit in each
        ]
        for name, each in asked.items()
    }
    prints = [corpus.fingerprint for corpus in corpora]
    return sha256_hex(
        canonical_json([VERSION, tokenizer.sha256, prints, asdict(sieve), sorted(units.items())])
    )


def found_json(found: Sequence[Found]) -> list[dict[str, Any]]:
    """The result as JSON."""
    return [asdict(one) | {"places": [list(place) for place in one.places]} for one in found]


def found_of(rows: Sequence[dict[str, Any]]) -> list[Found]:
    """The result from its JSON."""
    return [
        Found(
            row["name"],
            tuple(CorpusPlace(*place) for place in row["places"]),
            tuple(row["by_text"]),
            tuple(row["by_probe"]),
            row["too_short"],
            row["unlisted"],
        )
        for row in rows
    ]
