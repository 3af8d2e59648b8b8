"""What nodes a Slurm installation has: partitions, features, GPUs (GRES), cores, memory, from one
call of sinfo. Text only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from motet.slurm.client import Client
from motet.slurm.errors import SlurmError

FIELDS = "%N|%R|%c|%m|%T|%G|%f"
"""Name, partition, CPUs, memory in MiB, state, GRES, features: known since Slurm 2."""
_GPU = re.compile(r"gpu(?::(?P<words>[\w.:-]+))?(?:\([^)]*\))?")
_SLICE = re.compile(r"(?:^|[_-])\d+g\.\d+gb")
"""A slice of a GPU (MIG), as in a100_3g.20gb."""
UNUSABLE = ("down", "drain", "drng", "fail", "maint", "unk", "inval", "error", "future")
"""How the states of nodes begin that run no job; one that ends in * does not answer."""


@dataclass(frozen=True)
class SlurmNode:
    """One node as Slurm describes it.

    Attributes:
        partitions, features: names, in Slurm's order.
        memory_mib: that jobs may use.
        gpus: number of them; `gpu_kind` as the administrator called them, "" where no kind is
            given.
        state: such as "idle", "mixed", "allocated", "down*".
        problem: why its GPUs cannot be described, "" where they can.
    """

    name: str
    partitions: tuple[str, ...]
    cpus: int
    memory_mib: int
    state: str
    gpus: int
    gpu_kind: str
    features: tuple[str, ...]
    problem: str = ""

    @property
    def usable(self) -> bool:
        """Whether its state lets jobs run on it, now or later."""
        state = self.state.lower()
        return not state.startswith(UNUSABLE) and not state.endswith("*")

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


def described(found: Sequence[SlurmNode]) -> tuple[list[SlurmNode], list[str]]:
    """Return the nodes that can be counted on, and what is said of those that are left out: drained
    or down, or with GPUs that no group can describe.

    Raises:
        SlurmError: none is left.
    """
    kept = [node for node in found if node.usable and not node.problem]
    reasons: dict[str, list[str]] = {}
    for node in found:
        if not node.usable:
            reasons.setdefault(f"Slurm says {node.state}", []).append(node.name)
        elif node.problem:
            reasons.setdefault(node.problem, []).append(node.name)
    notes = [f"left out: {_listed(names)} ({why})" for why, names in reasons.items()]
    if found and not kept:
        raise SlurmError(f"no node can be used; {'; '.join(notes)}")
    return kept, notes


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


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
        (kind, count), problem = ("", 0), ""
        try:
            kind, count = gpus_of(gres)
        except SlurmError as error:  # one odd node must not hide all others
            problem = str(error)
        listed = () if features == "(null)" else tuple(features.split(","))
        found[name] = SlurmNode(
            name, (partition,), int(cpus), int(memory), state, count, kind, listed, problem
        )
    return list(found.values())


def gpus_of(gres: str) -> tuple[str, int]:
    """Return (kind, number) of the GPUs in a GRES such as "gpu:2080ti:8(S:0-1),nvme:1"; kind ""
    where none is given.

    A word that is a number alone is the count, unless another one follows.

    Raises:
        SlurmError: GPUs of several kinds in one node, or slices of GPUs, which no group can
            describe; or GPUs that are written in another way.
    """
    found: dict[str, int] = {}
    for part in re.split(r",(?![^()]*\))", gres):
        part = part.strip()
        if re.split(r"[:(]", part)[0] != "gpu":
            continue
        match = _GPU.fullmatch(part)
        words = [w for w in (match["words"] or "").split(":") if w != "no_consume"] if match else []
        if match is None or len(words) > 2 or ("" in words and words != [""]):
            raise SlurmError(f"GRES {part!r} is in no known form; describe this node by hand")
        count = int(words.pop()) if words and words[-1].isdecimal() else 1
        kind = words[0] if words else ""
        if _SLICE.search(kind):
            raise SlurmError(
                f"GRES {part!r} has slices of GPUs (MIG), not whole ones: measure them with `motet "
                "cluster probe` in a job"
            )
        found[kind] = found.get(kind, 0) + count
    if len(found) > 1:
        raise SlurmError(f"GRES {gres!r} has GPUs of several kinds; describe this node by hand")
    return next(iter(found.items()), ("", 0))


def alike(found: Iterable[SlurmNode]) -> list[list[SlurmNode]]:
    """Return nodes by kind: equal features, cores and GPUs."""
    kinds: dict[object, list[SlurmNode]] = {}
    for node in found:
        kinds.setdefault(node.likeness, []).append(node)
    return list(kinds.values())
