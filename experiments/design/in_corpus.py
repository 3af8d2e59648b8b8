"""Which units the base corpora hold: their texts, or a probe with its target, token for token.

A held-out unit that the base text tells of anyway makes a contrast smaller, not wrong: whether the
corpora hold a unit has nothing to do with its arm. So it is a warning, with counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.format import percent
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.corpora.occurrences import ANCHOR, TokenReader, occurrences
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.assignment import Question
from motet.experiments.design.wording import TEMPLATE_SHARE

I64 = npt.NDArray[np.int64]
PIECE_TOKENS = 13
"""Texts are looked for in pieces of this many tokens (Brown et al., "Language Models are Few-Shot
Learners", 2020, appendix C, has 13 words)."""
PROBE_TOKENS = 40
PIECES_SHARE = 0.5
VERSION = 1
MOST_NAMED = 3


@dataclass(frozen=True)
class CorpusHits:
    """What base text holds of one experiment's units.

    texts: units of whose texts at least half of the pieces occur. probes: units of which a probe
    with its target occurs. units, held_out: with either, of all and of those held out. n_units,
    n_held_out: how many there are. too_short: units with nothing long enough to look for. places:
    of probes. named: the first of the units.
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


@dataclass(frozen=True)
class Wanted:
    """The runs of tokens to look for: whose unit each is, and whether it is a probe's end."""

    question: Question
    runs: list[npt.NDArray[np.integer]]
    unit: I64
    is_probe: npt.NDArray[np.bool_]


def wanted(question: Question, tokenizer: Tokenizer) -> Wanted:
    """Return what to look for of one experiment.

    A text's first token is left out: after a space it is another one. So is what many units of
    the experiment have in common.
    """
    texts = [(number, text) for number, unit in enumerate(question.units) for text in unit.texts]
    probes = sorted(
        {
            (number, item.prompt + item.target)
            for number, unit in enumerate(question.units)
            for item in unit.items
            if (target := item.target.strip()) and any(target in text for text in unit.texts)
        }
    )
    found: dict[bytes, list[tuple[int, bool, npt.NDArray[np.integer]]]] = {}
    for is_probe, rows in ((False, texts), (True, probes)):
        encoded = tokenizer.encode_batch([text for _, text in rows])
        for (unit, _), tokens in zip(rows, encoded, strict=True):
            for run in [tokens[1:][-PROBE_TOKENS:]] if is_probe else _pieces(tokens[1:]):
                if len(run) >= ANCHOR:
                    found.setdefault(run.tobytes(), []).append((unit, is_probe, run))
    common = max(1, int(TEMPLATE_SHARE * len(question.units)))
    kept = [
        row
        for rows in found.values()
        if len({unit for unit, _, _ in rows}) <= common
        for row in rows
    ]
    return Wanted(
        question,
        [run for _, _, run in kept],
        np.array([unit for unit, _, _ in kept], dtype=np.int64),
        np.array([is_probe for _, is_probe, _ in kept], dtype=bool),
    )


def _pieces(tokens: npt.NDArray[np.integer]) -> list[npt.NDArray[np.integer]]:
    """Pieces of `PIECE_TOKENS` end to end; a shorter text is one piece."""
    whole = len(tokens) // PIECE_TOKENS
    if not whole:
        return [tokens]
    return [tokens[PIECE_TOKENS * i : PIECE_TOKENS * (i + 1)] for i in range(whole)]


def hits_in(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    corpora: Sequence[TokenReader],
    advance: Callable[[int], None] | None = None,
) -> list[CorpusHits]:
    """Return what the corpora hold of each experiment, in one pass over each corpus.

    Args:
        questions: with their units assigned.
        tokenizer: of the corpora.
        corpora: searched to their end.
        advance: called with the number of tokens of every chunk that was searched.
    """
    asked = [wanted(question, tokenizer) for question in questions]
    runs = [run for each in asked for run in each.runs]
    counts = np.zeros(len(runs), dtype=np.int64)
    for corpus in corpora:
        counts += occurrences(corpus, runs, advance)
    ends = np.cumsum([len(each.runs) for each in asked])
    parts = np.split(counts, ends[:-1]) if asked else []
    return [_hits(each, part) for each, part in zip(asked, parts, strict=True)]


def _hits(asked: Wanted, counts: I64) -> CorpusHits:
    question = asked.question
    n_units = len(question.units)
    text = ~asked.is_probe
    pieces = np.bincount(asked.unit[text], minlength=n_units)
    there = np.bincount(asked.unit[text], weights=counts[text] > 0, minlength=n_units)
    by_text = (pieces > 0) & (there >= PIECES_SHARE * pieces)
    by_probe = np.zeros(n_units, dtype=bool)
    by_probe[asked.unit[asked.is_probe & (counts > 0)]] = True
    held_out, any_way = ~question.treated(), by_text | by_probe
    looked = np.zeros(n_units, dtype=bool)
    looked[asked.unit] = True
    return CorpusHits(
        name=question.name,
        n_units=n_units,
        n_held_out=int(held_out.sum()),
        units=int(any_way.sum()),
        held_out=int((any_way & held_out).sum()),
        texts=int(by_text.sum()),
        probes=int(by_probe.sum()),
        places=int(counts[asked.is_probe].sum()),
        too_short=int((~looked).sum()),
        named=tuple(question.units[i].id for i in np.flatnonzero(any_way)[:MOST_NAMED].tolist()),
    )


def scan_key(questions: Sequence[Question], tokenizer: Tokenizer, corpora: Sequence[Any]) -> str:
    """A hash of everything that the result of `hits_in` depends on.

    `corpora` have a fingerprint each.
    """
    asked = [
        {
            "name": question.name,
            "treated": question.treated().tolist(),
            "clusters": question.design.cluster_of_unit.tolist(),
            "units": [
                [unit.id, unit.texts, [(item.prompt, item.target) for item in unit.items]]
                for unit in question.units
            ],
        }
        for question in questions
    ]
    prints = [corpus.fingerprint for corpus in corpora]
    return sha256_hex(canonical_json([VERSION, tokenizer.sha256, prints, asked]))


def hits_json(found: Sequence[CorpusHits]) -> list[dict[str, Any]]:
    """The result as JSON."""
    return [asdict(hits) for hits in found]


def hits_of(rows: Sequence[dict[str, Any]]) -> list[CorpusHits]:
    """The result from its JSON."""
    return [CorpusHits(**{**row, "named": tuple(row["named"])}) for row in rows]
