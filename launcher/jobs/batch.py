"""What a batch job does before and after its step: `python -m motet.launcher.jobs.batch begin|end
RUN ...`. No torch.

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
from typing import Any

from motet.core.errors import UserError
from motet.core.files import PRIVATE_UMASK, read_json, write_json
from motet.launcher.config import load as config
from motet.launcher.runs import attempts
from motet.launcher.runs.rundir import RunDir
from motet.slurm.script import HOLD, REQUEUE

FINE, FAILED = 0, 1
ASKED_TO_STOP = (0, 128 + 1, 128 + 2, 128 + 10, 128 + 12, 128 + 15)
"""Exit codes of a step that was told to stop: by its own account, or by a signal before it could
listen.
"""


def job_id_of(environment: Mapping[str, str]) -> str:
    """Return this job's id, ARRAY_TASK in an array, and that of the first component of a
    heterogeneous job.
    """
    if environment.get("SLURM_ARRAY_JOB_ID") and environment.get("SLURM_ARRAY_TASK_ID"):
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID", "")


def restarts_of(run: RunDir, environment: Mapping[str, str]) -> int:
    """Return how often this job was requeued, as it begins: by Slurm's count, and by our own where
    that is more.
    """
    count = environment.get("SLURM_RESTART_COUNT", "0")
    told = int(count) if count.isdecimal() else 0
    before = read_json(run.slurm_begun) if run.slurm_begun.exists() else {}
    same = before.get("job_id") == job_id_of(environment)
    return max(told, before["restarts"] + 1) if same else told


def begin(run: RunDir, environment: Mapping[str, str]) -> tuple[int, int, str]:
    """Claim the attempt of this job.

    Returns:
        The exit code, the attempt (0 when there is nothing to do), and what to say.
    """
    settings = config.load(run.resolved_yaml)
    job, restarts = job_id_of(environment), restarts_of(run, environment)
    if run.finished(settings.steps):
        return FINE, 0, f"{run.root} is finished; nothing is left to do"
    if run.cancelled.exists():
        return FINE, 0, f"{run.root} was cancelled; `motet resume {run.root}` goes on"
    if restarts > settings.slurm.max_requeues:
        return FAILED, 0, _limit(restarts, settings.slurm.max_requeues)
    attempts.settle(run, run.latest_attempt() + 1)
    if loop := attempts.crash_loop(run, since=read_json(run.slurm_command)["since_attempt"]):
        return FAILED, 0, f"{loop}\nto try once more: motet resume {run.root}"
    attempt, step = run.next_attempt(), attempts.newest_step(run)
    write_json(
        run.slurm_begun, {"job_id": job, "restarts": restarts, "attempt": attempt, "step": step}
    )
    return FINE, attempt, f"job {job}, attempt {attempt}: goes on from step {step:,}"


def superseded(run: RunDir, environment: Mapping[str, str]) -> bool:
    """Return whether this very job has begun anew elsewhere since it claimed MOTET_ATTEMPT: Slurm
    took its node for lost.
    """
    begun, own = read_json(run.slurm_begun), environment.get("MOTET_ATTEMPT", "")
    same = begun["job_id"] == job_id_of(environment)
    return same and own.isdecimal() and begun["attempt"] > int(own)


@dataclass(frozen=True)
class Ending:
    """How a job's step ended.

    Attributes:
        finished, cancelled: the run.
        superseded: whether the job has begun anew elsewhere.
        refusal: what its error.txt says; "" without one.
        code: exit code of srun.
        asked: "time" before the time limit, "killed" when Slurm ends the job, "" when the job was
            told nothing.
        progressed: whether there is a newer checkpoint than when the job began.
        restarts, most_restarts: requeues so far, and at most.
        requeue: the setting `slurm.requeue`.
        followed: whether another job of the run waits for the end of this one.
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


