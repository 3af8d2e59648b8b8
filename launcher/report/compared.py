"""Several runs side by side, from their reports: what was set otherwise, losses, and each effect.

Runs of one seed each show no chance between runs, so a difference of losses has no interval here. A
difference of effects has: each effect is known with an interval inside its own run. The two count
as independent; with the same units in the same arms they are not quite, and the interval is then
rather too wide than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from motet.launcher.report.training import validation_rows

Z_95 = 1.959963984540054
LAST_SHARE = 0.05
"""The training loss of a run is the mean over this share of its last points."""
NOT_COMPARED = ("name", "runs")
"""Settings that make no run another experiment."""


def compared(
    reports: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare runs, the first being what the others are held against.

    Args:
        reports: report.json of each run.
        settings: its resolved settings.

    Returns:
        runs: one row each. differing: {setting: its value in each run}, those that are not alike.
        experiments: by name, `effects` in each run (None where it lacks the experiment) and
        `differences` of the other runs from the first, None where the question is another one.
        whole_run: what global treatments measured in each run, without any test.
    """
    flat = [flattened(one) for one in settings]
    names = sorted({name for one in flat for name in one} - {*NOT_COMPARED})
    return {
        "runs": [run_row(report) for report in reports],
        "differing": {
            name: [one.get(name) for one in flat]
            for name in names
            if name not in NOT_COMPARED
            and any(a.get(name) != b.get(name) for a, b in pairwise(flat))
        },
        "experiments": _experiments(reports),
        "whole_run": _whole_run(reports),
    }


def run_row(report: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and losses of one run."""
    run, training = report.get("run") or {}, report.get("training") or {}
    row = {key: run.get(key) for key in ("name", "steps", "tokens", "parameters", "finished")}
    losses = [x for x in training.get("loss") or [] if x is not None]
    count = max(1, round(LAST_SHARE * len(losses)))
    row["loss"] = sum(losses[-count:]) / count if losses else None
    whole = [one for one in validation_rows(training) if one["member"] is None]
    return row | {"validation": {one["name"]: one["loss"] for one in whole}}


def flattened(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{a.b.c: value}; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{name}.")
        else:
            found[name] = value
    return found


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float] | None:
    """`other` less `one` with its 95 % interval; None where either has no interval."""
    ends = [end.get(key) for end in (one, other) for key in ("effect", "low", "high", "confidence")]
    if any(end is None for end in ends):
        return None
    effect = other["effect"] - one["effect"]
    half = math.hypot(*(_error(each) for each in (one, other))) * Z_95
    return {"effect": effect, "low": effect - half, "high": effect + half}


def _error(outcome: Mapping[str, Any]) -> float:
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + outcome["confidence"]) / 2)
    return float(outcome["high"] - outcome["low"]) / (2 * z)


def _experiments(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    entries = [
        {entry["name"]: entry for entry in (report.get("answers") or {}).get("experiments") or []}
        for report in reports
    ]
    specs = [
        {
            one["spec"]["name"]: one["spec"]
            for one in (report.get("definition") or {}).get("experiments") or []
        }
        for report in reports
    ]
    names = dict.fromkeys(name for one in entries for name in one)
    rows = []
    for name in names:
        found = [one.get(name) for one in entries]
        asked = [one.get(name) for one in specs]
        first = found[0]
        rows.append(
            {
                "name": name,
                "outcome": next(one["primary"].get("label") for one in found if one),
                "unit": next(one["primary"].get("unit") for one in found if one),
                "effects": [None if one is None else _effect(one) for one in found],
                "differences": [
                    difference(first["primary"], one["primary"])
                    if first and one and _same(asked[0], spec)
                    else None
                    for one, spec in zip(found[1:], asked[1:], strict=True)
                ],
                "asked_alike": [bool(one) and _same(asked[0], one) for one in asked[1:]],
            }
        )
    return rows


def _same(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two definitions ask the same of the same units."""
    return one is not None and one == other


def _effect(entry: Mapping[str, Any]) -> dict[str, Any]:
    primary = entry["primary"]
    kept = {key: primary.get(key) for key in ("effect", "low", "high", "p", "unit", "confidence")}
    return kept | {"verdict": (entry.get("verdict") or {}).get("kind")}


def _whole_run(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [
        {one["name"]: one for one in (report.get("answers") or {}).get("whole_run") or []}
        for report in reports
    ]
    return [
        {
            "name": name,
            "arms": [one.get(name, {}).get("arm") for one in found],
            "means": [one.get(name, {}).get("mean") for one in found],
        }
        for name in dict.fromkeys(name for one in found for name in one)
    ]
