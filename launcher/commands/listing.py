"""`motet ls`: the runs of a folder, in short."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from motet.core import format
from motet.launcher.commands import options
from motet.launcher.commands.status import loss_of, problem_line, step_of
from motet.launcher.follow.facts import find_runs
from motet.launcher.follow.overview import document, look
from motet.launcher.follow.state import at
from motet.launcher.jobs.schedulers import Schedulers
from motet.launcher.output import terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """A folder of runs."""
    options.as_json(parser)
    options.runs_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """List runs, the newest last."""
    views, records = look(find_runs(Path(arguments.runs)), Schedulers(), time.time())
    rows = sorted((view.fields() for view in views), key=lambda row: row["created"] or 0.0)
    if arguments.json:
        terminal.print_json(document(rows, records))
        return 0
    if not rows:
        print(f"no runs in {arguments.runs}/; `motet demo` makes one")
        return 0
    terminal.print_table(
        [
            {
                "name": row["name"],
                "state": row["state"],
                "step": step_of(row),
                "loss": loss_of(row),
                "parameters": "–" if row["parameters"] is None else format.short(row["parameters"]),
                "created": None if row["created"] is None else at(row["created"]),
            }
            for row in rows
        ]
    )
    if records.problem:
        print(problem_line(records))
    return 0
