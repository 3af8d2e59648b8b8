"""What a Slurm job runs on each of its nodes: `python -m motet.launcher.node RUN`, one per node.

No torch.

From Slurm's variables and `slurm/command.json` a node learns who it is, and starts torchrun for its
own processes. Host names come out of `SLURM_JOB_NODELIST`, never from `scontrol`, which is missing
in many containers.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import PRIVATE_UMASK, read_json
from motet.launcher.config import load as config
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs.batch import superseded
from motet.launcher.launch.agent import POLL_S, outcome, run_agent
from motet.launcher.launch.command import NodePlace, attempt_command, launch_environment
from motet.launcher.runs.attempts import facts_of, numbers
from motet.launcher.runs.rundir import RunDir
from motet.slurm import nodes
from motet.slurm.errors import SlurmError

MOST_SECRET_BYTES = 65_536
WORD_WAIT_S = 60.0
HOLD_WAIT_S = 60.0
"""How long a job waits for ranks of its last start on a node that Slurm lost; they end once they
see that it has begun anew.
"""


def read_secret(name: str, path: str) -> str:
    """Return what a secret's file holds.

    Raises:
        UserError: it is missing, empty, or others may read it. The message holds nothing of it.
    """
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(MOST_SECRET_BYTES + 1)
    except OSError as error:
        raise UserError(f"slurm.secrets: {name}={path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UserError(
            f"slurm.secrets: {name}={path} is not a file of yours alone; chmod 600 {path}"
        )
    text = content.decode("utf-8", errors="replace").strip()
    if not text or len(content) > MOST_SECRET_BYTES or not text.isprintable():
        raise UserError(f"slurm.secrets: {name}={path} must hold the secret as one line")
    return text


def place(
    told: Mapping[str, Any], environment: Mapping[str, str], job: str
) -> tuple[nodes.Seat, NodePlace]:
    """Return who this node is, by Slurm's variables, in two forms.

    Args:
        told: `slurm/command.json`.
        job: id of the job, from which the port follows.
    """
    processes = [group["processes"] for group in told["groups"]]
    number = environment.get("SLURM_PROCID", "")
    if not number.isdecimal():
        raise SlurmError("SLURM_PROCID is not set; srun starts this, one per node")
    seat = nodes.seat(nodes.hosts_by_group(environment), processes, int(number))
    port = nodes.port(job, *told["ports"])
    return seat, NodePlace(
        seat.nodes, seat.node, f"{seat.head}:{port}", seat.offset, seat.world_size
    )


def cores_of(environment: Mapping[str, str]) -> int:
    """Return the CPUs that this node has for the job."""
    asked = environment.get("SLURM_CPUS_PER_TASK", "")
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))


def with_processes(settings: RunSettings, processes: int) -> RunSettings:
    """Settings as they are on a node with this many processes."""
    return replace(settings, layout=replace(settings.layout, processes=processes))


def main(arguments: list[str]) -> int:
    """Run this node's part of an attempt; 0 when it finished or stopped as asked."""
    os.umask(PRIVATE_UMASK)
    run = RunDir(Path(arguments[0]))
    try:
        settings = config.load(run.resolved_yaml)
        told = read_json(run.slurm_command)
        job = os.environ.get("SLURM_HET_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
        seat, among = place(told, os.environ, job)
        secrets = {name: read_secret(name, path) for name, path in told["secrets"].items()}
        return _launch(run, settings, seat, among, {**os.environ, **secrets})
    except UserError as error:
        print(f"motet: {error}", file=sys.stderr)
        return 2


def _launch(
    run: RunDir,
    settings: RunSettings,
    seat: nodes.Seat,
    among: NodePlace,
    inherited: Mapping[str, str],
) -> int:
    """Start torchrun on this node and wait for its end."""
    attempt = int(inherited["MOTET_ATTEMPT"])
    own = with_processes(settings, seat.processes)
    environment = launch_environment(own, run, inherited, cores_of(inherited), attempt, among)
    command = attempt_command(own, run, attempt, among)

    def lost() -> bool:
        with contextlib.suppress(UserError):  # for once the file cannot be read
            return superseded(run, inherited)
        return False

    if seat.node:
        code = run_agent(command, environment, run, attempt, -1, False, lost)
        return code if code == 0 else _agreed(run, attempt, code)
    from motet.launcher.launch.local import record_launch

    with contextlib.ExitStack() as stack:
        held = _hold(run, stack)
        record_launch(run, attempt, settings, command, environment)
        return run_agent(command, environment, run, attempt, held, superseded=lost)


def _hold(run: RunDir, stack: contextlib.ExitStack) -> int:
    """Hold the run, as no two jobs train it at once; return the file descriptor that does."""
    from motet.launcher.launch.local import only_one

    deadline = time.monotonic() + HOLD_WAIT_S
    while True:
        try:
            return stack.enter_context(only_one(run))
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _agreed(run: RunDir, attempt: int, code: int) -> int:
    """The first node writes down how the ranks ended; wait for its word, as srun ends all nodes
    once one has failed.
    """
    deadline = time.monotonic() + WORD_WAIT_S
    while time.monotonic() < deadline:
        last = facts_of(run.attempt(numbers(run, attempt)[-1])).get("reason")
        if last != "running":
            return outcome(run, attempt, code)
        time.sleep(POLL_S)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
