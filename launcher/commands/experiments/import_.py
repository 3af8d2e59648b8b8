"""`motet experiments import`: somebody else's insertions, made ready for a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.core.hashing import canonical_json
from motet.launcher.commands import options


def arguments(parser: argparse.ArgumentParser) -> None:
    """The file, and where to write."""
    options.dry_run(parser)
    what = "Parquet or JSON lines with the columns position, text (or tokens) and experiment"
    parser.add_argument("source", metavar="FILE", help=what)
    told = "what a run.yaml names (default: NAME.insertions.jsonl here)"
    parser.add_argument("--output", metavar="FILE", help=told)


def run(arguments: argparse.Namespace) -> int:
    """Check every row, and write a file that needs no further package where the run trains."""
    from motet.experiments.design.imported import FORMAT, read_insertions

    source = Path(arguments.source)
    facts, rows = read_insertions(source)
    output = Path(arguments.output or f"{source.stem}.insertions.jsonl")
    if output.exists() and not arguments.dry_run:
        raise UserError(f"{output} exists; choose another name with --output")
    by = sorted({str(row.get("experiment") or "") for row in rows})
    print(f"{len(rows):,} insertions of {len(by):,} experiments: {', '.join(by[:8])}")
    if length := facts.get("sequence_length"):
        print(f"made for data.sequence_length={length}")
    if arguments.dry_run:
        return 0
    header = {"format": FORMAT, "version": 1, **facts}
    atomic_write(output, "".join(canonical_json(row) + "\n" for row in [header, *rows]))
    print(f"wrote {output}; in run.yaml:  experiments: {{insertions: {output}, list: [...]}}")
    return 0
