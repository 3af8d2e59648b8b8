"""`motet cancel`: save and stop a run, wherever it runs, and see to it that it does not start
again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from motet.core import format
from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.launcher.commands import common, options
from motet.launcher.follow.facts import Facts
from motet.launcher.follow.overview import View, look
from motet.launcher.follow.records import Records
from motet.launcher.follow.state import shown
from motet.launcher.follow.stopping import StopAction, actions
from motet.launcher.jobs.schedulers import Schedulers
from motet.launcher.output import terminal
from motet.launcher.runs.rundir import RunDir

FIRST_PAUSE_S, LONGEST_PAUSE_S, PAUSE_GROWTH = 0.1, 5.0, 1.5
FIRST_JOB_PAUSE_S = 2.0
SAY_EVERY_S = 15.0
GUEST_GRACE_S = 15.0
"""A foreign loop that ignores Ctrl-C, as one started with `&` in a script does, gets SIGTERM after
this time.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run, and how long to wait for it."""
    options.dry_run(parser)
    options.as_json(parser)
    options.run_folder(parser)
    options.runs_folder(parser)
    now = "kill it, without a checkpoint first"
    parser.add_argument("--now", action="store_true", help=now)
    wait = "how long to wait (default 300)"
    parser.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help=wait)


def run(arguments: argparse.Namespace) -> int:
    """Cancel a run; the exit code is 1 when it has not ended within --wait."""
    if not arguments.wait >= 0:
        raise UserError(f"--wait={arguments.wait:g} is below 0; give seconds, 0 for not waiting")
    rundir, schedulers = common.open_run(arguments.run, arguments.runs), Schedulers()
    view, records = _look(rundir, schedulers)
    todo = actions(view, records, arguments.now, time.time())
    if not arguments.json:
        for action in todo:
            print(f"would {action.text}" if arguments.dry_run else action.text)
    if todo and not arguments.dry_run:
        carry_out(todo, view.facts, schedulers)
        _refuse_silence(rundir, records)
        view = wait(rundir, schedulers, arguments.wait, say=not arguments.json)
    _tell(arguments, view, todo)
    return 1 if todo and not arguments.dry_run and view.state.active else 0


def _look(rundir: RunDir, schedulers: Schedulers) -> tuple[View, Records]:
    (view,), records = look([rundir], schedulers, time.time())
    return view, records


def carry_out(todo: Sequence[StopAction], facts: Facts, schedulers: Schedulers) -> None:
    """Do what was decided.

    Raises:
        SchedulerError: a scheduler refused to end a job.
        UserError: a process belongs to somebody else.
    """
    for action in todo:
        if action.kind == "mark":
            atomic_write(facts.run.cancelled, f"{time.time():.0f}\n")
        elif action.kind == "end":
            schedulers.of(facts.run, facts.scheduler).cancel(action.jobs)
        elif action.kind == "save":
            schedulers.of(facts.run, facts.scheduler).signal(action.jobs, action.signal)
        else:
            send(action.pids, signal.Signals[f"SIG{action.signal}"])


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal; a process that has gone meanwhile is no error.

    Raises:
        UserError: a process belongs to somebody else.
    """
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise UserError(f"process {pid} belongs to another user; ask them to cancel") from None


def _refuse_silence(rundir: RunDir, records: Records) -> None:
    if records.problem:
        raise UserError(
            f"{records.silent}: {records.problem}; {shown(rundir.root)} is marked and will not "
            "requeue itself, but its jobs were not ended: "
            f"cancel again when {records.silent} answers"
        )


def wait(
    rundir: RunDir,
    schedulers: Schedulers,
    wait_s: float,
    say: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> View:
    """Wait until nothing of the run waits or runs; return what it is then.

    Args:
        rundir: the run.
        schedulers: asked less and less often, when the run has jobs.
        wait_s: how long at most.
        say: print now and then that it goes on.
    """
    started_s = spoken_s = time.monotonic()
    view, _ = _look(rundir, schedulers)
    pause_s = FIRST_JOB_PAUSE_S if view.facts.jobs else FIRST_PAUSE_S
    insisted = False
    while view.state.active and time.monotonic() - started_s < wait_s:
        sleep(min(pause_s, max(0.0, wait_s - (time.monotonic() - started_s))))
        pause_s = min(LONGEST_PAUSE_S, pause_s * PAUSE_GROWTH)
        view, _ = _look(rundir, schedulers)
        waited_s = time.monotonic() - started_s
        if view.facts.guest and not insisted and waited_s > GUEST_GRACE_S:
            insisted = True
            send([p.pid for p in view.facts.processes if p.lives()], signal.SIGTERM)
        if say and time.monotonic() - spoken_s > SAY_EVERY_S:
            spoken_s = time.monotonic()
            print(
                f"{view.state.name} at step {view.facts.pace.step or 0:,} after "
                f"{format.clock(waited_s)}"
            )
            with contextlib.suppress(OSError):
                sys.stdout.flush()
    return view


def _tell(arguments: argparse.Namespace, view: View, todo: Sequence[StopAction]) -> None:
    """Say what became of it, and what was saved."""
    if arguments.json:
        fields: dict[str, Any] = {"version": 1, "dry_run": arguments.dry_run}
        fields |= {"actions": [action.fields() for action in todo], "run": view.fields()}
        terminal.print_json(fields)
        return
    if not todo:
        print(f"{shown(view.facts.run.root)} is {view.state.name}: there is nothing to cancel")
        return
    if arguments.dry_run:
        return
    step = view.facts.checkpoint
    saved = "nothing is saved yet" if step is None else f"the newest checkpoint is step {step:,}"
    print(f"{view.state.name}; {saved}")
    if view.state.active:
        print(
            f"it has not ended in {arguments.wait:g} s; `motet cancel --now` does not wait for it"
        )
    elif view.state.advice:
        print(f"to go on: {view.state.advice}")
