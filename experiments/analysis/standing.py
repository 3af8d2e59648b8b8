"""What a verdict is worth at the moment of the report: the frozen judgement, an interim look, or an
exploratory figure.

Looking again and again and stopping at the first small p finds 13 to 21 % of nothing (8 looks at
.05), so a verdict is given at the step that was frozen and at no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from motet.experiments.analysis.members import of_member
from motet.experiments.analysis.verdict import estimate_text

Answers = dict[str, Any]
LABELS = {"interim": "Interim", "exploratory": "Exploratory"}
COMPARED = ("effect", "low", "high", "p", "p_corrected", "n")
CLOSE = 1e-6


def entries_of(answers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every entry of an `answers` part: questions, then controls."""
    controls = [control for control in answers["controls"].values() if control is not None]
    return [*answers["experiments"], *controls]


def without_verdicts(answers: Answers, kind: str, why: str) -> Answers:
    """Return answers whose figures are shown and judge nothing.

    Args:
        answers: as `analyze` gives them.
        kind: "interim" or "exploratory".
        why: ends the sentence `Interim, no verdict: ...`.
    """
    over = answers["multiplicity"]["questions"]
    questions = [_unjudged(entry, kind, why, over) for entry in answers["experiments"]]
    controls = {
        name: None if control is None else _unjudged(control, kind, why, 1)
        for name, control in answers["controls"].items()
    }
    for control in controls.values():
        if control is not None:
            control |= {"ok": None, "sentence": control["verdict"]["sentence"]}
            if "by_member" in control:
                control["by_member"] = [row | {"ok": None} for row in control["by_member"]]
    return answers | {"experiments": questions, "controls": controls}


def _unjudged(entry: Mapping[str, Any], kind: str, why: str, over: int) -> dict[str, Any]:
    where = of_member(entry.get("member")) if "members" in entry else ""
    found = estimate_text(entry["primary"], over, where)
    sentence = f"{LABELS[kind]}: {found}. No verdict: {why}."
    unjudged = {**entry, "verdict": {"kind": kind, "sentence": sentence}}
    if slope := entry.get("size_slope"):
        told = f"{LABELS[kind]}: {estimate_text(slope, over, '')}. No verdict: {why}."
        unjudged["size_slope"] = {**slope, "verdict": {"kind": kind, "sentence": told}}
    return unjudged


def add_exploratory(answers: Answers, other: Answers, step: int | None, why: str) -> Answers:
    """Return answers with the figures of `other` beside those of the same experiments.

    Each entry's `exploratory` is a list of {step, why, primary, sentence}.
    """
    found = {entry["name"]: entry for entry in entries_of(other)}
    over = other["multiplicity"]["questions"]

    def joined(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["name"] not in found:
            return entry
        theirs = found[entry["name"]]
        shown = _unjudged(theirs, "exploratory", why, over if theirs["role"] == "question" else 1)
        more = {
            "step": step,
            "why": why,
            "primary": theirs["primary"],
            "sentence": shown["verdict"]["sentence"],
        }
        return {**entry, "exploratory": [*entry.get("exploratory", []), more]}

    return answers | {
        "experiments": [joined(entry) for entry in answers["experiments"]],
        "controls": {
            name: None if control is None else joined(control)
            for name, control in answers["controls"].items()
        },
    }


def differing(recorded: Mapping[str, Any], computed: Mapping[str, Any]) -> list[str]:
    """Return the experiments whose verdict or primary figures are not those that were recorded."""
    now = {entry["name"]: entry for entry in entries_of(computed)}
    then = {entry["name"]: entry for entry in entries_of(recorded)}
    return sorted(
        name
        for name in then.keys() | now.keys()
        if name not in now or name not in then or not _same(then[name], now[name])
    )


def _same(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if then["verdict"]["kind"] != now["verdict"]["kind"]:
        return False
    slopes = [entry.get("size_slope") for entry in (then, now)]
    declared = [slope for slope in slopes if slope and slope["declared"]]
    if len(declared) == 1 or (len(declared) == 2 and not _alike(*declared)):
        return False
    return _close_all(then["primary"], now["primary"])


def _alike(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return then["verdict"]["kind"] == now["verdict"]["kind"] and _close_all(then, now)


def _close_all(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(_close(then[name], now[name]) for name in COMPARED)


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= CLOSE * max(1.0, abs(one), abs(other))
