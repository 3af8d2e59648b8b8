"""`motet experiments audit`: what the final weights consumed."""

from __future__ import annotations

import argparse
import sys

from motet.launcher.commands import common, options
from motet.launcher.output import terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run."""
    options.as_json(parser)
    replay = "recompute every digest from the data"
    parser.add_argument("--replay", action="store_true", help=replay)
    options.run_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Whether every planned exposure was consumed exactly once in the lineage of the final
    weights.
    """
    from motet.launcher.study.after_training import audit_run

    result = audit_run(common.open_run(arguments.run).root, arguments.replay)
    if arguments.json:
        terminal.print_json({"ok": result.ok, "lines": list(result.lines)})
    else:
        for line in result.lines:
            print(line)
        sys.stdout.flush()
    return 0 if result.ok else 1
