"""The state of a run, decided from its folder and its scheduler's records: pure, so that every case
is a test of a few lines.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from motet.core import format
from motet.core.jobs import JobRecord, JobState
from motet.launcher.follow.facts import Facts
from motet.launcher.follow.records import Records
from motet.launcher.jobs.schedulers import title
from motet.launcher.runs.attempts import HANDED_OVER

ACTIVE = frozenset({"pending", "starting", "running", "completing", "suspended"})
"""States in which something will still happen by itself."""
STATES = (*sorted(ACTIVE), "new", "stopped", "cancelled", "crashed", "lost", "finished")
SILENT_S, SILENT_STEPS = 120.0, 20.0
"""A run that trains is called silent after this time without a row, and after that many steps'
time.
"""
_QUEUED = {
    JobState.PENDING: "pending",
    JobState.ENDING: "completing",
    JobState.SUSPENDED: "suspended",
}


@dataclass(frozen=True)
class State:
    """What a run does.

    Attributes:
        name: one of `STATES`.
        why: reason of waiting or ending, in words; "" when there is nothing to add.
        advice: the command to type next; "" when there is none.
        job: the job that decided.
        warnings: what needs an eye although the run goes on.
    """

    name: str
    why: str = ""
    advice: str = ""
    job: JobRecord | None = None
    warnings: tuple[str, ...] = ()

    @property
    def active(self) -> bool:
        """Whether something will still happen by itself."""
        return self.name in ACTIVE


def decide(facts: Facts, records: Records, now: float) -> State:
    """Return the state of a run; the folder comes first, then the queue, then what the newest
    attempt and the accounts say.

    Args:
        facts: of its folder.
        records: answers of schedulers.
        now: Unix time.
    """
    restarted = facts.lock_pid is not None and facts.attempt.get("reason") != "finished"
    if facts.finished and not restarted:
        return State("finished", advice=f"motet report {shown(facts.run.root)}")
    live = records.live(facts)
    running = next((job for job in live if job.state is JobState.RUNNING), None)
    if facts.lives_here() or running is not None:
        return _running(facts, running, now)
    if live:
        return _queued(facts, live[0])
    elsewhere = facts.seen_elsewhere(now)
    if elsewhere is not None:
        return _running(facts, None, now, f"on {elsewhere.host}")
    return _ended(facts, records)


def _running(facts: Facts, job: JobRecord | None, now: float, where: str = "") -> State:
    ready = facts.attempt.get("ended") is None and facts.attempt.get("segment") is not None
    if not ready or (job is not None and not _of_this_start(facts, job)):
        return State("starting", "; ".join(filter(None, (where, facts.waiting))), job=job)
    why = "; ".join(filter(None, (where, facts.waiting)))
    return State("running", why, job=job, warnings=tuple(_warnings(facts, job, now)))


def _of_this_start(facts: Facts, job: JobRecord) -> bool:
    """Return whether the newest attempt is of this start of a job, and not of the one before: by
    what the job wrote down, by times only where it wrote nothing.
    """
    begun = facts.begun
    if begun.get("job_id") == job.id and isinstance(begun.get("restarts"), int):
        return bool(begun["restarts"] >= job.restarts and facts.number >= begun.get("attempt", 0))
    started = epoch(job.start)
    return started is None or bool(facts.attempt["started"] >= started)


def _warnings(facts: Facts, job: JobRecord | None, now: float) -> list[str]:
    found = []
    pace = facts.pace
    quiet = now - max(pace.last_row or 0.0, facts.attempt["started"])
    if quiet > max(SILENT_S, SILENT_STEPS * (pace.step_s or 0.0)):
        found.append(f"no step for {format.clock(quiet)}")
    if facts.skipped:
        found.append(f"checkpoints are skipped: {facts.skipped.splitlines()[0]}")
    left = pace.seconds_left(facts.tokens) if facts.tokens is not None else None
    end, start = (epoch(job.end), epoch(job.start)) if job else (None, None)
    if left is not None and end is not None and now + left > end:
        more = more_jobs(left, now, start, end)
        jobs = f"; {more} more job{'s' * (more > 1)} of this length" if more else ""
        found.append(f"will not finish before its limit in {format.clock(end - now)}{jobs}")
    return found


def more_jobs(left_s: float, now: float, start: float | None, end: float) -> int:
    """Return how many jobs like the one that ends at `end` are needed after it; 0 when its length
    is unknown.
    """
    if start is None or end <= start:
        return 0
    return math.ceil((now + left_s - end) / (end - start))


def _queued(facts: Facts, job: JobRecord) -> State:
    why = "its job is being cleaned up" if job.state is JobState.ENDING else job.why
    return State(_QUEUED.get(job.state, "starting"), why, job=job)


def _ended(facts: Facts, records: Records) -> State:
    """Say how a run ended that nothing trains and nothing will."""
    job = records.ended(facts)
    resume = f"motet resume {shown(facts.run.root)}"
    if facts.guest:
        resume = "start its script again, with motet.Guest(..., resume=True)"
    reason = facts.attempt.get("reason")
    if reason == "stopped":
        name = "cancelled" if facts.cancelled else "stopped"
        return State(name, "as asked, after a checkpoint", resume, job)
    if facts.stopped_early:
        return State("stopped", "as asked, before it trained", resume, job)
    if facts.error:
        return State("crashed", facts.error.splitlines()[0], resume, job)
    if facts.culprit or reason == "crashed":
        return State("crashed", facts.culprit or "it left no word of why", resume, job)
    if facts.cancelled:
        return State("cancelled", "as asked", resume, job)
    if job is not None and job.state is not JobState.SUCCEEDED:
        name = "cancelled" if job.state is JobState.CANCELLED else "lost"
        return State(name, f"job {job.id}: {job.why or job.state.value}", resume, job)
    if facts.number == 0:
        return _never_begun(facts, records, resume)
    if reason == HANDED_OVER:
        return State("stopped", "after a stage; other ranks go on with the next", resume, job)
    if reason not in (None, "running", "lost"):
        return State("stopped", str(reason), resume, job)
    return State("lost", _lost(facts, records), resume, job)


def _never_begun(facts: Facts, records: Records, resume: str) -> State:
    if not facts.jobs:
        return State("new", "it was never started", resume)
    if records.no_answer(facts):
        silent = title(facts.scheduler)
        return State("lost", f"its job may be waiting: {silent} does not answer", "")
    newest = facts.jobs[-1]["job_id"]
    logs = f"motet logs {shown(facts.run.root)}"
    return State("lost", f"job {newest} left the queue before it began ({logs})", resume)


def _lost(facts: Facts, records: Records) -> str:
    """Say what is known of an attempt that ended without a word."""
    rank = next((p for p in facts.processes if p.rank == 0), None)
    where = f" on {rank.host}" if rank and rank.host and not rank.is_here else ""
    seen = f"; last seen {at(rank.seen)}{where}" if rank else ""
    name = title(facts.scheduler)
    if records.no_answer(facts) and facts.jobs:
        return f"{name} does not answer, and its folder shows nobody who trains it{seen}"
    forgotten = f"; {name} has forgotten its job" if facts.jobs else ""
    return (
        f"attempt {facts.number} ended without a word: killed, or its machine went "
        f"down{seen}{forgotten}"
    )


def epoch(iso: str) -> float | None:
    """Return the Unix time of a time as schedulers write it, which is local; None if it is none."""
    try:
        return datetime.fromisoformat(iso).timestamp()
    except ValueError:
        return None


def at(seconds: float) -> str:
    """Return a Unix time as local date and minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def shown(path: Path) -> str:
    """Return a path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
