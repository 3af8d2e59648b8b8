"""How long collectives take on given links. Pure; no torch.

n ranks of a group, k of them on one node, V bytes. Ring algorithms (Patarasu and Yuan, JPDC 69(2),
2009): each rank sends (n - 1) / n of V for an all-gather or a reduce-scatter, twice that for an
all-reduce. A ring leaves a node once, and while all devices of a node work in groups of their own,
a group has the share of the network cards that belongs to its k devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster, Group, Link

LAUNCH_S = 12e-6
"""From the call of a collective to its first byte (NCCL's start-up time for small messages on one
node).
"""


@dataclass(frozen=True)
class CommGroup:
    """Where the ranks of one group of a layout stand.

    Attributes:
        ranks: n.
        per_node: k, on the node that has fewest.
        nodes: that the group spans.
        intra, inter: links inside and between nodes (per device).
        between: the link between groups of the cluster that it crosses, if it does (shared by
            `sharers` groups of the layout).
    """

    ranks: int
    per_node: int
    nodes: int
    intra: Link
    inter: Link
    between: Link | None = None
    sharers: int = 1

    def __hash__(self) -> int:
        """Remembered: domains are keys of what a search has computed."""
        found = self.__dict__.get("_hash")
        if found is None:
            ends = (self.ranks, self.per_node, self.nodes, self.intra, self.inter)
            found = hash((*ends, self.between, self.sharers))
            object.__setattr__(self, "_hash", found)
        return int(found)

    def rates(self, constants: Constants) -> tuple[float, float]:
        """Return (bytes per second around the ring, seconds of one hop)."""
        rate, hop = math.inf, 0.0
        # A ring goes through every node once: inside, each device has its own link; between nodes,
        # all devices of a node carry rings at the same time, so that rates add up.
        if self.per_node > 1:
            rate, hop = _reached(self.intra, constants.intra), self.intra.latency_us
        if self.nodes > 1:
            crowd = 1.0 + constants.congestion * math.log2(self.nodes)
            rate = min(rate, self.per_node * _reached(self.inter, constants.inter) / crowd)
            hop = max(hop, self.inter.latency_us)
        if self.between is not None:
            # All groups of the layout that cross here do so at the same time and share one link.
            rate = min(rate, _reached(self.between, constants.inter) / self.sharers)
            hop = max(hop, self.between.latency_us)
        return rate * 1e9, hop * 1e-6

    def gather_s(self, size: float, constants: Constants) -> float:
        """Return the time of an all-gather or reduce-scatter whose whole is `size` bytes."""
        if self.ranks == 1:
            return 0.0
        rate, hop_s = self.rates(constants)
        # Every rank has its own part already and receives those of the others.
        share = (self.ranks - 1) / self.ranks
        return LAUNCH_S + share * size / rate + hop_s * self._hops()

    def reduce_s(self, size: float, constants: Constants) -> float:
        """Return the time of an all-reduce of `size` bytes."""
        if self.ranks == 1:
            return 0.0
        rate, hop_s = self.rates(constants)
        # A reduce-scatter and an all-gather; latencies grow with the logarithm, as libraries take
        # trees for small sizes.
        share = 2 * (self.ranks - 1) / self.ranks
        return LAUNCH_S + share * size / rate + 2 * hop_s * math.log2(self.ranks)

    def exchange_s(self, size: float, constants: Constants) -> float:
        """Return the time of an all-to-all to which every rank brings `size` bytes."""
        if self.ranks == 1:
            return 0.0
        # Rows go to experts anywhere alike: a rank keeps 1/n of them, some stay on its node, the
        # rest leave it by its own card.
        inside = (self.per_node - 1) / self.ranks * size
        outside = (self.ranks - self.per_node) / self.ranks * size
        time_s = LAUNCH_S + inside / (self.intra.gb_s * 1e9 * constants.routing)
        if self.nodes > 1:
            crowd = 1.0 + constants.congestion * math.log2(self.nodes)
            time_s += outside * crowd / (self.inter.gb_s * 1e9 * constants.routing)
            time_s += self.inter.latency_us * 1e-6
        if self.between is not None:
            # All ranks' rows cross the same link.
            time_s += outside * self.ranks / (self.between.gb_s * 1e9 * constants.routing)
        return time_s

    def _hops(self) -> float:
        """Around a ring of nodes; the ranks of one node cost little."""
        return self.nodes - 1 + math.log2(self.per_node) if self.nodes > 1 else self.ranks - 1

    def send_s(self, size: float, constants: Constants) -> float:
        """Return the time in which one rank sends `size` bytes to another of the group."""
        if self.ranks == 1:
            return 0.0
        # Two ranks, wherever the group stands: one pair sends, not a ring of the whole node.
        rate, hop_s = replace(self, per_node=2 if self.nodes == 1 else 1).rates(constants)
        return LAUNCH_S + hop_s + size / rate


def _reached(link: Link, share: float) -> float:
    """Return the GB/s that collectives get: what a probe measured is counted whole."""
    return link.gb_s if link.measured else link.gb_s * share


def domain(cluster: Cluster, devices: Sequence[int], sharers: int = 1) -> CommGroup:
    """Return where a group of devices stands.

    Args:
        devices: their numbers in the cluster.
        sharers: groups of the layout that cross the same link between groups of the cluster at the
            same time.
    """
    spots = [cluster.spot(device) for device in devices]
    # The node with fewest ranks has fewest cards for the same ring: it decides the rate.
    on_node: dict[int, int] = {}
    for _, node in spots:
        on_node[node] = on_node.get(node, 0) + 1
    numbers = sorted({group for group, _ in spots})
    groups = [cluster.groups[number] for number in numbers]
    between = None
    if len(numbers) > 1:
        crossed = [cluster.link(a, b) for a in numbers for b in numbers if a < b]
        between = min(crossed, key=lambda link: link.gb_s)
    return CommGroup(
        len(devices),
        min(on_node.values()),
        len(on_node),
        min((group.intra_node for group in groups), key=lambda link: link.gb_s),
        min((group.inter_node for group in groups), key=lambda link: link.gb_s),
        between,
        sharers,
    )


def strided(group: Group, ranks: int, stride: int) -> CommGroup:
    """Return where `ranks` ranks, each `stride` after the last, stand in a group of equal nodes
    that they fill in order.
    """
    size = group.devices_per_node
    # A stride of a node or more puts every rank on a node of its own; else as many as the node has
    # room for.
    inside = max(1, min(ranks, size // stride)) if stride < size else 1
    return CommGroup(ranks, inside, -(-ranks // inside), group.intra_node, group.inter_node)
