"""`motet experiments export`: the exact insertions of a run, or of one to come."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from motet.core.errors import UserError
from motet.launcher.commands import common, options


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, and where to."""
    options.dry_run(parser)
    what = "a run's folder, or a run.yaml (nothing is trained)"
    parser.add_argument("source", metavar="RUN|RUN.YAML", help=what)
    parser.add_argument("output", metavar="FILE", help="OUT.parquet, or OUT.jsonl")
    options.settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write one row for each insertion: position, text, tokens, experiment, unit, arm."""
    from motet.launcher.config import run_yaml
    from motet.launcher.study.exchange import export_run, export_settings

    source, output = Path(arguments.source), Path(arguments.output)
    if output.exists():
        raise UserError(f"{output} exists; choose another name")
    with tempfile.TemporaryDirectory() as aside:
        to = Path(aside) / output.name if arguments.dry_run else output
        if source.suffix in (".yaml", ".yml") and source.is_file():
            count = export_settings(run_yaml.load(source, arguments.settings), to)
        else:
            count = export_run(common.open_run(arguments.source), to)
    print(f"{'would write' if arguments.dry_run else 'wrote'} {count:,} insertions to {output}")
    return 0
