"""A cluster.yaml, checked: every value that cannot be meant is told at once, with what would work.

Pure; no torch.

groups:
  - name: hall
    device: h100               # of the catalogue; or {kind: mine, like: h100, memory_gib: 60}
    nodes: 4
    devices_per_node: 8
    intra_node: nvlink4        # may be left out; or {gb_s: 450, latency_us: 3, kind: nvlink}
    nics: {count: 8, gbit_s: 400, kind: infiniband}    # of one node
    calibration: {constants: {matmul: 0.7}}            # may be left out; `motet plan --calibrate`
                                                       writes it
links:                         # between groups
  - {between: [hall, attic], gbit_s: 10, latency_us: 5000, kind: ethernet}
currency: EUR                  # of all price_per_hour; may be left out
"""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

from motet.core.errors import Problem
from motet.core.parsing import parse_yaml
from motet.core.schema import MappingReader, is_sequence
from motet.parallel.cluster.calibration import fault
from motet.parallel.cluster.description import (
    Calibration,
    Cluster,
    ClusterError,
    Device,
    Group,
    Link,
    builtin_link,
    pair,
    unknown_device,
)
from motet.parallel.cluster.devices import DEFAULT_LINKS, DEVICES, LINKS, NETWORK_LATENCY_US

BOUNDS: dict[str, tuple[float, float, str]] = {
    # field: least, most, what a value outside may be instead
    "memory_gib": (0.5, 2048.0, "GiB of one device"),
    "matmul_efficiency": (0.01, 1.0, "a share of the peak"),
    "memory_gb_s": (5.0, 30_000.0, "GB/s; an H100 has 3,350"),
    "price_per_hour": (0.0, 1000.0, "of one device"),
    "power_w": (0.0, 5000.0, "of one device"),
}
TOP_KEYS = ("name", "groups", "links", "currency")
MOST_CURRENCY = 12
DTYPES = ("bf16", "fp16", "fp8", "fp32")
PEAK_TFLOPS = (0.01, 20_000.0)
INFINIBAND_GBIT_S = (10.0, 20.0, 40.0, 56.0, 100.0, 200.0, 400.0, 800.0)
MOST_NIC_GBIT_S = 1600.0
MOST_NODE_LINK_GB_S = 2000.0
_DEVICE_KEYS = (*(one.name for one in fields(Device)), "like")
_CALIBRATION_KEYS = tuple(one.name for one in fields(Calibration))
_GROUP_KEYS: tuple[str, ...] = ("name", "device", "nodes", "devices_per_node", "intra_node")
_GROUP_KEYS += ("inter_node", "nics", "calibration")
_LINK_KEYS = ("gb_s", "gbit_s", "latency_us", "kind", "measured")


class _Reader(MappingReader):
    UNKNOWN = "is not known"

    def name(self, key: str, default: str | None, instead: str) -> str:
        """Return a name; `instead` stands in for one that is wrong."""
        value = self.values.get(key, default)
        if isinstance(value, str) and value:
            return value
        self.refuse(key, value, "a name")
        return instead


def read(path: Path) -> Cluster:
    """Read a cluster.yaml.

    Raises:
        ClusterError: no such file, no YAML, or values that cannot be meant; all problems at once.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ClusterError(f"{path} is not YAML: {error}") from None
    try:
        return from_mapping(values)
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from None


def from_mapping(values: Any) -> Cluster:
    """Return the cluster that plain values describe (see above).

    Raises:
        ClusterError: one message with everything that is wrong.
    """
    problems: list[Problem] = []
    top = _Reader(values, "cluster", problems, TOP_KEYS).values
    listed = top.get("groups")
    groups: tuple[Group, ...] = ()
    links: dict[tuple[str, str], Link] = {}
    if isinstance(listed, list) and listed:
        groups = tuple(
            _group(_Reader(one, f"groups[{i}]", problems, _GROUP_KEYS))
            for i, one in enumerate(listed)
        )
        names = [group.name for group in groups]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [Problem("groups", f"{name!r} names more than one group") for name in twice]
        links = _links(problems, top.get("links") or [], names)
    else:
        why = f"{listed!r} is not a list of at least one group of nodes"
        problems.append(Problem("groups", why))
    currency = top.get("currency") or ""
    if not isinstance(currency, str) or len(currency) > MOST_CURRENCY or not currency.isprintable():
        problems.append(Problem("currency", f"{currency!r} is no short word, such as EUR"))
    if problems:
        raise ClusterError("; ".join(map(str, problems)))
    return Cluster(groups, links, currency)


def _group(reader: _Reader) -> Group:
    needed = ("device", "nodes", "devices_per_node")
    if missing := [key for key in needed if key not in reader.values]:
        reader.problem("", f"lacks {', '.join(missing)}")
    device = _device(reader, reader.values.get("device", "h100"))
    nodes = reader.whole("nodes", 1, 1, 1_000_000)
    per_node = reader.whole("devices_per_node", 1, 1, 1024)
    name = reader.name("name", device.kind, reader.where)
    intra = _intra(reader, device.kind)
    inter = _inter(reader, nodes, per_node)
    return Group(name, device, nodes, per_node, intra, inter, _calibration(reader))


def _calibration(group: _Reader) -> Calibration | None:
    """Return what runs said of a group's constants, each of them physical."""
    if group.values.get("calibration") is None:
        return None
    reader = group.inner("calibration", _CALIBRATION_KEYS)
    constants = reader.values.get("constants")
    if not isinstance(constants, dict) or not constants:
        reader.refuse("constants", constants, "a mapping such as {matmul: 0.6}")
        return None
    for name, value in constants.items():
        if why := fault(str(name), value):
            reader.problem(f"constants.{name}", why)
    runs, at_bounds = (tuple(map(str, reader.sequence(key))) for key in ("runs", "at_bounds"))
    return Calibration(
        constants,
        int(reader.number("devices", 0, 0, 1e6)),
        runs,
        float(reader.number("median_error", 0.0, 0.0, 100.0)),
        at_bounds,
        str(reader.values.get("date", "")),
        {str(key): str(value) for key, value in reader.mapping("versions").items()},
    )


