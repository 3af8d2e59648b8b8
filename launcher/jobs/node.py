"""What a job runs on each of its nodes, once: `python -m motet.launcher.node RUN`. No torch.

From its scheduler and from command.json a node learns who it is, and starts torchrun for its own
processes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from motet.core.access import follow
from motet.core.errors import UserError
from motet.core.jobs import JobNode
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs import schedulers
from motet.launcher.jobs.batch import superseded
from motet.launcher.jobs.place import place_of
from motet.launcher.jobs.scheduler import Scheduler
from motet.launcher.jobs.secrets import read_secret
from motet.launcher.launch.agent import POLL_S, outcome, run_agent
from motet.launcher.launch.alone import found_here
from motet.launcher.launch.command import NodePlace, attempt_command, launch_environment
from motet.launcher.launch.start_watch import StartWatch
from motet.launcher.runs.attempts import facts_of, numbers
from motet.launcher.runs.job_files import read_command
from motet.launcher.runs.rundir import RunDir

WORD_WAIT_S = 60.0
HOLD_WAIT_S = 60.0
"""How long a job waits for ranks of its last start on a lost node; they end once they see that it
has begun anew.
"""


def with_processes(settings: RunSettings, processes: int) -> RunSettings:
    """Settings as they are on a node with this many processes."""
    return replace(settings, layout=replace(settings.layout, processes=processes))


def main(arguments: list[str]) -> int:
    """Run this node's part of an attempt; 0 when it finished or stopped as asked."""
    run = RunDir(Path(arguments[0]))
    follow(run.root)
    try:
        settings = run_yaml.load(run.resolved_yaml)
        told = read_command(run)
        scheduler = schedulers.of_run(run, settings.scheduler)
        here = scheduler.this_node(os.environ)
        each = [group["processes"] for group in told["groups"]]
        processes, among = place_of(here, each, told["ports"][0])
        section = scheduler.request(settings).section
        secrets = {n: read_secret(n, path, section) for n, path in told["secrets"].items()}
        own = with_processes(settings, processes)
        return _launch(run, settings, own, scheduler, among, {**os.environ, **secrets}, here)
    except UserError as error:
        print(f"motet: {error}", file=sys.stderr)
        return 2


def _launch(
    run: RunDir,
    settings: RunSettings,
    own: RunSettings,
    scheduler: Scheduler,
    among: NodePlace,
    inherited: Mapping[str, str],
    here: JobNode,
) -> int:
    """Start torchrun on this node, with its `own` settings, and wait for its end."""
    attempt = int(inherited["MOTET_ATTEMPT"])
    cores = here.cpus or len(os.sched_getaffinity(0))
    job = scheduler.current_job(inherited)

    def lost() -> bool:
        with contextlib.suppress(UserError):  # for once the file cannot be read
            return superseded(run, job, attempt)
        return False

    with contextlib.ExitStack() as stack:
        place = stack.enter_context(found_here(among, run.meeting(attempt)))
        environment = launch_environment(own, run, inherited, cores, attempt, place)
        command = attempt_command(own, run, attempt, place)
        hosts = [name for group in here.hosts for name in group]
        watch = StartWatch(run, attempt, settings.layout.timeout_s, place, hosts)
        meeting = Path(place.folder) if among.count > 1 else None
        if among.rank:
            code = run_agent(command, environment, run, attempt, -1, False, lost, watch, meeting)
            return code if code == 0 else _agreed(run, attempt, code)
        from motet.launcher.launch.local import record_launch

        held = _hold(run, stack)
        record_launch(run, attempt, settings, command, environment, scheduler.recorded)
        return run_agent(
            command, environment, run, attempt, held, superseded=lost, watch=watch, meeting=meeting
        )


def _hold(run: RunDir, stack: contextlib.ExitStack) -> int:
    """Hold the run, as no two jobs train it at once; return the file descriptor that does."""
    from motet.launcher.launch.holding import only_one

    deadline = time.monotonic() + HOLD_WAIT_S
    while True:
        try:
            return stack.enter_context(only_one(run))
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _agreed(run: RunDir, attempt: int, code: int) -> int:
    """The first node writes down how the ranks ended; wait for its word, as a step may end on all
    nodes once one has failed.
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
