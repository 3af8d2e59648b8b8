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
"""

from __future__ import annotations

import difflib
import math
from dataclasses import fields
from itertools import combinations
from typing import Any

from motet.parallel.cluster.calibration import KEYS as CALIBRATION_KEYS
from motet.parallel.cluster.calibration import Calibration, fault
from motet.parallel.cluster.description import (
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
DTYPES = ("bf16", "fp16", "fp8", "fp32")
PEAK_TFLOPS = (0.01, 20_000.0)
INFINIBAND_GBIT_S = (10.0, 20.0, 40.0, 56.0, 100.0, 200.0, 400.0, 800.0)
MOST_NIC_GBIT_S = 1600.0
MOST_NODE_LINK_GB_S = 2000.0
_DEVICE_FIELDS = tuple(f.name for f in fields(Device))
_GROUP_KEYS: tuple[str, ...] = ("name", "device", "nodes", "devices_per_node", "intra_node")
_GROUP_KEYS += ("inter_node", "nics", "calibration")
_LINK_KEYS = ("gb_s", "gbit_s", "latency_us", "kind", "measured")


class _Reader:
    """Reads values and gathers what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def wrong(self, where: str, why: str) -> None:
        self.problems.append(f"{where}: {why}")

    def keys(self, where: str, values: Any, known: tuple[str, ...]) -> dict[str, Any]:
        """Return a mapping without the keys that nobody knows."""
        if not isinstance(values, dict):
            self.wrong(where, f"{values!r} is not a mapping with {', '.join(known)}")
            return {}
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                self.wrong(f"{where}.{key}", f"is not known{hint}; known: {', '.join(known)}")
        return {key: value for key, value in values.items() if key in known}

    def number(self, where: str, value: Any, least: float, most: float, unit: str = "") -> float:
        """Return a number within bounds, or the lower bound after a complaint."""
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if not (sound and math.isfinite(value) and least <= value <= most):
            hint = f" ({unit})" if unit else ""
            self.wrong(where, f"{value!r} is not a number from {least:g} to {most:,g}{hint}")
            return least
        return float(value)

    def whole(self, where: str, value: Any, most: int = 1_000_000) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            self.wrong(where, f"{value!r} is not a whole number from 1 to {most:,}")
            return 1
        return value


def from_mapping(values: Any) -> Cluster:
    """Return the cluster that plain values describe (see above).

    Raises:
        ClusterError: one message with everything that is wrong.
    """
    reader = _Reader()
    top = reader.keys("cluster", values, ("name", "groups", "links"))
    listed = top.get("groups")
    if not isinstance(listed, list) or not listed:
        reader.wrong("groups", f"{listed!r} is not a list of at least one group of nodes")
        raise ClusterError("; ".join(reader.problems))
    groups = tuple(_group(reader, f"groups[{i}]", one) for i, one in enumerate(listed))
    names = [group.name for group in groups]
    for name in {name for name in names if names.count(name) > 1}:
        reader.wrong("groups", f"{name!r} names more than one group")
    links = _links(reader, top.get("links") or [], names)
    if reader.problems:
        raise ClusterError("; ".join(reader.problems))
    return Cluster(groups, links)


def _group(reader: _Reader, where: str, values: Any) -> Group:
    found = reader.keys(where, values, _GROUP_KEYS)
    missing = [key for key in ("device", "nodes", "devices_per_node") if key not in found]
    if missing:
        reader.wrong(where, f"lacks {', '.join(missing)}")
    kind = _device(reader, f"{where}.device", found.get("device", "h100"))
    nodes = reader.whole(f"{where}.nodes", found.get("nodes", 1))
    per_node = reader.whole(f"{where}.devices_per_node", found.get("devices_per_node", 1), 1024)
    name = found.get("name", kind.kind)
    if not isinstance(name, str) or not name:
        reader.wrong(f"{where}.name", f"{name!r} is not a name")
        name = where
    intra = _intra(reader, f"{where}.intra_node", found.get("intra_node"), kind.kind)
    inter = _inter(reader, where, found, nodes, per_node)
    calibration = _calibration(reader, f"{where}.calibration", found.get("calibration"))
    return Group(name, kind, nodes, per_node, intra, inter, calibration)


