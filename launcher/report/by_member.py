"""The primary outcome of one experiment on every member: the rows of its table and its picture.

Nothing here is shown for a run of one member.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from motet.experiments.analysis.members import effects
from motet.launcher.report import bounds, plots, words

Row = dict[str, Any]
FEWEST_POINTS = 2


def rows(entry: Mapping[str, Any], run: Mapping[str, Any]) -> list[Row]:
    """One row a member, in the order of parameters: its name, size and OUTCOME, whether it is the
    one that the answer is for, and why its figures are not valid ("" where they are).

    Args:
        entry: an experiment of report.json.
        run: the `run` part of report.json, which knows the sizes.
    """
    sizes = parameters(run)
    judged = entry.get("member")
    invalid = {one["member"]: one.get("invalid") or "" for one in entry.get("members") or []}
    verdict = entry.get("verdict") or {}
    if verdict.get("kind") == "invalid":
        invalid[judged] = words.sentence(verdict)
    found = [
        {
            "member": member,
            "label": words.member(member),
            "parameters": sizes.get(member),
            "outcome": outcome,
            "judged": member == judged,
            "invalid": invalid.get(member, ""),
        }
        for member, outcome in effects(entry)
    ]
    return sorted(found, key=lambda row: (row["parameters"] or math.inf, row["label"]))


def parameters(run: Mapping[str, Any]) -> dict[str | None, float | None]:
    """Number of parameters by member; None is the whole model."""
    sizes: dict[str | None, float | None] = {
        entry.get("name"): words.finite(entry.get("parameters"))
        for entry in run.get("members") or []
    }
    return {None: words.finite(run.get("parameters")), **sizes}


def further(entry: Mapping[str, Any]) -> list[Row]:
    """The other outcomes on members that the answer is not for: member and OUTCOME."""
    return [
        {"label": words.member(other["member"]), "outcome": outcome}
        for other in entry.get("members") or []
        for outcome in other.get("secondary") or []
    ]


def picture(members: Sequence[Row], key: str) -> str | None:
    """Effect with interval against parameters, on a logarithmic axis; None with fewer than two
    members of known size and effect.
    """
    shown = [row for row in members if row["parameters"] and effect(row) is not None]
    if len(shown) < FEWEST_POINTS:
        return None
    unit = str(shown[0]["outcome"].get("unit") or "")
    ends = bounds.possible({}, unit, [effect(row) or 0.0 for row in shown], gain=True)
    with plots.figure(key, plots.SMALL) as fig:
        axes = fig.subplots()
        for row in shown:
            x, y = float(row["parameters"]), effect(row) or 0.0
            low, high = (words.scaled(row["outcome"].get(end), unit) for end in ("low", "high"))
            shade = plots.ORDERED[3] if row["judged"] else plots.CONTROL
            if low is not None and high is not None:
                low, high = bounds.inside([low, high], ends)
                axes.plot([x, x], [low, high], color=shade, linewidth=2.2, solid_capstyle="butt")
            # filled for the member that the answer is for, so that colour is not the only sign
            face = shade if row["judged"] else "none"
            mark = "x" if row.get("invalid") else "o"
            axes.plot([x], [y], mark, color=shade, markerfacecolor=face, markersize=6.5)
            axes.annotate(
                plots.clip(row["label"], 16),
                (x, y),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8.5,
            )
        axes.axhline(0.0, color=plots.CONTROL, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xscale("log")
        axes.minorticks_off()
        places = sorted({row["parameters"] for row in shown})
        axes.set_xticks(places, [words.big(x) for x in places])
        axes.margins(x=0.14, y=0.12)
        label = str(shown[0]["outcome"].get("label") or "outcome")
        plots.name_axes(axes, "parameters (log scale)", f"effect: {label}", unit, difference=True)
        bounds.keep_within(axes, ends)
        return plots.to_svg(fig, key, told(shown, label, unit))


def slope(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The slope of the effect over sizes, with the kind and the words of its verdict."""
    outcome = entry.get("size_slope")
    if not outcome:
        return None
    verdict = outcome.get("verdict") or {}
    kind = verdict.get("kind")
    kind = kind if kind in words.VERDICT_LABELS else "exploratory"
    return {"outcome": outcome, "kind": kind, "sentence": words.sentence(verdict)}


def effect(row: Row) -> float | None:
    """The effect in the unit that is printed."""
    outcome = row["outcome"]
    return words.scaled(outcome.get("effect"), str(outcome.get("unit") or ""))


def told(shown: Sequence[Row], label: str, unit: str) -> str:
    """What the picture shows, in words."""
    points = "; ".join(f"{row['label']}: {effect(row):.3g}" for row in shown)
    return f"Effect on {label} by parameters, in {words.shown_unit(unit, True)}. {points}."


COLUMNS = ("experiment", "role", "member", "parameters", "effect", "low", "high", "p", "judged")


def table(report: Mapping[str, Any]) -> list[list[Any]]:
    """Every experiment's primary effect at every member, as rows of `COLUMNS`; the slope over their
    sizes, per doubling of parameters, is a row of member `all`.
    """
    answers, found = report.get("answers") or {}, []
    controls = [one for one in (answers.get("controls") or {}).values() if one]
    for entry in [*(answers.get("experiments") or []), *controls]:
        shown = [
            (words.member(row["member"]), row["parameters"], row["outcome"], row["judged"])
            for row in rows(entry, report.get("run") or {})
        ]
        if outcome := entry.get("size_slope"):
            shown.append(("all", None, outcome, bool(outcome["declared"])))
        for member, size, outcome, judged in shown:
            numbers = [outcome.get(name) for name in ("effect", "low", "high", "p")]
            found.append([entry["name"], entry["role"], member, size, *numbers, judged])
    return found
