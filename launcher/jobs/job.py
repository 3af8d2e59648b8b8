"""All of a job whose script does nothing else: `python -m motet.launcher.jobs.job RUN [WORDS ...]`.

It claims an attempt, runs the step (`WORDS`, which start `motet.launcher.node` once on every node
of the job; without words: this machine is the only node), passes signals on, and does what the end
asks for. No torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from motet.core.access import follow
from motet.core.errors import UserError
from motet.core.jobs import JobExit
from motet.core.marks import marking
from motet.core.processes import die_with_parent
from motet.launcher.config import run_yaml
from motet.launcher.jobs import batch, schedulers
from motet.launcher.jobs.scheduler import Scheduler
from motet.launcher.runs.rundir import RunDir

ASKED = {signal.SIGUSR1: "time", signal.SIGTERM: "killed"}
"""What a signal to the job means: its time limit is near; the scheduler is ending it."""
HOLD_S, ALONE_S = 900.0, 40.0
"""How long a job waits to be ended or requeued; and how long, where it was told to end, until only
this process was told, as nobody ends it.
"""
REPEAT_S = 2.0
"""The step is told again and again: it may not have been able to hear yet."""


class _Step:
    """The step of a job, and what the job was told meanwhile."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.asked = ""
        before = {number: signal.signal(number, self._hear) for number in ASKED}
        try:
            self.process = subprocess.Popen(
                list(words),
                env=dict(environment),
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
            self.code = self._wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = ASKED[signal.Signals(number)]

    def _wait(self) -> int:
        """Return the step's exit code, that of a shell where a signal ended it."""
        told_s = -REPEAT_S
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(0.1)
                return 128 - code if code < 0 else code
            if self.asked and time.monotonic() - told_s >= REPEAT_S:
                told_s = time.monotonic()
                self.process.send_signal(signal.SIGUSR1)


def act(
    code: JobExit,
    scheduler: Scheduler,
    environment: Mapping[str, str],
    sleep: Callable[[float], None] = time.sleep,
    requeue: str = "site",
) -> int:
    """Do what the end of a step asks for; return the exit code of the job.

    Args:
        requeue: who requeues a job that was told to end and is not: "self", "site" or "never".
    """
    if code is JobExit.HOLD and requeue != "site":
        sleep(ALONE_S)
        again = (
            "the job is requeued" if requeue == "self" else "it is not requeued: motet resume it"
        )
        batch.say(f"only this process was told to end; {again}")
        code = JobExit.REQUEUE if requeue == "self" else JobExit.FAILED
    if code is JobExit.REQUEUE:
        job = scheduler.current_job(environment)
        assert job is not None  # `begin` has seen it
        scheduler.requeue(job.id)
        sleep(HOLD_S)  # the scheduler ends this process meanwhile
    elif code is JobExit.HOLD:
        sleep(HOLD_S)
    return 0 if code in (JobExit.FINE, JobExit.REQUEUE) else 1


def main(arguments: list[str]) -> int:
    """Run a job to its end; messages go to standard error."""
    run = RunDir(Path(arguments[0]))
    follow(run.root)
    words = arguments[1:] or [sys.executable, "-m", "motet.launcher.node", str(run.root)]
    try:
        settings = run_yaml.load(run.resolved_yaml)
        scheduler = schedulers.of_run(run, settings.scheduler)
        code, attempt, message = batch.begin(run, scheduler.current_job(os.environ))
        batch.say(message)
        if not attempt:
            return int(code)
        environment = {**os.environ, "MOTET_ATTEMPT": str(attempt)}
        step = _Step(words, environment)
        ended = batch.finish(run, step.code, step.asked, scheduler.current_job(os.environ), attempt)
        requeue = scheduler.request(settings).requeue
        return act(ended, scheduler, os.environ, requeue=requeue)
    except UserError as error:
        batch.say(str(error))
        return 1


if __name__ == "__main__":
    with marking():
        sys.exit(main(sys.argv[1:]))
