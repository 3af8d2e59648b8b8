"""What the controls say of a run, at each member of a family: they vouch for answers there alone.

A control is judged at every member on which it was measured, by the same rules. Where it fails, no
answer of that member is valid; those of other members stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from motet.experiments.analysis.measured import PLACEBO_THRESHOLD
from motet.experiments.analysis.members import at_member
from motet.experiments.analysis.negative import fault
from motet.experiments.analysis.verdict import placebo_sentence, positive_sentence

Entry = dict[str, Any]
ROLES = {"placebo": "placebo", "positive": "positive_control"}
TITLES = {"placebo": "A/A", "positive": "positive"}


def controls_of(
    entries: Sequence[Entry], smallest: Mapping[str, float], alpha: float
) -> dict[str, Entry | None]:
    """Return the `controls` of report.json: the one that decides at its own member, with `ok` and
    `sentence`, and in a family `by_member`: {member, ok, sentence, p} at each.

    Args:
        entries: of all experiments, each with its members in it.
        smallest: the smallest p-value that each A/A could have, by name.
        alpha: of the run.
    """
    return {kind: _control(kind, entries, smallest, alpha) for kind in ROLES}


def _control(
    kind: str, entries: Sequence[Entry], smallest: Mapping[str, float], alpha: float
) -> Entry | None:
    found = [entry for entry in entries if entry["role"] == ROLES[kind]]
    if not found:
        return None
    worst, judged = _judged(kind, [(entry, entry) for entry in found], smallest, alpha)
    members = {entry.get("member"): True for entry in found}
    members |= {one["member"]: True for entry in found for one in entry.get("members") or []}
    rows = []
    for member in members if len(members) > 1 else ():
        there = [(entry, at) for entry in found if (at := at_member(entry, member)) is not None]
        one, judged_there = _judged(kind, there, smallest, alpha)
        rows.append({"member": member, **judged_there, "p": one["primary"]["p"]})
    return worst | judged | ({"by_member": rows} if rows else {})


def _judged(
    kind: str, at: Sequence[tuple[Entry, Entry]], smallest: Mapping[str, float], alpha: float
) -> tuple[Entry, Entry]:
    """(the control nearest to failing, {ok, sentence}) at one member.

    Args:
        at: (entry, what it says at the member) of every control of this kind.
    """
    if kind == "placebo":
        worst, judged = _placebo(at, smallest, alpha)
    else:
        worst = max((one for _, one in at), key=_p)
        ok, sentence = positive_sentence(worst["primary"], alpha)
        judged = {"ok": ok, "sentence": sentence}
    if found := " ".join(text for _, one in at if (text := fault(one))):
        # A control whose own units differed before any exposure vouches for nothing.
        told = f"The {TITLES[kind]} control cannot be relied on. {found}"
        judged = {"ok": False, "sentence": told}
    return worst, judged


def _placebo(
    at: Sequence[tuple[Entry, Entry]], smallest: Mapping[str, float], alpha: float
) -> tuple[Entry, Entry]:
    """Of several the one with the smallest p, which is multiplied by their number."""
    worst = min((one for _, one in at), key=_p)
    p = worst["primary"]["p"]
    corrected = None if p is None else min(1.0, p * len(at))
    worst["primary"]["p_corrected"] = corrected
    least = max(smallest[entry["name"]] * len(at) for entry, _ in at)
    ok, sentence = placebo_sentence(corrected, PLACEBO_THRESHOLD, alpha, least)
    return worst, {"ok": ok, "sentence": sentence}


def _p(entry: Entry) -> float:
    p = entry["primary"]["p"]
    return 2.0 if p is None else float(p)


def unsound_at(controls: Mapping[str, Entry | None], member: str | None) -> list[str]:
    """Return why no answer at a member is valid, in words; [] where all controls there are sound.

    A control that was not measured at the member is taken at its own.
    """
    found = []
    for control in controls.values():
        if control is None:
            continue
        rows = [row for row in control.get("by_member") or [] if row["member"] == member]
        judged = rows[0] if rows else control
        if not judged["ok"]:
            found.append(str(judged["sentence"]))
    return found
