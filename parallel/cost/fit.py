"""Constants that runs calibrate: what ships, how it was found, and how to fit others.

Pure; scipy is loaded by `fit` alone.

Nothing here was fitted to data whose licence forbids to pass on what is derived from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from motet.parallel.cost.terms import BOUNDS, Constants

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
"""By how much of themselves these grow with every doubling of the devices beyond the largest run."""


STARTS = (0.55, 0.75, 0.92)
"""Where between its bounds, in logarithms, every constant starts."""


PULL = 0.1
"""A constant that is off by a factor of 1.5 from where it starts weighs as much as one run that is
off by 4 %: constants that the runs hardly move stay physical."""


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
    from scipy.optimize import least_squares

    if len(measured_s) < len(names):
        raise ValueError(f"{len(measured_s)} runs cannot fit {len(names)} constants")
    low = np.log([max(BOUNDS[name][0], 1e-3) for name in names])
    high = np.log([BOUNDS[name][1] for name in names])
    usual = [getattr(start, name) for name in names]
    if None in usual:
        raise ValueError("start.matmul is None; give the device's matmul_efficiency")
    expected = np.log([max(value, 1e-3) for value in usual])

    def constants(point: np.ndarray) -> Constants:
        values = dict(zip(names, np.exp(point).tolist(), strict=True))
        return replace(start, **values)

    def errors(point: np.ndarray) -> np.ndarray:
        now = constants(point)
        found = [math.log(p(now) / m) for p, m in zip(predictors, measured_s, strict=True)]
        return np.array([*found, *(PULL * (point - expected))])

    best = None
    for share in STARTS:
        # A constant that does not bind has no slope: start from several places.
        first = np.clip(low + share * (high - low), low + 1e-6, high - 1e-6)
        found = least_squares(errors, first, bounds=(low, high), loss="soft_l1", f_scale=0.05)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    at_bounds = tuple(
        name
        for name, x, a, b in zip(names, best.x, low, high, strict=True)
        if min(x - a, b - x) < 1e-3
    )
    ratios = np.abs(np.expm1(errors(best.x)[: len(measured_s)]))
    return Fit(constants(best.x), float(np.median(ratios)), len(measured_s), at_bounds)


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
            wrong = -margin if failed else margin
            soft = max(0.0, wrong) + math.log1p(math.exp(-abs(wrong)))
            total += soft * (false_fit_weight if failed else 1.0)
        return total

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
