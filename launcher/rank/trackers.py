"""All trackers that a run asks for, as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motet.launcher.rank.alerts import StallAlarm, alert_settings
from motet.launcher.rank.other_trackers import TensorBoardTracker, TrackioTracker
from motet.launcher.rank.wandb_mirror import open_mirror

if TYPE_CHECKING:
    from motet.launcher.runs.metrics import Tracker
    from motet.launcher.runs.rundir import RunDir

KINDS = {"tensorboard": TensorBoardTracker, "trackio": TrackioTracker}
"""Setting of `tracking` -> its tracker, beside Weights & Biases."""


class Trackers:
    """Hands everything on to several trackers."""

    def __init__(self, each: Sequence[Tracker]) -> None:
        self.each = list(each)

    def log(self, row: Mapping[str, Any]) -> None:
        """Give one row of `metrics.jsonl` to all."""
        for one in self.each:
            one.log(row)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Give a table to all."""
        for one in self.each:
            one.table(name, columns, rows, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Give values of the whole run to all."""
        for one in self.each:
            one.summary(values)

    def close(self, wait_s: float | None = None) -> None:
        """Close all, one after the other."""
        for one in self.each:
            one.close(wait_s)


def open_trackers(
    rundir: RunDir,
    config: Mapping[str, Any],
    rank: int = 0,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    alarm: bool = True,
) -> Trackers | None:
    """Return the trackers of a run's configuration: None on ranks other than 0, and where all are
    off.

    Args:
        rundir: of the run.
        config: its settings as plain data without secrets.
        rank: of this process.
        facts: hashes and sizes that trackers show beside the settings.
        say: tells the user of a failure, once for each.
        alarm: whether a stall is told where `alerts` asks for it: in a process that trains.
    """
    if rank != 0:
        return None
    mirror = open_mirror(rundir, config, rank, facts, say)
    found: list[Tracker] = [] if mirror is None else [mirror]
    asked = config.get("tracking") or {}
    shown = {**config, **(facts or {})}
    found += [kind(rundir, shown, say) for name, kind in KINDS.items() if asked.get(name)]
    alerts = alert_settings(config)
    if alarm and alerts.used and "stall" in alerts.events:
        found.append(StallAlarm(rundir, alerts))
    return Trackers(found) if found else None
