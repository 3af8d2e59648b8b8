"""Where the values of an outcome can lie, and drawings that do not go beyond it.

A mean is always drawn where it was measured, also when a class of the user's own said that it could
not lie there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motet.launcher.report.words import finite, is_percent, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AIR = 0.04
"""Of the shown span, beyond an end, so that a mark on the end is seen whole."""
ROUNDING = 1e-9
Bounds = tuple[float, float]


def possible(
    curve: Mapping[str, Any], unit: str, mean: Sequence[float], gain: bool = False
) -> Bounds:
    """The least and the most of what a curve shows, in the printed unit; infinite without an end.

    Args:
        curve: `range` of it says so in the outcome's own unit. A report that has none is older:
            shares lie in 0 to 1, and gains of them in -1 to 1.
        unit: of the outcome.
        mean: in the printed unit; holds NaN where nothing was measured.
        gain: the curve shows differences.
    """
    found = curve.get("range")
    if not found and is_percent(unit):
        found = (-1.0 if gain else 0.0, 1.0)
    low, high = ([scaled(end, unit) for end in found]) if found else (None, None)
    known = [x for x in mean if x == x]
    return (
        -math.inf if low is None else min([low, *known]),
        math.inf if high is None else max([high, *known]),
    )


def possible_effect(
    outcome: Mapping[str, Any], levels: Sequence[float | None] | None = None
) -> Bounds:
    """The least and the most that a difference of two means can be, in the outcome's own unit.

    Args:
        outcome: an OUTCOME of report.json.
        levels: the range of the means; None is not known, and 0 to 1 for shares.
    """
    found = [finite(end) for end in levels or []]
    if len(found) == 2 and found[0] is not None and found[1] is not None:
        reach = found[1] - found[0]
    elif is_percent(str(outcome.get("unit") or "")):
        reach = 1.0
    else:
        return -math.inf, math.inf
    reach = max(reach, abs(finite(outcome.get("effect")) or 0.0))
    return -reach, reach


def inside(numbers: Sequence[float], ends: Bounds) -> list[float]:
    """Numbers no further than the ends; NaN stays."""
    return [x if x != x else min(max(x, ends[0]), ends[1]) for x in numbers]


def keep_within(axes: Axes, ends: Bounds) -> None:
    """The vertical axis shows nothing beyond the ends but a little air, and has no tick there."""
    bottom, top = axes.get_ylim()
    low, high = max(bottom, ends[0]), min(top, ends[1])
    if (low, high) == (bottom, top) or high <= low:
        return
    air = AIR * (high - low)
    axes.set_ylim(max(bottom, low - air), min(top, high + air))
    slack = ROUNDING * (high - low)
    ticks = [t for t in axes.get_yticks() if ends[0] - slack <= t <= ends[1] + slack]
    axes.set_yticks([t for t in ticks if low - slack <= t <= high + slack])
