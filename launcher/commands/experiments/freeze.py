"""`motet experiments freeze`: the definition that is signed off, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.launcher.commands import common, options


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml, and where to write."""
    what = "where to write (default: NAME.preregistered.json beside run.yaml)"
    parser.add_argument("--output", metavar="FILE", help=what)
    options.dry_run(parser)
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the definition with its hashes; `train --preregistered FILE` is held to it."""
    from motet.launcher.study.preregistration import registered_text

    settings = common.load_questions(arguments)
    default = Path(arguments.run_yaml).parent / f"{settings.name}.preregistered.json"
    path = Path(arguments.output) if arguments.output else default
    if path.exists() and not arguments.dry_run:
        raise UserError(f"{path} exists; what was signed off is never overwritten: use --output")
    text, sha256 = registered_text(settings)
    if arguments.dry_run:
        print(text, end="")
        return 0
    atomic_write(path, text)
    print(f"wrote {path}: definition {sha256}")
    print(f"motet train {arguments.run_yaml} --preregistered {path}")
    return 0
