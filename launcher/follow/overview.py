"""Many runs at a glance: facts, records and states as plain data for tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from motet.core.jobs import JobRecord
from motet.launcher.follow.facts import Facts, all_attempts, read_facts
from motet.launcher.follow.processes import held_locks
from motet.launcher.follow.records import Records, ask, job_ids
from motet.launcher.follow.state import State, decide
from motet.launcher.jobs.schedulers import Schedulers
from motet.launcher.runs.rundir import RunDir

JSON_VERSION = 1
Fields = dict[str, Any]


@dataclass(frozen=True)
class View:
    """One run: what its folder tells, and what follows from it."""

    facts: Facts
    state: State
    now: float

    @property
    def seconds_left(self) -> float | None:
        """Training time that is left, probes and checkpoints counted; None when unknown."""
        if self.facts.tokens is None or not self.state.active:
            return None
        return self.facts.pace.seconds_left(self.facts.tokens)

    @property
    def predicted_end(self) -> float | None:
        """Unix time at which a run that trains will finish, unless a job's time limit ends it
        before.
        """
        left = self.seconds_left
        return None if left is None or self.state.name != "running" else self.now + left

    def fields(self) -> Fields:
        """Return the run as plain data: the keys of docs/following.md."""
        facts, state, pace = self.facts, self.state, self.facts.pace
        moving = state.name == "running"
        return {
            "run": str(facts.run.root),
            "name": facts.run.name,
            "state": state.name,
            "why": state.why,
            "warnings": [*state.warnings, *(f"damaged: {told}" for told in facts.damaged)],
            "advice": state.advice,
            "guest": facts.guest,
            "parameters": facts.parameters,
            "created": facts.created,
            "step": pace.step or 0,
            "steps": facts.steps,
            "tokens": pace.tokens or 0,
            "total_tokens": facts.tokens,
            "loss": pace.loss,
            "tokens_per_s": pace.tokens_per_s if moving else None,
            "seconds_left": self.seconds_left,
            "predicted_end": self.predicted_end,
            "updated": pace.last_row,
            "checkpoint_step": facts.checkpoint,
            "attempts": facts.number,
            "job": None if state.job is None else job_fields(state.job),
        }


def job_fields(job: JobRecord) -> Fields:
    """Return a record of a scheduler as plain data, in its own words."""
    return {
        "id": job.id,
        "name": job.name,
        "state": job.word or job.state.value,
        "reason": job.reason,
        "partition": job.partition,
        "nodes": job.nodes,
        "start": job.start,
        "end": job.end,
        "restarts": job.restarts,
    }


def look(runs: Sequence[RunDir], schedulers: Schedulers, now: float) -> tuple[list[View], Records]:
    """Read runs and ask their schedulers of all of them at once.

    Args:
        runs: their folders.
        schedulers: asked at most twice, and not at all when no unfinished run was submitted.
        now: Unix time.
    """
    locks = held_locks()
    facts = [read_facts(run, locks) for run in runs]
    records = ask(facts, schedulers)
    return [View(one, decide(one, records, now), now) for one in facts], records


def detail(view: View, records: Records) -> Fields:
    """Return one run with its attempts and its jobs, as plain data."""
    known = records.known(view.facts)
    submitted = {str(job["job_id"]): job for job in view.facts.jobs}
    jobs = [
        {**submitted[id_], "record": job_fields(known[id_]) if id_ in known else None}
        for id_ in job_ids(view.facts)
    ]
    return {**view.fields(), "attempt_list": all_attempts(view.facts.run), "jobs": jobs}


def document(runs: Sequence[Fields], records: Records) -> Fields:
    """Return the JSON of `status` and `ls`."""
    return {"version": JSON_VERSION, "slurm_problem": records.problem, "runs": list(runs)}
