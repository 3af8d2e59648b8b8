"""From what a probe measured to a cluster, with notes on what was measured and what was taken from
data sheets. Pure; no torch.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster, Device, Group, Link, builtin_link, pair
from motet.parallel.cluster.devices import DEFAULT_LINKS, DEVICES, NETWORK_LATENCY_US
from motet.parallel.cluster.file import BOUNDS, PEAK_TFLOPS

_NAMES = (
    # what drivers call a device, before and after: names in the catalogue, the largest memory first
    ("gb200", ("gb200",)),
    ("b200", ("b200",)),
    ("h200", ("h200",)),
    ("h100", ("h100-96-500w", "h100")),
    ("a100", ("a100-80", "a100-40")),
    ("v100", ("v100-32", "v100-16")),
    ("mi300x", ("mi300x",)),
    ("l40s", ("l40s",)),
    ("4090", ("rtx4090",)),
    ("a10", ("a10",)),
    ("t4", ("t4",)),
    ("cpu", ("cpu",)),
)
WAN_US = 2_000.0
SLOW_NODE_LINK_GB_S = 60.0
"""Devices of one node that send less than this to each other are not on NVLink."""


def device_kind(name: str, memory_gib: float | None = None) -> str | None:
    """Return the catalogue's name of a device as its driver or a Slurm administrator calls it;
    None: it has none.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    for word, kinds in _NAMES:
        if not any(re.fullmatch(rf"(rtx|tesla|nvidia)?{word}", one) for one in words):
            continue
        if memory_gib is None:
            return kinds[-1]
        near = [k for k in kinds if abs(DEVICES[k]["memory_gib"] / memory_gib - 1) < 0.15]
        return near[0] if near else (kinds[-1] if word == "cpu" else None)
    return None


def cluster_of(result: Mapping[str, Any]) -> tuple[Cluster, list[str]]:
    """Return the cluster that `probe_survey.survey` measured, and what one should know of it."""
    notes: list[str] = []
    groups = tuple(_group(name, hosts, result, notes) for name, hosts in result["groups"].items())
    return Cluster(groups, _between(result["links"])), notes


def _between(measured: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Link]:
    """Return the links between groups.

    The slower direction of all devices together counts, or what one pair alone has where flows in
    each other's way had less.
    """
    rates: dict[tuple[str, str], float] = {}
    for one in measured:
        if one["scope"] == "between":
            key = pair(*one["groups"])
            rates[key] = min(one["gb_s"], rates.get(key, one["gb_s"]))
    links = {}
    for one in measured:
        if one["scope"] == "between_alone":
            key = pair(*one["groups"])
            word = "wan" if one["latency_us"] > WAN_US else "ethernet"
            rate, latency_us = max(rates[key], one["gb_s"]), max(one["latency_us"], 0.1)
            links[key] = Link(_round(rate), _round(latency_us), word, measured=True)
    return links


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _group(name: str, hosts: Sequence[str], result: Mapping[str, Any], notes: list[str]) -> Group:
    rows = [one for host in hosts for one in result["hosts"][host]]
    kind = _device(name, rows, notes)
    measured = {link["scope"]: link for link in result["links"] if link["groups"] == [name]}
    per_node = len(result["hosts"][hosts[0]])
    buses = [one["bus_gb_s"] for one in result.get("collectives", ()) if one["where"] == name]
    reached = statistics.median(buses) / per_node if buses else None
    return Group(
        name,
        kind,
        len(hosts),
        per_node,
        _intra(name, kind, measured.get("intra_node"), notes),
        _inter(name, rows[0]["network"], measured.get("inter_node"), len(hosts), reached, notes),
    )


