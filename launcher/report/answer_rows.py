"""The answers of a run as rows and as flat values, for services that show tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    *("experiment", "role", "outcome", "effect", "low", "high", "unit", "p", "p_corrected"),
    *("units", "verdict", "ok"),
)


def table(report: Mapping[str, Any]) -> list[list[Any]]:
    """Return one row of `COLUMNS` for each question and control: the primary outcome, its verdict,
    and whether a control held.
    """
    answers = report.get("answers") or {}
    controls = [one for one in (answers.get("controls") or {}).values() if one]
    found: dict[str, list[Any]] = {}
    for entry in [*(answers.get("experiments") or []), *controls]:
        primary = entry.get("primary") or {}
        verdict = (entry.get("verdict") or {}).get("kind")
        effect = primary.get("effect", primary.get("slope_per_doubling"))
        outcome = primary.get("label") or primary.get("name")
        numbers = [primary.get(name) for name in ("low", "high", "unit", "p", "p_corrected", "n")]
        role = entry.get("role", "question")
        row = [entry.get("name"), role, outcome, effect, *numbers, verdict, entry.get("ok")]
        if primary or str(entry.get("name")) not in found:
            found[str(entry.get("name"))] = row
    return list(found.values())


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same under `answers/EXPERIMENT/COLUMN`; what is missing is left out."""
    return {
        f"answers/{row[0]}/{column}": value
        for row in table(report)
        for column, value in zip(COLUMNS[1:], row[1:], strict=True)
        if value is not None
    }
