"""The order in which ranks measure, and what comes of it as plain values: `survey` is one
collective of all ranks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from motet.parallel.cluster.description import ClusterError
from motet.parallel.cluster.probe.fit import (
    MOST_HOSTS_COMPARED,
    SIZES,
    LinkFit,
    check_groups,
    climb,
    fit,
    rounds,
    together,
)
from motet.parallel.cluster.probe.ranks import (
    COLLECTIVES,
    DTYPES,
    Flow,
    Measurer,
    Transfers,
    bus_share,
    collective_seconds,
    copy_gb_s,
    facts,
    matmul_tflops,
)

PAIR_SIZES = SIZES[:-2]
"""For who stands near whom, 16 MiB are enough."""
PAIR_S = 0.5
Hosts = dict[str, list[int]]  # ranks by host


def survey(
    measurer: Measurer, given: Mapping[str, Sequence[str]] | None = None, series_s: float = 1.5
) -> dict[str, Any]:
    """Measure everything; the same result on every rank.

    Args:
        given: hosts of every group; None: groups are found by measuring.
        series_s: seconds of transfers of one series, about; links between groups get twice that,
            collectives half.

    Raises:
        ClusterError: groups that do not have the hosts that there are, or unlike hosts. On all
            ranks.
    """
    started = time.monotonic()
    rank_facts = facts(measurer)
    hosts = _by_host(rank_facts)
    if given:
        check_groups(given, list(hosts))
        _check_alike(given, hosts, rank_facts)
    for ranks in hosts.values():
        for rank in ranks if measurer.world.device.type == "cpu" else ():
            rank_facts[rank]["memory_gib"] /= len(ranks)  # they share the host's
    devices = _devices(measurer, rank_facts)
    transfers = Transfers(measurer)
    pairs: list[dict[str, Any]] = []
    if given:
        groups, found_by = {name: list(members) for name, members in given.items()}, "given"
    else:
        groups, found_by, pairs = _find_groups(transfers, hosts, rank_facts)
    links = _links(transfers, groups, hosts, series_s)
    collectives = _collectives(measurer, groups, hosts, series_s / 2)
    return {
        "hosts": {host: [devices[rank] for rank in ranks] for host, ranks in hosts.items()},
        "groups": groups,
        "groups_by": found_by,
        "pairs": pairs,
        "links": links,
        "collectives": collectives,
        "seconds": time.monotonic() - started,
    }


def _by_host(known: Sequence[Mapping[str, Any]]) -> Hosts:
    hosts: Hosts = {}
    for rank, one in enumerate(known):
        hosts.setdefault(one["host"], []).append(rank)
    for host, ranks in hosts.items():
        if len({known[rank]["local_rank"] for rank in ranks}) < len(ranks):
            raise ClusterError(
                f"two machines are both called {host!r}; give them names of their own"
            )
    return dict(sorted(hosts.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which n2 comes before n10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _check_alike(
    groups: Mapping[str, Sequence[str]], hosts: Hosts, known: Sequence[Mapping[str, Any]]
) -> None:
    for name, members in groups.items():
        kinds = {host: _kind(host, hosts, known) for host in members}
        if len(set(kinds.values())) > 1:
            told = ", ".join(f"{h} has {n} x {device}" for h, (device, n) in kinds.items())
            raise ClusterError(
                f"--groups: the nodes of {name} are not alike: {told}; put unlike nodes into "
                "groups of their own"
            )


def _kind(host: str, hosts: Hosts, known: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    return str(known[hosts[host][0]]["device"]), len(hosts[host])


def _devices(measurer: Measurer, known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the facts of every rank with its measured rates."""
    rates: dict[str, list[float]] = {}
    for name in DTYPES:
        if name == "fp16" and measurer.world.device.type == "cpu":
            continue
        measurer.tell(f"products in {name}")
        rates[name] = measurer.share(matmul_tflops(measurer, name))
    measurer.tell("copies in memory")
    copies = measurer.share(copy_gb_s(measurer))
    return [
        {
            **one,
            "rank": rank,
            "tflops": {name: rate[rank] for name, rate in rates.items() if rate[rank] > 0},
            "copy_gb_s": copies[rank],
        }
        for rank, one in enumerate(known)
    ]


# --- who stands near whom


