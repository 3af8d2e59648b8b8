"""Where the groups of a layout stand on a cluster: which links each collective uses, and which
devices each stage has. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from motet.parallel.cluster.description import Cluster, ClusterError, Group
from motet.parallel.cost.links import CommGroup, domain, strided
from motet.parallel.layout.layout import Layout


@dataclass(frozen=True)
class StageGroups:
    """One pipeline rank's groups of ranks, the slowest of each kind.

    Attributes:
        groups: the cluster's groups that its devices belong to.
        data: data-parallel and context ranks that hold the same weights, replicas included; `shard`
            without replicas; `replicate` these alone.
        expert_data: ranks of one replica that hold the same experts; `expert_replicas` the same
            over all replicas.
        hop: two neighbouring stages.
    """

    groups: tuple[int, ...]
    tp: CommGroup
    cp: CommGroup
    ep: CommGroup
    etp: CommGroup
    data: CommGroup
    shard: CommGroup
    replicate: CommGroup
    expert_data: CommGroup
    expert_replicas: CommGroup
    hop: CommGroup

    def __hash__(self) -> int:
        """Remembered: stages are keys of what a search has computed."""
        found = self.__dict__.get("_hash")
        if found is None:
            found = hash((self.groups, self.tp, self.cp, self.ep, self.etp, self.data, self.shard,
                          self.replicate, self.expert_data, self.hop))  # fmt: skip
            object.__setattr__(self, "_hash", found)
        return int(found)


@dataclass(frozen=True)
class ReplicaKind:
    """Replicas that stand alike: their share of a step, and the cluster's groups that each stage
    has devices of.
    """

    share: float
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Topology:
    """The stages of a layout, in order of pipeline ranks, and its kinds of replicas."""

    stages: tuple[StageGroups, ...]
    columns: tuple[ReplicaKind, ...]


def topology_of(cluster: Cluster, layout: Layout) -> Topology:
    """Return where a sound layout stands; its processes take the cluster's devices in order.

    Raises:
        ClusterError: the cluster has too few devices.
    """
    if layout.world_size > cluster.devices:
        raise ClusterError(
            f"the layout has {layout.world_size:,} ranks, but the cluster has {cluster.devices:,} "
            "devices"
        )
    # In one group, in order, every stage looks alike: no device needs to be asked.
    if len(cluster.groups) == 1 and not layout.placement:
        return _uniform(cluster, layout)
    return _enumerated(cluster, layout)


def strides(layout: Layout) -> dict[str, tuple[int, int]]:
    """Return (ranks, distance between neighbours) of every kind of group within a stage."""
    context = layout.tp
    shard = context * layout.cp
    experts = layout.ep * layout.etp
    return {
        "tp": (layout.tp, 1),
        "cp": (layout.cp, context),
        "ep": (layout.ep, layout.etp),
        "etp": (layout.etp, 1),
        "data": (layout.dp_replicate * layout.fsdp, context),
        "shard": (layout.fsdp, context),
        "replicate": (layout.dp_replicate, shard * layout.dp_shard),
        "expert_data": (layout.edp, experts),
        "expert_replicas": (layout.dp_replicate * layout.edp, experts),
    }


def _uniform(cluster: Cluster, layout: Layout) -> Topology:
    group = cluster.groups[0]
    groups = {name: strided(group, *where) for name, where in strides(layout).items()}
    shares = layout.shares or (1,) * layout.dp_replicate
    # The replica with most micro-batches is the one that the others wait for.
    share = max(shares) * layout.dp_replicate / sum(shares)
    # Stages of one group differ in one thing only: whether the next one is on the same node.
    kinds: dict[bool, StageGroups] = {}
    stages = []
    for number in range(layout.pp):
        near = _on_one_node(group, layout, number)
        if near not in kinds:
            ends = (2, 1) if near else (1, 2)
            hop = CommGroup(2, *ends, group.intra_node, group.inter_node)
            kinds[near] = StageGroups((0,), **groups, hop=hop)
        stages.append(kinds[near])
    return Topology(tuple(stages), (ReplicaKind(share, ((0,),) * layout.pp),))


def _neighbour(layout: Layout, number: int) -> int:
    """Return the stage that a pipeline rank sends to: the next; the last one back, or around to its
    next stage.
    """
    # The last rank sends gradients back; where ranks have several stages, it sends on to the first.
    last = number == layout.pp - 1 and layout.virtual_stages == 1
    return (number - 1 if last else number + 1) % layout.pp


def _on_one_node(group: Group, layout: Layout, number: int) -> bool:
    """Return whether a pipeline rank and its neighbour stand on one node."""
    first, last = sorted((number, _neighbour(layout, number)))
    size, node = layout.stage_ranks, group.devices_per_node
    return first * size // node == ((last + 1) * size - 1) // node


def _enumerated(cluster: Cluster, layout: Layout) -> Topology:
    devices = layout.placement or tuple(range(layout.world_size))
    group_of = [cluster.spot(device)[0] for device in devices]
    size = layout.stage_ranks
    starts = range(0, layout.world_size, size)
    within = {
        name: _slowest_of_stages(
            cluster,
            [
                [[devices[r] for r in one] for one in _groups(range(at, at + size), *where)]
                for at in starts
            ],
        )
        for name, where in strides(layout).items()
    }
    stages = []
    for number in range(layout.pp):
        # Stages take the devices in order, as the runtime numbers its ranks.
        ranks = range(number * size, (number + 1) * size)
        found = {name: domains[number] for name, domains in within.items()}
        other = _neighbour(layout, number) * size
        pairs = [[devices[r], devices[other + r - ranks[0]]] for r in ranks]
        hop = _slowest(cluster, pairs) if layout.pp > 1 else found["tp"]
        groups = tuple(sorted({group_of[r] for r in ranks}))
        stages.append(StageGroups(groups, **found, hop=hop))
    return Topology(tuple(stages), _columns(layout, group_of))


def _groups(ranks: range, count: int, stride: int) -> list[list[int]]:
    """Return the groups of `count` ranks, `stride` apart, that a stage divides into."""
    block = count * stride
    return [
        [ranks[0] + start + offset + stride * i for i in range(count)]
        for start in range(0, len(ranks), block)
        for offset in range(stride)
    ]


def _slowest_of_stages(
    cluster: Cluster, stages: Sequence[Sequence[Sequence[int]]]
) -> list[CommGroup]:
    """Return the slowest group of every stage: stages work at the same time, and share a link
    between clusters.
    """
    found = [_slowest(cluster, groups) for groups in stages]
    # Stages work at the same time: all that cross between clusters share the link.
    crossing = sum(one.sharers for one in found if one.between is not None)
    return [one if one.between is None else replace(one, sharers=crossing) for one in found]


def _slowest(cluster: Cluster, groups: Sequence[Sequence[int]]) -> CommGroup:
    """Return the group that the others wait for; all that cross between clusters share a link."""
    found = [domain(cluster, group) for group in dict.fromkeys(map(tuple, groups))]
    # Groups of one kind transfer at the same time, in step with each other.
    crossing = sum(one.between is not None for one in found)
    # A collective of one kind runs in all groups at once, and the next pass waits for the last.
    worst = min(found, key=_speed)
    if worst.between is None:
        return worst
    return CommGroup(
        worst.ranks,
        worst.per_node,
        worst.nodes,
        worst.intra,
        worst.inter,
        worst.between,
        crossing,
    )


def _speed(one: CommGroup) -> tuple[float, float]:
    """Order groups by the bandwidth between their ranks."""
    if one.between is not None:
        return 0.0, one.between.gb_s
    if one.nodes > 1:
        return 1.0, one.per_node * one.inter.gb_s
    return 2.0, one.intra.gb_s


def _columns(layout: Layout, group_of: Sequence[int]) -> tuple[ReplicaKind, ...]:
    shares = layout.shares or (1,) * layout.dp_replicate
    size = layout.stage_ranks // layout.dp_replicate
    largest_share: dict[tuple[tuple[int, ...], ...], float] = {}
    for replica, share in enumerate(shares):
        groups = []
        for number in range(layout.pp):
            start = number * layout.stage_ranks + replica * size
            groups.append(tuple(sorted(set(group_of[start : start + size]))))
        # Replicas that stand alike take equally long: one of each kind is predicted, with the
        # largest share of the step.
        key = tuple(groups)
        part = share * layout.dp_replicate / sum(shares)
        largest_share[key] = max(part, largest_share.get(key, 0.0))
    return tuple(ReplicaKind(share, groups) for groups, share in largest_share.items())
