"""The first line of a report: how its verdicts are not those that were frozen, or not yet."""

from __future__ import annotations

from typing import Any


def first_line(study: Any) -> str | None:
    """What must be known before all else: how this is not the judgement that was frozen before
    step 1, or not yet; None where it is.
    """
    if study is None:
        return None
    parts = list(study.standing.told)
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
