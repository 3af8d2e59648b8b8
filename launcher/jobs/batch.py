"""What a batch job does before and after its step: `python -m motet.launcher.batch begin|end RUN
...`. No torch.

`begin` prints the attempt that the job is to make, and nothing when there is nothing left to do.
`end` decides what becomes of the job; its exit code tells the batch script. Both read the run's
folder only, so a job that was cut off at any point goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motet.core.access import follow
from motet.core.errors import UserError
from motet.core.files import write_json
from motet.core.jobs import CurrentJob, JobExit
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs import schedulers
from motet.launcher.jobs.scheduler import JobRequest
from motet.launcher.runs import attempts
from motet.launcher.runs.job_files import read_begun, read_command, read_jobs
from motet.launcher.runs.rundir import RunDir

ASKED_TO_STOP = (0, 128 + 1, 128 + 2, 128 + 10, 128 + 12, 128 + 15)
"""Exit codes of a step that was told to stop: by its own account, or by a signal before it could
listen.
"""


OUTSIDE = CurrentJob("")
"""In place of a job where there is none."""


def restarts_of(run: RunDir, job: CurrentJob) -> int:
    """Return how often this job was requeued, as it begins: by its scheduler's count, and by our
    own where that is more.
    """
    before = read_begun(run) if run.job_begun.exists() else {}
    same = before.get("job_id") == job.id
    return max(job.restarts, before["restarts"] + 1) if same else job.restarts


def begin(run: RunDir, job: CurrentJob | None) -> tuple[int, int, str]:
    """Claim the attempt of this job.

    Returns:
        The exit code, the attempt (0 when there is nothing to do), and what to say.
    """
    settings = run_yaml.load(run.resolved_yaml)
    job = job or OUTSIDE
    request, restarts = _request(run, settings), restarts_of(run, job)
    if run.finished(settings.steps):
        return JobExit.FINE, 0, f"{run.root} is finished; nothing is left to do"
    if run.cancelled.exists():
        return JobExit.FINE, 0, f"{run.root} was cancelled; `motet resume {run.root}` goes on"
    if restarts > request.max_requeues:
        return JobExit.FAILED, 0, _limit(request.section, restarts, request.max_requeues)
    attempts.settle(run, run.latest_attempt() + 1)
    if loop := attempts.crash_loop(run, since=read_command(run)["since_attempt"]):
        return JobExit.FAILED, 0, f"{loop}\nto try once more: motet resume {run.root}"
    attempt, step = run.next_attempt(), attempts.newest_step(run)
    begun = {"job_id": job.id, "restarts": restarts, "attempt": attempt, "step": step}
    write_json(run.job_begun, begun)
    return JobExit.FINE, attempt, f"job {job.id}, attempt {attempt}: goes on from step {step:,}"


def _request(run: RunDir, settings: RunSettings) -> JobRequest:
    return schedulers.of_run(run, settings.scheduler).request(settings)


def superseded(run: RunDir, job: CurrentJob | None, own: int) -> bool:
    """Return whether this very job has begun anew elsewhere since it claimed the attempt `own`: its
    scheduler took its node for lost.
    """
    begun = read_begun(run)
    return bool(begun["job_id"] == (job or OUTSIDE).id and begun["attempt"] > own)


@dataclass(frozen=True)
class Ending:
    """How a job's step ended.

    Attributes:
        finished, cancelled: the run.
        superseded: whether the job has begun anew elsewhere.
        refusal: what its error.txt says; "" without one.
        code: exit code of the step.
        asked: "time" before the time limit, "killed" when the scheduler ends the job, "" when the
            job was told nothing.
        progressed: whether there is a newer checkpoint than when the job began.
        restarts, most_restarts: requeues so far, and at most.
        requeue: "self", "site" or "never" (see `JobRequest`).
        followed: whether another job of the run waits for the end of this one.
        scheduler, section: its name in messages, and the section of its settings.
    """

    finished: bool = False
    cancelled: bool = False
    superseded: bool = False
    refusal: str = ""
    code: int = 0
    asked: str = ""
    progressed: bool = True
    restarts: int = 0
    most_restarts: int = 20
    requeue: str = "self"
    followed: bool = False
    scheduler: str = "Slurm"
    section: str = "slurm"


def verdict(ending: Ending) -> tuple[JobExit, str]:
    """Return the exit code that tells the batch script what to do, and why."""
    stopped, name = ending.code in ASKED_TO_STOP, ending.scheduler
    if ending.finished:
        return JobExit.FINE, "the run is finished"
    if ending.superseded:
        return (
            JobExit.FINE,
            f"{name} took a node of this start for lost, and the job has begun anew",
        )
    if ending.refusal:
        return (
            JobExit.FAILED,
            f"the run gave up, and another start would not help: {ending.refusal}",
        )
    if ending.cancelled:
        return JobExit.FINE, "the run was cancelled"
    if ending.asked == "killed":
        return JobExit.HOLD, f"{name} is ending this job; if it was preempted, {name} requeues it"
    if not stopped and not ending.progressed:
        return JobExit.FAILED, (
            f"the step failed (exit code {ending.code}) with no checkpoint since the job began; it "
            "is not requeued"
        )
    if ending.asked == "time" and not ending.progressed:
        return JobExit.FAILED, (
            "the time limit came near before the run could save anything; it is not requeued: "
            f"raise {ending.section}.time"
        )
    if ending.asked == "time" and ending.followed:
        return JobExit.FINE, "the time limit is near; the next job of the chain goes on"
    if ending.requeue == "site" and stopped and ending.asked != "time":
        return JobExit.HOLD, "stopped; waiting for the site to requeue this job"
    if ending.requeue != "self":
        code = JobExit.FINE if stopped else JobExit.FAILED
        return code, f"{ending.section}.requeue={ending.requeue}: the job ends here"
    if ending.restarts >= ending.most_restarts:
        return JobExit.FAILED, _limit(ending.section, ending.restarts, ending.most_restarts)
    why = "stopped" if stopped else f"the step failed (exit code {ending.code}) after a checkpoint"
    return JobExit.REQUEUE, f"{why}: the job is requeued, for the {ending.restarts + 1}. time"


def _limit(section: str, restarts: int, most: int) -> str:
    return f"the job was requeued {restarts} times; {section}.max_requeues={most}"


def ending_of(run: RunDir, code: int, asked: str, job: CurrentJob | None, own: int) -> Ending:
    """Read from the run's folder how its step ended.

    Args:
        own: attempt that this start of the job claimed.
    """
    settings, job = run_yaml.load(run.resolved_yaml), job or OUTSIDE
    request, begun = _request(run, settings), read_begun(run)
    refusal = attempts.refusal(run, begun["attempt"])
    return Ending(
        finished=run.finished(settings.steps),
        cancelled=run.cancelled.exists(),
        superseded=superseded(run, job, own),
        refusal=refusal.read_text(errors="replace").strip() if refusal else "",
        code=code,
        asked=asked,
        progressed=attempts.newest_step(run) > begun["step"],
        restarts=begun["restarts"],
        most_restarts=request.max_requeues,
        requeue=request.requeue,
        followed=_followed(run, job.id),
        scheduler=schedulers.title(settings.scheduler),
        section=request.section,
    )


def _followed(run: RunDir, job: str) -> bool:
    """Whether a job of the run was submitted after this one."""
    jobs = read_jobs(run)
    ids = [entry["job_id"] for entry in jobs]
    return job in ids[:-1]


def forgive(run: RunDir) -> None:
    """Note that the newest attempt was lost if it crashed: its job was being ended meanwhile, for a
    lost node or a preemption.
    """
    folder = run.attempt(run.latest_attempt())
    facts = attempts.facts_of(folder)
    if facts.get("reason") == "crashed":
        write_json(folder / "attempt.json", {**facts, "reason": "lost"})


def finish(run: RunDir, code: int, asked: str, job: CurrentJob | None, own: int) -> JobExit:
    """Decide what becomes of a job whose step has ended, write down how its attempts ended, and say
    why.
    """
    ending = ending_of(run, code, asked, job, own)
    found, message = verdict(ending)
    if not ending.superseded:
        attempts.settle(run, run.latest_attempt() + 1)
        if ending.asked == "killed":
            forgive(run)
    say(message)
    return found


def say(message: str) -> None:
    """Write a line into the output of the job."""
    print(f"motet: {message}", file=sys.stderr, flush=True)


def own_attempt(environment: Mapping[str, str]) -> int:
    """Return the attempt that this start of the job claimed; no attempt is later where it is not
    known.
    """
    own = environment.get("MOTET_ATTEMPT", "")
    return int(own) if own.isdecimal() else sys.maxsize


def main(arguments: list[str]) -> int:
    """`begin RUN` or `end RUN CODE ASKED`; messages go to standard error."""
    what, folder, *rest = arguments
    run = RunDir(Path(folder))
    follow(run.root)
    try:
        settings = run_yaml.load(run.resolved_yaml)
        job = schedulers.of_run(run, settings.scheduler).current_job(os.environ)
        if what == "end":
            return finish(run, int(rest[0]), rest[1], job, own_attempt(os.environ))
        code, attempt, message = begin(run, job)
        if attempt:
            print(attempt, flush=True)
        say(message)
        return code
    except UserError as error:
        say(str(error))
        return JobExit.FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
