"""What a plan says besides its table: what was searched, doubts, advice; and all of it as plain
values. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from motet.launcher.planning import table as plan_table
from motet.launcher.planning.calibrate import doubts
from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout
from motet.parallel.planner.which_probe import probes

NO_OUTER = (
    "A link this slow calls for low-communication training between groups (outer optimizer steps, "
    "DiLoCo), which Motet cannot run "
    "yet: no layout here uses it."
)
SLOW_SHARE = 0.15
LEFT_OUT = {
    "slower": "too slow by a lower bound of their time",
    "memory": "too large by a lower bound of their memory",
    "micro-batches": "with too few micro-batches for a pipeline",
    "uneven": "that would use nodes unevenly",
    "not tried": "not looked at",
}
"""Kinds of candidates that are left out before they are predicted, by `PlanAnswer.counts`."""


def searched(answer: PlanAnswer) -> str:
    """Return what the search looked at.

    A candidate that is left out early stands for many layouts: the numbers are of unlike things.
    """
    counts = answer.counts
    text = f"{counts['predicted']:,} layouts predicted"
    left = [f"{counts[name]:,} {words}" for name, words in LEFT_OUT.items() if counts[name]]
    if left:
        text += (
            ". Left out before that, as sets of layouts (degrees, their machines, or a schedule "
            f"of these): {', '.join(left)}"
        )
    return f"{text}."


def doubts_of(choice: RankedLayout) -> list[str]:
    """Return reasons to doubt what is predicted of a layout."""
    lines = [f"Doubt: {reason}." for reason in dict.fromkeys(choice.prediction.trust)]
    lines += [
        f"Doubt: constants of {group.name}: {doubt}."
        for group in choice.cluster.groups
        if group.calibration is not None
        for doubt in doubts(group.calibration)
    ]
    return lines


def advice(question: PlanQuestion, answer: PlanAnswer) -> list[str]:
    """Return doubts about the first layout, and what would be better than any of them."""
    best = answer.best
    lines = doubts_of(best)
    if answer.gap:
        left = "a layout with whole replicas in different groups"
        if answer.late:
            left = "the search ended after --seconds, and what was left"
        lines.append(
            f"Not all was tried: {left} may be up to {answer.gap:.1%} faster than the first; "
            f"none that is left takes less than {answer.bound_s:.3g} s."
        )
    if not answer.ranked_all:
        lines.append("Rows behind the first are the fastest found of their kinds, not proven.")
    crossing = sum(best.prediction.parts.get(k, 0.0) for k in ("pipeline_send", "data_parallel"))
    left_out = {g.name for g in question.cluster.groups} - {g.name for g in best.cluster.groups}
    if left_out:
        lines.append(f"Faster without {', '.join(sorted(left_out))}.")
    several = len(question.cluster.groups) > 1
    if several and (left_out or crossing > SLOW_SHARE * best.prediction.step_time_s):
        lines.append(NO_OUTER)
    return lines


def lines(question: PlanQuestion, answer: PlanAnswer, tokens: float) -> list[str]:
    """Return what stands below the table."""
    out = [f"{tokens:.3g} tokens. {searched(answer)}"]
    used = plan_table.transports(answer.best).items()
    if used:
        shown = ", ".join(f"{name} over {word}" for name, word in used)
        out.append(f"Transport of the first: {shown}.")
    probe = probes(answer.choices)[0]
    return [
        *out,
        *advice(question, answer),
        f"A one-minute run of layout {probe.number} would tell most "
        f"({probe.phase.replace('_', ' ')}): uncertainty "
        f"{probe.before:.0%} -> {probe.after:.0%}. `motet plan ... --probe` starts it.",
    ]


def changes(before: PlanAnswer, after: PlanAnswer) -> list[str]:
    """Return what a calibration changed: the times of the layouts that were ranked, how sure they
    are, and which is first.
    """
    known = {choice.kind: choice for choice in after.choices}
    out = []
    for number, choice in enumerate(before.choices, 1):
        found = known.get(choice.kind)
        there = _time(found) if found else "no longer among the ranked"
        out.append(f"  {number}. {plan_table.words(choice)}: {_time(choice)} -> {there}")
    same = [c.kind for c in before.choices] == [c.kind for c in after.choices]
    first = before.best.kind == after.best.kind
    verdict = "The ranking is the same" if same else "The ranking changed"
    if not same:
        verdict += ", its first layout stays" if first else ", and so did its first layout"
    return ["Before -> after:", *out, f"{verdict}."]


def _time(choice: RankedLayout) -> str:
    found = choice.prediction
    low, high = found.interval_s
    width = (high - low) / 2 / found.step_time_s
    return f"{found.step_time_s:.3g} s ±{width:.0%}"


def plain(
    question: PlanQuestion, answer: PlanAnswer, rows: Sequence[Mapping[str, Any]], tokens: float
) -> dict[str, Any]:
    """Return a plan as JSON has it."""
    layouts = []
    for row, choice in zip(rows, answer.choices, strict=True):
        prediction = choice.prediction
        layouts.append(
            {
                **row,
                "settings": plan_table.section(choice),
                "step_time_s": prediction.step_time_s,
                "interval_s": list(prediction.interval_s),
                "memory_gib": prediction.memory_gib,
                "capacity_gib": prediction.capacity_gib,
                "parts_s": dict(prediction.parts),
                "memory_parts_gib": dict(prediction.memory_parts),
                "transports": plan_table.transports(choice),
                "trust": list(prediction.trust),
            }
        )
    return {
        "tokens": tokens,
        "devices": question.cluster.devices,
        "candidates": dict(answer.counts),
        "bound_s": answer.bound_s or None,
        "advice": advice(question, answer),
        "layouts": layouts,
        "probes": [vars(one) for one in probes(answer.choices)],
    }
