"""The members of a family in the report: losses on held-out text, Pareto fronts, and what the run
cost against separate ones. Pure functions; nothing is shown for a run of one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from motet.launcher.report import plots, words
from motet.launcher.runs.metrics import Row, rows_of
from motet.models.family.base import WHOLE
from motet.models.family.costs import lineage_totals

AXES = {
    "parameters": "parameters (log scale)",
    "flops_per_token": "training FLOPs per token (log scale)",
    "latency_ms": "milliseconds per forward pass of one sequence (log scale)",
}
"""What a member costs: field of a row, and its name on an axis."""
SHORT = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs",
    "latency_ms": "latency",
}


def family_part(
    manifest: Mapping[str, Any], rows: Sequence[Row], compliance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `family` of report.json; {} for a run of one model.

    Args:
        rows: of metrics.jsonl.
        compliance: with `trained_sequences` and `flops` by member, from ledger and draws.
    """
    if not manifest.get("members"):
        return {}
    evaluations = rows_of(rows, "evaluation")
    last = evaluations[-1] if evaluations else {}
    if manifest.get("stages"):
        last = _last_of_each(evaluations)
    latency = last.get("latency_ms") or {}
    trained = compliance.get("trained_sequences")
    members = [
        _member(entry, name, last, latency, trained, manifest)
        for name, entry in [(WHOLE, manifest), *((m["name"], m) for m in manifest["members"])]
    ]
    members.sort(key=lambda row: (row["parameters"] or math.inf, row["member"]))
    for axis in AXES:
        for row, on_front in zip(members, front(members, axis), strict=True):
            row["front"][axis] = on_front
    stages = lineage(members, manifest, rows, compliance) if manifest.get("stages") else []
    return {
        "members": members,
        **({"lineage": stages} if stages else {}),
        "step": last.get("step") if latency else None,
        "unseen": all(row.get("unseen", True) for row in evaluations) if evaluations else None,
        "sequences": last.get("sequences"),
        "latency_of": last.get("latency_of"),
        "losses": curves(evaluations),
        "cost": grown_cost(stages, compliance)
        if stages
        else family_cost(members, manifest, compliance),
    }


def _last_of_each(evaluations: Sequence[Row]) -> Row:
    """Return, as one evaluation, that of each member when it was as it is kept."""
    whole = [row for row in evaluations if row.get("latency_ms")]
    found: dict[str, Any] = dict(whole[-1]) if whole else {}
    for key in ("losses", "latency_ms"):
        found[key] = {name: x for row in whole for name, x in (row.get(key) or {}).items()}
    return found


