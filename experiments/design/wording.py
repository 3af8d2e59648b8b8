"""The texts and probes of one experiment as numbered words: which n-grams they hold, which of them
are its template, and which words tell one unit from another.

A *template* n-gram is one that many units share: an instruction, a fixed question, a form. It says
nothing about any one unit, so it is set aside before two experiments are compared.

Shapes: T texts, W words of all texts end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from motet.experiments.design.assignment import Question
from motet.experiments.design.words import WORD
from motet.experiments.stream.random import U64, mix64, text_keys

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TEMPLATE_SHARE = 0.1
"""An n-gram in more than this share of an experiment's clusters is its template."""
MOST_CLUSTERS = 50
"""... and so is one in more clusters than this, however many there are."""
MOST_UNITS_OF_CLUSTER = 4
"""With more on average, units are counted instead of clusters."""
CACHED_WORDS = 200_000
FEWEST_LETTERS = 3
SHINGLE_WORDS = 3
MOST_CONTEXT_WORDS, MOST_TARGET_WORDS, FEWEST_PROBE_WORDS = 24, 16, 4
FEWEST_LONE_WORDS = 6
"""A target with fewer words is looked for with the prompt before it only: chance repeats it."""


@dataclass(frozen=True)
class Wording:
    """Texts as words, end to end.

    words: uint64 [W], a key per word without regard to case. owner: int64 [W], the text of each.
    named: bool [W], written as a name or a number is. starts: int64 [T + 1].
    """

    words: U64
    owner: I64
    named: Bools
    starts: I64
    _grams: dict[int, tuple[U64, I64]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, texts: Sequence[str]) -> Wording:
        """Cut texts into words."""
        found = [WORD.findall(text) for text in texts]
        flat = [word for words in found for word in words]
        distinct = sorted(set(flat))
        number = {word: place for place, word in enumerate(distinct)}
        at = np.array([number[word] for word in flat], dtype=np.int64)
        keys = text_keys([word.casefold() for word in distinct]) if distinct else np.empty(0, "u8")
        named = np.array([is_name(word) for word in distinct], dtype=bool)
        lengths = np.array([len(words) for words in found], dtype=np.int64)
        starts = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        owner = np.repeat(np.arange(len(texts)), lengths)
        return cls(keys[at], owner, named[at], starts)

    def text(self, number: int) -> U64:
        """The words of one text."""
        return self.words[self.starts[number] : self.starts[number + 1]]

    def grams(self, n: int) -> tuple[U64, I64]:
        """(key, text) of every run of n words inside one text, uint64 and int64 [runs]."""
        if n not in self._grams:
            found = self._made(n)
            if len(self.words) > CACHED_WORDS:
                return found
            self._grams[n] = found
        return self._grams[n]

    def runs_to(self, last: I64, n: int) -> tuple[U64, I64]:
        """(key, text) of the runs of n words that end at the places `last`, as `grams` has them."""
        first = last - n + 1
        first = first[(first >= 0) & (self.owner[first] == self.owner[last])]
        keys = np.zeros(len(first), dtype=np.uint64)
        for place in range(n):
            keys = mix64(keys + self.words[first + place])
        return keys, self.owner[first]

    def _made(self, n: int) -> tuple[U64, I64]:
        count = max(len(self.words) - n + 1, 0)
        keys = np.zeros(count, dtype=np.uint64)
        for place in range(n):
            keys = mix64(keys + self.words[place : place + count])
        inside = self.owner[:count] == self.owner[n - 1 : n - 1 + count]
        return keys[inside], self.owner[:count][inside]


def is_name(word: str) -> bool:
    """Whether a word is written as names and numbers are: Ana, 1204; not amber, 7, A."""
    if len(word) < FEWEST_LETTERS:
        return False
    return word[0].isupper() or (any(c.isdigit() for c in word) and len(word) > FEWEST_LETTERS)


@dataclass(frozen=True)
class Probe:
    """One probe item of a unit: its words are text `prompt` and `target` of the wording."""

    unit: int
    prompt: int
    target: int


