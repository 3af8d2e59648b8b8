"""`motet status`: what the runs of a folder do, or one run in detail."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core import format
from motet.core.errors import UserError
from motet.launcher.commands import common, options
from motet.launcher.follow.facts import find_runs
from motet.launcher.follow.overview import View, detail, document, look
from motet.launcher.follow.records import Records
from motet.launcher.follow.state import ACTIVE, at, shown
from motet.launcher.jobs.schedulers import Schedulers
from motet.launcher.output import terminal
from motet.launcher.runs.attempts import ENDED_WELL

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
FIRST_PAUSE_S, LONGEST_PAUSE_S, PAUSE_GROWTH = 2.0, 30.0, 1.3
_STYLES = {
    "running": "green",
    "finished": "bold green",
    "crashed": "bold red",
    "lost": "red",
    "pending": "yellow",
    "starting": "cyan",
    "suspended": "yellow",
    "completing": "cyan",
}
Fields = dict[str, Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, or a folder of runs."""
    options.as_json(parser)
    parser.add_argument("run", metavar="RUN", nargs="?", help=f"{options.RUN_HELP} (default: all)")
    options.runs_folder(parser)
    parser.add_argument("--watch", action="store_true", help="redraw until nothing runs or waits")


def run(arguments: argparse.Namespace) -> int:
    """Show one run, or all runs of a folder; with --watch again and again."""
    if arguments.watch and arguments.json:
        raise UserError("--watch redraws a table, and --json prints once; leave one of them out")
    schedulers = Schedulers()
    if arguments.watch:
        return _watch(arguments, schedulers)
    views, records = _look(arguments, schedulers)
    if arguments.json:
        whole = [detail(v, records) if arguments.run else v.fields() for v in views]
        terminal.print_json(document(whole, records))
        return 0
    terminal.console().print(picture(arguments, views, records), soft_wrap=bool(arguments.run))
    return 0


def _look(arguments: argparse.Namespace, schedulers: Schedulers) -> tuple[list[View], Records]:
    if arguments.run:
        runs = [common.open_run(arguments.run, arguments.runs)]
    else:
        runs = find_runs(Path(arguments.runs))
    return look(runs, schedulers, time.time())


