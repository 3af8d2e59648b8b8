"""AMP's runs (arXiv:2210.07297): pipeline stages of explicit units on AWS instances, also unequal
ones.
"""

from __future__ import annotations

import re
from dataclasses import replace

from planner_observation import (
    MEGATRON,
    Observation,
    Row,
    even,
    gpt,
    measured_s,
    nodes_of,
    whole,
)

from motet.models.counts import training_flops_per_token
from motet.parallel.cluster.description import Cluster, Group, Link, builtin_link, device, pair
from motet.parallel.cluster.devices import DEFAULT_LINKS, NETWORK_LATENCY_US
from motet.parallel.cost.stages import Training
from motet.parallel.layout.layout import Layout

# Devices per node, kind, link inside, Gbit/s of the node.
INSTANCES = {
    "g4dn.12xlarge": (4, "t4", "pcie3", 50.0),
    "g4dn.metal": (8, "t4", "pcie3", 100.0),
    "p3.2xlarge": (1, "v100-16", "nvlink2", 10.0),
    "p3.8xlarge": (4, "v100-16", "nvlink2", 10.0),
    "p3.16xlarge": (8, "v100-16", "nvlink2", 25.0),
    "p3dn.24xlarge": (8, "v100-32", "nvlink2", 100.0),
    "p4d.24xlarge": (8, "a100-40", "nvlink3", 400.0),
}
SOCKETS_GBIT_S = 16.0
"""What NCCL's sockets carry between two instances, however fast their cards are: there is no RDMA.
"""
EDGE_UNITS = (2, 4)
"""Of AMP's pipeline units, those that are no blocks: embedding and cast before, norm, head, loss
and cast behind.
"""


def amp(row: Row) -> Observation | None:
    """AMP, arXiv:2210.07297: Megatron with stages of explicit units, on AWS instances."""
    layers, gpus = whole(row, "layers"), whole(row, "gpus")
    sizes = [int(float(size)) for size in row["stage_sizes"].split()]
    model = replace(
        gpt(row, 50_304, heads=whole(row, "heads", 16)), tied_embeddings=len(sizes) == 1
    )
    tp, pp, dp = (whole(row, key) for key in ("tp", "pp", "dp"))
    layout = Layout(
        tp=tp, pp=pp, dp_replicate=dp, micro_sequences=whole(row, "micro_batch"),
        sequence_parallel=False, stage_layers=_blocks_of_units(sizes, layers),
    )  # fmt: skip
    training = Training(
        whole(row, "global_batch"), whole(row, "seq_len"), "fp16", optimizer_bytes=12.0, zero_stage=0
    )  # fmt: skip
    flops = training.sequences * training.sequence_length * training_flops_per_token(
        model, training.sequence_length
    )  # fmt: skip
    cluster = instances(row["gpu_type"], gpus)
    peak = sum(group.devices * group.device.peak("fp16") for group in cluster.groups) * 1e12
    failed = row.get("status") != "ok"
    label = f"tp{tp} pp{pp} dp{dp} mb{layout.micro_sequences} {row['stage_sizes']}"
    return Observation(
        "amp", (row["model"], row.get("set", "")), model, cluster, layout, training,
        replace(MEGATRON, gradient_bytes=2.0, reduce_bytes=2.0), measured_s(row), failed, None,
        flops, peak, label,
    )  # fmt: skip


def _blocks_of_units(sizes: list[int], layers: int) -> tuple[int, ...]:
    """Return blocks per stage; where units are not blocks and the usual edges, spread blocks
    alike.
    """
    counts = list(sizes)
    if sum(counts) == layers + sum(EDGE_UNITS):
        left = [EDGE_UNITS[0], EDGE_UNITS[1]]
        for order, side in ((range(len(counts)), 0), (reversed(range(len(counts))), 1)):
            for i in order:
                taken = min(left[side], counts[i])
                counts[i] -= taken
                left[side] -= taken
    if sum(counts) != layers:
        counts = list(even(layers, len(sizes)))
    return tuple(counts)


def instances(text: str, gpus: int) -> Cluster:
    """Return the cluster of a description such as "3x g4dn.12xlarge + 1x p3.8xlarge (...)"."""
    found = [(int(n), kind) for n, kind in re.findall(r"(\d+)\s*x\s*([a-z0-9]+\.[a-z0-9]+)", text)]
    groups = []
    for nodes, name in found:
        if name not in INSTANCES:
            raise ValueError(f"instance type {name!r} is none of {', '.join(INSTANCES)}")
        each, kind, inside, gbit_s = INSTANCES[name]
        inter = _sockets(gbit_s, each)
        groups.append(
            Group(f"{name}-{len(groups)}", device(kind), nodes, each, builtin_link(inside), inter)
        )
    if not groups:
        groups = _counted(text, gpus)
    links = {}
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            rate = min(g.inter_node.gb_s * g.devices_per_node for g in (one, other))
            links[pair(one.name, other.name)] = Link(
                rate, NETWORK_LATENCY_US["ethernet"], "ethernet"
            )
    return Cluster(tuple(groups), links)


def _sockets(gbit_s: float, devices: int) -> Link:
    """Return a device's share of its instance's network."""
    rate = min(gbit_s, SOCKETS_GBIT_S) / 8 / devices
    return Link(rate, NETWORK_LATENCY_US["ethernet"], "ethernet")


def _counted(text: str, gpus: int) -> list[Group]:
    """Return nodes of four for a description such as "12x T4 + 4x V100"; T4 where it names none."""
    names = {"T4": "t4", "V100": "v100-16", "A100": "a100-40"}
    found = [(int(n), names[kind]) for n, kind in re.findall(r"(\d+)\s*x?\s*(T4|V100|A100)", text)]
    groups = []
    for count, kind in found or [(gpus, "t4")]:
        gbit_s = 10.0 if kind.startswith("v100") else 50.0  # p3.8xlarge, g4dn.12xlarge
        inter = _sockets(gbit_s, 4)
        intra = builtin_link(DEFAULT_LINKS[kind])
        nodes = nodes_of(count, 4)
        groups.append(Group(f"{kind}-{len(groups)}", device(kind), nodes, 4, intra, inter))
    return groups
