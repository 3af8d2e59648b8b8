"""`motet report RUN`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.launcher.commands import common, export_table, options
from motet.launcher.config import run_yaml
from motet.launcher.output import terminal
from motet.launcher.report import ended
from motet.launcher.runs.rundir import RunDir

FORMATS = ("md", "csv", "latex")
"""Of `--format`: those of `motet export --table` that are text."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run."""
    options.dry_run(parser)
    options.as_json(parser)
    parser.add_argument(
        "--wandb",
        action="store_true",
        help="send effects, intervals, p and verdicts to the run's W&B run and other trackers, too",
    )
    parser.add_argument(
        "--table",
        choices=export_table.PARTS,
        help="print a table instead, to copy; `motet export --table` writes files of them",
    )
    parser.add_argument("--format", choices=FORMATS, help=f"of --table (default: {FORMATS[0]})")
    options.run_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Analyse a run and write report.json and report.html; 1 when the run folder is damaged."""
    if arguments.format and not arguments.table:
        parts = ", ".join(export_table.PARTS)
        raise UserError(f"--format {arguments.format} is of a table; give --table {parts}")
    rundir = common.open_run(arguments.run)
    if arguments.table:
        return print_table(rundir, arguments)
    if arguments.dry_run:
        print(f"# reads  {rundir.metrics}\n#        {rundir.probes}\n#        {rundir.ledger}")
        print(f"# writes {rundir.report_json}\n#        {rundir.report_html}")
        return 0
    if not os.access(rundir.root, os.W_OK):
        raise UserError(
            f"{rundir.root} may be read by you and not written to, and the report is a file of it; "
            f"`motet report {arguments.run} --table answers` prints the answers"
        )
    found = build(rundir, quiet=arguments.json)
    if arguments.json:
        terminal.print_json(found)
    if arguments.wandb:
        ended.send_answers(rundir, run_yaml.load(rundir.resolved_yaml), found)
    return 1 if found.get("damaged") else 0


def print_table(rundir: RunDir, arguments: argparse.Namespace) -> int:
    """Print one table of the run; the report is left as it is.

    Raises:
        UserError: another way to show the report is asked for as well.
    """
    for name in ("json", "wandb"):
        if getattr(arguments, name):
            raise UserError(f"--table and --{name} are two things; ask for one")
    form = arguments.format or FORMATS[0]
    if arguments.dry_run:
        print(f"# reads  {rundir.root}\n# writes standard output ({arguments.table} as {form})")
        return 0
    print(export_table.table(rundir.root, arguments.table, form).decode(), end="")
    return 0


def build(rundir: RunDir, quiet: bool = False) -> dict[str, Any]:
    """Make the report, show its summary and say where it is; return it."""
    from motet.launcher import report

    path = report.build(rundir)
    found: dict[str, Any] = read_json(rundir.report_json)
    if not quiet:
        terminal.console().print(report.terminal_summary(found))
        print(f"\nreport: {path}")
    return found
