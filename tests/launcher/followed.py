"""Run folders as training leaves them, made in a moment, and a Slurm that says what a test
wants.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core.files import atomic_write, write_json
from motet.core.jobs import JobRecord
from motet.launcher.jobs.scheduler import Scheduler
from motet.launcher.jobs.schedulers import Schedulers
from motet.launcher.jobs.slurm_scheduler import SlurmScheduler
from motet.launcher.runs.rundir import RunDir
from motet.slurm import states
from motet.slurm.errors import SlurmError

SEQUENCES, LENGTH = 8, 128
TOKENS_PER_STEP = SEQUENCES * LENGTH
DEAD_PID = 0x3FFFFFFF
NOW = float(int(time.time()))


def make_run(folder: Path, name: str, steps: int = 100, **manifest: Any) -> RunDir:
    """Make a run that was frozen and never started."""
    run = RunDir(folder / name)
    run.create()
    atomic_write(
        run.resolved_yaml, f"name: {name}\ntraining:\n  steps: {steps}\n  tokens: null\nseed: 0\n"
    )
    facts = {
        "name": name,
        "created": NOW - 3600,
        "parameters": 84_128,
        "sequence_length": LENGTH,
        "tokens_per_step": TOKENS_PER_STEP,
        "config": {"batch": {"sequences": SEQUENCES, "ramp": []}},
    }
    write_json(run.manifest, {**facts, **manifest})
    return run


def add_attempt(
    run: RunDir,
    reason: str = "running",
    start_step: int = 0,
    end_step: int | None = None,
    pids: Mapping[int, str] | None = None,
    seen: float | None = None,
    **facts: Any,
) -> int:
    """Add an attempt; `pids` are the texts of its pid files, by default one of a process that is
    dead.
    """
    number = run.next_attempt()
    started = NOW - 600
    told = {
        "attempt": number,
        "start_step": start_step,
        "end_step": end_step,
        "world_size": 2,
        "started": started,
        "ended": None if reason == "running" else NOW - 60,
        "reason": reason,
        "segment": number,
    }
    write_json(run.attempt(number) / "attempt.json", {**told, **facts})
    for rank, text in (pids or {0: f"{DEAD_PID} {socket.gethostname()}"}).items():
        path = run.attempt(number) / f"pid-{rank}"
        atomic_write(path, text)
        if seen is not None:
            os.utime(path, (seen, seen))
    return number


def step_rows(
    steps: Iterable[int], end: float = NOW, step_s: float = 2.0, loss: float = 3.5
) -> list[dict[str, Any]]:
    """Rows of steps, one every `step_s`, the last at `end`."""
    steps = list(steps)
    return [
        {
            "kind": "step",
            "step": step,
            "time": end - step_s * (steps[-1] - step),
            "loss": loss,
            "tokens": step * TOKENS_PER_STEP,
            "tokens_per_s": 2 * TOKENS_PER_STEP / step_s,
            "skipped": False,
        }
        for step in steps
    ]


def write_rows(run: RunDir, rows: Sequence[Mapping[str, Any]], torn: str = "") -> None:
    """Append rows to the metrics, and a torn line."""
    with run.metrics.open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows) + torn)


def add_jobs(run: RunDir, *ids: str) -> None:
    """Write down that jobs were submitted."""
    entries = [
        {
            "job_id": id_,
            "submitted": NOW - 700,
            "array_task": None,
            "dependency": "",
            "resumed": False,
        }
        for id_ in ids
    ]
    write_json(run.jobs_json, entries)


def job(id_: str, state: str = "RUNNING", **fields: Any) -> JobRecord:
    """A record of Slurm; `state` is its word."""
    reason = fields.get("reason", "")
    found = {"state": states.state(state), "word": state, "why": states.why(state, reason)}
    return JobRecord(**{"id": id_, "name": "x", **found, **fields})


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


class OneScheduler(Schedulers):
    """The same scheduler for every run."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def of(self, run: RunDir, name: str) -> Scheduler:
        return self.scheduler


class FakeClient(OneScheduler):
    """Answers like Slurm, and keeps what it was asked; stands in for the schedulers of all runs as
    well.
    """

    def __init__(
        self,
        *queue: JobRecord,
        history: Sequence[JobRecord] = (),
        fails: str = "",
        absent: bool = False,
    ) -> None:
        scheduler = SlurmScheduler()
        scheduler.client = self  # type: ignore[assignment]
        super().__init__(scheduler)
        self.jobs = {job.id: job for job in queue}
        self.past = {job.id: job for job in history}
        self.fails, self.absent = fails, absent
        self.calls: list[tuple[Any, ...]] = []

    def available(self) -> bool:
        return not self.absent

    def queue(self, ids: Sequence[str] = ()) -> dict[str, JobRecord]:
        self.calls.append(("queue", *ids))
        if self.fails:
            raise SlurmError(self.fails)
        return {id_: job for id_, job in self.jobs.items() if not ids or id_ in ids}

    def history(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        self.calls.append(("history", *ids))
        return {id_: self.past[id_] for id_ in ids if id_ in self.past}

    def cancel(self, ids: Sequence[str], signal: str | None = None) -> None:
        self.calls.append(("cancel", signal, *ids))
        if self.fails:
            raise SlurmError(self.fails)
        for id_ in ids:
            self.jobs.pop(id_, None)