def _device(group: _Reader, values: Any) -> Device:
    values = {"kind": values} if isinstance(values, str) else values
    reader = _Reader(values, f"{group.where}.device", group.problems, _DEVICE_KEYS)
    kind, like = reader.name("kind", None, "?"), reader.values.get("like")
    start = kind if like is None else like
    known = DEVICES.get(start) if isinstance(start, str) else None
    needed = {"memory_gib", "peak_tflops", "memory_gb_s"}
    if known is None and (like is not None or not needed <= set(reader.values)):
        reader.problem("", unknown_device(start))
        known = DEVICES["h100"]
    base = {"matmul_efficiency": 0.6, **(known or {})}
    base.pop("source", None)
    for name, (least, most, unit) in BOUNDS.items():
        if name in base or name in reader.values:
            base[name] = float(reader.number(name, base.get(name, least), least, most, unit))
    for name in ("peak_tflops", "measured_tflops"):
        if name in reader.values:
            base[name] = _rates(reader, name)
    for dtype, rate in base.get("measured_tflops", {}).items():
        peak = base["peak_tflops"].get(dtype, math.inf)
        if rate > peak * 1.02:
            why = f"{rate:g} is more than the peak of {peak:g} TFLOPS; correct one of them"
            reader.problem(f"measured_tflops.{dtype}", why)
    return Device(kind=kind, **base)


def _rates(device: _Reader, key: str) -> dict[str, float]:
    reader = device.inner(key, DTYPES)
    if not reader.values:
        reader.problem("", f"has no rate; give at least one of {', '.join(DTYPES)}")
    least = PEAK_TFLOPS[0]
    return {
        name: float(reader.number(name, least, *PEAK_TFLOPS, "TFLOPS")) for name in reader.values
    }


def _rate_gb_s(reader: MappingReader) -> float:
    """Return the rate of a link in GB/s, given in one of two units."""
    if ("gb_s" in reader.values) == ("gbit_s" in reader.values):
        reader.problem("", "needs one of gb_s (bytes) and gbit_s (bits; 8 Gbit/s = 1 GB/s)")
        return 1.0
    if "gb_s" in reader.values:
        return float(reader.number("gb_s", 1e-4, 1e-4, 1e6))
    return float(reader.number("gbit_s", 1e-4, 1e-4, 1e6)) / 8


def _intra(group: _Reader, kind: str) -> Link:
    usual = builtin_link(DEFAULT_LINKS.get(kind, "pcie4"))
    values = group.values.get("intra_node")
    if values is None:
        return usual
    if isinstance(values, str):
        if values in LINKS:
            return builtin_link(values)
        group.refuse("intra_node", values, f"one of {', '.join(LINKS)}; or give gb_s and kind")
        return usual
    reader = group.inner("intra_node", _LINK_KEYS)
    rate = _rate_gb_s(reader)
    word = str(reader.values.get("kind", usual.kind))
    if word == "nvlink" and usual.kind == "nvlink" and rate > 1.1 * usual.gb_s:
        why = (
            f"{rate:g} GB/s is more than a {kind} sends in one direction; data sheets count both: "
            f"{usual.gb_s:g} GB/s is its NVLink"
        )
        reader.problem("gb_s", why)
    elif rate > MOST_NODE_LINK_GB_S:
        why = (
            f"{rate:g} GB/s is more than any link inside a node; is it Gbit/s? Then {rate / 8:g} "
            f"GB/s, or gbit_s: {rate:g}"
        )
        reader.problem("gb_s", why)
    latency = float(reader.number("latency_us", usual.latency_us, 0.1, 1e5))
    return Link(rate, latency, word, bool(reader.values.get("measured", False)))


