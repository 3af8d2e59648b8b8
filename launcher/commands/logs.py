"""`motet logs`: what the ranks of a run printed, merged; with -f until the run ends."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from motet.core.errors import UserError
from motet.launcher.commands import common, options
from motet.launcher.follow.logs import JOB, LogChoice, LogLine, Merged
from motet.launcher.follow.overview import look
from motet.launcher.follow.state import State
from motet.launcher.jobs.schedulers import Schedulers
from motet.launcher.output import terminal
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_LINES = 20
FIRST_PAUSE_S, LONGEST_PAUSE_S, PAUSE_GROWTH = 0.2, 2.0, 1.5
FIRST_ASK_S, LONGEST_ASK_S = 5.0, 60.0
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
INTERRUPTED = 130


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, and which of its lines."""
    options.as_json(parser)
    options.run_folder(parser)
    options.runs_folder(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    rank = "only this rank, or job for the job's output"
    parser.add_argument("--rank", metavar="R", help=rank)
    parser.add_argument(
        "--attempt",
        type=int,
        metavar="N",
        help="default: the newest; with -f, those of the newest start",
    )
    lines = "last lines of each rank (default 20)"
    parser.add_argument("--lines", type=int, metavar="N", help=lines)


def run(arguments: argparse.Namespace) -> int:
    """Print the last lines of every rank; with --follow go on."""
    rundir = common.open_run(arguments.run, arguments.runs)
    lines = DEFAULT_LINES if arguments.lines is None else arguments.lines
    if lines < 0:
        raise UserError(f"--lines={lines} is below 0; give how many of the last lines to show")
    merged = Merged(rundir, choice_of(arguments, rundir), lines)
    show = _as_json if arguments.json else painter(terminal.console())
    try:
        if arguments.follow:
            return follow(merged, show, Watched(rundir, Schedulers()))
    except KeyboardInterrupt:
        return INTERRUPTED
    found = merged.poll(flush=True)
    show(found)
    if not found:
        print("motet: these ranks printed nothing that was kept", file=sys.stderr)
    return 0


def choice_of(arguments: argparse.Namespace, rundir: RunDir) -> LogChoice:
    """Return which lines the arguments ask for.

    Raises:
        UserError: there is no such rank or attempt.
    """
    rank: int | str | None = arguments.rank
    rank = JOB if rank == "job" else rank
    if rank is not None and rank != JOB:
        if not str(rank).isdecimal():
            raise UserError(f"--rank={rank} is no rank; give a number from 0 on, or job")
        rank = int(rank)
    newest = rundir.latest_attempt()
    if arguments.attempt is not None and not 1 <= arguments.attempt <= newest:
        there = f"there are 1 to {newest}" if newest else "none has begun"
        raise UserError(
            f"--attempt={arguments.attempt}: {rundir.root} has no such attempt; {there}"
        )
    return LogChoice(rank, arguments.attempt, whole_launch=arguments.follow)


class Watched:
    """Whether anything of a run is still to come; its scheduler is asked less and less often.

    Args:
        run: the run.
        schedulers: asked when nothing of it runs here.
        clock: monotonic seconds.
    """

    def __init__(
        self, run: RunDir, schedulers: Schedulers, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.run, self.schedulers, self.clock = run, schedulers, clock
        self._ask_s = FIRST_ASK_S
        self._next_s = clock()

    def ended(self) -> State | None:
        """Return the state of a run that has come to an end; None while it goes on, or while its
        scheduler does not say.
        """
        if self.clock() < self._next_s and not self.run.done.exists():
            return None
        (view,), records = look([self.run], self.schedulers, time.time())
        if view.facts.jobs:
            self._next_s = self.clock() + self._ask_s
            self._ask_s = min(LONGEST_ASK_S, self._ask_s * PAUSE_GROWTH)
        unsure = bool(records.problem) and not view.facts.finished
        return None if view.state.active or unsure else view.state


def follow(
    merged: Merged,
    show: Callable[[Sequence[LogLine]], None],
    watched: Watched,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show lines as they come, those of new attempts too, until the run ends."""
    pause_s = FIRST_PAUSE_S
    while True:
        found = merged.poll()
        show(found)
        if found:
            pause_s = FIRST_PAUSE_S
        else:
            state = watched.ended()
            if state is not None:
                show(merged.poll(flush=True))
                why = f": {state.why}" if state.why else ""
                print(f"motet: {merged.run.name} is {state.name}{why}", file=sys.stderr)
                return 0
            pause_s = min(LONGEST_PAUSE_S, pause_s * PAUSE_GROWTH)
        sleep(pause_s)


def _as_json(lines: Sequence[LogLine]) -> None:
    for line in lines:
        source = line.source
        row = {"attempt": source.attempt or None, "rank": source.rank, "line": line.text}
        print(json.dumps(row, ensure_ascii=False))
    sys.stdout.flush()


def painter(console: Console) -> Callable[[Sequence[LogLine]], None]:
    """Return what prints lines with the attempt and rank before each, coloured by rank on a
    terminal.
    """
    from rich.text import Text

    def paint(lines: Sequence[LogLine]) -> None:
        for line in lines:
            rank = line.source.rank
            colour = "dim" if isinstance(rank, str) else _COLOURS[rank % len(_COLOURS)]
            prefix = Text(f"[{line.source.label}] ", style=colour)
            console.print(prefix + Text(line.text), soft_wrap=True, crop=False)
        sys.stdout.flush()

    return paint
