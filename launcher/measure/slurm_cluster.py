"""From Slurm's list of nodes to a cluster: what is known, and what has to be assumed until a probe
has measured it. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from motet.core.errors import UserError
from motet.parallel.cluster.description import (
    Cluster,
    Device,
    Group,
    Link,
    builtin_link,
    device,
    pair,
)
from motet.parallel.cluster.devices import DEFAULT_LINKS, DEVICES, NETWORK_LATENCY_US
from motet.parallel.cluster.probe.result import device_kind
from motet.parallel.cluster.this_machine import CATALOGUE_CORES, cpu
from motet.slurm.inventory import SlurmNode, alike, described

INFINIBAND_GBIT_S = {"qdr": 40, "fdr": 56, "edr": 100, "hdr": 200, "ndr": 400, "xdr": 800}
ASSUMED_GBIT_S = 10.0
"""Of a network that no feature names."""


def cluster_from_slurm(
    nodes: Sequence[SlurmNode], gpu: str | None = None
) -> tuple[Cluster, list[str]]:
    """Return the cluster that Slurm describes, and what of it is assumed or left out.

    Args:
        nodes: as Slurm lists them.
        gpu: kind of the GPUs that Slurm gives no kind, as the catalogue calls it.

    Raises:
        UserError: there are no nodes, or GPUs that are not in the catalogue.
    """
    if not nodes:
        raise UserError("Slurm lists no nodes")
    kept, notes = described(nodes)
    groups: list[Group] = []
    names: set[str] = set()
    for members in alike(kept):
        name = _name(members[0], names)
        names.add(name)
        groups.append(_group(name, members, notes, gpu))
    links = {}
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            rate = min(ASSUMED_GBIT_S / 8, *(g.inter_node.gb_s * g.devices for g in (one, other)))
            links[pair(one.name, other.name)] = Link(
                rate, NETWORK_LATENCY_US["ethernet"], "ethernet"
            )
            notes.append(f"{one.name} to {other.name}: {rate * 8:g} Gbit/s of Ethernet is assumed")
    notes.append("nothing here was measured; on these nodes: srun motet cluster probe")
    return Cluster(tuple(groups), links), notes


def _name(node: SlurmNode, taken: set[str]) -> str:
    """Name a group by its features, else by its GPUs, else by its partition."""
    name = "-".join(node.features) or node.gpu_kind or node.partitions[0]
    number = 2
    while name in taken:
        name = f"{name.removesuffix(f'-{number - 1}')}-{number}"
        number += 1
    return name


def _group(name: str, members: Sequence[SlurmNode], notes: list[str], gpu: str | None) -> Group:
    node = members[0]
    if node.gpus:
        kind, number = _gpu(name, node, gpu), node.gpus
    else:
        number = max(1, node.cpus // CATALOGUE_CORES)
        least_mib = min(one.memory_mib for one in members)
        kind = cpu(node.cpus / number, least_mib / 1024 / number)
        notes.append(f"{name}: rates of {node.cpus} cores are taken from the catalogue's cpu")
    word, gbit_s = network_of(node.features)
    if len(members) > 1 and gbit_s is None:
        notes.append(
            f"{name}: no feature names its network; {ASSUMED_GBIT_S:g} Gbit/s per node is assumed"
        )
    rate = gbit_s if gbit_s is not None else ASSUMED_GBIT_S
    intra = builtin_link(DEFAULT_LINKS.get(kind.kind, "pcie4"))
    inter = Link(rate / 8 / number, NETWORK_LATENCY_US[word], word)
    return Group(name, kind, len(members), number, intra, inter)


def _gpu(name: str, node: SlurmNode, untyped: str | None) -> Device:
    words = " ".join((node.gpu_kind, *node.features))
    size = re.search(r"(\d+)\s*_?g[bi]", words.lower())
    for text in (node.gpu_kind, *node.features):
        if kind := device_kind(text):
            near = device_kind(text, float(size[1])) if size else None
            return device(near or kind)
    if not node.gpu_kind:
        if untyped is not None:
            return device(untyped)
        raise UserError(
            f"group {name}: Slurm does not say of what kind the {node.gpus} GPUs of {node.name} "
            f"are; --gpu KIND does, one of {', '.join(DEVICES)}"
        )
    raise UserError(
        f"group {name}: GPUs {node.gpu_kind!r} of {node.name} are not in the catalogue "
        f"({', '.join(DEVICES)}); describe them in a cluster.yaml by hand, or measure them: motet "
        "cluster probe"
    )


def network_of(features: Sequence[str]) -> tuple[str, float | None]:
    """Return (kind, Gbit/s of one card, None = unknown) that features such as "hdr" or "eth25"
    name.
    """
    for feature in features:
        word = feature.lower()
        if word in INFINIBAND_GBIT_S:
            return "infiniband", float(INFINIBAND_GBIT_S[word])
        if match := re.fullmatch(r"(?:eth|ethernet|roce)[-_]?(\d+)g?", word):
            return ("roce" if word.startswith("roce") else "ethernet"), float(match[1])
    kinds = {feature.lower() for feature in features}
    if kinds & {"ib", "infiniband"}:
        return "infiniband", None
    return ("roce" if "roce" in kinds else "ethernet"), None
