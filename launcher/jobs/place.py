"""Where a node stands among those of a run, and which processes it starts: pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from motet.core.jobs import JobNode, SchedulerError
from motet.launcher.launch.command import NodePlace

PORTS = 1000
"""So many ports from the first on: jobs that follow each other on a host get different ones."""


def place_of(here: JobNode, processes: Sequence[int], first_port: int) -> tuple[int, NodePlace]:
    """Return how many processes a node starts, and its place.

    Args:
        here: the node, by its scheduler.
        processes: per node of every group, as the run was made for.
        first_port: of `PORTS`.

    Raises:
        SchedulerError: there are other groups or nodes than the run was made for.
    """
    if len(here.hosts) != len(processes):
        raise SchedulerError(
            f"this job has {len(here.hosts)} groups of nodes, and the run was made for "
            f"{len(processes)}"
        )
    each = [processes[group] for group, names in enumerate(here.hosts) for _ in names]
    if not 0 <= here.rank < len(each):
        raise SchedulerError(f"node {here.rank} is not among the {len(each)} nodes of this job")
    endpoint = f"{here.hosts[0][0]}:{port(here.job_id, first_port)}"
    offset = sum(each[: here.rank])
    return each[here.rank], NodePlace(len(each), here.rank, endpoint, offset, sum(each))


def port(job_id: str, first: int, count: int = PORTS) -> int:
    """Return the port of a job's rendezvous, by its id."""
    digits = re.sub(r"\D", "", job_id) or "0"
    return first + int(digits) % count