def _device(group: str, found: Sequence[Mapping[str, Any]], notes: list[str]) -> Device:
    """Return the device of a group: rates as measured, the rest of the catalogue where it has the
    device.
    """
    first = found[0]
    kind = device_kind(first["device"], first["memory_gib"])
    names = set.intersection(*(set(one["tflops"]) for one in found))
    rates = {n: statistics.median(one["tflops"][n] for one in found) for n in sorted(names)}
    weak = [n for n, rate in rates.items() if rate < PEAK_TFLOPS[0]]
    measured = {n: _round(max(rate, PEAK_TFLOPS[0])) for n, rate in rates.items() if n not in weak}
    notes += [f"{group}: {n} reaches {rates[n] * 1e3:.1f} GFLOPS only: left out" for n in weak]
    if not measured:
        measured = {"fp32": PEAK_TFLOPS[0]}
        notes.append(f"{group}: no products are fast enough; fp32 is written as the least there is")
    copy = statistics.median(one["copy_gb_s"] for one in found)
    slowest = {n: min(one["tflops"][n] for one in found) for n in measured if n in names}
    for n, rate in slowest.items():
        if rate < 0.8 * rates[n]:
            notes.append(f"{group}: one device reaches {rate / rates[n]:.0%} of the median in {n}")
    if kind is None or kind == "cpu":
        return _unlisted(group, first, kind, measured, copy, notes)
    listed = {key: value for key, value in DEVICES[kind].items() if key != "source"}
    peaks = listed["peak_tflops"]
    for n in [n for n in measured if measured[n] > peaks.get(n, float("inf"))]:
        notes.append(f"{group}: {n} reaches {measured[n]:g} of {peaks[n]:g} TFLOPS: not written")
        del measured[n]
    sheet = listed["memory_gb_s"]
    notes.append(f"{group}: copies reach {copy:,.0f} of {sheet:,.0f} GB/s ({copy / sheet:.0%})")
    listed["memory_gib"] = _round(first["memory_gib"])
    return Device(kind=kind, measured_tflops=measured, **listed)


def _unlisted(
    group: str,
    first: Mapping[str, Any],
    kind: str | None,
    measured: Mapping[str, float],
    copy_gb_s: float,
    notes: list[str],
) -> Device:
    """Return a device without a data sheet: what it reaches stands for its peak."""
    name = kind or "-".join(re.findall(r"[a-z0-9]+", first["device"].lower())) or "device"
    # The cost model takes this share of a peak: write the peak of which it is what was measured.
    peak_gb_s = copy_gb_s / Constants().bandwidth
    least, most, _ = BOUNDS["memory_gb_s"]
    if not least <= peak_gb_s <= most:
        notes.append(f"{group}: copies reach {copy_gb_s:.2g} GB/s, written as {least:g}")
    notes.append(f"{group}: {name}: what was measured stands for the peak; price and power unknown")
    return Device(
        kind=name,
        memory_gib=_round(max(BOUNDS["memory_gib"][0], first["memory_gib"])),
        peak_tflops=dict(measured),
        matmul_efficiency=1.0,
        memory_gb_s=_round(min(max(peak_gb_s, least), most)),
        measured_tflops=dict(measured),
    )


def _intra(name: str, kind: Device, measured: Mapping[str, Any] | None, notes: list[str]) -> Link:
    usual = builtin_link(DEFAULT_LINKS.get(kind.kind, "pcie4"))
    if measured is None:
        notes.append(f"{name}: one process per node: the link inside a node was not measured")
        return usual
    rate = measured["per_flow_gb_s"]
    word = "pcie" if usual.kind == "nvlink" and rate < SLOW_NODE_LINK_GB_S else usual.kind
    return Link(_round(rate), _round(max(0.1, measured["latency_us"])), word, measured=True)


def _inter(
    name: str,
    network: str,
    measured: Mapping[str, Any] | None,
    nodes: int,
    reached: float | None,
    notes: list[str],
) -> Link:
    """Return the link between nodes: as fast as a pair sends, or as the group's collectives (their
    median, `reached`) where that is less.
    """
    if measured is None:
        if nodes > 1:
            notes.append(f"{name}: the link between its nodes was not measured")
        return Link(1.0, NETWORK_LATENCY_US[network], network)
    rate, latency = measured["per_flow_gb_s"], max(0.1, measured["latency_us"])
    if reached is not None and reached < rate:
        notes.append(
            f"{name}: collectives between nodes reach {reached / rate:.0%} of what a pair does: "
            "written"
        )
        rate = reached
    return Link(_round(rate), _round(latency), network, measured=True)
