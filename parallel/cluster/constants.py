"""Constants of the cost model that runs on a kind of device decide: what they mean, between which
bounds they are physical, what ships. Pure; no torch.

Nothing that ships was fitted to data whose licence forbids to pass on what is derived from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """What runs on a kind of device calibrate; `BOUNDS` says what is physical.

    Attributes:
        matmul: share of the peak that large products reach; None: the device's `matmul_efficiency`.
        bandwidth: share of the peak memory bandwidth that pointwise kernels reach.
        attention: measured time of attention kernels over that of `ATTENTION_EFFICIENCY`.
        intra, inter: share of a link's rate that collectives reach inside a node and between nodes.
        host_us: time that the host takes to start one block's forward pass: the device waits for it
            where its work is shorter.
        congestion: loss of bandwidth between nodes with every doubling of the nodes that a group
            spans.
        activation: bytes of activations over those that are counted (allocator rounding,
            fragments).
        logits: the same of logits, whose few large blocks leave the largest gaps.
        reserved_gib: context, libraries' buffers, work spaces.
        communicator_gib: buffers of the collectives of one kind of groups, data parallelism's
            aside.
        routing: share of a link's rate that all-to-all of routed rows reaches.
        grouped: rate of experts' products over that of dense ones of equal size, unequal experts
            included.
        most_devices: of the runs that these were found on; beyond it intervals widen. 0 = unknown.
    """

    matmul: float | None = None
    bandwidth: float = 0.80
    attention: float = 1.0
    intra: float = 0.75
    inter: float = 0.80
    host_us: float = 300.0
    congestion: float = 0.02
    activation: float = 1.05
    logits: float = 1.1
    reserved_gib: float = 1.0
    communicator_gib: float = 0.75
    routing: float = 0.5
    grouped: float = 0.8
    most_devices: int = 0


BOUNDS: Mapping[str, tuple[float, float]] = {
    "matmul": (0.10, 0.95),
    "bandwidth": (0.25, 1.0),
    "attention": (0.4, 3.0),
    "intra": (0.2, 1.0),
    "inter": (0.1, 1.0),
    "host_us": (0.0, 3000.0),
    "congestion": (0.0, 0.4),
    "activation": (0.9, 1.6),
    "logits": (0.9, 1.6),
    "reserved_gib": (0.1, 12.0),
    "communicator_gib": (0.0, 2.0),
    "routing": (0.05, 1.0),
    "grouped": (0.3, 1.0),
}
"""Physical bounds of `Constants`, in their units."""

DEFAULTS: Mapping[str, Constants] = {
    "a100-40": Constants(most_devices=128),
    "a100-80": Constants(most_devices=512),
    "h100": Constants(inter=0.92, congestion=0.01, routing=0.7, grouped=1.0, most_devices=1024),
    "h100-96-500w": Constants(
        inter=0.92, congestion=0.01, routing=0.7, grouped=1.0, most_devices=512
    ),
    # Presets of 1 to 15 million on two cores, fastest of 14 steps: 0.35 to 0.40 GiB of a process
    # are libraries. Yours is another CPU.
    "cpu": Constants(matmul=0.90, reserved_gib=0.38, communicator_gib=0.0),
}
"""By kind of device; a kind that is not here has `Constants()`.

Of kinds without `most_devices`, predictions say that no run calibrates them.
"""
