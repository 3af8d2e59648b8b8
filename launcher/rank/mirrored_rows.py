"""Rows of `metrics.jsonl` as Weights & Biases shows them: pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


def history_of(row: Row) -> dict[str, Any]:
    """W&B history of a row: `train/...`, `probe/<experiment>/...`, both axes, and loss by
    tokens.
    """
    kind = row["kind"]
    skip = {"kind", "step", "time", "tokens", "nonfinite", "experiments", "members"}
    fields = {name: value for name, value in row.items() if name not in skip}
    if kind == "step":
        values = {f"train/{name}": value for name, value in flat(fields).items()}
        if row.get("loss") is not None:
            values["by_tokens/loss"] = row["loss"]
    elif kind == "probe":
        values = {f"probe/{name}": value for name, value in probed(row).items()}
        values |= {f"probe_cost/{name}": value for name, value in flat(fields).items()}
    elif kind == "evaluation":
        losses, latency = fields.pop("losses", {}), fields.pop("latency_ms", {})
        fields.pop("sizes", None)
        values = {f"members/{name}/loss": loss for name, loss in losses.items()}
        values |= {f"members/{name}/latency_ms": value for name, value in latency.items()}
        values |= {f"evaluation/{name}": value for name, value in flat(fields).items()}
    elif kind == "validation":
        values = {f"validation/{name}/loss": loss for name, loss in row["losses"].items()}
        for member, losses in (row.get("members") or {}).items():
            values |= {f"validation/{name}@{member}/loss": loss for name, loss in losses.items()}
    else:
        values = {f"{kind}/{name}": value for name, value in flat(fields).items()}
    if not values:
        return {}
    axes = {"step": row["step"], **({"tokens": row["tokens"]} if "tokens" in row else {})}
    return {**axes, **values}


def probed(row: Row) -> dict[str, int | float]:
    """The numbers of a probe row: `EXPERIMENT/...`, and `EXPERIMENT@MEMBER/...` of a family."""
    scores = dict(row.get("experiments") or {})
    for member, theirs in (row.get("members") or {}).items():
        scores |= {f"{name}@{member}": found for name, found in theirs.items()}
    return flat(scores)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, int | float]:
    """The numbers in nested dictionaries under `a/b` names; flags become 0 or 1, the rest is left
    out.
    """
    out: dict[str, int | float] = {}
    for name, item in value.items():
        item = item.tolist() if hasattr(item, "tolist") else item
        if isinstance(item, Mapping):
            out |= flat(item, f"{prefix}{name}/")
        elif isinstance(item, bool):
            out[prefix + str(name)] = int(item)
        elif isinstance(item, int | float):
            out[prefix + str(name)] = item
    return out


def member_table(row: Row) -> tuple[list[str | int], list[list[Any]]]:
    """(columns, rows) of the members in an evaluation of all of them."""
    columns: list[str | int] = ["member", "parameters", "loss", "latency_ms"]
    data = [
        [name, size, row["losses"].get(name), row["latency_ms"].get(name)]
        for name, size in row["sizes"].items()
    ]
    return columns, data
