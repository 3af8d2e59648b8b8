"""What schedulers say of the jobs of many runs: one call of each for what waits and runs, and one
more for jobs that it has forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from motet.core.errors import UserError
from motet.core.jobs import JobRecord
from motet.launcher.follow.facts import Facts
from motet.launcher.jobs.scheduler import Scheduler
from motet.launcher.jobs.schedulers import Schedulers, title

JOBS_PER_RUN = 20
"""Only so many of the newest jobs of a run are asked for: older ones have ended."""
JOBS_PER_CALL = 2000
"""With more, all jobs of the user are asked for: an argument holds 128 KiB."""
Jobs = dict[tuple[str, str], JobRecord]
"""By scheduler (as the run's setting names it) and id."""


@dataclass(frozen=True)
class Records:
    """The answers of schedulers.

    Attributes:
        queue: jobs that wait, run or end now, or ended lately.
        history: ended jobs, where the site keeps accounts.
        problems: scheduler -> why there is no answer of it.
    """

    queue: Jobs = field(default_factory=dict)
    history: Jobs = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """Why answers are missing; "" when there are all, or none was needed."""
        return "; ".join(self.problems.values())

    @property
    def silent(self) -> str:
        """The schedulers that gave no answer, in words."""
        return " and ".join(title(name) for name in self.problems)

    def known(self, facts: Facts) -> dict[str, JobRecord]:
        """Return the newest jobs of a run that its scheduler knows, by id, as submitted."""
        every = {**self.history, **self.queue}
        keys = [(facts.scheduler, id_) for id_ in job_ids(facts)]
        return {id_: every[name, id_] for name, id_ in keys if (name, id_) in every}

    def live(self, facts: Facts) -> list[JobRecord]:
        """Return the jobs of a run that wait, run or are about to end, in the order submitted."""
        keys = [(facts.scheduler, id_) for id_ in job_ids(facts)]
        return [self.queue[k] for k in keys if k in self.queue and not self.queue[k].finished]

    def ended(self, facts: Facts) -> JobRecord | None:
        """Return the newest ended job of a run that its scheduler knows."""
        found = reversed(self.known(facts).values())
        return next((job for job in found if job.finished), None)

    def no_answer(self, facts: Facts) -> bool:
        """Return whether the run's scheduler gave no answer."""
        return facts.scheduler in self.problems


def job_ids(facts: Facts) -> list[str]:
    """Return the newest jobs of a run, in the order submitted."""
    return [str(job["job_id"]) for job in facts.jobs[-JOBS_PER_RUN:]]


def ask(runs: Sequence[Facts], schedulers: Schedulers) -> Records:
    """Ask the schedulers of all runs at once, and only of those that are not finished: at most two
    calls of each.

    A scheduler that is absent, hangs or refuses is no error: `problems` says so, and folders alone
    decide.
    """
    records = Records({}, {}, {})
    for name in dict.fromkeys(facts.scheduler for facts in runs):
        mine = [f for f in runs if f.scheduler == name and f.jobs and not f.finished]
        try:
            groups = _by_scheduler(mine, schedulers)
        except UserError as error:  # a class of the user's own that cannot be read
            records = _with_problem(records, name, str(error))
            continue
        for scheduler, waiting in groups:
            queue, history, problem = _ask_one(waiting, scheduler)
            records.queue.update({(name, id_): job for id_, job in queue.items()})
            records.history.update({(name, id_): job for id_, job in history.items()})
            records = _with_problem(records, name, problem) if problem else records
    return records


def _with_problem(records: Records, name: str, problem: str) -> Records:
    return Records(records.queue, records.history, {**records.problems, name: problem})


def _by_scheduler(
    runs: Sequence[Facts], schedulers: Schedulers
) -> list[tuple[Scheduler, list[Facts]]]:
    """Runs of one scheduler are asked for together; of a class of the user's own there may be
    several versions.
    """
    groups: dict[int, tuple[Scheduler, list[Facts]]] = {}
    for facts in runs:
        scheduler = schedulers.of(facts.run, facts.scheduler)
        groups.setdefault(id(scheduler), (scheduler, []))[1].append(facts)
    return list(groups.values())


def _ask_one(
    waiting: Sequence[Facts], scheduler: Scheduler
) -> tuple[dict[str, JobRecord], dict[str, JobRecord], str]:
    """Return queue, history, and why there is no answer."""
    ids = [id_ for facts in waiting for id_ in job_ids(facts)]
    try:
        if problem := scheduler.available():
            return {}, {}, problem
        queue = scheduler.query(ids if len(ids) <= JOBS_PER_CALL else ())
    except UserError as error:
        return {}, {}, str(error)
    forgotten = [
        id_
        for facts in waiting
        if not facts.lives_here() and not any(i in queue for i in job_ids(facts))
        for id_ in job_ids(facts)[-1:]
    ]
    if not forgotten:
        return queue, {}, ""
    try:
        return queue, scheduler.history(forgotten[-JOBS_PER_CALL:]), ""
    except UserError as error:
        return queue, {}, str(error)
