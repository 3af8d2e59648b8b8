"""Draw what `motet status` and `motet logs` show of real runs, as they are now, into SVG files
beside this one.

    python docs/img/following.py --runs FOLDER --run NAME [--attempt N]

The runs are left as they are; `docs/following.md` says which ones are in the pictures.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from motet.launcher.commands.logs import painter
from motet.launcher.commands.status import open_run, picture
from motet.launcher.follow.facts import find_runs
from motet.launcher.follow.logs import LogChoice, Merged
from motet.launcher.follow.overview import look
from motet.launcher.jobs.schedulers import Schedulers

HERE = Path(__file__).parent
WIDTH = 132


def draw(name: str, commands: dict[str, Callable[[Console], None]]) -> None:
    """Write one picture: commands, each with what it prints under it."""
    console = Console(
        record=True, file=io.StringIO(), force_terminal=True, width=WIDTH, highlight=False
    )
    for command, show in commands.items():
        console.print(Text(f"$ {command}", style="bold"))
        show(console)
        console.print()
    # An id of its own, so that the same output gives the same file.
    console.save_svg(str(HERE / f"{name}.svg"), title="motet", unique_id=name)


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--run", required=True, help="the one that is shown in detail")
    parser.add_argument("--attempt", type=int, help="also shown by `motet logs`, in part")
    arguments = parser.parse_args()

    def status(run: str | None) -> Callable[[Console], None]:
        def show(console: Console) -> None:
            runs = [open_run(run, arguments.runs)] if run else find_runs(Path(arguments.runs))
            views, records = look(runs, Schedulers(), time.time())
            chosen = argparse.Namespace(run=run, runs=arguments.runs)
            console.print(picture(chosen, views, records), soft_wrap=bool(run))

        return show

    def logs(attempt: int | None, lines: int) -> Callable[[Console], None]:
        def show(console: Console) -> None:
            run = open_run(arguments.run, arguments.runs)
            painter(console)(Merged(run, LogChoice(attempt=attempt), lines).poll(flush=True))

        return show

    run, attempt = arguments.run, arguments.attempt
    draw("status", {"motet status": status(None), f"motet status {run}": status(run)})
    shown = {}
    if attempt:
        shown[f"motet logs {run} --attempt {attempt} --lines 5"] = logs(attempt, 5)
    draw("logs", {**shown, f"motet logs {run} --lines 8": logs(None, 8)})


if __name__ == "__main__":
    main()
