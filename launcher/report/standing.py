"""The first line of a report: how its verdicts are not those that were frozen, or not yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_line(study: Any, damaged: Sequence[str] = (), problems: Sequence[str] = ()) -> str | None:
    """What must be known before all else: what is damaged, and how this is not the judgement that
    was frozen before step 1, or not yet; None where it is.

    Args:
        damaged: what of the run folder is.
        problems: why a run with experiments has no study.
    """
    if study is None:
        told = "; ".join(damaged or problems)
        if not told:
            return None
        return (
            f"The run folder is damaged, so it has no answers: {told}." if damaged else f"{told}."
        )
    parts = list(study.standing.told)
    if damaged:
        why = "no figure of this page can be trusted"
        parts.insert(0, f"The run folder is damaged, and {why}: {'; '.join(damaged)}.")
    registered = (study.compliance or {}).get("preregistered") or {}
    if registered.get("deviations"):
        told = "; ".join(registered["deviations"])
        parts.insert(0, f"Deviation from the preregistered definition: {told}.")
    if study.deviations:
        told = "; ".join(study.deviations)
        parts.insert(0, f"Deviation from the definition that was frozen before step 1: {told}.")
    return " ".join(parts) or None


def standing(study: Any) -> dict[str, Any] | None:
    """What the verdicts are worth now: `kind` is judged, interim or exploratory."""
    if study is None:
        return None
    now = study.standing
    return {"kind": now.kind, "step": now.step, "judged_at": dict(now.judged_at)}