def _watch(
    arguments: argparse.Namespace,
    schedulers: Schedulers,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Redraw until nothing is active any more; pauses grow while nothing changes."""
    from rich.live import Live

    pause_s, before = FIRST_PAUSE_S, None
    with Live(console=terminal.console(), auto_refresh=False) as live:
        while True:
            views, records = _look(arguments, schedulers)
            live.update(picture(arguments, views, records), refresh=True)
            if not any(view.state.active for view in views):
                return 0
            now = [(view.state.name, view.facts.pace.step) for view in views]
            pause_s = (
                FIRST_PAUSE_S if now != before else min(LONGEST_PAUSE_S, pause_s * PAUSE_GROWTH)
            )
            before = now
            sleep(pause_s)


def picture(
    arguments: argparse.Namespace, views: Sequence[View], records: Records
) -> RenderableType:
    """Return what `status` shows: one run in detail, or a line for each."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if arguments.run:
        parts += one_run(detail(views[0], records))
    elif views:
        parts.append(table_of([view.fields() for view in views]))
        parts.append(Text(tally(views), style="dim"))
    else:
        parts.append(Text(f"no runs in {arguments.runs}/; `motet demo` makes one"))
    if records.problem:
        parts.append(Text(problem_line(records), style="yellow"))
    return Group(*parts)


def problem_line(records: Records) -> str:
    """Return what is said of schedulers that gave no answer."""
    return f"{records.silent}: {records.problem}; shown from folders alone"


def tally(views: Sequence[View]) -> str:
    """Return how many runs are in which state, the active ones first."""
    counts: dict[str, int] = {}
    for view in views:
        counts[view.state.name] = counts.get(view.state.name, 0) + 1
    ordered = sorted(counts, key=lambda name: (name not in ACTIVE, name))
    return f"{len(views):,} runs: " + ", ".join(f"{counts[name]:,} {name}" for name in ordered)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of many runs."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "state"):
        table.add_column(heading, overflow="fold")
    for heading in ("step", "loss", "tokens/s", "left", "attempts"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ends", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        cells = (
            row["name"],
            (row["state"], _STYLES.get(row["state"], "")),
            step_of(row),
            loss_of(row),
            "–" if row["tokens_per_s"] is None else format.short(row["tokens_per_s"]),
            "–" if row["seconds_left"] is None else format.clock(row["seconds_left"]),
            str(row["attempts"]),
            ends(row),
            "; ".join(filter(None, (row["why"], *row["warnings"]))),
        )
        table.add_row(*(Text(*c) if isinstance(c, tuple) else Text(c) for c in cells))
    return table


def step_of(row: Mapping[str, Any]) -> str:
    """Return `120/200`, without the end where it is unknown."""
    end = "?" if row["steps"] is None else f"{row['steps']:,}"
    return f"{row['step']:,}/{end}"


def loss_of(row: Mapping[str, Any]) -> str:
    """Return the loss, a dash before the first step."""
    return "–" if row["loss"] is None else format.loss(row["loss"])


def ends(row: Mapping[str, Any]) -> str:
    """Return when a run will end, or when its scheduler expects to start it."""
    if row["predicted_end"] is not None:
        return at(row["predicted_end"])
    job = row["job"]
    if row["state"] == "pending" and job and job["start"]:
        return f"starts {job['start'].replace('T', ' ')[:16]}"
    return "–"


def one_run(row: Fields) -> list[RenderableType]:
    """Return the parts that describe one run: facts, warnings, attempts, jobs, what is next."""
    from rich.text import Text

    facts = [f"{name.ljust(11)} {value}" for name, value in facts_of(row) if value]
    parts: list[RenderableType] = [Text("\n".join(facts))]
    parts += [Text(f"warning     {warning}", style="yellow") for warning in row["warnings"]]
    if row["attempt_list"]:
        parts += [Text(), _plain_table([attempt_row(a, row) for a in row["attempt_list"]])]
    if row["jobs"]:
        parts += [Text(), _plain_table([job_row(job) for job in row["jobs"]])]
    if row["advice"]:
        parts += [Text(f"\nnext: {row['advice']}")]
    return parts


def facts_of(row: Fields) -> list[tuple[str, str]]:
    """Return the lines that head the detail of a run; one with an empty value is left out."""
    state = f"{row['state']}: {row['why']}" if row["why"] else row["state"]
    speed = "" if row["tokens_per_s"] is None else f"{format.short(row['tokens_per_s'])} tokens/s"
    left = "" if row["seconds_left"] is None else format.clock(row["seconds_left"])
    ended = f"{left}, ends {ends(row)}" if left and row["predicted_end"] else left
    size = "" if row["parameters"] is None else f"{row['parameters']:,} parameters"
    saved = "none yet" if row["checkpoint_step"] is None else f"step {row['checkpoint_step']:,}"
    return [
        ("run", shown(Path(row["run"]))),
        ("state", state),
        ("step", f"{step_of(row)} ({row['tokens']:,} tokens)"),
        ("loss", "" if row["loss"] is None else format.loss(row["loss"])),
        ("speed", speed),
        ("left", ended),
        ("starts", "" if left else ends(row).removeprefix("starts ").replace("–", "")),
        ("checkpoint", saved),
        ("model", size),
        ("last row", "" if row["updated"] is None else at(row["updated"])),
    ]


def attempt_row(attempt: Fields, row: Fields) -> Fields:
    """Return one attempt as a line of its table; only the newest one of a run that trains is
    running.
    """
    started, ended = attempt.get("started"), attempt.get("ended")
    newest = attempt["attempt"] == row["attempts"]
    reason = attempt.get("reason")
    if reason in (None, "running") and not (newest and row["state"] in ACTIVE):
        reason = "crashed" if attempt["why"] else "lost" if started else "never began"
    last = attempt.get("end_step") if reason in ENDED_WELL else None
    if newest and last is None:
        last = row["step"]
    took = None if started is None or ended is None else format.clock(ended - started)
    return {
        "attempt": attempt["attempt"],
        "end": reason or "starting",
        "from step": attempt.get("start_step"),
        "to step": last,
        "ranks": attempt.get("world_size"),
        "started": None if started is None else at(started),
        "took": took,
        "why": attempt["why"] if reason in ("crashed", "lost") else "",
    }


def job_row(job: Fields) -> Fields:
    """Return one job as a line of its table; a job that its scheduler has forgotten has only its
    id.
    """
    record = job["record"] or {}
    submitted = job.get("submitted")
    return {
        "job": job["job_id"],
        "state": record.get("state", "gone"),
        "reason": record.get("reason", ""),
        "partition": record.get("partition"),
        "nodes": record.get("nodes"),
        "submitted": at(submitted) if isinstance(submitted, int | float) else None,
        "start": record.get("start", "").replace("T", " "),
        "end": record.get("end", "").replace("T", " "),
    }


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0]:
        numeric = all(isinstance(row[key], int | None) for row in rows)
        table.add_column(key, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(terminal.cell(value)) for value in row.values()))
    return table
