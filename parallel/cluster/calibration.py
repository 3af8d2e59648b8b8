"""Constants of the cost model that runs on a group's own machines decided, and what they were
fitted from. Pure; no torch.

A group of a cluster.yaml may carry them, so that everything which reads the cluster (a plan, the
prediction of a run, the forecast of a job) uses them:

    calibration:
      constants: {matmul: 0.62, host_us: 210.0}     # the others as they ship
      devices: 8                                    # of the largest run
      runs: [runs/probe/attempts/1]
      median_error: 0.012
      at_bounds: []
      date: 2026-11-21
      versions: {motet: 0.1.0, torch: 2.13.0}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from motet.parallel.cluster.constants import BOUNDS, DEFAULTS, Constants
from motet.parallel.cluster.description import Group


def shipped(kind: str) -> Constants:
    """Return the constants that ship for a kind of device."""
    return DEFAULTS.get(kind, Constants())


def constants_of(groups: Sequence[Group], given: Mapping[str, Constants] | None) -> list[Constants]:
    """Return the constants of every group: those given by kind of device, else its calibration's,
    else what ships.
    """
    if given is not None:
        return [given.get(group.device.kind, Constants()) for group in groups]
    return [_own(group) for group in groups]


def calibrated(groups: Sequence[Group], given: Mapping[str, Constants] | None) -> list[bool]:
    """Return for every group whether some run decided on its constants."""
    if given is not None:
        return [group.device.kind in given for group in groups]
    return [own.most_devices > 0 for own in constants_of(groups, None)]


def _own(group: Group) -> Constants:
    usual, found = shipped(group.device.kind), group.calibration
    if found is None:
        return usual
    most = max(1, found.devices, usual.most_devices)
    return replace(usual, **found.constants, most_devices=most)


def fault(name: str, value: object) -> str | None:
    """Return what is wrong with a constant: its name, or a value that is not physical; None where
    it is sound.
    """
    if name not in BOUNDS:
        return f"is none of the constants {', '.join(BOUNDS)}"
    low, high = BOUNDS[name]
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if sound and low <= float(str(value)) <= high:
        return None
    return f"{value!r} is not a number from {low:g} to {high:g}, between which it is physical"
