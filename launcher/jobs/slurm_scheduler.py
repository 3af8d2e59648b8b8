"""Slurm behind the scheduler protocol: the section `slurm:` of run.yaml to a batch request, and
calls handed on to the slurm room. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.hashing import sha256_hex
from motet.core.jobs import CurrentJob, JobNode, JobRecord
from motet.launcher.config.batch import groups_of, size_of
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs.scheduler import JobCommands, JobRequest, Scheduler
from motet.launcher.jobs.secrets import read_secret
from motet.slurm import job
from motet.slurm.client import Client
from motet.slurm.config import BatchRequest, fault, seconds
from motet.slurm.script import ALWAYS_PASSED, batch_script

SECTION = "slurm"
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:([^,}]+)")


class SlurmScheduler(Scheduler):
    """One Slurm installation, by its commands on the PATH."""

    title = "Slurm"
    queue_hint = "`squeue --me`"
    recorded = job.RECORDED

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.client = Client(environment)

    def request(self, settings: RunSettings) -> JobRequest:
        slurm = settings.slurm
        secrets = (entry.partition("=") for entry in slurm.secrets)
        return JobRequest(
            groups=groups_of(settings.slurm, settings.layout),
            section=SECTION,
            limit_s=seconds(slurm.time),
            requeue=slurm.requeue,
            max_requeues=slurm.max_requeues,
            chain=slurm.chain,
            seeds=slurm.array,
            first_port=slurm.port,
            secrets={name: path for name, _, path in secrets},
            python=slurm.python,
            container=slurm.container,
        )

    def size(self, settings: RunSettings) -> tuple[int, int]:
        return size_of(settings.slurm, settings.layout)

    def problems(self, settings: RunSettings, environment: Mapping[str, str]) -> list[Problem]:
        """What the job is to get of this shell is here, and what its settings read is among it."""
        return [*_missing_variables(settings, environment), *_unread_secrets(settings)]

    def script(self, settings: RunSettings, root: str, commands: JobCommands) -> str:
        return batch_script(batch_request(settings, root, commands))

    def available(self) -> str:
        return "" if self.client.available() else "Slurm's commands are not on this machine"

    def trial(self, script: str) -> str:
        return self.client.test_only(script)

    def dependency(self, settings: RunSettings, after: str = "") -> str:
        if not after:
            return ",".join(settings.slurm.dependency)
        # Components of a heterogeneous job would wait for each other as singletons.
        own = f"afterany:{after}" if len(settings.slurm.groups) > 1 else "singleton"
        return ",".join([*settings.slurm.dependency, own])

    def submit(self, script: Path, dependency: str = "") -> str:
        arguments = [f"--dependency={dependency}"] if dependency else []
        return self.client.submit(script, arguments)

    def query(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        return self.client.queue(ids)

    def history(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        return self.client.history(ids)

    def cancel(self, ids: Sequence[str]) -> None:
        self.client.cancel(ids)

    def signal(self, ids: Sequence[str], name: str) -> None:
        self.client.cancel(ids, signal=name)

    def requeue(self, job_id: str) -> None:
        self.client.requeue(job_id)

    def current_job(self, environment: Mapping[str, str]) -> CurrentJob | None:
        return job.current_job(environment)

    def this_node(self, environment: Mapping[str, str]) -> JobNode:
        return job.this_node(environment)

    def probed_node(self, environment: Mapping[str, str]) -> JobNode | None:
        return job.probed_node(environment)


def batch_request(settings: RunSettings, root: str, commands: JobCommands) -> BatchRequest:
    """Return what sbatch is asked for.

    Raises:
        UserError: a path cannot stand in a script.
    """
    slurm, python = settings.slurm, commands.python[-1]
    paths = (("runs", root), ("slurm.python", python))
    raise_problems([Problem(name, why) for name, p in paths if (why := fault("path", p))])
    entries = [entry.partition("=") for entry in slurm.environment]
    name = settings.name
    if slurm.chain > 1:  # jobs of one name follow each other: no other run may have it
        name += f".{sha256_hex(root)[:8]}"
    return BatchRequest(
        name=name,
        run=root,
        python=python,
        groups=groups_of(settings.slurm, settings.layout),
        hook=commands.hook,
        node=commands.node,
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


def _missing_variables(settings: RunSettings, environment: Mapping[str, str]) -> list[Problem]:
    slurm = settings.slurm
    out = [
        Problem(
            "slurm.environment", f"{entry} is not set in this shell; export it, or leave it out"
        )
        for entry in slurm.environment
        if "=" not in entry and entry not in environment
    ]
    given = {entry.partition("=")[0] for entry in slurm.environment} | set(ALWAYS_PASSED)
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
    return out


def _unread_secrets(settings: RunSettings) -> list[Problem]:
    out = []
    for entry in settings.slurm.secrets:
        name, _, path = entry.partition("=")
        try:
            read_secret(name, path, SECTION)
        except UserError as error:
            out.append(Problem("slurm.secrets", str(error).removeprefix("slurm.secrets: ")))
    return out
