"""Taking texts out of the base stream: where they lie in the slots of a run, and the base text that
goes over them.

A treated unit's text is overwritten at every place at which any slot of the run holds it, in every
epoch; a held-out unit's text stays. What goes over is i.i.d. base text of equal length that is cut
from no place of any unit. All of it is decided before training, as every exposure is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, raise_problems
from motet.experiments.corpora.matches import FEWEST_TOKENS, SHINGLE, Sought, matches
from motet.experiments.corpora.sampling import searched_tokens
from motet.experiments.corpora.tokenizer import token_dtype
from motet.experiments.design.assignment import Question
from motet.experiments.design.decontaminate import pieces_of, slots_of
from motet.experiments.design.requests import Setting, placebo_texts
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.placement import Request, Texts
from motet.experiments.stream.random import name_key

I64 = npt.NDArray[np.int64]
MOST_NAMED = 3


@dataclass(frozen=True)
class Stretches:
    """Runs of tokens in corpora: rows are (unit, corpus, [start, stop)), all int64, sorted by
    corpus and start.
    """

    unit: I64
    corpus: I64
    start: I64
    stop: I64

    def claims(self) -> dict[int, Claims]:
        """The token ranges of each corpus, by its number."""
        return {
            number: Claims(self.start[self.corpus == number], self.stop[self.corpus == number])
            for number in np.unique(self.corpus).tolist()
        }


def removal_request(question: Question, setting: Setting) -> Request:
    """Return every overwriting that the removal of the treated units asks for.

    Raises:
        UserError: units that the corpora do not hold, that the run does not read, or that lie in
            one another; or so many that no other text is found to take their place.
    """
    found = stretches(question, setting)
    pieces = pieces_of(found.claims(), setting.sequence_length)
    slot, piece = slots_of(pieces, setting)
    base = np.int64(1 << 44)
    stretch = np.searchsorted(
        found.corpus * base + found.start, pieces.corpus * base + pieces.start, side="right"
    )
    unit = found.unit[stretch - 1][piece]
    _check_read(question, unit)
    # Of treated units, by unit and then in the order of the run, numbered so.
    rows = np.flatnonzero(question.treated()[unit])
    rows = rows[np.lexsort((pieces.start[piece[rows]], slot[rows], unit[rows]))]
    unit, slot, piece = unit[rows], slot[rows], piece[rows]
    count = np.bincount(unit, minlength=len(question.units))
    repetition = np.arange(len(unit)) - np.repeat(np.cumsum(count) - count, count)
    keys, lengths = question.unit_keys(), pieces.length[piece]
    texts = placebo_texts(
        name_key(setting.seed, "removal", question.name),
        keys[unit],
        repetition,
        lengths,
        replace(setting, avoid=_with(setting.avoid, found.claims())),
    )
    return Request(
        experiment=question.name,
        unit_keys=keys,
        unit=unit.astype(np.int32),
        repetition=repetition.astype(np.int32),
        text=np.arange(len(unit), dtype=np.int32),
        first_slot=slot,
        last_slot=slot + 1,
        texts=Texts.of(list(texts), token_dtype(setting.tokenizer.vocabulary_size)),
        placebo=np.zeros(len(unit), dtype=bool),
        offset=pieces.offset[piece],
    )


def _with(one: Mapping[int, Claims], other: Mapping[int, Claims]) -> dict[int, Claims]:
    """Token ranges of either, by the number of their corpus; those that meet are one."""
    joined = {**one, **other}
    for number in one.keys() & other.keys():
        start = np.concatenate([one[number].start, other[number].start])
        stop = np.concatenate([one[number].stop, other[number].stop])
        order = np.argsort(start, kind="stable")
        start, stop = start[order], np.maximum.accumulate(stop[order])
        first = np.append(True, start[1:] > stop[:-1])
        joined[number] = Claims(start[first], stop[np.append(first[1:], True)])
    return joined


def stretches(question: Question, setting: Setting) -> Stretches:
    """Return where the corpora hold each unit's text, its first word left out.

    Raises:
        UserError: units that are nowhere, too short to look for, or that share tokens.
    """
    runs = searched_tokens(setting.tokenizer, [unit.texts[0] for unit in question.units])
    where = f"experiments.{question.name}.items"
    short = [u.id for u, run in zip(question.units, runs, strict=True) if len(run) < FEWEST_TOKENS]
    if short:
        message = f"have texts of fewer than {FEWEST_TOKENS} tokens beside their first word"
        raise_problems([Problem(where, f"{_named(short)} {message}")])
    rows: list[tuple[int, int, int, int]] = []
    sought = [
        Sought(run, len(run), np.ones(len(run) - SHINGLE + 1, dtype=bool), None) for run in runs
    ]
    for number, corpus in enumerate(setting.stream.corpora):
        for part in matches(corpus, sought):
            rows += [(number, one.start, one.stop, one.text) for one in part]
    missing = sorted(set(range(len(runs))) - {row[3] for row in rows})
    if missing:
        ids = [question.units[unit].id for unit in missing]
        message = (
            "are not in the corpora, token for token; what is removed or kept must be there "
            "(`motet data sample CORPUS` writes passages that are)"
        )
        raise_problems([Problem(where, f"{_named(ids)} {message}")])
    return _apart(sorted(rows), question, where)


def _apart(rows: Sequence[tuple[int, int, int, int]], question: Question, where: str) -> Stretches:
    """Join places of one unit that overlap; refuse those of two."""
    joined: list[list[int]] = []
    for corpus, start, stop, unit in rows:
        last = joined[-1] if joined else None
        if last and last[0] == corpus and start < last[2]:
            if last[3] != unit:
                ids = [question.units[one].id for one in (last[3], unit)]
                message = f"{_named(ids)} lie in one another; one could not be removed alone"
                raise_problems([Problem(where, message)])
            last[2] = max(stop, last[2])
        else:
            joined.append([corpus, start, stop, unit])
    table = np.array(joined, dtype=np.int64).reshape(-1, 4)
    return Stretches(table[:, 3], table[:, 0], table[:, 1], table[:, 2])


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else ""
    return f"{', '.join(map(repr, ids[:MOST_NAMED]))}{more}"


def _check_read(question: Question, read: I64) -> None:
    """Refuse units that no slot of the run holds: there is nothing to remove or to keep."""
    unread = np.setdiff1d(np.arange(len(question.units)), read)
    if len(unread):
        ids = [question.units[unit].id for unit in unread.tolist()]
        message = (
            "are in the corpora, but this run never reads them: it is shorter than an epoch. "
            "Leave them out, or lengthen the run"
        )
        raise_problems([Problem(f"experiments.{question.name}.items", f"{_named(ids)} {message}")])