def _inter(group: _Reader, nodes: int, devices_per_node: int) -> Link:
    """Return one device's share of its node's network cards."""
    of_node, of_device = "nics" in group.values, "inter_node" in group.values
    if of_node and of_device:
        group.problem("", "has both nics (of a node) and inter_node (of a device); keep one")
    if not of_node and not of_device:
        if nodes > 1:
            why = "has several nodes and no nics; e.g. nics: {count: 8, gbit_s: 200, kind: "
            group.problem("", why + "infiniband}")
        return Link(1.0, NETWORK_LATENCY_US["ethernet"], "ethernet")
    if of_device:
        reader, cards = group.inner("inter_node", _LINK_KEYS), devices_per_node
    else:
        reader = group.inner("nics", ("count", *_LINK_KEYS))
        cards = reader.whole("count", 1, 1, 64)
    word, latency = _network(reader)
    rate = _rate_gb_s(reader)
    if of_node:
        _plausible_nic(reader, rate, word)
    elif rate > MOST_NIC_GBIT_S / 8:
        reader.problem("gb_s", _too_fast(rate))
    measured = bool(reader.values.get("measured", False))
    return Link(rate * cards / devices_per_node, latency, word, measured)


def _network(reader: MappingReader) -> tuple[str, float]:
    word = str(reader.values.get("kind", "ethernet"))
    if word not in NETWORK_LATENCY_US:
        reader.choice("kind", tuple(NETWORK_LATENCY_US), "ethernet")
    return word, float(reader.number("latency_us", NETWORK_LATENCY_US.get(word, 25.0), 0.1, 1e6))


def _too_fast(rate_gb_s: float) -> str:
    return (
        f"{rate_gb_s:g} GB/s is more than any network card (at most {MOST_NIC_GBIT_S / 8:g}); is "
        f"it Gbit/s? Then gbit_s: {rate_gb_s:g}, or gb_s: {rate_gb_s / 8:g}"
    )


def _is_infiniband(gbit_s: float) -> bool:
    return any(math.isclose(gbit_s, known, rel_tol=0.03) for known in INFINIBAND_GBIT_S)


def _plausible_nic(reader: MappingReader, rate_gb_s: float, word: str) -> None:
    """Complain about rates that only make sense in the other unit."""
    unit = "gb_s" if "gb_s" in reader.values else "gbit_s"
    gbit_s = rate_gb_s * 8
    if rate_gb_s > MOST_NIC_GBIT_S / 8:
        reader.problem(unit, _too_fast(rate_gb_s))
    elif word != "infiniband" or _is_infiniband(gbit_s) or reader.values.get("measured"):
        return
    elif unit == "gbit_s" and _is_infiniband(gbit_s * 8):
        why = f"{gbit_s:g} Gbit/s is no rate of InfiniBand; is it GB/s? Then gb_s: {gbit_s:g}"
        reader.problem(unit, f"{why}, or gbit_s: {gbit_s * 8:g}")
    elif unit == "gb_s" and _is_infiniband(rate_gb_s):
        why = f"{rate_gb_s:g} GB/s is no rate of InfiniBand; is it Gbit/s? Then gbit_s: "
        reader.problem(unit, f"{why}{rate_gb_s:g}, or gb_s: {rate_gb_s / 8:g}")


def _links(problems: list[Problem], values: Any, names: list[str]) -> dict[tuple[str, str], Link]:
    links: dict[tuple[str, str], Link] = {}
    if not is_sequence(values):
        why = f"{values!r} is not a list of links between groups"
        problems.append(Problem("links", why))
        return links
    for i, one in enumerate(values):
        reader = _Reader(one, f"links[{i}]", problems, ("between", *_LINK_KEYS))
        ends = reader.values.get("between")
        if not (isinstance(ends, list) and len(ends) == 2 and len({str(e) for e in ends}) == 2):
            reader.refuse("between", ends, "a list of two groups")
            continue
        for end in ends:
            if end not in names:
                reader.refuse("between", end, f"a group; groups are {', '.join(names)}")
        word, latency = _network(reader)
        measured = bool(reader.values.get("measured", False))
        link = Link(_rate_gb_s(reader), latency, word, measured)
        links[pair(str(ends[0]), str(ends[1]))] = link
    for one, other in combinations(sorted(set(names)), 2):
        if (one, other) not in links:
            why = (
                f"say nothing of {one} and {other}; add {{between: [{one}, {other}], gbit_s: 10, "
                f"latency_us: 500, kind: ethernet}}"
            )
            problems.append(Problem("links", why))
    return links
