"""`motet resume`: go on with a run from its last checkpoint.

Nothing heavy is imported before the first line: on a slow disk the rest takes longer than people
wait without a word.
"""

from __future__ import annotations

import argparse

from motet.launcher.commands import common, options


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, settings that differ, and the machines that train together."""
    options.dry_run(parser)
    options.run_folder(parser)
    options.settings(parser, "see docs/reference.md")
    options.nodes(parser)
    options.verify(parser)
    anew = "train from step 0 although every checkpoint was damaged"
    parser.add_argument("--from-start", action="store_true", help=anew)


def run(arguments: argparse.Namespace) -> int:
    """Say what goes on, look at what is there, and go on."""
    rundir = common.open_run(arguments.run)
    if not arguments.dry_run:
        print(f"motet: {rundir.name}: going on; what is there is checked first", flush=True)
    from motet.launcher.commands.going_on import go_on

    return go_on(arguments, rundir)