def verdict(ending: Ending) -> tuple[int, str]:
    """Return the exit code that tells the batch script what to do, and why."""
    stopped = ending.code in ASKED_TO_STOP
    if ending.finished:
        return FINE, "the run is finished"
    if ending.superseded:
        return FINE, "Slurm took a node of this start for lost, and the job has begun anew"
    if ending.refusal:
        return FAILED, f"the run gave up, and another start would not help: {ending.refusal}"
    if ending.cancelled:
        return FINE, "the run was cancelled"
    if ending.asked == "killed":
        return HOLD, "Slurm is ending this job; if it was preempted, Slurm requeues it"
    if not stopped and not ending.progressed:
        return FAILED, (
            f"the step failed (exit code {ending.code}) with no checkpoint since the job began; it "
            "is not requeued"
        )
    if ending.asked == "time" and not ending.progressed:
        return FAILED, (
            "the time limit came near before the run could save anything; it is not requeued: "
            "raise slurm.time"
        )
    if ending.asked == "time" and ending.followed:
        return FINE, "the time limit is near; the next job of the chain goes on"
    if ending.requeue == "site" and stopped and ending.asked != "time":
        return HOLD, "stopped; waiting for the site to requeue this job"
    if ending.requeue != "self":
        return (FINE if stopped else FAILED), f"slurm.requeue={ending.requeue}: the job ends here"
    if ending.restarts >= ending.most_restarts:
        return FAILED, _limit(ending.restarts, ending.most_restarts)
    why = "stopped" if stopped else f"the step failed (exit code {ending.code}) after a checkpoint"
    return REQUEUE, f"{why}: the job is requeued, for the {ending.restarts + 1}. time"


def _limit(restarts: int, most: int) -> str:
    return f"the job was requeued {restarts} times; slurm.max_requeues={most}"


def ending_of(run: RunDir, code: int, asked: str, environment: Mapping[str, str]) -> Ending:
    """Read from the run's folder how its step ended."""
    settings = config.load(run.resolved_yaml)
    begun = read_json(run.slurm_begun)
    refusal = attempts.refusal(run, begun["attempt"])
    return Ending(
        finished=run.finished(settings.steps),
        cancelled=run.cancelled.exists(),
        superseded=superseded(run, environment),
        refusal=refusal.read_text(errors="replace").strip() if refusal else "",
        code=code,
        asked=asked,
        progressed=attempts.newest_step(run) > begun["step"],
        restarts=begun["restarts"],
        most_restarts=settings.slurm.max_requeues,
        requeue=settings.slurm.requeue,
        followed=_followed(run, job_id_of(environment)),
    )


def _followed(run: RunDir, job: str) -> bool:
    """Whether a job of the run was submitted after this one."""
    jobs: list[Any] = read_json(run.slurm_jobs) if run.slurm_jobs.exists() else []
    ids = [entry["job_id"] for entry in jobs]
    return job in ids[:-1]


def forgive(run: RunDir) -> None:
    """Note that the newest attempt was lost if it crashed: Slurm was ending its job meanwhile, for
    a lost node or a preemption.
    """
    folder = run.attempt(run.latest_attempt())
    facts = attempts.facts_of(folder)
    if facts.get("reason") == "crashed":
        write_json(folder / "attempt.json", {**facts, "reason": "lost"})


def main(arguments: list[str]) -> int:
    """`begin RUN` or `end RUN CODE ASKED`; messages go to standard error."""
    os.umask(PRIVATE_UMASK)
    what, folder, *rest = arguments
    run = RunDir(Path(folder))
    try:
        if what == "begin":
            code, attempt, message = begin(run, os.environ)
            if attempt:
                print(attempt, flush=True)
        else:
            ending = ending_of(run, int(rest[0]), rest[1], os.environ)
            code, message = verdict(ending)
            if not ending.superseded:
                attempts.settle(run, run.latest_attempt() + 1)
                if ending.asked == "killed":
                    forgive(run)
    except UserError as error:
        code, message = FAILED, str(error)
    print(f"motet: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
