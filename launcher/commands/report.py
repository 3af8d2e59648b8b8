"""`motet report RUN`."""

from __future__ import annotations

import argparse

from motet.core.files import read_json
from motet.launcher.commands import common, options
from motet.launcher.output import terminal
from motet.launcher.runs.rundir import RunDir


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run."""
    options.dry_run(parser)
    options.as_json(parser)
    options.run_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Analyse a run and write report.json and report.html."""
    rundir = common.open_run(arguments.run)
    if arguments.dry_run:
        print(f"# reads  {rundir.metrics}\n#        {rundir.probes}\n#        {rundir.ledger}")
        print(f"# writes {rundir.report_json}\n#        {rundir.report_html}")
        return 0
    build(rundir, quiet=arguments.json)
    if arguments.json:
        terminal.print_json(read_json(rundir.report_json))
    return 0


def build(rundir: RunDir, quiet: bool = False) -> None:
    """Make the report, show its summary and say where it is."""
    from motet.launcher import report

    path = report.build(rundir)
    if not quiet:
        terminal.console().print(report.terminal_summary(read_json(rundir.report_json)))
        print(f"\nreport: {path}")
