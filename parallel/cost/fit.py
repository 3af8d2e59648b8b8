"""Which constants some runs can decide on, and what the runs say of them: step times by least
squares, memory by what fits. Pure; scipy is loaded by `fit` alone.

A constant is worth fitting where it is uncertain and the runs' times move with it. Its worth is the
product of both: the relative spread of step times that its uncertainty makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from motet.parallel.cluster.constants import BOUNDS, Constants

if TYPE_CHECKING:
    import numpy as np

STARTS = (0.55, 0.75, 0.92)
"""Where between its bounds, in logarithms, every constant starts."""


PULL = 0.1
"""A constant that is off by a factor of 1.5 from where it starts weighs as much as one run that is
off by 4 %: constants that the runs hardly move stay physical."""
SMALLEST = 1e-3
"""What is 0 counts as this in logarithms."""


UNSURE: Mapping[str, float] = {
    # Relative uncertainty (one standard deviation) of constants as they ship: that of the phases
    # they scale (`trust.SPREAD`).
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


@dataclass(frozen=True)
class Fit:
    """Constants found, and how well they describe what they were fitted to.

    Attributes:
        median_error: median of |predicted / measured - 1|.
        observations: runs used.
        at_bounds: constants that ended at a physical bound: do not trust them.
    """

    constants: Constants
    median_error: float
    observations: int
    at_bounds: tuple[str, ...]


def fit(
    names: Sequence[str],
    start: Constants,
    predictors: Sequence[Callable[[Constants], float]],
    measured_s: Sequence[float],
) -> Fit:
    """Return the constants under which predictions are nearest to measured step times.

    Least squares of log ratios with a soft L1 loss, so that a few odd runs do not decide (scipy
    `least_squares`, scale 5 %), in the logarithms of constants, within `BOUNDS`.

    Args:
        names: constants to fit; the others stay as in `start`.
        predictors: for every run, constants to predicted step time in seconds.
        measured_s: of the same runs.

    Raises:
        ValueError: fewer runs than constants, or no value to start from.
    """
    import numpy as np

    if len(measured_s) < len(names):
        raise ValueError(f"{len(measured_s)} runs cannot fit {len(names)} constants")
    expected = np.log(_usual(names, start))

    def constants(point: np.ndarray) -> Constants:
        values = dict(zip(names, np.exp(point).tolist(), strict=True))
        return replace(start, **values)

    # Logarithms, because a prediction that is twice too long is as wrong as one that is half as
    # long; the pull adds an error for every constant that leaves its usual value.
    def errors(point: np.ndarray) -> np.ndarray:
        now = constants(point)
        ratios = [math.log(p(now) / m) for p, m in zip(predictors, measured_s, strict=True)]
        return np.array([*ratios, *(PULL * (point - expected))])

    low = np.log([max(BOUNDS[name][0], SMALLEST) for name in names])
    high = np.log([BOUNDS[name][1] for name in names])
    point = _least_squares(errors, low, high)
    margins = np.minimum(point - low, high - point)
    at_bounds = tuple(name for name, margin in zip(names, margins, strict=True) if margin < 1e-3)
    ratios = np.abs(np.expm1(errors(point)[: len(measured_s)]))
    return Fit(constants(point), float(np.median(ratios)), len(measured_s), at_bounds)


def _usual(names: Sequence[str], start: Constants) -> list[float]:
    """Return what constants are pulled to: where nothing pulls, one that the runs hardly move would
    drift to a bound.
    """
    usual = [getattr(start, name) for name in names]
    if None in usual:
        raise ValueError("start.matmul is None; give the device's matmul_efficiency")
    return [max(value, SMALLEST) for value in usual]


def _least_squares(
    errors: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Return the best of the points that least squares end at."""
    import numpy as np
    from scipy.optimize import least_squares

    best = None
    for share in STARTS:
        # A constant that does not bind has no slope: start from several places.
        first = np.clip(low + share * (high - low), low + 1e-6, high - 1e-6)
        end = least_squares(errors, first, bounds=(low, high), loss="soft_l1", f_scale=0.05)
        best = end if best is None or end.cost < best.cost else best
    assert best is not None
    return np.asarray(best.x)


def fit_memory(
    start: Constants,
    fills: Sequence[Callable[[Constants], float]],
    out_of_memory: Sequence[bool],
    false_fit_weight: float = 2.0,
) -> Constants:
    """Return `start` with the `activation` and `logits` that best tell runs that fit from those
    that do not.

    Logistic loss of the predicted share of memory (scale 3 %), over grids that narrow within
    `BOUNDS`; a run that is falsely called fitting weighs more than one that is falsely refused. A
    weak pull to `start` decides where runs do not.

    Args:
        fills: for every run, constants to predicted memory over what the device has.
        out_of_memory: of the same runs.
    """

    def loss(constants: Constants) -> float:
        total = 5.0 * math.log(constants.activation / start.activation) ** 2
        total += 5.0 * math.log(constants.logits / start.logits) ** 2
        for fill, failed in zip(fills, out_of_memory, strict=True):
            margin = math.log(fill(constants)) / 0.03
            # Where the margin is on the wrong side it costs in proportion to it, on the right side
            # almost nothing.
            wrong = -margin if failed else margin
            soft = max(0.0, wrong) + math.log1p(math.exp(-abs(wrong)))
            total += soft * (false_fit_weight if failed else 1.0)
        return total

    # Grids, as the loss has steps where another device becomes the fullest: slopes mislead there.
    best, step = start, 0.1
    for _ in range(3):
        places = [(i * step, j * step) for i in range(-5, 6) for j in range(-5, 6)]
        best = min((_moved(best, *place) for place in places), key=loss)
        step /= 4
    return best


def _moved(constants: Constants, activation: float, logits: float) -> Constants:
    """Return constants with these two moved, within their bounds."""
    low, high = zip(BOUNDS["activation"], BOUNDS["logits"], strict=True)
    return replace(
        constants,
        activation=min(high[0], max(low[0], constants.activation + activation)),
        logits=min(high[1], max(low[1], constants.logits + logits)),
    )


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
    # Both must be there: a constant that is known needs no run, and one that no step feels cannot
    # be found.
    worth = {name: spread * _slope(name, start, predictors) for name, spread in unsure.items()}
    found = sorted((name for name in worth if worth[name] >= LEAST), key=lambda n: -worth[n])
    return found[:most]


def _slope(
    name: str, start: Constants, predictors: Sequence[Callable[[Constants], float]]
) -> float:
    """Return the root mean square of d log(time) / d log(constant)."""
    low, high = BOUNDS[name]
    value = getattr(start, name)
    # A step of a tenth: times are smooth in constants, but for kinks where the host or a link takes
    # over.
    other = value * NUDGE if value * NUDGE <= high else value / NUDGE
    if not max(low, 1e-9) <= value <= high:
        return 0.0
    moved = replace(start, **{name: other})
    slopes = [math.log(p(moved) / p(start)) / math.log(other / value) for p in predictors]
    return math.sqrt(math.fsum(slope**2 for slope in slopes) / len(slopes))
