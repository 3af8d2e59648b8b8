"""The machines there are: devices, nodes, links inside and between them.

A value that needs no torch.

A cluster is one or more groups of equal nodes. Devices are numbered group by group, node by node:
processes start in that order. GB/s are 10^9 bytes per second in one direction; Gbit/s are 10^9
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from motet.core.errors import UserError, suggest
from motet.parallel.cluster.devices import DEFAULT_LINKS, DEVICES, LINKS, NETWORK_LATENCY_US


class ClusterError(UserError):
    """A description of machines that cannot be meant; the message says which value, why not, and
    what would work.
    """


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        kind: its name in the catalogue, or one of your own.
        memory_gib: what a process can allocate.
        peak_tflops: by data type ("bf16", "fp16", "fp8", "fp32"), dense, 10^12 operations per
            second.
        matmul_efficiency: share of the peak that large matrix products reach.
        memory_gb_s: peak of its memory.
        measured_tflops: measured rate of large products by data type; where it is there, it stands
            for peak x efficiency.
        price_per_hour: of one device, in any currency; 0 = unknown.
        power_w: of one device under load; 0 = unknown.
    """

    kind: str
    memory_gib: float
    peak_tflops: Mapping[str, float]
    matmul_efficiency: float
    memory_gb_s: float
    measured_tflops: Mapping[str, float] = field(default_factory=dict)
    price_per_hour: float = 0.0
    power_w: float = 0.0

    def peak(self, dtype: str) -> float:
        """Return the peak for a data type in TFLOPS; without bf16 units, fp16 stands in."""
        for name in (dtype, *{"bf16": ("fp16",), "fp8": ("bf16", "fp16")}.get(dtype, ()), "fp32"):
            if name in self.peak_tflops:
                return self.peak_tflops[name]
        raise ClusterError(f"device {self.kind!r} has no rate for {dtype}; set peak_tflops.{dtype}")


@dataclass(frozen=True)
class Link:
    """What carries bytes between two devices.

    Attributes:
        gb_s: bytes that one device sends in one direction; of a link between groups: all devices
            together.
        latency_us: of one hop.
        kind: "nvlink", "pcie", "infiniband", "roce", "ethernet", ...
        measured: the rate is one that a probe saw, not one of a data sheet.
    """

    gb_s: float
    latency_us: float
    kind: str
    measured: bool = False


@dataclass(frozen=True)
class Calibration:
    """What runs say of the devices of a group.

    Attributes:
        constants: by name of `Constants`; what is not here stays as it ships.
        devices: of the largest run; beyond it intervals widen.
        runs: the attempts that were fitted.
        median_error: median of |predicted / measured - 1| over them, after the fit.
        at_bounds: constants that ended at a physical bound: not to be trusted.
        date: of the fit, as YYYY-MM-DD; "" = not known.
        versions: of what trained, by name.
    """

    constants: Mapping[str, float]
    devices: int = 0
    runs: tuple[str, ...] = ()
    median_error: float = 0.0
    at_bounds: tuple[str, ...] = ()
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, as a cluster.yaml holds them."""
        return {
            "constants": dict(self.constants),
            "devices": self.devices,
            "runs": list(self.runs),
            "median_error": self.median_error,
            "at_bounds": list(self.at_bounds),
            "date": self.date,
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class Group:
    """Equal nodes in one network.

    Attributes:
        intra_node: between devices of a node.
        inter_node: one device's share of its node's network cards: cards x rate / devices.
        calibration: what runs on these machines say of the cost model's constants; None: what
            ships.
    """

    name: str
    device: Device
    nodes: int
    devices_per_node: int
    intra_node: Link
    inter_node: Link
    calibration: Calibration | None = None

    @property
    def devices(self) -> int:
        """Devices of the group."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Cluster:
    """All groups, and the links between them by pairs of names in alphabetical order.

    Attributes:
        currency: of all prices; "" = not said.
    """

    groups: tuple[Group, ...]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    currency: str = ""

    @property
    def devices(self) -> int:
        """Devices of all groups."""
        return sum(group.devices for group in self.groups)

    @property
    def price_per_hour(self) -> float:
        """Of all devices; 0 where no price is known."""
        return sum(group.devices * group.device.price_per_hour for group in self.groups)

    def link(self, one: int, other: int) -> Link:
        """Return the link between two groups, by their numbers."""
        return self.links[pair(self.groups[one].name, self.groups[other].name)]

    def spot(self, device: int) -> tuple[int, int]:
        """Return (group, node over all groups) of a device."""
        node = 0
        for number, group in enumerate(self.groups):
            if device < group.devices:
                return number, node + device // group.devices_per_node
            device -= group.devices
            node += group.nodes
        raise ClusterError(f"the cluster has {self.devices:,} devices; there is no device {device}")

    def to_mapping(self) -> dict[str, Any]:
        """Return what `from_mapping` reads: every value written out."""
        out: dict[str, Any] = {"groups": [_group_mapping(group) for group in self.groups]}
        if self.links:
            out["links"] = [
                {"between": list(names), **_link_mapping(link)}
                for names, link in self.links.items()
            ]
        return out | ({"currency": self.currency} if self.currency else {})

    def to_yaml(self) -> str:
        """Return the text of a cluster.yaml that `read` makes this cluster of."""
        import yaml

        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)


