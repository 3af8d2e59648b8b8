"""`motet export RUN --table`: answers, units, scores or metrics of a run as a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import UserError
from motet.core.marks import marked

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

FORMATS = ("csv", "parquet", "md", "latex")
PARTS = ("answers", "units", "scores", "items", "metrics")


def table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what concerns tables to the arguments of `motet export`."""
    parser.add_argument("--table", choices=FORMATS, help="write a table instead of the model")
    parser.add_argument("--what", choices=PARTS, help="which table (default: answers)")


def run_table(rundir: RunDir, arguments: argparse.Namespace) -> int:
    """Write one table to `--output`, or to standard output.

    Raises:
        UserError: no format, a checkpoint (a table is of the whole run), Parquet to a terminal, a
            format that needs a package, a folder as output.
    """
    if arguments.table is None:
        raise UserError(f"--what={arguments.what} needs a format: --table {', '.join(FORMATS)}")
    if arguments.step is not None:
        raise UserError(f"--step={arguments.step} names a model; a table is of the whole run")
    for name in ("member", "params", "spec", "all"):
        if value := getattr(arguments, name):
            said = f"--{name}" if value is True else f"--{name}={value}"
            raise UserError(f"{said} names a model; a table holds all members")
    part = arguments.what or PARTS[0]
    output = Path(arguments.output) if arguments.output else None
    if output is not None and output.is_dir():
        raise UserError(f"--output={output} is a folder; give the file that holds the table")
    if arguments.dry_run:
        target = output or "standard output"
        print(f"# reads  {rundir.root}\n# writes {target} ({part} as {arguments.table})")
        return 0
    if output is None and arguments.table == "parquet" and sys.stdout.isatty():
        raise UserError("--table parquet is not text; give --output FILE")
    content = table(rundir.root, part, arguments.table)
    if output is None:
        sys.stdout.flush()
        if sys.stdout.isatty():
            content = marked(content.decode()).encode()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return 0
    from motet.core.files import atomic_write

    atomic_write(output, content)
    print(f"wrote {output}")
    return 0


def table(run: Path, part: str, form: str) -> bytes:
    """One part of a run (see `PARTS`) in one of `FORMATS`."""
    from motet.launcher.report.loaded import load
    from motet.launcher.report.tables import FORMATS as WRITERS

    return WRITERS[form](getattr(load(run), part))
