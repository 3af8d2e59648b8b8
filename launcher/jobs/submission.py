"""A run as a batch job: settings to a script, everything checked first, folder made, job submitted.
No torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.core.errors import UserError, raise_problems
from motet.core.files import atomic_write, write_json
from motet.core.jobs import SchedulerUnreachable
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs import schedulers
from motet.launcher.jobs.place import PORTS
from motet.launcher.jobs.scheduler import JobCommands, JobRequest, Scheduler
from motet.launcher.runs import attempts
from motet.launcher.runs.job_files import read_jobs, write_jobs
from motet.launcher.runs.rundir import RunDir

WHOLE_JOB, HOOK, NODE = "motet.launcher.jobs.job", "motet.launcher.batch", "motet.launcher.node"


@dataclass(frozen=True)
class Submission:
    """What one `motet submit` hands to a scheduler: the runs (several in an array), and the script
    that all of them share.
    """

    settings: tuple[RunSettings, ...]
    rundirs: tuple[RunDir, ...]
    scheduler: Scheduler
    request: JobRequest
    commands: JobCommands
    script: str


def submission(
    settings: Sequence[RunSettings], scheduler: Scheduler, whole: RunSettings | None = None
) -> Submission:
    """Return what is submitted for a run, or for the runs of an array.

    Args:
        settings: checked; those of every run.
        scheduler: of all of them.
        whole: settings that the runs of an array were made of (see `of_seed`), in the order of its
            seeds; None = one run.

    Raises:
        UserError: a value cannot stand in a script.
    """
    rundirs = tuple(RunDir(Path(one.runs) / one.name) for one in settings)
    first, root = whole or settings[0], str(rundirs[0].root)
    request = scheduler.request(first)
    if request.seeds:
        root = root.removesuffix(str(request.seeds[0]))
    python = (*request.container, request.python or sys.executable)
    commands = JobCommands(python, WHOLE_JOB, HOOK, NODE)
    script = scheduler.script(first, root, commands)
    return Submission(tuple(settings), rundirs, scheduler, request, commands, script)


def check(made: Submission) -> None:
    """Refuse what can be seen here: corpora, the layout on all ranks of all groups, the
    environment.
    """
    from motet.launcher.launch.local import check_layout, verify_corpora

    settings = made.settings[0]
    verify_corpora(settings)
    check_layout(settings, made.request.world_size, alone=False)
    raise_problems(made.scheduler.problems(settings, os.environ))


def submit(made: Submission, yaml_text: str) -> list[str]:
    """Make the folders of the runs, write the script and submit; return the job ids.

    A refusal by the scheduler leaves no folder behind. Where it gives no answer the folders stay:
    the job may have been taken.
    """
    return submit_all([made], [yaml_text])[0]


def submit_all(all_made: Sequence[Submission], yaml_texts: Sequence[str]) -> list[list[str]]:
    """Submit one after the other, once the folders of all are made; return their job ids.

    Where one is refused, it and those behind it leave no folder, and the error names the others.
    """
    from motet.launcher.runs.described_model import check_weights

    for made in all_made:
        made.scheduler.trial(made.script)
        check_weights(made.settings[0])
    prepared: list[list[RunDir]] = [[] for _ in all_made]
    ids: list[list[str]] = []
    try:
        for made, text, runs in zip(all_made, yaml_texts, prepared, strict=True):
            _prepare(made, text, runs)
        for made in all_made:
            ids.append(hand_in(made, resumed=False))  # noqa: PERF401 - those so far are told of
        return ids
    except SchedulerUnreachable as error:
        made = all_made[min(len(ids), len(all_made) - 1)]
        _remove(prepared[len(ids) + 1 :])
        raise SchedulerUnreachable(
            f"{error}\n{made.rundirs[0].root} is made; once {made.scheduler.name} answers, look "
            f"at {made.scheduler.queue_hint}, and then `motet resume` it{_submitted(all_made, ids)}"
        ) from None
    except UserError as error:
        _remove(prepared[len(ids) :])
        if not ids:
            raise
        raise type(error)(f"{error}{_submitted(all_made, ids)}") from None
    except BaseException:
        _remove(prepared[len(ids) :])
        raise


def _prepare(made: Submission, yaml_text: str, prepared: list[RunDir]) -> None:
    """Make the folders of one submission; `prepared` gets those that were not there before."""
    from motet.launcher.launch.local import prepare_run
    from motet.launcher.rank.wandb_mirror import stored_run_id

    for settings, run in zip(made.settings, made.rundirs, strict=True):
        existed = run.root.exists()
        prepare_run(settings, run, yaml_text)
        prepared += [] if existed else [run]
        schedulers.keep(settings, run)
        if settings.metrics.wandb != "off" or settings.tracking.trackio:
            stored_run_id(run)


def _remove(prepared: Sequence[Sequence[RunDir]]) -> None:
    for run in (run for runs in prepared for run in runs):
        shutil.rmtree(run.root, ignore_errors=True)


def _submitted(all_made: Sequence[Submission], ids: Sequence[Sequence[str]]) -> str:
    """What was submitted before an error, for its end."""
    if not ids:
        return ""
    known = ", ".join(
        f"{made.rundirs[0].name} ({', '.join(jobs)})"
        for made, jobs in zip(all_made, ids, strict=False)
    )
    return f"\nsubmitted before that: {known}"


def hand_in(made: Submission, *, resumed: bool) -> list[str]:
    """Write script and command into every run's folder, submit the chain, and note its jobs; return
    their ids.
    """
    for run in made.rundirs:
        atomic_write(run.job_script, made.script)
        write_json(run.job_command, command_facts(made, run))
        run.cancelled.unlink(missing_ok=True)
        write_jobs(run, read_jobs(run))  # without an answer no job is known, but one may wait
    scheduler, settings = made.scheduler, made.settings[0]
    ids: list[str] = []
    for link in range(made.request.chain):
        dependency = scheduler.dependency(settings, ids[-1] if link else "")
        script = made.rundirs[0].job_script
        ids.append(scheduler.submit(script, dependency if link else ""))
        _note(made, ids[-1], dependency, resumed or link > 0)
    return ids


def _note(made: Submission, job_id: str, dependency: str, resumed: bool) -> None:
    """Add a job to jobs.json of every run."""
    tasks: Sequence[int | None] = made.request.seeds or [None]
    for run, task in zip(made.rundirs, tasks, strict=True):
        jobs = read_jobs(run)
        entry = {
            "job_id": job_id if task is None else f"{job_id}_{task}",
            "submitted": time.time(),
            "array_task": task,
            "dependency": dependency,
            "resumed": resumed,
        }
        write_jobs(run, [*jobs, entry])


def command_facts(made: Submission, run: RunDir) -> dict[str, Any]:
    """Return what command.json tells the nodes: no secret, only the files that hold them."""
    request, commands = made.request, made.commands
    return {
        "node": [*commands.python, "-m", commands.node, str(run.root)],
        "groups": [{"nodes": g.nodes, "processes": g.processes} for g in request.groups],
        "ports": [request.first_port, PORTS],
        "secrets": dict(request.secrets),
        "since_attempt": run.latest_attempt() + 1,
    }


def resubmit(made: Submission, yaml_text: str) -> list[str]:
    """Submit a run again, from its newest checkpoint; return the job ids.

    Raises:
        UserError: a job of the run waits or runs.
    """
    (rundir,), (settings,) = made.rundirs, made.settings
    raise_problems(made.scheduler.problems(settings, os.environ))
    active = active_jobs(rundir, made.scheduler)
    if active:
        known = ", ".join(f"{job_id} ({state})" for job_id, state in active.items())
        raise UserError(
            f"{rundir.root} has a job that is not over: {known}; wait for it, or `motet cancel "
            f"{rundir.root}`"
        )
    made.scheduler.trial(made.script)
    atomic_write(rundir.run_yaml, yaml_text)
    run_yaml.store(rundir.resolved_yaml, settings)
    attempts.settle(rundir, rundir.latest_attempt() + 1)
    return hand_in(made, resumed=True)


def active_jobs(rundir: RunDir, scheduler: Scheduler) -> dict[str, str]:
    """Return the state of each job of the run that is not over, by id, in its scheduler's words."""
    ids = [entry["job_id"] for entry in read_jobs(rundir)]
    known = scheduler.query(ids) if ids else {}
    return {
        job_id: job.word or job.state.value for job_id, job in known.items() if not job.finished
    }


def of_seed(settings: RunSettings, request: JobRequest, seed: int) -> list[str]:
    """Settings that make a run of an array out of the run.yaml."""
    return [
        f"name={settings.name}-seed{seed}",
        f"seed={seed}",
        f"{request.section}.array=[]",
        f"{request.section}.array_limit=0",
    ]


def asked_of(made: Submission) -> str:
    """Return what the scheduler says of the job, or why it was not asked.

    Raises:
        SchedulerError: the job would be refused.
    """
    if why := made.scheduler.available():
        return f"not asked: {why}"
    try:
        return made.scheduler.trial(made.script)
    except SchedulerUnreachable as error:
        return f"not asked: {error}"
