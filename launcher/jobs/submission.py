"""A run as a Slurm job: settings to request, everything checked first, folder made, script written,
job submitted. No torch.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import atomic_write, read_json, write_json
from motet.core.hashing import sha256_hex
from motet.launcher.config import load as settings_io
from motet.launcher.config.batch import groups_of, world_size
from motet.launcher.config.checks import deepspeed_library_problems, layout_problems
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs.node import read_secret
from motet.launcher.runs import attempts
from motet.launcher.runs.rundir import RunDir
from motet.slurm.client import Client
from motet.slurm.config import BatchRequest, fault
from motet.slurm.errors import SlurmUnreachable
from motet.slurm.script import ALWAYS_PASSED, batch_script

PORTS = 1000
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:([^,}]+)")


@dataclass(frozen=True)
class Submission:
    """What one `motet submit` hands to Slurm: the runs (several in an array), and the text of the
    script that all of them share.
    """

    settings: tuple[RunSettings, ...]
    rundirs: tuple[RunDir, ...]
    request: BatchRequest

    @property
    def script(self) -> str:
        return batch_script(self.request)


def submission(settings: Sequence[RunSettings], whole: RunSettings | None = None) -> Submission:
    """Return what is submitted for a run, or for the runs of an array.

    Args:
        settings: checked; those of every run.
        whole: settings that the runs of an array were made of (see `of_seed`), in the order of its
            seeds; None = one run.

    Raises:
        UserError: a value cannot stand in a script.
    """
    rundirs = tuple(RunDir(Path(one.runs) / one.name) for one in settings)
    first, root = whole or settings[0], str(rundirs[0].root)
    python = first.slurm.python or sys.executable
    problems = [
        Problem("runs" if path == root else "slurm.python", why)
        for path in (root, python)
        if (why := fault("path", path))
    ]
    raise_problems(problems)
    if first.slurm.array:
        root = root.removesuffix(str(first.slurm.array[0]))
    return Submission(tuple(settings), rundirs, _request(first, root, python))


def _request(settings: RunSettings, root: str, python: str) -> BatchRequest:
    slurm = settings.slurm
    entries = [entry.partition("=") for entry in slurm.environment]
    name = settings.name
    if slurm.chain > 1:  # jobs of one name follow each other: no other run may have it
        name += f".{sha256_hex(root)[:8]}"
    return BatchRequest(
        name=name,
        run=root,
        python=python,
        groups=groups_of(settings),
        array=slurm.array,
        array_limit=slurm.array_limit,
        account=slurm.account,
        qos=slurm.qos,
        time=slurm.time,
        signal_s=slurm.signal_s,
        requeue=slurm.requeue,
        mail_user=slurm.mail_user,
        mail_type=slurm.mail_type,
        dependency=slurm.dependency,
        passed=tuple(name for name, equals, _ in entries if not equals),
        variables=tuple((name, value) for name, equals, value in entries if equals),
        modules=slurm.modules,
        container=slurm.container,
        srun=slurm.srun,
    )


def environment_problems(settings: RunSettings, environment: Mapping[str, str]) -> list[Problem]:
    """What the job is to get of this shell is here, and what its settings read is among it."""
    slurm = settings.slurm
    names = {entry.partition("=")[0] for entry in slurm.environment}
    out = [
        Problem(
            "slurm.environment", f"{entry} is not set in this shell; export it, or leave it out"
        )
        for entry in slurm.environment
        if "=" not in entry and entry not in environment
    ]
    given = names | set(ALWAYS_PASSED)
    for path, raw in settings.as_written.items():
        out += [
            Problem(
                path,
                f"{raw} is read again in the job, which has no {name}; add {name} to "
                "slurm.environment",
            )
            for name in _FROM_ENVIRONMENT.findall(raw)
            if name not in given
        ]
    for entry in slurm.secrets:
        name, _, path = entry.partition("=")
        try:
            read_secret(name, path)
        except UserError as error:
            out.append(Problem("slurm.secrets", str(error).removeprefix("slurm.secrets: ")))
    return out


def check(settings: RunSettings) -> None:
    """Refuse what can be seen here: corpora, the layout on all ranks of all groups, the
    environment.
    """
    from motet.launcher.launch.local import model_of, verify_corpora

    verify_corpora(settings)
    raise_problems(layout_problems(settings, world_size(settings), model_of(settings)[0]))
    raise_problems(deepspeed_library_problems(settings))
    raise_problems(environment_problems(settings, os.environ))


def submit(made: Submission, yaml_text: str, client: Client) -> list[str]:
    """Make the folders of the runs, write the script and submit; return the job ids.

    A refusal by Slurm leaves no folder behind. Where Slurm gives no answer the folders stay: the
    job may have been taken.
    """
    from motet.launcher.launch.local import prepare_run
    from motet.launcher.rank.wandb_mirror import stored_run_id

    client.test_only(made.script)
    prepared: list[RunDir] = []
    try:
        for settings, run in zip(made.settings, made.rundirs, strict=True):
            existed = run.root.exists()
            prepare_run(settings, run, yaml_text)
            prepared += [] if existed else [run]
            if settings.metrics.wandb != "off":
                stored_run_id(run)
        return hand_in(made, client, resumed=False)
    except SlurmUnreachable as error:
        raise SlurmUnreachable(
            f"{error}\n{made.rundirs[0].root} is made; once Slurm answers, look at `squeue --me`, "
            "and then `motet resume` it"
        ) from None
    except BaseException:
        for run in prepared:
            shutil.rmtree(run.root, ignore_errors=True)
        raise


def hand_in(made: Submission, client: Client, *, resumed: bool) -> list[str]:
    """Write script and command into every run's folder, submit the chain, and note its jobs; return
    their ids.
    """
    slurm = made.settings[0].slurm
    for run in made.rundirs:
        atomic_write(run.slurm_script, made.script)
        write_json(run.slurm_command, command_facts(made, run))
        run.cancelled.unlink(missing_ok=True)
    ids: list[str] = []
    for link in range(slurm.chain):
        dependency = _chain_dependency(made, ids[-1]) if link else ""
        arguments = [f"--dependency={dependency}"] if dependency else []
        job_id = client.submit(made.rundirs[0].slurm_script, arguments)
        ids.append(job_id)
        _note(made, job_id, dependency or ",".join(slurm.dependency), resumed or link > 0)
    return ids


def _chain_dependency(made: Submission, before: str) -> str:
    """What a later job of a chain waits for.

    Components of a heterogeneous job would wait for each other as singletons.
    """
    own = f"afterany:{before}" if len(made.request.groups) > 1 else "singleton"
    return ",".join([*made.request.dependency, own])


def _note(made: Submission, job_id: str, dependency: str, resumed: bool) -> None:
    """Add a job to `slurm/jobs.json` of every run."""
    tasks: Sequence[int | None] = made.request.array or [None]
    for run, task in zip(made.rundirs, tasks, strict=True):
        jobs: list[dict[str, Any]] = read_json(run.slurm_jobs) if run.slurm_jobs.exists() else []
        entry = {
            "job_id": job_id if task is None else f"{job_id}_{task}",
            "submitted": time.time(),
            "array_task": task,
            "dependency": dependency,
            "resumed": resumed,
        }
        write_json(run.slurm_jobs, [*jobs, entry])


def command_facts(made: Submission, run: RunDir) -> dict[str, Any]:
    """Return what command.json tells the nodes: no secret, only the files that hold them."""
    slurm = made.settings[0].slurm
    request = made.request
    return {
        "node": [
            *request.container,
            request.python,
            "-m",
            "motet.launcher.node",
            str(run.root),
        ],
        "groups": [{"nodes": g.nodes, "processes": g.processes} for g in request.groups],
        "ports": [slurm.port, PORTS],
        "secrets": {name: path for name, _, path in (e.partition("=") for e in slurm.secrets)},
        "since_attempt": run.latest_attempt() + 1,
    }


def resubmit(rundir: RunDir, settings: RunSettings, yaml_text: str, client: Client) -> list[str]:
    """Submit a run again, from its newest checkpoint; return the job ids.

    Raises:
        UserError: a job of the run waits or runs.
    """
    raise_problems(environment_problems(settings, os.environ))
    active = active_jobs(rundir, client)
    if active:
        known = ", ".join(f"{job_id} ({state})" for job_id, state in active.items())
        raise UserError(
            f"{rundir.root} has a job that is not over: {known}; wait for it, or `motet cancel "
            f"{rundir.root}`"
        )
    made = submission([settings])
    client.test_only(made.script)
    atomic_write(rundir.run_yaml, yaml_text)
    atomic_write(rundir.resolved_yaml, settings_io.to_yaml(settings))
    attempts.settle(rundir, rundir.latest_attempt() + 1)
    return hand_in(made, client, resumed=True)


def active_jobs(rundir: RunDir, client: Client) -> dict[str, str]:
    """Return the state of every job of the run that is not over, by id."""
    ids = [entry["job_id"] for entry in read_json(rundir.slurm_jobs)]
    known = client.queue(ids) if ids else {}
    return {
        job_id: job.state
        for job_id, job in known.items()
        if job.state.partition(" ")[0] not in ENDED
    }


def of_seed(settings: RunSettings, seed: int) -> list[str]:
    """Settings that make a run of an array out of the run.yaml."""
    return [
        f"name={settings.name}-seed{seed}",
        f"seed={seed}",
        "slurm.array=[]",
        "slurm.array_limit=0",
    ]


def asked_of_slurm(script: str, client: Client) -> str:
    """Return what `sbatch --test-only` says, or why it was not asked; `SlurmError` when the job
    would be refused.
    """
    if not client.available():
        return "not asked: there is no sbatch here"
    try:
        return client.test_only(script)
    except SlurmUnreachable as error:
        return f"not asked: {error}"
