"""`motet verify`: whether a run folder is as it was written."""

from __future__ import annotations

import argparse

from motet.launcher.commands import common, options
from motet.launcher.output import terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run."""
    options.as_json(parser)
    full = "hash every file of the corpora again, not those alone that were written since"
    parser.add_argument("--full", action="store_true", help=full)
    again = "write again what others keep as well: segment.json of the ledger"
    parser.add_argument("--mend", action="store_true", help=again)
    options.run_folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Name every damaged thing, and what no hash vouches for; 1 when anything is damaged."""
    from motet.launcher.runs.mending import mend
    from motet.launcher.runs.verify import WHOLE, inspect

    rundir = common.open_run(arguments.run)
    mended = mend(rundir) if arguments.mend else []
    found = inspect(rundir, WHOLE, full=arguments.full)
    if arguments.json:
        damage = [vars(one) for one in found.damage]
        facts = {"ok": not damage, "damage": damage, "unknown": found.unknown}
        terminal.print_json({**facts, "parts": found.looked, "mended": mended})
        return int(bool(damage))
    for done in mended:
        print(f"mended: {done}")
    for one in found.damage:
        print(f"DAMAGED: {one}")
    for told in found.unknown:
        print(f"not verified: {told}")
    whole = f"whole: {', '.join(found.looked)}"
    print(f"{len(found.damage)} damaged" if found.damage else whole)
    return int(bool(found.damage))