def _calibration(reader: _Reader, where: str, values: Any) -> Calibration | None:
    """Return what runs said of a group's constants, each of them physical."""
    if values is None:
        return None
    found = reader.keys(where, values, CALIBRATION_KEYS)
    constants = found.get("constants")
    if not isinstance(constants, dict) or not constants:
        reader.wrong(
            f"{where}.constants", f"{constants!r} is not a mapping such as {{matmul: 0.6}}"
        )
        return None
    for name, value in constants.items():
        if why := fault(str(name), value):
            reader.wrong(f"{where}.constants.{name}", why)
    for name, kind in (("runs", list), ("at_bounds", list), ("versions", dict)):
        if not isinstance(found.get(name, kind()), kind):
            word = "list" if kind is list else "mapping"
            reader.wrong(f"{where}.{name}", f"{found.pop(name)!r} is not a {word}")
    versions = {str(key): str(value) for key, value in found.get("versions", {}).items()}
    devices = reader.number(f"{where}.devices", found.get("devices", 0), 0, 1e6)
    error = reader.number(f"{where}.median_error", found.get("median_error", 0.0), 0.0, 100.0)
    runs, at_bounds = (tuple(map(str, found.get(name, ()))) for name in ("runs", "at_bounds"))
    date = str(found.get("date", ""))
    return Calibration(constants, int(devices), runs, error, at_bounds, date, versions)


def _device(reader: _Reader, where: str, values: Any) -> Device:
    if isinstance(values, str):
        values = {"kind": values}
    given = reader.keys(where, values, (*_DEVICE_FIELDS, "like"))
    kind, like = given.pop("kind", None), given.pop("like", None)
    if not isinstance(kind, str) or not kind:
        reader.wrong(f"{where}.kind", f"{kind!r} is not a name")
        kind = "?"
    start = like if like is not None else kind
    known = DEVICES.get(start) if isinstance(start, str) else None
    needed = {"memory_gib", "peak_tflops", "memory_gb_s"}
    if known is None and (like is not None or not needed <= set(given)):
        reader.wrong(where, unknown_device(start))
        known = DEVICES["h100"]
    base = {"matmul_efficiency": 0.6, **(known or {}), **given}
    base.pop("source", None)
    for name, (least, most, unit) in BOUNDS.items():
        if name in base:
            base[name] = reader.number(f"{where}.{name}", base[name], least, most, unit)
    for name in ("peak_tflops", "measured_tflops"):
        if name in base:
            base[name] = _rates(reader, f"{where}.{name}", base[name])
    for dtype, rate in base.get("measured_tflops", {}).items():
        peak = base["peak_tflops"].get(dtype, math.inf)
        if rate > peak * 1.02:
            why = f"{rate:g} is more than the peak of {peak:g} TFLOPS; correct one of them"
            reader.wrong(f"{where}.measured_tflops.{dtype}", why)
    return Device(kind=kind, **base)


def _rates(reader: _Reader, where: str, values: Any) -> dict[str, float]:
    found = reader.keys(where, values, DTYPES)
    if not found:
        reader.wrong(where, f"has no rate; give at least one of {', '.join(DTYPES)}")
    return {
        name: reader.number(f"{where}.{name}", value, *PEAK_TFLOPS, "TFLOPS")
        for name, value in found.items()
    }


def _rate_gb_s(reader: _Reader, where: str, values: dict[str, Any]) -> float:
    """Return the rate of a link in GB/s, given in one of two units."""
    if ("gb_s" in values) == ("gbit_s" in values):
        reader.wrong(where, "needs one of gb_s (bytes) and gbit_s (bits; 8 Gbit/s = 1 GB/s)")
        return 1.0
    name = "gb_s" if "gb_s" in values else "gbit_s"
    value = reader.number(f"{where}.{name}", values[name], 1e-4, 1e6)
    return value / (8 if name == "gbit_s" else 1)


def _intra(reader: _Reader, where: str, values: Any, kind: str) -> Link:
    usual = builtin_link(DEFAULT_LINKS.get(kind, "pcie4"))
    if values is None:
        return usual
    if isinstance(values, str):
        if values in LINKS:
            return builtin_link(values)
        reader.wrong(where, f"{values!r} is not one of {', '.join(LINKS)}; or give gb_s and kind")
        return usual
    found = reader.keys(where, values, _LINK_KEYS)
    rate = _rate_gb_s(reader, where, found)
    word = str(found.get("kind", usual.kind))
    if word == "nvlink" and usual.kind == "nvlink" and rate > 1.1 * usual.gb_s:
        why = (
            f"{rate:g} GB/s is more than a {kind} sends in one direction; data sheets count both: "
            f"{usual.gb_s:g} GB/s is its NVLink"
        )
        reader.wrong(f"{where}.gb_s", why)
    elif rate > MOST_NODE_LINK_GB_S:
        why = (
            f"{rate:g} GB/s is more than any link inside a node; is it Gbit/s? Then {rate / 8:g} "
            f"GB/s, or gbit_s: {rate:g}"
        )
        reader.wrong(f"{where}.gb_s", why)
    latency = reader.number(
        f"{where}.latency_us", found.get("latency_us", usual.latency_us), 0.1, 1e5
    )
    return Link(rate, latency, word, bool(found.get("measured", False)))


