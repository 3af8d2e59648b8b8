"""Which short run would make the ranking surer. Pure; no torch.

Phases of a step err independently, by `trust.SPREAD`. A run of a layout measures one sum of
its phases, with a little noise. By the formula for Gaussian variables its expected effect on the
variance of another layout's time is cov^2 / (var + noise): no run is needed to know it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motet.parallel.cost.trust import SPREAD
from motet.parallel.planner.question import RankedLayout

NOISE = 0.02
"""Relative scatter of a one-minute run's mean step time (repeats of public runs differ by 0.3 to 2
%).
"""


@dataclass(frozen=True)
class ProbeRun:
    """A candidate: the run of a ranked layout, and the relative uncertainty of all ranked layouts
    before and after it.
    """

    number: int
    before: float
    after: float
    phase: str  # that it tells most about


def probes(choices: Sequence[RankedLayout]) -> list[ProbeRun]:
    """Return candidate runs, the most useful first: each ranked layout (numbered from 1), run for a
    minute.
    """
    weights = [_weights(choice.prediction.parts) for choice in choices]
    before = math.sqrt(sum(_variance(one) for one in weights) / max(1, len(weights)))
    found = []
    for number, seen in enumerate(weights, 1):
        # A run measures its own sum with noise; what it tells about another layout is what their
        # phases share.
        total = _variance(seen) + NOISE**2
        left = sum(_variance(one) - _covariance(one, seen) ** 2 / total for one in weights)
        phase = max(seen, key=lambda name: (SPREAD.get(name, 0.3) * seen[name]) ** 2)
        found.append(ProbeRun(number, before, math.sqrt(max(0.0, left) / len(weights)), phase))
    return sorted(found, key=lambda probe: probe.after)


def _weights(parts: Mapping[str, float]) -> dict[str, float]:
    total = sum(parts.values())
    return {name: value / total for name, value in parts.items()}


def _variance(one: Mapping[str, float]) -> float:
    return _covariance(one, one)


def _covariance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return sum(
        value * other.get(name, 0.0) * SPREAD.get(name, 0.3) ** 2 for name, value in one.items()
    )
