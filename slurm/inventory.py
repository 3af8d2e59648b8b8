"""What nodes a Slurm installation has: partitions, features, GPUs (GRES), cores, memory, from one
call of sinfo. Text only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from motet.slurm.client import Client
from motet.slurm.errors import SlurmError

FIELDS = "%N|%R|%c|%m|%T|%G|%f"
"""Name, partition, CPUs, memory in MiB, state, GRES, features: known since Slurm 2."""
_GPU = re.compile(r"gpu(?::(?P<kind>[A-Za-z][\w.-]*))?(?::(?P<count>\d+))?(?:\([^)]*\))?")


@dataclass(frozen=True)
class SlurmNode:
    """One node as Slurm describes it.

    Attributes:
        partitions, features: names, in Slurm's order.
        memory_mib: that jobs may use.
        gpus: number of them; `gpu_kind` as the administrator called them, "" where no kind is
            given.
        state: such as "idle", "mixed", "allocated", "down*".
    """

    name: str
    partitions: tuple[str, ...]
    cpus: int
    memory_mib: int
    state: str
    gpus: int
    gpu_kind: str
    features: tuple[str, ...]

    @property
    def likeness(self) -> tuple[tuple[str, ...], int, int, str]:
        """Nodes that agree in this are of one kind."""
        return self.features, self.cpus, self.gpus, self.gpu_kind


def nodes(client: Client, partition: str | None = None) -> list[SlurmNode]:
    """Return every node, or those of a partition.

    Raises:
        SlurmError: Slurm does not answer, or there is no such partition.
    """
    found = parse(client.sinfo(FIELDS))
    if partition is None:
        return found
    chosen = [node for node in found if partition in node.partitions]
    if not chosen:
        known = list(dict.fromkeys(name for node in found for name in node.partitions))
        raise SlurmError(f"partition {partition!r} has no nodes; there are {', '.join(known)}")
    return chosen


def parse(lines: Iterable[str]) -> list[SlurmNode]:
    """Return nodes of lines in `FIELDS`: one per node and partition.

    Raises:
        SlurmError: a line is something else.
    """
    found: dict[str, SlurmNode] = {}
    for line in lines:
        parts = line.strip().split("|", 6)
        if len(parts) != 7 or not parts[2].isdecimal() or not parts[3].isdecimal():
            raise SlurmError(f"sinfo says {line.strip()[:80]!r}, which describes no node")
        name, partition, cpus, memory, state, gres, features = parts
        if name in found:
            before = found[name]
            found[name] = replace(before, partitions=(*before.partitions, partition))
            continue
        kind, count = gpus_of(gres)
        listed = () if features == "(null)" else tuple(features.split(","))
        found[name] = SlurmNode(
            name, (partition,), int(cpus), int(memory), state, count, kind, listed
        )
    return list(found.values())


def gpus_of(gres: str) -> tuple[str, int]:
    """Return (kind, number) of the GPUs in a GRES such as "gpu:h100:8(S:0-1),nvme:1"; kind "" where
    none is given.

    Raises:
        SlurmError: GPUs of several kinds in one node, which no group can describe.
    """
    found: dict[str, int] = {}
    for part in re.split(r",(?![^()]*\))", gres):
        if match := _GPU.fullmatch(part.strip()):
            kind = match["kind"] or ""
            found[kind] = found.get(kind, 0) + int(match["count"] or 1)
    if len(found) > 1:
        raise SlurmError(f"GRES {gres!r} has GPUs of several kinds; describe this node by hand")
    return next(iter(found.items()), ("", 0))


def alike(found: Iterable[SlurmNode]) -> list[list[SlurmNode]]:
    """Return nodes by kind: equal features, cores and GPUs."""
    kinds: dict[object, list[SlurmNode]] = {}
    for node in found:
        kinds.setdefault(node.likeness, []).append(node)
    return list(kinds.values())
