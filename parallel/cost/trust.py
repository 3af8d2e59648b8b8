"""How far to trust a prediction: an interval, and reasons to doubt it. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple

from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.block import PHASES
from motet.parallel.cost.terms import Training
from motet.parallel.layout.layout import Layout

STEP_PHASES = (*PHASES, "pipeline_send", "bubble", "data_parallel", "optimizer", "probes", "data")
"""Phases of a step, in the order of `Prediction.parts`."""

SPREAD = {
    # Relative uncertainty (one standard deviation) of each phase where nothing was fitted.
    "products": 0.10,
    "attention": 0.25,
    "pointwise": 0.25,
    "host": 0.50,
    "tensor": 0.25,
    "context": 0.40,
    "experts": 0.40,
    "head": 0.20,
    "pipeline_send": 0.50,
    "bubble": 0.10,
    "data_parallel": 0.40,
    "optimizer": 0.30,
    "probes": 0.20,
    "data": 0.50,
}
FITTED_SPREAD = 0.5
"""What is left of these where the device's constants were fitted to runs."""
BEYOND_SPREAD = 0.4
"""By how much of themselves these grow with every doubling of devices beyond the largest run."""
TIGHT = 0.93
"""Above this share of its memory, whether a layout fits is uncertain."""
BUSY_NETWORK = 0.2
"""Above this share of a step, what transfers take is told as a doubt."""
_VARIANCES = tuple(SPREAD[name] ** 2 for name in STEP_PHASES)


class Trust(NamedTuple):
    """What is known of the devices of a cluster.

    Attributes:
        known: of every group, whether some run decided on its constants.
    """

    cluster: Cluster
    training: Training
    constants: Sequence[Constants]
    known: Sequence[bool]

    def beyond(self, used: Mapping[int, float]) -> float:
        """Return by how many doublings a layout has more devices than the runs that its constants
        were found on; `used`: devices of the cluster's groups.
        """
        # The group that was seen least decides: a step waits for all.
        most = min([self.constants[group].most_devices for group in used])
        devices = sum(used.values())
        return math.log2(devices / most) if 0 < most < devices else 0.0

    def interval(
        self, parts: Mapping[str, float], time_s: float, used: Mapping[int, float], beyond: float
    ) -> tuple[float, float]:
        """Return between what a step lies: 1.64 standard deviations on both sides (90 %).

        Phases err independently of each other, so variances add.
        """
        factor = 1.0
        if all(map(self.known.__getitem__, used)):
            factor = FITTED_SPREAD * (1.0 + BEYOND_SPREAD * beyond)
        seconds = parts.values()
        variance = sum(map(mul, _VARIANCES, map(mul, seconds, seconds)))
        spread = math.exp(1.64 * (factor * math.sqrt(variance) / time_s + 0.02))
        return time_s / spread, time_s * spread

    def doubts(
        self,
        layout: Layout,
        parts: Mapping[str, float],
        time_s: float,
        fill: float,
        used: Mapping[int, float],
        beyond: float,
    ) -> tuple[str, ...]:
        """Return reasons to doubt a prediction; `fill`: of its memory that the fullest device
        needs.
        """
        doubts = []
        for group in used:
            if not self.known[group]:
                kind = self.cluster.groups[group].device.kind
                doubts.append(f"no run on {kind} calibrates its constants; data sheets stand in")
        if beyond:
            most = min(self.constants[group].most_devices for group in used)
            doubts.append(f"the constants come from runs on at most {most:,} devices")
        if TIGHT < fill < 2.0 - TIGHT:
            doubts.append(f"memory is {fill:.0%} of what the device has: it may or may not fit")
        network = parts["data_parallel"] + parts["pipeline_send"] + parts["experts"]
        # On one node links are nobody else's.
        if network > BUSY_NETWORK * time_s and layout.world_size > 8:
            doubts.append(
                f"{network / time_s:.0%} of the step waits for transfers, which depend on the "
                "network's load; probe it"
            )
        if len(used) > 1:
            doubts.append("devices differ: the times of their links were not measured together")
        if self.training.dtype == "fp8":
            doubts.append("fp8: how much of a block runs in 8 bits differs between backends")
        return tuple(doubts)
