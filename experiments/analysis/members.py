"""One experiment measured on several members: the one that its answer is for, and the others.

What is to be computed across members, such as how an effect grows with the number of parameters,
starts from `effects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.experiments.analysis.measured import Measured


@dataclass(frozen=True)
class ByMember:
    """One experiment on all members: `judged` at the member that its definition names."""

    judged: Measured
    others: list[Measured]


def by_experiment(measured: Sequence[Measured]) -> list[ByMember]:
    """Group what was measured by experiment, in the order given.

    An experiment whose own member was not measured has no answer and is left out.
    """
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.name, []).append(one)
    found = []
    for group in groups.values():
        judged = [one for one in group if one.member == one.experiment.spec.member]
        if judged:
            found.append(ByMember(judged[0], [one for one in group if one is not judged[0]]))
    return found


def of_member(member: str | None) -> str:
    """` of the whole model` or ` of member NAME`, to follow the name of an outcome."""
    return " of the whole model" if member is None else f" of member {member}"


def name_of_member(member: str | None) -> str:
    """`the whole model` or `member NAME`."""
    return "the whole model" if member is None else f"member {member}"


def at_member(entry: Mapping[str, Any], member: str | None) -> dict[str, Any] | None:
    """What an entry says at one member: its own fields, or those of `members`; None without."""
    if entry.get("member") == member:
        return dict(entry)
    return next((one for one in entry.get("members") or [] if one["member"] == member), None)


def secondaries(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The OUTCOMEs of an entry of report.json that are exploratory: neither its primary one nor a
    declared slope over sizes, on all members.
    """
    found = list(entry["secondary"])
    slope = entry.get("size_slope")
    if slope and not slope["declared"]:
        found.append(slope)
    for other in entry.get("members") or []:
        found += [other["primary"], *other["secondary"]]
    return found


def effects(entry: Mapping[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """(member, OUTCOME) of the primary outcome on every member, the one judged first; empty for an
    experiment that was measured on one member.
    """
    others = entry.get("members") or []
    if not others:
        return []
    first = (entry.get("member"), entry["primary"])
    return [first, *((other["member"], other["primary"]) for other in others)]