def _inter(
    reader: _Reader, where: str, group: dict[str, Any], nodes: int, devices_per_node: int
) -> Link:
    """Return one device's share of its node's network cards."""
    if "nics" in group and "inter_node" in group:
        reader.wrong(where, "has both nics (of a node) and inter_node (of a device); keep one")
    if "nics" not in group and "inter_node" not in group:
        if nodes > 1:
            why = (
                "has several nodes and no nics; e.g. nics: {count: 8, gbit_s: 200, kind: "
                "infiniband}"
            )
            reader.wrong(where, why)
        return Link(1.0, NETWORK_LATENCY_US["ethernet"], "ethernet")
    if "inter_node" in group:
        where, cards = f"{where}.inter_node", devices_per_node
        found = reader.keys(where, group["inter_node"], _LINK_KEYS)
    else:
        where = f"{where}.nics"
        found = reader.keys(where, group["nics"], ("count", *_LINK_KEYS))
        cards = reader.whole(f"{where}.count", found.get("count", 1), 64)
    word, latency = _network(reader, where, found)
    rate = _rate_gb_s(reader, where, found)
    if "nics" in group:
        _plausible_nic(reader, where, found, rate, word)
    elif rate > MOST_NIC_GBIT_S / 8:
        reader.wrong(f"{where}.gb_s", _too_fast(rate))
    measured = bool(found.get("measured", False))
    return Link(rate * cards / devices_per_node, latency, word, measured)


def _network(reader: _Reader, where: str, found: dict[str, Any]) -> tuple[str, float]:
    word = str(found.get("kind", "ethernet"))
    if word not in NETWORK_LATENCY_US:
        reader.wrong(f"{where}.kind", f"{word!r} is not one of {', '.join(NETWORK_LATENCY_US)}")
    usual = NETWORK_LATENCY_US.get(word, 25.0)
    return word, reader.number(f"{where}.latency_us", found.get("latency_us", usual), 0.1, 1e6)


def _too_fast(rate_gb_s: float) -> str:
    return (
        f"{rate_gb_s:g} GB/s is more than any network card (at most {MOST_NIC_GBIT_S / 8:g}); is "
        "it Gbit/s? "
        f"Then gbit_s: {rate_gb_s:g}, or gb_s: {rate_gb_s / 8:g}"
    )


def _plausible_nic(
    reader: _Reader, where: str, found: dict[str, Any], rate_gb_s: float, word: str
) -> None:
    """Complain about rates that only make sense in the other unit."""
    if rate_gb_s > MOST_NIC_GBIT_S / 8:
        reader.wrong(f"{where}.{'gb_s' if 'gb_s' in found else 'gbit_s'}", _too_fast(rate_gb_s))
        return
    gbit_s = rate_gb_s * 8
    standard = any(math.isclose(gbit_s, known, rel_tol=0.03) for known in INFINIBAND_GBIT_S)
    if word != "infiniband" or standard or found.get("measured"):
        return
    if "gbit_s" in found and any(
        math.isclose(gbit_s * 8, known, rel_tol=0.03) for known in INFINIBAND_GBIT_S
    ):
        why = (
            f"{gbit_s:g} Gbit/s is no rate of InfiniBand; is it GB/s? Then gb_s: {gbit_s:g}, or "
            f"gbit_s: {gbit_s * 8:g}"
        )
        reader.wrong(f"{where}.gbit_s", why)
    elif "gb_s" in found and any(
        math.isclose(rate_gb_s, known, rel_tol=0.03) for known in INFINIBAND_GBIT_S
    ):
        why = (
            f"{rate_gb_s:g} GB/s is no rate of InfiniBand; is it Gbit/s? Then gbit_s: "
            f"{rate_gb_s:g}, or gb_s: {rate_gb_s / 8:g}"
        )
        reader.wrong(f"{where}.gb_s", why)


def _links(reader: _Reader, values: Any, names: list[str]) -> dict[tuple[str, str], Link]:
    found: dict[tuple[str, str], Link] = {}
    if not isinstance(values, list):
        reader.wrong("links", f"{values!r} is not a list of links between groups")
        return found
    for i, one in enumerate(values):
        where = f"links[{i}]"
        given = reader.keys(where, one, ("between", *_LINK_KEYS))
        ends = given.get("between")
        if not (isinstance(ends, list) and len(ends) == 2 and len({str(e) for e in ends}) == 2):
            reader.wrong(f"{where}.between", f"{ends!r} is not a list of two groups")
            continue
        for end in ends:
            if end not in names:
                why = f"{end!r} is not a group; groups are {', '.join(names)}"
                reader.wrong(f"{where}.between", why)
        word, latency = _network(reader, where, given)
        rate = _rate_gb_s(reader, where, given)
        measured = bool(given.get("measured", False))
        found[pair(str(ends[0]), str(ends[1]))] = Link(rate, latency, word, measured)
    for one, other in combinations(sorted(set(names)), 2):
        if (one, other) not in found:
            why = (
                f"say nothing of {one} and {other}; add {{between: [{one}, {other}], gbit_s: 10, "
                f"latency_us: 500, kind: ethernet}}"
            )
            reader.wrong("links", why)
    return found
