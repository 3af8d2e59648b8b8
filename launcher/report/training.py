"""The training of a run in the report: curves, time by phase, validation losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from motet.launcher.report.words import finite
from motet.launcher.runs.metrics import Row, rows_of

MOST_POINTS = 2_000


def training_record(rows: Sequence[Row], exposures: Mapping[str, list[int]]) -> dict[str, Any]:
    """Curves of training, thinned to `MOST_POINTS` steps, and the time that each phase took."""
    steps = rows_of(rows, "step")
    thin = steps[:: max(1, -(-len(steps) // MOST_POINTS))]
    if steps and thin[-1] is not steps[-1]:
        thin.append(steps[-1])
    curves = {
        name: [finite(row.get(name)) for row in thin]
        for name in ("loss", "lr", "grad_norm", "tokens_per_s")
    }
    return {
        "steps": [row["step"] for row in thin],
        **curves,
        "exposure_steps": dict(exposures),
        **({"validation": validation} if (validation := validation_losses(rows)) else {}),
        "seconds": seconds_by_phase(rows),
        "skipped_steps": skipped_steps(rows),
        **({"thinned": thinned} if (thinned := thinned_probes(rows)) else {}),
    }


def thinned_probes(rows: Sequence[Row]) -> dict[str, list[int]]:
    """{experiment: steps} of the probes that the budget had no room for (`probes.budget`)."""
    found: dict[str, set[int]] = {}
    for event in rows_of(rows, "event"):
        if event.get("event") == "thinned":
            for name in event.get("experiments") or ():
                found.setdefault(str(name), set()).add(event["step"])
    return {name: sorted(steps) for name, steps in sorted(found.items())}


def skipped_steps(rows: Sequence[Row]) -> list[int]:
    """Steps whose update was left out: bad ones, and those that a rollback took back."""
    found = {row["step"] for row in rows_of(rows, "step") if row.get("skipped")}
    for event in rows_of(rows, "event"):
        if event.get("event") == "rollback" and "to_step" in event:
            found.update(range(event["to_step"] + 1, event["step"] + 1))
    return sorted(found)


def seconds_by_phase(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of training, probes, checkpoints and waiting for data.

    Probes, evaluations and validations (counted with them) and checkpoints have rows of their own;
    the rest is in `seconds` of the step rows.
    """
    phases = {"train": 0.0, "probe": 0.0, "checkpoint": 0.0, "data": 0.0}
    own = {"train": "train", "forward_backward": "train", "optimizer": "train", "data": "data"}
    for row in rows_of(rows, "step"):
        for name, seconds in (row.get("seconds") or {}).items():
            if name in own:
                phases[own[name]] += finite(seconds) or 0.0
    measured = [(kind, "probe") for kind in ("probe", "evaluation", "validation")]
    for kind, phase in (*measured, ("checkpoint", "checkpoint")):
        phases[phase] += sum(finite(row.get("seconds")) or 0.0 for row in rows_of(rows, kind))
    return phases


def validation_losses(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Steps and losses of each text that was validated, and the members' at the end; of one that
    grew into another, when it last trained.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows_of(rows, "validation"):
        for name, loss in (row.get("losses") or {}).items():
            curve = found.setdefault(name, {"steps": [], "loss": []})
            curve["steps"].append(row["step"])
            curve["loss"].append(finite(loss))
            curve["labels"] = (row.get("labels") or {}).get(name)
            members = {m: finite(losses.get(name)) for m, losses in row.get("members", {}).items()}
            if members:
                curve.setdefault("members", {}).update(members)
                curve.setdefault("member_steps", {}).update(dict.fromkeys(members, row["step"]))
    return found


def validation_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The last loss of each text that was validated, of the whole model (`member` None) and of
    each member.
    """
    out = []
    for name, curve in (record.get("validation") or {}).items():
        for member, loss in {None: curve["loss"][-1], **(curve.get("members") or {})}.items():
            step = (curve.get("member_steps") or {}).get(member, curve["steps"][-1])
            known = {"name": name, "member": member, "step": step, "loss": loss}
            perplexity = None if loss is None else math.exp(min(loss, 700.0))
            out.append({**known, "perplexity": perplexity, "labels": curve.get("labels")})
    return out