def pair(one: str, other: str) -> tuple[str, str]:
    """Return the key of a link between two groups."""
    return (one, other) if one <= other else (other, one)


def device(kind: str, **changes: Any) -> Device:
    """Return a device of the catalogue, with any field replaced.

    Raises:
        ClusterError: the catalogue has no such device.
    """
    if kind not in DEVICES:
        raise ClusterError(unknown_device(kind))
    values = {name: value for name, value in DEVICES[kind].items() if name != "source"}
    return replace(Device(kind=kind, **values), **changes)


def unknown_device(kind: object) -> str:
    """Return what to say of a device that the catalogue does not have."""
    return (
        f"{kind!r} is not in the catalogue{suggest(str(kind), DEVICES)}: {', '.join(DEVICES)}. "
        "To add one, write its "
        "values: "
        f"device: {{kind: {kind}, memory_gib: 24, peak_tflops: {{bf16: 150}}, memory_gb_s: 900}}, "
        f"or start from one that is like it: device: {{kind: {kind}, like: a100-80, memory_gib: "
        f"24}}"
    )


def homogeneous(
    kind: str,
    nodes: int,
    devices_per_node: int = 8,
    nic_gbit_s: float = 200.0,
    nics: int | None = None,
    network: str = "infiniband",
) -> Cluster:
    """Return one group of catalogue devices; `nics` network cards per node (None: one per device)
    of `nic_gbit_s` each.
    """
    cards = devices_per_node if nics is None else nics
    share = nic_gbit_s / 8 * cards / devices_per_node
    intra = builtin_link(DEFAULT_LINKS[kind])
    inter = Link(share, NETWORK_LATENCY_US[network], network)
    return Cluster((Group(kind, device(kind), nodes, devices_per_node, intra, inter),))


def builtin_link(name: str) -> Link:
    """Return a link of the catalogue."""
    values = LINKS[name]
    return Link(float(values["gb_s"]), float(values["latency_us"]), str(values["kind"]))


def _link_mapping(link: Link) -> dict[str, Any]:
    found: dict[str, Any] = {"gb_s": link.gb_s, "latency_us": link.latency_us, "kind": link.kind}
    return found | ({"measured": True} if link.measured else {})


def _group_mapping(group: Group) -> dict[str, Any]:
    kind = group.device
    shown: dict[str, Any] = {
        "kind": kind.kind,
        "memory_gib": kind.memory_gib,
        "peak_tflops": dict(kind.peak_tflops),
        "matmul_efficiency": kind.matmul_efficiency,
        "memory_gb_s": kind.memory_gb_s,
        "price_per_hour": kind.price_per_hour,
        "power_w": kind.power_w,
    }
    if kind.measured_tflops:
        shown["measured_tflops"] = dict(kind.measured_tflops)
    out = {
        "name": group.name,
        "device": shown,
        "nodes": group.nodes,
        "devices_per_node": group.devices_per_node,
        "intra_node": _link_mapping(group.intra_node),
        "inter_node": _link_mapping(group.inter_node),
    }
    if group.calibration is not None:
        out["calibration"] = group.calibration.to_mapping()
    return out