class Told:
    """One experiment as words: what it shows, what it asks, and what is peculiar to its units.

    Args:
        question: with its units in clusters.
        least: the clusters that anything may be in and still be peculiar to a unit, however few
            clusters there are; 2 where an experiment is held against itself.

    Attributes:
        shown: the texts that exposures may show.
        unit_of_text, number_of_text: int64 [shown texts], whose text it is, and which of its texts.
        told: everything that belongs to a unit, its texts and its probes.
        unit_of_told: int64 [told texts].
    """

    def __init__(self, question: Question, least: int = 1) -> None:
        self.question = question
        self.least = least
        units = question.units
        clusters = question.design.n_clusters
        # A few large clusters (all units of one form) cannot say what is peculiar to a unit.
        alone = clusters * MOST_UNITS_OF_CLUSTER < len(units)
        self.group_of_unit = np.arange(len(units)) if alone else question.design.cluster_of_unit
        self.n_groups = len(units) if alone else clusters
        cycled = any(arm.variants == "cycle" and arm.dose > 0 for arm in question.spec.arms)
        pairs = [
            (unit, number)
            for unit, each in enumerate(units)
            for number in range(len(each.texts) if cycled else 1)
        ]
        self.unit_of_text = np.array([unit for unit, _ in pairs], dtype=np.int64)
        self.number_of_text = np.array([number for _, number in pairs], dtype=np.int64)
        self._holding: dict[int, tuple[U64, I64]] = {}
        self.shown = Wording.of([units[unit].texts[number] for unit, number in pairs])
        self._listed()

    @property
    def invented(self) -> bool:
        """Whether the items were drawn from the experiment's own key and not read from a file."""
        return self.question.spec.items is None

    def _listed(self) -> None:
        """Number the texts, prompts and targets of all units, each once a unit."""
        texts: list[str] = []
        owners: list[int] = []
        probes: dict[Probe, None] = {}
        for unit, each in enumerate(self.question.units):
            place: dict[str, int] = {}
            wanted = [*each.texts, *(t for item in each.items for t in (item.prompt, item.target))]
            for text in wanted:
                if text not in place:
                    place[text] = len(texts)
                    texts.append(text)
                    owners.append(unit)
            for item in each.items:
                probes[Probe(unit, place[item.prompt], place[item.target])] = None
        self.probes = list(probes)
        self.told = Wording.of(texts)
        self.unit_of_told = np.array(owners, dtype=np.int64)

    @cached_property
    def limit(self) -> int:
        """The most clusters that an n-gram may be in and still tell units apart."""
        share = int(TEMPLATE_SHARE * self.n_groups)
        return min(MOST_CLUSTERS, max(self.least, share))

    def spread(self, keys: U64, units: I64) -> tuple[U64, I64]:
        """(distinct key, in how many clusters it is) of n-grams and the units that hold them."""
        distinct, number = np.unique(keys, return_inverse=True)
        pairs = np.unique(number * np.int64(self.n_groups) + self.group_of_unit[units])
        count = np.bincount(pairs // self.n_groups, minlength=len(distinct))
        return distinct, count

    def n_holding(self, n: int, key: int) -> int:
        """In how many clusters' shown texts a run of n words is."""
        if n not in self._holding:
            keys, text = self.shown.grams(n)
            self._holding[n] = self.spread(keys, self.unit_of_text[text])
        distinct, count = self._holding[n]
        place = int(np.searchsorted(distinct, np.uint64(key)))
        return int(count[place]) if place < len(distinct) and distinct[place] == key else 0

    @cached_property
    def names(self) -> tuple[U64, I64]:
        """(word, clusters) of the words that are only ever written as names and numbers are; where
        nothing is written in capitals, of those that one cluster alone has.
        """
        told = self.told
        distinct, count = self.spread(told.words, self.unit_of_told[told.owner])
        plain = np.unique(told.words[~told.named])
        names = ~np.isin(distinct, plain, assume_unique=True)
        if not (count[names] <= self.limit).any():
            names = count == 1
        return distinct[names], count[names]

    @cached_property
    def rare(self) -> U64:
        """The words of shown texts that few clusters hold, however they are written."""
        words, count = self.spread(self.shown.words, self.unit_of_text[self.shown.owner])
        return words[count <= self.limit]

    @cached_property
    def shingles(self) -> tuple[U64, I64]:
        """(shingle, shown text) of those that tell units apart, each once a text."""
        keys, text = self.shown.grams(SHINGLE_WORDS)
        distinct, count = self.spread(keys, self.unit_of_text[text])
        kept = np.isin(keys, distinct[count <= self.limit])
        return each_once(keys[kept], text[kept])

    @cached_property
    def own_names(self) -> tuple[U64, I64]:
        """(name, unit) of the names that few clusters hold, each once a unit."""
        names, count = self.names
        kept = np.isin(self.told.words, names[count <= self.limit])
        return each_once(self.told.words[kept], self.unit_of_told[self.told.owner[kept]])

    @cached_property
    def probe_ends(self) -> dict[int, tuple[U64, I64]]:
        """{n: (key, unit)} of the last words of prompts with their targets, n words in all, that
        few clusters have in common; `Answer: yes` may be many units' end.
        """
        starts = self.told.starts
        prompt = np.array([probe.prompt for probe in self.probes], dtype=np.int64)
        target = np.array([probe.target for probe in self.probes], dtype=np.int64)
        unit = np.array([probe.unit for probe in self.probes], dtype=np.int64)
        before = np.minimum(starts[prompt + 1] - starts[prompt], MOST_CONTEXT_WORDS)
        after = np.minimum(starts[target + 1] - starts[target], MOST_TARGET_WORDS)
        found: dict[int, list[tuple[U64, I64]]] = {}
        for a, b in np.unique(np.stack([before, after], axis=1), axis=0).tolist():
            rows = np.flatnonzero((before == a) & (after == b))
            first, last = starts[prompt[rows] + 1] - a, starts[target[rows]]
            keys = self._run([first + i for i in range(a)] + [last + i for i in range(b)])
            if a and b and a + b >= FEWEST_PROBE_WORDS:
                found.setdefault(a + b, []).append(self._peculiar(keys, unit[rows]))
            if b >= FEWEST_LONE_WORDS:
                keys = self._run([last + i for i in range(b)])
                own = self._in_own_texts(keys, unit[rows], b)
                found.setdefault(b, []).append(self._peculiar(keys[own], unit[rows][own]))
        return {
            n: (np.concatenate([k for k, _ in parts]), np.concatenate([u for _, u in parts]))
            for n, parts in found.items()
        }

    @cached_property
    def whole_texts(self) -> U64:
        """A key for each distinct shown text, of all its words in their order."""
        starts, words = self.shown.starts, self.shown.words
        keys = np.zeros(len(starts) - 1, dtype=np.uint64)
        left = np.diff(starts)
        for place in range(int(left.max(initial=0))):
            rows = np.flatnonzero(left > place)
            keys[rows] = mix64(keys[rows] + words[starts[rows] + place])
        return np.unique(keys[left > 0])

    @cached_property
    def target_keys(self) -> dict[int, tuple[U64, I64]]:
        """{n: (key, unit)} of all targets of n words."""
        starts = self.told.starts
        target = np.array([probe.target for probe in self.probes], dtype=np.int64)
        unit = np.array([probe.unit for probe in self.probes], dtype=np.int64)
        length, found = starts[target + 1] - starts[target], {}
        for n in np.unique(length[length > 0]).tolist():
            first = starts[target[length == n]]
            keys = self._run([first + place for place in range(n)])
            found[n] = each_once(keys, unit[length == n])
        return found

    @cached_property
    def last_words(self) -> U64:
        """The words that any run of `probe_ends` ends with."""
        starts = self.told.starts
        target = np.array([probe.target for probe in self.probes], dtype=np.int64)
        length = np.minimum(starts[target + 1] - starts[target], MOST_TARGET_WORDS)
        return np.unique(self.told.words[(starts[target] + length - 1)[length > 0]])

    def _run(self, places: list[I64]) -> U64:
        """The keys of runs whose first words are at places[0], their second at places[1], ..."""
        keys = np.zeros(len(places[0]) if places else 0, dtype=np.uint64)
        for place in places:
            keys = mix64(keys + self.told.words[place])
        return keys

    def _peculiar(self, keys: U64, units: I64) -> tuple[U64, I64]:
        """Those (key, unit) whose key few clusters have."""
        distinct, count = self.spread(keys, units)
        kept = np.isin(keys, distinct[count <= self.limit])
        return keys[kept], units[kept]

    def _in_own_texts(self, keys: U64, units: I64, n: int) -> Bools:
        """Whether the n words of each key are in a text that its own unit shows."""
        shown, text = self.shown.grams(n)
        own = mix64(shown ^ self.unit_of_text[text].astype(np.uint64))
        return np.isin(mix64(keys ^ units.astype(np.uint64)), own)

    @cached_property
    def targets(self) -> list[list[U64]]:
        """The words of every target, each once, by unit."""
        found: list[dict[bytes, U64]] = [{} for _ in self.question.units]
        for probe in self.probes:
            words = self.told.text(probe.target)
            found[probe.unit][words.tobytes()] = words
        return [list(words.values()) for words in found]


def each_once(keys: U64, rows: I64) -> tuple[U64, I64]:
    """Distinct (key, row) pairs, in the order of rows, then keys."""
    order = np.lexsort((keys, rows))
    keys, rows = keys[order], rows[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
    return keys[first], rows[first]
