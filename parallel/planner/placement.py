"""Where the stages and replicas of a candidate stand, found from its shape alone: no loop over
devices. Pure; no torch.

For shapes that fill nodes evenly this is what `topology.topology_of` finds device by device (a test
compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from motet.parallel.cluster.description import Cluster, Group, pair
from motet.parallel.cost.links import CommGroup, strided
from motet.parallel.cost.topology import ReplicaKind, StageGroups, Topology, strides, topology_of
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.space import GroupAssignment


def trimmed(cluster: Cluster, used: Sequence[int]) -> Cluster | None:
    """Return the nodes that a candidate uses of each group, whole nodes or a part of one; None
    where nodes would be used unevenly.
    """
    groups = []
    for group, devices in zip(cluster.groups, used, strict=True):
        size = group.devices_per_node
        if devices % size == 0 and devices:
            groups.append(replace(group, nodes=devices // size))
        elif 0 < devices < size:
            groups.append(replace(group, nodes=1, devices_per_node=devices))
        elif devices:
            return None
    names = [group.name for group in groups]
    pairs = {pair(a, b) for a in names for b in names if a != b}
    links = {key: cluster.links[key] for key in pairs}
    return Cluster(tuple(groups), links, cluster.currency)


def renumbered(spread: GroupAssignment) -> GroupAssignment:
    """Return a spread with groups numbered as in its trimmed cluster: those that it uses, in the
    cluster's order.
    """
    used = sorted(group for group, _ in spread.blocks)
    return GroupAssignment(
        spread.across, tuple((used.index(g), count) for g, count in spread.blocks)
    )


def placement(cluster: Cluster, layout: Layout, spread: GroupAssignment) -> tuple[int, ...]:
    """Return the device at every position of the grid; () where that is the plain order.

    Args:
        cluster: trimmed; the layout uses all of its devices.
    """
    starts = [0, *accumulate(group.devices for group in cluster.groups)]
    out: list[int] = []
    if spread.across == "pipeline":
        for group, stages in spread.blocks:
            out += range(starts[group], starts[group] + stages * layout.stage_ranks)
    else:
        size = layout.stage_ranks // layout.dp_replicate
        for stage in range(layout.pp):
            for group, replicas in spread.blocks:
                first = starts[group] + stage * replicas * size
                out += range(first, first + replicas * size)
    return () if out == list(range(len(out))) else tuple(out)


def places_of(cluster: Cluster, layout: Layout, spread: GroupAssignment) -> Topology:
    """Return where the groups of a layout stand.

    Args:
        cluster: trimmed to the devices that the layout uses.
        layout: its placement is left out of account: `spread` says it.
    """
    if len(cluster.groups) == 1:
        return topology_of(cluster, replace(layout, placement=()))
    if not even(cluster, layout, spread):
        return topology_of(cluster, replace(layout, placement=placement(cluster, layout, spread)))
    return (
        _pipelined(cluster, layout, spread)
        if spread.across == "pipeline"
        else (replicated(cluster, layout, spread))
    )


def even(cluster: Cluster, layout: Layout, spread: GroupAssignment) -> bool:
    """Return whether every group of ranks has as many devices on each of its nodes, at the same
    places.
    """
    for number, count in spread.blocks:
        size = cluster.groups[number].devices_per_node
        ranks = layout.stage_ranks
        wanted = strides(layout)
        if spread.across == "replicas":
            inside = layout.stage_ranks // layout.dp_replicate
            ranks = inside * count
            wanted |= {"replicate": (count, inside), "data": (count * layout.fsdp, layout.tp)}
            experts = layout.ep * layout.etp
            wanted["expert_replicas"] = (count * layout.edp, experts)
        blocks = [ranks, *(n * stride for n, stride in wanted.values())]
        blocks += [stride for n, stride in wanted.values() if n > 1]
        # A block that is neither a whole number of nodes nor a whole part of one would lie
        # differently on each node: that is found device by device.
        if any(block % size and size % block for block in blocks):
            return False
    return True


def _stage(number: int, group: Group, layout: Layout, hop: CommGroup) -> StageGroups:
    found = {name: strided(group, *where) for name, where in strides(layout).items()}
    return StageGroups((number,), **found, hop=hop)


def _near(group: Group, stage_ranks: int, at: int) -> bool:
    """Return whether stages `at` and `at + 1` of one group stand on one node."""
    size = group.devices_per_node
    return at * stage_ranks // size == ((at + 2) * stage_ranks - 1) // size


def _hop(group: Group, near: bool) -> CommGroup:
    return CommGroup(2, 2 if near else 1, 1 if near else 2, group.intra_node, group.inter_node)


def crossing_of(cluster: Cluster, numbers: Sequence[int], ranks: int, sharers: int) -> CommGroup:
    """Return ranks of several groups of the cluster; as many groups of ranks as `sharers` cross the
    link at the same time.
    """
    groups = [cluster.groups[number] for number in numbers]
    links = [cluster.link(a, b) for a in numbers for b in numbers if a < b]
    return CommGroup(
        ranks,
        1,
        ranks,
        min((group.intra_node for group in groups), key=lambda link: link.gb_s),
        min((group.inter_node for group in groups), key=lambda link: link.gb_s),
        min(links, key=lambda link: link.gb_s),
        sharers,
    )


def _pipelined(cluster: Cluster, layout: Layout, spread: GroupAssignment) -> Topology:
    stages: list[StageGroups] = []
    for block, (number, count) in enumerate(spread.blocks):
        group = cluster.groups[number]
        after = spread.blocks[(block + 1) % len(spread.blocks)][0]
        known: dict[bool, StageGroups] = {}
        for at in range(count - 1):
            near = _near(group, layout.stage_ranks, at)
            if near not in known:
                known[near] = _stage(number, group, layout, _hop(group, near))
            stages.append(known[near])
        # The last rank sends back what it got; with several stages per rank it sends on to the
        # first.
        last = block == len(spread.blocks) - 1 and layout.virtual_stages == 1
        if last and count > 1:  # it sends back only
            stages.append(stages[-1])
            continue
        other = spread.blocks[block - 1][0] if last else after
        # All ranks of a stage send at the same time: they share the link.
        hop = crossing_of(cluster, sorted((number, other)), 2, layout.stage_ranks)
        stages.append(_stage(number, group, layout, hop))
    columns = (ReplicaKind(1.0, tuple(stage.groups for stage in stages)),)
    return Topology(tuple(stages), columns)


def replicated(cluster: Cluster, layout: Layout, spread: GroupAssignment) -> Topology:
    """Return where replicas stand that fill nodes evenly; the cluster may have more devices than
    they use.
    """
    numbers = sorted(number for number, _ in spread.blocks)
    groups = {number: cluster.groups[number] for number in numbers}
    counts = dict(spread.blocks)
    inner = {}
    for name, where in strides(layout).items():
        found = [strided(groups[number], *where) for number, _ in spread.blocks]
        # Replicas wait for each other at the end of a step: the slowest group of ranks counts for
        # all.
        inner[name] = min(found, key=_speed)
    size = layout.stage_ranks // layout.dp_replicate
    experts = layout.ep * layout.etp
    wide = {
        # ranks of one replica in the group, distance between neighbours, groups of a stage that
        # cross at the same time
        "replicate": (1, size, size),
        "data": (layout.fsdp, layout.tp, layout.tp),
        "expert_replicas": (layout.edp, experts, experts),
    }
    for name, (ranks, stride, sharers) in wide.items():
        parts = [strided(groups[n], counts[n] * ranks, stride) for n in numbers]
        # Gradients of all stages cross at the same time (measured: 1.72 s where one stage's alone
        # would be 1.15).
        whole = crossing_of(cluster, numbers, layout.dp_replicate * ranks, sharers * layout.pp)
        per_node = min(part.per_node for part in parts)
        nodes = sum(part.nodes for part in parts)
        inner[name] = replace(whole, per_node=per_node, nodes=nodes)
    stage = StageGroups(tuple(numbers), **inner, hop=inner["tp"])
    stages = []
    for at in range(layout.pp):
        back = at if at + 1 < layout.pp or layout.virtual_stages > 1 else at - 1
        pick = [
            _hop(groups[n], _near(groups[n], counts[n] * size, back))
            if back + 1 < layout.pp
            else _hop(groups[n], layout.pp * counts[n] * size <= groups[n].devices_per_node)
            for n, _ in spread.blocks
        ]
        hop = min(pick, key=_speed) if layout.pp > 1 else inner["tp"]
        stages.append(replace(stage, hop=hop))
    return Topology(tuple(stages), _columns(layout, spread))


def _speed(one: CommGroup) -> tuple[float, float]:
    """Order groups of ranks by the bandwidth between them, as `topology` does."""
    if one.nodes > 1:
        return 1.0, one.per_node * one.inter.gb_s
    return 2.0, one.intra.gb_s


def _columns(layout: Layout, spread: GroupAssignment) -> tuple[ReplicaKind, ...]:
    shares = layout.shares or (1,) * layout.dp_replicate
    columns, first = [], 0
    for number, count in spread.blocks:
        share = max(shares[first : first + count]) * layout.dp_replicate / sum(shares)
        columns.append(ReplicaKind(share, ((number,),) * layout.pp))
        first += count
    return tuple(columns)
