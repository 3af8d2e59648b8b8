"""Which constants some runs can decide on. Pure; no torch.

A constant is worth fitting where it is uncertain and the runs' times move with it. Its worth is the
product of both: the relative spread of step times that its uncertainty makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from motet.parallel.cost.terms import BOUNDS, Constants

UNSURE: Mapping[str, float] = {
    # Relative uncertainty (one standard deviation) of constants as they ship: that of the phases
    # they scale (`calibration.SPREAD`).
    "matmul": 0.10,
    "bandwidth": 0.25,
    "attention": 0.25,
    "host_us": 0.50,
    "intra": 0.25,
    "inter": 0.40,
    "routing": 0.40,
    "grouped": 0.20,
}
UNSURE_MATMUL = 0.40
"""The same of `matmul` on devices that no run calibrates: what their data sheet says of their peak
is uncertain, too.
"""
LEAST = 0.01
"""A constant whose uncertainty changes no step by this share is not fitted."""
NUDGE = 1.1


def telling(
    start: Constants,
    predictors: Sequence[Callable[[Constants], float]],
    most: int,
    unsure: Mapping[str, float] = UNSURE,
) -> list[str]:
    """Return at most so many constants, those first that the runs tell most about.

    Args:
        start: with a value for each of `unsure`.
        predictors: for every run, constants to predicted step time in seconds.
    """
    worth = {name: spread * _slope(name, start, predictors) for name, spread in unsure.items()}
    found = sorted((name for name in worth if worth[name] >= LEAST), key=lambda n: -worth[n])
    return found[:most]


def _slope(
    name: str, start: Constants, predictors: Sequence[Callable[[Constants], float]]
) -> float:
    """Return the root mean square of d log(time) / d log(constant)."""
    low, high = BOUNDS[name]
    value = getattr(start, name)
    other = value * NUDGE if value * NUDGE <= high else value / NUDGE
    if not max(low, 1e-9) <= value <= high:
        return 0.0
    moved = replace(start, **{name: other})
    slopes = [math.log(p(moved) / p(start)) / math.log(other / value) for p in predictors]
    return math.sqrt(math.fsum(slope**2 for slope in slopes) / len(slopes))