def lineage(
    members: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    metrics: Sequence[Row] = (),
    compliance: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return what each stage read and cost, in order, alone and with those before it; figures are
    None where no ledger says what was read. `ended` has the event of a stage that its loss could
    end; `members`, of a stage that trains slices, each one's passes.
    """
    events = [row for row in rows_of(metrics, "event") if row.get("event") == "stage_ended"]
    ended = {row["member"]: row for row in events}  # the last, where a stage was trained again
    by_name = {row["member"]: row for row in members}
    rows: list[dict[str, Any]] = []
    tokens: float | None = 0.0
    flops = 0.0
    for stage in manifest["stages"]:
        row = by_name[stage["name"]]
        inside = _inside(stage, members, manifest, compliance or {})
        read = inside["tokens"] if inside else row["tokens"]
        own = None if read is None or tokens is None else float(read)
        tokens = None if own is None or tokens is None else tokens + own
        each = row["flops_per_token"] or 0.0
        flops += _ran(stage, own or 0.0, each, inside)
        rows.append(
            {
                "member": stage["name"],
                "operator": stage["operator"],
                "start_step": stage["start_step"],
                "flops_per_token": each,
                "tokens": own,
                "lineage_tokens": tokens,
                "lineage_flops": None if own is None else flops,
                **({"members": inside["members"]} if inside else {}),
                **({"ended": _ended(ended.get(stage["name"]))} if "until" in stage else {}),
            }
        )
    return rows


def _ran(stage: Mapping[str, Any], tokens: float, each: float, inside: Mapping[str, Any]) -> float:
    """Return the operations of a stage: of its passes, its teacher's, and what its maps learned."""
    own = tokens * stage.get("virtual_flops_per_token", each)
    learning = stage.get("learning_tokens", 0) * each if tokens else 0.0
    teacher = tokens * stage.get("teacher_flops_per_token", 0.0)
    return float(inside.get("flops", own)) + learning + teacher


def _inside(
    stage: Mapping[str, Any],
    members: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    compliance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a stage read and ran where slices of its model train; {} where its model trains
    alone.
    """
    ran, names = compliance.get("flops"), {stage["name"], *stage.get("members", ())}
    if not stage.get("members"):
        return {}
    rows = [row for row in members if row["member"] in names]
    found = [
        {
            "member": row["member"],
            "flops_per_token": row["flops_per_token"] or 0.0,
            "flops": float((ran or {}).get(row["member"], 0.0)),
        }
        for row in rows
    ]
    if ran is None:
        return {"tokens": None, "members": found, "flops": 0.0}
    own = (compliance.get("stages") or {}).get(stage["name"]) or {"sequences": 0, "flops": 0.0}
    length = manifest.get("sequence_length") or 0
    return {"tokens": own["sequences"] * length, "members": found, "flops": own["flops"]}


def _ended(event: Row | None) -> dict[str, Any] | None:
    """Return why a stage ended, and the slope of its loss then; None before it did."""
    keys = ("step", "by", "threshold", "fall", "error", "blocks")
    return None if event is None else {key: event.get(key) for key in keys}


def grown_cost(
    stages: Sequence[Mapping[str, Any]], compliance: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the operations that really ran against those of separate runs
    (`models.family.costs.lineage_totals`); None without a ledger. Stages that did not begin have
    cost nothing and are left out.
    """
    begun = [row for row in stages if row["tokens"]]
    if compliance.get("flops") is None or not begun:
        return None
    return lineage_totals(begun)


def _member(
    entry: Mapping[str, Any],
    name: str,
    last: Mapping[str, Any],
    latency: Mapping[str, Any],
    trained: Mapping[str, int] | None,
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    sequences = None if trained is None else int(trained.get(name, 0))
    length = manifest.get("sequence_length") or 0
    # Of the last evaluation, where all members were measured; before, they were at other steps.
    loss = (last.get("losses") or {}).get(name) if latency else None
    return {
        "member": name,
        "parameters": words.finite(entry.get("parameters")),
        "parameters_non_embedding": words.finite(entry.get("parameters_non_embedding")),
        "flops_per_token": words.finite(entry.get("flops_per_token")),
        "loss": words.finite(loss),
        "latency_ms": words.finite(latency.get(name)),
        "tokens": None if sequences is None else sequences * length,
        "front": {},
    }


def front(members: Sequence[Mapping[str, Any]], axis: str) -> list[bool | None]:
    """Return which members no other one beats: none costs as little or less and has as low a loss
    or a lower one, and is better in one of the two. None where cost or loss is not known.
    """
    points = [(row[axis], row["loss"]) for row in members]
    known = [point for point in points if None not in point]

    def beaten(x: float, loss: float) -> bool:
        return any(a <= x and b <= loss and (a, b) != (x, loss) for a, b in known)

    return [None if x is None or loss is None else not beaten(x, loss) for x, loss in points]


def curves(evaluations: Sequence[Row]) -> dict[str, dict[str, list[Any]]]:
    """Return steps and losses of each member's evaluations."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in evaluations:
        for name, loss in (row.get("losses") or {}).items():
            curve = found.setdefault(name, {"steps": [], "loss": []})
            curve["steps"].append(row["step"])
            curve["loss"].append(words.finite(loss))
    return found


def family_cost(
    members: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    compliance: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return the operations that really ran, of every pass, against those of separate runs: each
    member trained alone on as many tokens as this run read. None without a ledger.
    """
    ran = compliance.get("flops")
    if ran is None:
        return None
    per_token = {row["member"]: row["flops_per_token"] or 0.0 for row in members}
    length = manifest.get("sequence_length") or 0
    by_member = {name: float(ran.get(name, 0.0)) for name in per_token}
    tokens = length * (compliance.get("sequences") or 0)
    separate = {name: tokens * each for name, each in per_token.items()}
    flops = sum(ran.values())  # members that are drawn and not listed among them
    alone = sum(separate.values())
    return {
        "tokens": tokens,
        "flops": flops,
        "by_member": by_member,
        "separate": separate,
        "separate_flops": alone,
        "of_separate": flops / alone if alone else None,
        "of_the_largest": flops / most if (most := max(separate.values())) else None,
    }


def loss_picture(family: Mapping[str, Any], key: str) -> str | None:
    """Held-out loss of each member over training steps."""
    shown = [
        (name, curve) for name, curve in (family.get("losses") or {}).items() if curve["steps"]
    ]
    if not shown:
        return None
    order = {row["member"]: number for number, row in enumerate(family["members"])}
    shown.sort(key=lambda item: order.get(item[0], len(order)))
    with plots.figure(key, plots.WIDE) as fig:
        axes = fig.subplots()
        for number, (name, curve) in enumerate(shown):
            shade = plots.ORDERED[round(number * (len(plots.ORDERED) - 1) / max(1, len(shown) - 1))]
            mark = plots.MARKERS[number % len(plots.MARKERS)]
            ys = [math.nan if y is None else y for y in curve["loss"]]
            axes.plot(curve["steps"], ys, color=shade, marker=mark, markersize=4, label=name)
        plots.name_axes(axes, "training step", "held-out loss", "nats/token")
        fig.legend(loc="outside upper left", ncols=min(6, len(shown)))
        ends = "; ".join(f"{name}: {curve['loss'][-1]:.3g}" for name, curve in shown)
        return plots.to_svg(fig, key, f"Held-out loss of each member over steps. Last, {ends}.")


def front_picture(family: Mapping[str, Any], axis: str, key: str) -> str | None:
    """Loss against one cost; members that no other beats are filled and joined."""
    rows = [r for r in family["members"] if r[axis] and r["loss"] is not None]
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: row[axis])
    with plots.figure(key, plots.SMALL) as fig:
        axes = fig.subplots()
        best = [row for row in rows if row["front"][axis]]
        axes.plot([r[axis] for r in best], [r["loss"] for r in best], color=plots.SOFT)
        for row in rows:
            shade = plots.ORDERED[3] if row["front"][axis] else plots.CONTROL
            face = shade if row["front"][axis] else "none"
            axes.plot([row[axis]], [row["loss"]], "o", color=shade, markerfacecolor=face)
            axes.annotate(
                plots.clip(row["member"], 16),
                (row[axis], row["loss"]),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8.5,
            )
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = sorted({row[axis] for row in rows})
        axes.set_xticks(ticks, [words.big(x) if x >= 1000 else f"{x:.3g}" for x in ticks])
        axes.margins(x=0.16, y=0.14)
        plots.name_axes(axes, AXES[axis], "held-out loss", "nats/token")
        told = "; ".join(f"{r['member']}: {r[axis]:.3g}, {r['loss']:.3g}" for r in rows)
        return plots.to_svg(fig, key, f"Held-out loss by {AXES[axis]}. {told}.")


def view(family: Mapping[str, Any], markup: Any) -> dict[str, Any] | None:
    """What the page shows of a family; None for a run of one model."""
    if not family:
        return None
    drawn = [(f"Loss against {SHORT[a]}", front_picture(family, a, f"front-{a}")) for a in AXES]
    curve = loss_picture(family, "member-loss")
    return {
        **family,
        "loss_plot": markup(curve) if curve else None,
        "fronts": [(caption, markup(svg)) for caption, svg in drawn if svg],
        "axes": SHORT,
    }
