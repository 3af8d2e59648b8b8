"""What Slurm says of the jobs of many runs: one call for the queue, and one more for jobs that it
has forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from motet.launcher.follow.facts import Facts
from motet.slurm.errors import SlurmError

if TYPE_CHECKING:
    from motet.slurm.client import Client, JobRecord

JOBS_PER_RUN = 20
"""Only so many of the newest jobs of a run are asked for: older ones have ended."""
JOBS_PER_CALL = 2000
"""With more, all jobs of the user are asked for: an argument holds 128 KiB."""


ENDED = frozenset(
    {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
    | {"BOOT_FAIL", "DEADLINE", "REVOKED"}
)
"""States of jobs that Slurm still lists, some minutes after their end."""


@dataclass(frozen=True)
class Records:
    """Slurm's answers.

    Attributes:
        queue: jobs that wait, run or end now, or ended lately.
        history: ended jobs, where the site keeps accounts.
        problem: why there is no answer; "" when there is one, or none was needed.
    """

    queue: Mapping[str, JobRecord] = field(default_factory=dict)
    history: Mapping[str, JobRecord] = field(default_factory=dict)
    problem: str = ""

    def live(self, facts: Facts) -> list[JobRecord]:
        """Return the jobs of a run that wait, run or are about to end, in the order submitted."""
        listed = [self.queue[id_] for id_ in job_ids(facts) if id_ in self.queue]
        return [job for job in listed if job.state not in ENDED]

    def ended(self, facts: Facts) -> JobRecord | None:
        """Return the newest ended job of a run that Slurm knows."""
        known = {**self.history, **self.queue}
        found = [known[id_] for id_ in job_ids(facts) if id_ in known]
        return next((job for job in reversed(found) if job.state in ENDED), None)


def job_ids(facts: Facts) -> list[str]:
    """Return the newest jobs of a run, in the order submitted."""
    return [str(job["job_id"]) for job in facts.jobs[-JOBS_PER_RUN:]]


def ask(runs: Sequence[Facts], client: Client) -> Records:
    """Ask Slurm of all runs at once, and only of those that are not finished: at most two calls.

    A Slurm that is absent, hangs or refuses is no error: `problem` says so, and folders alone
    decide.
    """
    waiting = [facts for facts in runs if facts.jobs and not facts.finished]
    if not waiting:
        return Records()
    if not client.available():
        return Records(problem="Slurm's commands are not on this machine")
    ids = [id_ for facts in waiting for id_ in job_ids(facts)]
    try:
        queue = client.queue(ids if len(ids) <= JOBS_PER_CALL else ())
    except SlurmError as error:
        return Records(problem=str(error))
    forgotten = [
        id_
        for facts in waiting
        if not facts.lives_here() and not any(i in queue for i in job_ids(facts))
        for id_ in job_ids(facts)[-1:]
    ]
    if not forgotten:
        return Records(queue)
    try:
        return Records(queue, client.history(forgotten[-JOBS_PER_CALL:]))
    except SlurmError as error:
        return Records(queue, problem=str(error))
