"""What torchrun starts for `motet cluster probe`, on every rank: `python -m
motet.launcher.measure.cluster_worker ASKED.json RESULT.json`.

The first rank of every machine writes the result, or why there is none, for the command that
started it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import read_json, write_json
from motet.core.marks import marking
from motet.core.processes import die_with_parent

TOLD = "@probe "
"""What begins a line of standard output that says what is measured now."""


def main(arguments: list[str]) -> int:
    """Join the other ranks and measure; 0 when it was done."""
    die_with_parent(signal.SIGKILL)
    asked, result = read_json(Path(arguments[0])), Path(arguments[1])
    first = os.environ["LOCAL_RANK"] == "0"
    try:
        found = _measure(asked, first)
    except UserError as error:
        if first:
            write_json(result, {"error": str(error)})
        return 2
    if first:
        write_json(result, found)
    return 0


def _measure(asked: dict[str, Any], first: bool) -> dict[str, Any]:
    from motet.parallel.cluster.probe.ranks import Measurer
    from motet.parallel.cluster.probe.survey import survey
    from motet.parallel.runtime.mesh import join, leave

    world = join(asked["device"], asked["timeout_s"])

    def tell(text: str) -> None:
        if first:
            print(f"{TOLD}{text}", flush=True)

    tell(f"{world.size} rank{'s' if world.size > 1 else ''} found each other")
    try:
        return survey(Measurer(world, tell), asked["groups"], asked["series_s"])
    finally:
        leave()


if __name__ == "__main__":
    with marking():
        sys.exit(main(sys.argv[1:]))
