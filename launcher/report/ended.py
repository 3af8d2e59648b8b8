"""What follows the end of a run: its answers go to its trackers, and its alerts are sent. Nothing
that fails here changes how the run ended.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.launcher.config import run_yaml
from motet.launcher.rank import alerts

if TYPE_CHECKING:
    from motet.launcher.config.sections import RunSettings
    from motet.launcher.runs.metrics import Tracker
    from motet.launcher.runs.rundir import RunDir


def after(rundir: RunDir, why: str = "") -> None:
    """Tell who asked for it how a run ended; where nobody did, read the settings and no more.

    Args:
        rundir: of the run; finished, where it has its marker.
        why: it ended otherwise than it should, in words; "" = it was finished, or stopped.
    """
    try:
        settings = run_yaml.load(rundir.resolved_yaml)
        if rundir.finished(settings.steps):
            _finished(rundir, settings)
        elif why:
            last = (rundir.checkpoint_steps() or [0])[-1]
            text = f"ended with an error; the newest checkpoint is of step {last:,}: {why}"
            alerts.tell(settings.alerts, rundir, "crash", text, step=last)
    except Exception as error:  # the run is over, and well kept: a message about it is a courtesy
        print(f"motet: after the run: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _finished(rundir: RunDir, settings: RunSettings) -> None:
    tracked = settings.tracking.answers and is_tracked(settings)
    told = settings.alerts.used and {"end", "failed_control"} & set(settings.alerts.events)
    if not tracked and not told:
        return
    from motet.launcher import report

    report.build(rundir)
    found = read_json(rundir.report_json)
    if tracked:
        send_answers(rundir, settings, found)
    failed = failed_controls(found)
    for sentence in failed:
        alerts.tell(settings.alerts, rundir, "failed_control", sentence, step=settings.steps)
    text = f"finished after {settings.steps:,} steps"
    text += f"; {len(failed)} failed: trust no answer" if failed else ""
    alerts.tell(settings.alerts, rundir, "end", text, step=settings.steps)


def is_tracked(settings: RunSettings) -> bool:
    """Whether the run has any tracker."""
    tracking = settings.tracking
    return settings.metrics.wandb != "off" or tracking.tensorboard or tracking.trackio


def failed_controls(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each control that failed."""
    held = ((report.get("answers") or {}).get("controls") or {}).values()
    failed = [one for one in held if one and one.get("ok") is False]
    return [f"{one.get('name')} failed: {one.get('sentence') or 'no reason'}" for one in failed]


def send_answers(rundir: RunDir, settings: RunSettings, report: Mapping[str, Any]) -> None:
    """Send what only the report knows to the trackers of the run: the answers, as a table and as
    summary values, and of a family the effects by member and its cost.

    Raises:
        UserError: it has no tracker.
    """
    from motet.launcher.rank.trackers import open_trackers

    opened = open_trackers(rundir, run_yaml.public(settings), alarm=False)
    if opened is None:
        raise UserError(
            "metrics.wandb is off in this run, and so is all of tracking; set metrics.wandb to "
            "online or offline"
        )
    _hand_over(opened, report)
    opened.close()


def _hand_over(opened: Tracker, report: Mapping[str, Any]) -> None:
    from motet.launcher.report import answer_rows, by_member

    step = int(report["run"]["steps"])
    opened.table("answers", answer_rows.COLUMNS, answer_rows.table(report), step)
    opened.summary(answer_rows.summary(report))
    if report.get("family"):
        opened.table("effects_by_member", by_member.COLUMNS, by_member.table(report), step)
        spent = report["family"].get("cost") or {}
        opened.summary({f"family/{k}": x for k, x in spent.items() if not isinstance(x, dict)})
