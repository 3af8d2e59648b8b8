"""Where a run is and how fast it goes, from the last rows of its metrics.jsonl."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.launcher.follow.tails import MOST_BYTES, last_bytes
from motet.launcher.runs.metrics import decode_row

RECENT_STEPS = 20
FEW_BYTES, MANY_BYTES = 1 << 13, 1 << 15
Row = dict[str, Any]


@dataclass(frozen=True)
class Pace:
    """What the last rows tell.

    Attributes:
        step: updates done in the lineage of the weights; None before the first row.
        loss: of the last logged step that still counts.
        tokens: consumed by that lineage; None before its first logged step.
        tokens_per_s: median of the last `RECENT_STEPS` logged steps, training alone.
        wall_tokens_per_s: tokens over the wall clock between logged steps: probes and checkpoints
            counted.
        step_s: the wall clock of one step, in the same way.
        last_row: Unix time of the newest row.
    """

    step: int | None = None
    loss: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    wall_tokens_per_s: float | None = None
    step_s: float | None = None
    last_row: float | None = None

    def seconds_left(self, total_tokens: int) -> float | None:
        """Return the time until the run has consumed `total_tokens`, as fast as lately; None when
        unknown.
        """
        if self.tokens is None or not self.wall_tokens_per_s:
            return None
        return max(0, total_tokens - self.tokens) / self.wall_tokens_per_s


def read_pace(metrics: Path, moving: bool) -> Pace:
    """Read the end of a metrics.jsonl; more of it when the run is `moving`, as its speed is wanted
    then.

    Torn and foreign lines are skipped; more is read as long as no step is among the rows.
    """
    count = MANY_BYTES if moving else FEW_BYTES
    while True:
        rows = parse(last_bytes(metrics, count))
        if any(row["kind"] == "step" for row in rows):
            return pace_of(rows)
        if count >= min(MOST_BYTES, _size(metrics)):
            return pace_of(rows)
        count *= 8


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def parse(block: bytes) -> list[Row]:
    """Return the rows of a piece of metrics.jsonl."""
    rows = []
    for line in block.split(b"\n"):
        try:
            if (row := decode_row(line)) is not None:
                rows.append(row | {"time": float(row["time"])})
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def pace_of(rows: list[Row]) -> Pace:
    """Return what rows in the order written tell: an `attempt` row makes steps after its
    `start_step` void.
    """
    if not rows:
        return Pace()
    spans: list[list[Row]] = [[]]
    counted: list[Row] = []
    step: int | None = None
    for row in rows:
        if row["kind"] == "attempt":
            step = int(row.get("start_step", row["step"]) or 0)
            counted = [other for other in counted if other["step"] <= step]
            spans.append([])
        elif row["kind"] == "step":
            step = row["step"]
            counted.append(row)
            spans[-1].append(row)
    last = counted[-1] if counted else {}
    long_enough = [span for span in spans if len(span) > 1]
    span = long_enough[-1] if long_enough else []
    rates = [row["tokens_per_s"] for row in span[-RECENT_STEPS:] if row.get("tokens_per_s")]
    return Pace(
        step=step,
        loss=last.get("loss"),
        tokens=last.get("tokens"),
        tokens_per_s=statistics.median(rates) if rates else None,
        wall_tokens_per_s=_slope(span, "tokens"),
        step_s=_inverse(_slope(span, "step")),
        last_row=rows[-1]["time"],
    )


def _slope(span: list[Row], key: str) -> float | None:
    """Return how fast a count grew over the wall clock of some rows, per second."""
    if len(span) < 2 or span[0].get(key) is None or span[-1].get(key) is None:
        return None
    seconds, grown = span[-1]["time"] - span[0]["time"], span[-1][key] - span[0][key]
    return grown / seconds if seconds > 0 and grown > 0 else None


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None
