"""Which hosts a job has, from Slurm's variables alone: `scontrol` is missing in many containers.

Pure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from motet.slurm.errors import SlurmError

MOST_HOSTS = 65_536
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(text: str) -> list[str]:
    """Return the host names of a list as Slurm writes it: "n[1-3,07-09],a-b2" has 7.

    Raises:
        SlurmError: it is no such list.
    """
    if not text:
        return []
    out: list[str] = []
    for part in _split(text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        choices = [[p] if i % 2 == 0 else list(_numbers(p, text)) for i, p in enumerate(pieces)]
        for words in itertools.product(*choices):
            out.append("".join(words))
            if len(out) > MOST_HOSTS:
                raise SlurmError(f"the node list {text[:80]!r} has more than {MOST_HOSTS:,} hosts")
    wrong = [name for name in out if not _HOST.fullmatch(name)]
    if wrong:
        raise SlurmError(f"the node list {text[:80]!r} names {wrong[0]!r}, which is no host")
    return out


def _split(text: str) -> list[str]:
    """Parts at the commas outside of brackets."""
    return re.split(r",(?![^\[\]]*\])", text)


def _numbers(text: str, whole: str) -> Iterator[str]:
    """The numbers of one pair of brackets, with the zeros they are padded with."""
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise SlurmError(f"the node list {whole[:80]!r} has [{text}], which is no range")
        first, last = match[1], match[2] or match[1]
        if int(last) - int(first) >= MOST_HOSTS:
            raise SlurmError(f"the node list {whole[:80]!r} has more than {MOST_HOSTS:,} hosts")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))


def hosts_by_group(environment: Mapping[str, str]) -> list[list[str]]:
    """Return the hosts of every component of this job, in order; one component where the job is not
    heterogeneous.

    Raises:
        SlurmError: this process runs in no job.
    """
    size = environment.get("SLURM_HET_SIZE", "")
    if size.isdecimal() and int(size) > 0:
        names = [f"SLURM_JOB_NODELIST_HET_GROUP_{group}" for group in range(int(size))]
    else:
        names = ["SLURM_JOB_NODELIST"]
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise SlurmError(f"{missing[0]} is not set; this runs inside of a Slurm job only")
    return [expand(environment[name]) for name in names]


@dataclass(frozen=True)
class Seat:
    """Where a node stands among those of a run.

    Attributes:
        nodes: number of all nodes.
        node: rank of this node, from 0; groups come one after the other.
        group: its group.
        processes: that it runs.
        offset: rank of its first process among all processes.
        world_size: processes of all nodes.
        head: host of the first node.
    """

    nodes: int
    node: int
    group: int
    processes: int
    offset: int
    world_size: int
    head: str


def seat(hosts: Sequence[Sequence[str]], processes: Sequence[int], node: int) -> Seat:
    """Return the seat of a node.

    Args:
        hosts: of every group.
        processes: per node of every group.
        node: its rank, as `SLURM_PROCID` of a step with one task per node.

    Raises:
        SlurmError: there are other groups or nodes than the run was made for.
    """
    if len(hosts) != len(processes):
        raise SlurmError(
            f"this job has {len(hosts)} groups of nodes, and the run was made for {len(processes)}"
        )
    everyone = [group for group, names in enumerate(hosts) for _ in names]
    if not 0 <= node < len(everyone):
        raise SlurmError(f"node {node} is not among the {len(everyone)} nodes of this job")
    each = [processes[group] for group in everyone]
    group = everyone[node]
    return Seat(len(everyone), node, group, each[node], sum(each[:node]), sum(each), hosts[0][0])


def port(job_id: str, first: int, count: int) -> int:
    """Return the port of a job's rendezvous: jobs that follow each other on a host get different
    ones.
    """
    digits = re.sub(r"\D", "", job_id) or "0"
    return first + int(digits) % count
