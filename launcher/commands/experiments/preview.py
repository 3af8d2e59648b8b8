"""`motet experiments preview`: sample exposures in their context."""

from __future__ import annotations

import argparse

from motet.core.errors import UserError
from motet.launcher.commands import common, options


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml, and how many samples."""
    parser.add_argument("--count", type=int, default=3, metavar="N", help="per experiment")
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Sample exposures, decoded in their context."""
    from motet.launcher.study import before_training

    if arguments.count < 1:
        raise UserError(f"--count {arguments.count} must be at least 1")
    print(before_training.preview(common.load_questions(arguments), arguments.count))
    return 0
