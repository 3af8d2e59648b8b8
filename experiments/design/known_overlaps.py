"""What experiments tell of each other's units, looked for once: it depends on their texts alone, so
`check`, a run's making and all of its reports ask the user's cache first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from motet.core.cache import cache_file, recall, remember
from motet.core.hashing import canonical_json, sha256_file, sha256_hex
from motet.experiments.design.assignment import Question
from motet.experiments.design.overlap import HOW, Overlap, Telling, find_overlaps

FEWEST_UNITS = 500
"""Fewer are searched sooner than a file is worth."""
SOURCES = ("overlap.py", "in_common.py", "wording.py", "words.py")


def known_overlaps(questions: Sequence[Question]) -> list[Overlap]:
    """Return `find_overlaps` of these questions, from the user's cache where it is there."""
    if sum(len(question.units) for question in questions) < FEWEST_UNITS:
        return find_overlaps(questions)
    file = cache_file("overlaps", overlap_key(questions))
    with contextlib.suppress(TypeError, ValueError, KeyError):  # damaged
        if isinstance(kept := recall(file), list):
            return [_overlap(row, questions) for row in kept]
    found = find_overlaps(questions)
    remember(file, [_row(overlap) for overlap in found])
    return found


def overlap_key(questions: Sequence[Question]) -> str:
    """A hash of everything that the result depends on, the code that searches included."""
    code = [sha256_file(Path(__file__).with_name(name)) for name in SOURCES]
    return sha256_hex(canonical_json([code, [_texts(question) for question in questions]]))


def _texts(question: Question) -> list[Any]:
    shown = [[arm.dose > 0, arm.variants] for arm in question.spec.arms]
    units = [
        [unit.texts, [(item.prompt, item.target) for item in unit.items]] for unit in question.units
    ]
    groups = question.design.cluster_of_unit.tolist()
    return [question.name, question.experiment.inserts_units, shown, groups, units]


def _row(overlap: Overlap) -> dict[str, Any]:
    links = [[one.unit, one.teller, one.text, HOW.index(one.how)] for one in overlap.links]
    return {"told": overlap.told, "teller": overlap.teller, "links": links}


def _overlap(row: dict[str, Any], questions: Sequence[Question]) -> Overlap:
    """An overlap from its row; ValueError where it does not fit the questions."""
    sizes = {question.name: len(question.units) for question in questions}
    told, teller = sizes[row["told"]], sizes[row["teller"]]
    links = tuple(Telling(u, t, text, HOW[how]) for u, t, text, how in row["links"])
    if any(not (0 <= one.unit < told and 0 <= one.teller < teller) for one in links):
        raise ValueError("a kept link names a unit that there is not")
    return Overlap(row["told"], row["teller"], links)
