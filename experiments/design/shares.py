"""Experiments that show each other's units: refused, unless an entry declares it.

A declaration names the other experiment in `shares_units_with`, in either of the two entries: the
later one can then be added to a run whose earlier ones are frozen. The two assignments are drawn
apart from each other, so each comparison stays a randomized one; what it estimates is the effect
averaged over the arms of the other. A control shares nothing, declared or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, suggest
from motet.experiments.design.assignment import Question
from motet.experiments.design.known_overlaps import known_overlaps
from motet.experiments.design.overlap import Overlap, Telling
from motet.experiments.design.spec import ExperimentSpec
from motet.experiments.design.wording import is_name
from motet.experiments.design.words import WORD
from motet.experiments.stream.placement import Request

I64 = npt.NDArray[np.int64]

MOST_WORDS_SHOWN = 12
IN_WORDS = {
    "equal": "the same text",
    "near": "nearly the same text",
    "probe": "its probe with the answer",
    "facts": "its facts in other words",
}


def declaration_problems(specs: Sequence[ExperimentSpec]) -> list[Problem]:
    """Return what is wrong with `shares_units_with`: names of no other question of the run."""
    role = {spec.name: spec.role for spec in specs}
    problems = []
    for spec in specs:
        where = f"experiments.{spec.name}.shares_units_with"
        if spec.shares_units_with and spec.role != "question":
            message = "is set, but a control shares its units with nothing; remove it"
            problems.append(Problem(where, message))
            continue
        for name in spec.shares_units_with or ():
            if name == spec.name:
                problems.append(Problem(where, f"has {name!r}, the experiment itself"))
            elif name not in role:
                others = [other for other in role if other != spec.name]
                known = ", ".join(others) or "none"
                hint = suggest(name, others) or f"; the other experiments are: {known}"
                problems.append(Problem(where, f"has {name!r}, which is no experiment{hint}"))
            elif role[name] != "question":
                problems.append(Problem(where, f"has {name!r}, a control; it must share nothing"))
    return problems


def declared(one: ExperimentSpec, other: ExperimentSpec) -> bool:
    """Whether either of two entries says that they share units."""
    return other.name in (one.shares_units_with or ()) or one.name in (
        other.shares_units_with or ()
    )


def sharing_problems(questions: Sequence[Question], requests: Sequence[Request]) -> list[Problem]:
    """Return the pairs of experiments that show each other's units without saying so.

    Args:
        questions: in the order in which they are named.
        requests: the exposures of each.
    """
    by_name = {question.name: question for question in questions}
    asked = {request.experiment: request for request in requests}
    pairs: dict[frozenset[str], list[Overlap]] = {}
    for overlap in known_overlaps(questions):
        if not declared(by_name[overlap.told].spec, by_name[overlap.teller].spec):
            pairs.setdefault(frozenset((overlap.told, overlap.teller)), []).append(overlap)
    return [_undeclared(overlaps, by_name, asked) for overlaps in pairs.values()]


def _undeclared(
    overlaps: Sequence[Overlap], questions: Mapping[str, Question], requests: Mapping[str, Request]
) -> Problem:
    """One pair that shares units, with what would work."""
    names = [overlaps[0].told, overlaps[0].teller]
    later = max(names, key=list(questions).index)
    first = min(names, key=list(questions).index)
    told = "; ".join(
        telling(overlap, questions, shown_by(overlap, questions, requests)) for overlap in overlaps
    )
    remedy = "take other items, or leave one of the two out"
    if all(questions[name].experiment.role == "question" for name in names):
        remedy += (
            f"; or declare it with shares_units_with: [{first}], and each effect is averaged over "
            "the arms of the other"
        )
    else:
        remedy += ": nothing of a control may be shown by another experiment"
    return Problem(f"experiments.{later}.shares_units_with", f"is not set, but {told}; {remedy}")


def telling(overlap: Overlap, questions: Mapping[str, Question], shown: I64) -> str:
    """What one experiment's texts tell of another's units, in words, with the first as example.

    Args:
        overlap: who tells of whom.
        questions: by name.
        shown: int64 [U], exposures of such texts by unit that is told of.
    """
    told, teller = questions[overlap.told], questions[overlap.teller]
    link = overlap.links[0]
    unit, other = told.units[link.unit], teller.units[link.teller]
    words = " ".join(shared_words(told, teller, link))
    return (
        f"{overlap.teller} tells of {len(overlap.units)} of the {len(told.units)} units of "
        f"{overlap.told} (unit {other.id!r} holds of {unit.id!r} {IN_WORDS[link.how]}: "
        f"{words!r}), {shown_text(~told.treated(), shown)}"
    )


def shown_text(held_out_U: npt.NDArray[np.bool_], shown_U: I64) -> str:
    """What exposures of another experiment would do, in words.

    Args:
        held_out_U: bool [U], the units of dose 0.
        shown_U: int64 [U], how often the other's texts would show each.
    """
    held, n_held = held_out_U & (shown_U > 0), int(held_out_U.sum())
    if held.any():
        units = f"{int(held.sum())} of its {n_held} held-out units"
        return f"so that {units} would be shown {_times(int(shown_U[held].sum()))}"
    if shown_U.any():
        more = f"{int((shown_U > 0).sum())} of its treated units would be shown "
        more += f"{_times(int(shown_U.sum()))} beyond their dose"
        return f"so that {more} (no held-out unit, as the arms were drawn)"
    return "which no exposure shows as the arms were drawn, but another seed may"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def shared_words(told: Question, teller: Question, link: Telling) -> list[str]:
    """Words that a unit has in common with the text that tells of it: the longest run, or names."""
    unit = told.units[link.unit]
    spoken = WORD.findall(teller.units[link.teller].texts[link.text])
    own = [*unit.texts, *(f"{item.prompt} {item.target}" for item in unit.items)]
    if link.how == "facts":
        both = {word.casefold() for word in spoken}
        about = dict.fromkeys(word for text in own for word in WORD.findall(text))
        found = [word for word in about if word.casefold() in both]
        return [word for word in found if is_name(word)][:MOST_WORDS_SHOWN] or found[-3:]
    there = [word.casefold() for word in spoken]
    best: list[str] = []
    for text in own:
        here = [word.casefold() for word in WORD.findall(text)]
        run = SequenceMatcher(None, here, there, autojunk=False).find_longest_match()
        if run.size > len(best):
            best = spoken[run.b : run.b + run.size]
    return best[:MOST_WORDS_SHOWN]


def shown_by(
    overlap: Overlap, questions: Mapping[str, Question], requests: Mapping[str, Request]
) -> I64:
    """Planned exposures of texts that tell of each unit, int64 [U]."""
    request = requests[overlap.teller]
    rows = ~request.placebo
    once = np.ones(int(rows.sum()), dtype=np.int64)
    unit, repetition = request.unit[rows], request.repetition[rows]
    told, teller = questions[overlap.told], questions[overlap.teller]
    return exposures_of(overlap.links, len(told.units), teller, unit, repetition, once)


def exposures_of(
    links: Sequence[Telling],
    n_units: int,
    teller: Question,
    unit: npt.NDArray[np.integer],
    repetition: npt.NDArray[np.integer],
    times: I64,
) -> I64:
    """How often the teller's exposures told of each of `n_units` units, int64 [n_units].

    Args:
        links: of the units that are told of.
        teller: whose exposures they are.
        unit, repetition: of each of its exposures, no placebos, int [rows].
        times: int64 [rows], how often it was consumed.
    """
    n_texts = np.array([len(each.texts) for each in teller.units], dtype=np.int64)
    cycled = np.array([arm.variants == "cycle" for arm in teller.spec.arms])[teller.arms]
    number = np.where(cycled[unit], repetition % n_texts[unit], 0)
    shown = np.zeros((len(teller.units), int(n_texts.max(initial=1))), dtype=np.int64)
    np.add.at(shown, (unit, number), times)
    total = np.zeros(n_units, dtype=np.int64)
    for link in links:
        total[link.unit] += shown[link.teller, link.text]
    return total