def _find_groups(
    transfers: Transfers, hosts: Hosts, known: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[str]], str, list[dict[str, Any]]]:
    """Return groups of hosts by name, how they were found, and what was measured of pairs."""
    names = list(hosts)
    if len(names) == 1:
        return {names[0]: names}, "one host", []
    if len(names) > MOST_HOSTS_COMPARED:
        raise ClusterError(
            f"{len(names)} hosts are too many to compare every pair (at most "
            f"{MOST_HOSTS_COMPARED}); "
            "say which belong together, e.g. --groups a:n[1-64] b:n[65-128]"
        )
    links: dict[tuple[int, int], LinkFit] = {}
    leaders = [ranks[0] for ranks in hosts.values()]
    for number, met in enumerate(rounds(len(names)), 1):
        transfers.measurer.tell(f"pairs of hosts, round {number} of {len(rounds(len(names)))}")
        flows = [(leaders[a], leaders[b]) for a, b in met]
        samples = climb(lambda size, f=flows: transfers.seconds(f, size), PAIR_S, PAIR_SIZES)  # type: ignore[misc]
        for i, pair in enumerate(met):
            links[pair] = fit(samples, i)
    told = [
        {"hosts": [names[a], names[b]], "gb_s": one.gb_s, "latency_us": one.latency_us}
        for (a, b), one in sorted(links.items())
    ]
    groups: list[list[str]] = []
    for members in together(links, len(names)):  # unlike hosts are never one group
        kinds: dict[tuple[str, int], list[str]] = {}
        for host in members:
            kinds.setdefault(_kind(names[host], hosts, known), []).append(names[host])
        groups += kinds.values()
    return {f"group-{i}": group for i, group in enumerate(groups, 1)}, "measured", told


# --- links


def _links(
    transfers: Transfers, groups: Mapping[str, Sequence[str]], hosts: Hosts, series_s: float
) -> list[dict[str, Any]]:
    """Measure inside nodes, between nodes of a group, and between groups."""
    out = []

    def add(scope: str, names: list[str], flows: Sequence[Flow], budget_s: float) -> None:
        transfers.measurer.tell(f"{scope.replace('_', ' ')}: {', '.join(names)}")
        found = fit(climb(lambda size: transfers.seconds(flows, size), budget_s))
        told = {"scope": scope, "groups": names, "flows": len(flows), **vars(found)}
        out.append(told | {"per_flow_gb_s": found.gb_s / len(flows)})

    for name, members in groups.items():
        ranks = [hosts[host] for host in members]
        inside = [pair for own in ranks for pair in neighbours(own)]
        if inside:
            add("intra_node", [name], inside, series_s)
        across = [flow for one, other in neighbours(ranks) for flow in zip(one, other, strict=True)]
        if across:
            add("inter_node", [name], across, series_s)
    names = list(groups)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            ahead = crossing([hosts[h] for h in groups[one]], [hosts[h] for h in groups[other]])
            back = [(b, a) for a, b in ahead]
            add("between", [one, other], ahead, 2 * series_s)
            add("between", [other, one], back, 2 * series_s)
            add("between_alone", [one, other], ahead[:1], series_s)
    return out


def neighbours(things: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return disjoint pairs of neighbours: (0, 1), (2, 3), ..."""
    return list(zip(things[::2], things[1::2], strict=False))


def crossing(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> list[Flow]:
    """Return disjoint flows from one group's ranks (by host) to another's, as many as there can be,
    spread over hosts.
    """
    spread = [
        [own[i] for i in range(max(map(len, side))) for own in side if i < len(own)]
        for side in (one, other)
    ]
    return list(zip(*spread, strict=False))


# --- collectives


def _collectives(
    measurer: Measurer, groups: Mapping[str, Sequence[str]], hosts: Hosts, series_s: float
) -> list[dict[str, Any]]:
    """Time collectives on one node, in every group, and over all."""
    sets: dict[str, list[int]] = {}
    for name, members in groups.items():
        ranks = [rank for host in members for rank in hosts[host]]
        if len(hosts[members[0]]) > 1:
            sets[f"a node of {name}"] = hosts[members[0]]
        if len(members) > 1:
            sets[name] = ranks
    if len(groups) > 1:
        sets["all"] = list(range(measurer.world.size))
    out = []
    for where, ranks in sets.items():
        wait = timedelta(seconds=measurer.world.timeout_s)
        made = dist.new_group(sorted(ranks), timeout=wait)
        group = made if measurer.world.rank in ranks else None
        out += [_collective(measurer, k, where, group, len(ranks), series_s) for k in COLLECTIVES]
    return out


def _collective(
    measurer: Measurer, kind: str, where: str, group: Any, ranks: int, series_s: float
) -> dict[str, Any]:
    """Time one kind of collective; `group` is None on ranks that are not in it."""
    measurer.tell(f"{kind.replace('_', '-')}: {where}")
    samples = climb(lambda size: collective_seconds(measurer, kind, group, ranks, size), series_s)
    found = fit(samples)
    return {
        "where": where,
        "kind": kind,
        "ranks": ranks,
        "bus_gb_s": found.gb_s * bus_share(kind, ranks),
        "start_us": 2 * found.latency_us,
        "residual": found.residual,
        "largest": found.largest,
    }
