"""The small interval graphic in a row of the answers: vector shapes from numbers alone, nothing to
escape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.launcher.report.bounds import possible_effect
from motet.launcher.report.words import finite

WIDTH = 230.0
HEIGHT = 30.0
MARGIN = 8.0


@dataclass(frozen=True)
class Axis:
    """Linear map of one row's values to pixels; zero is always on it."""

    low: float
    high: float

    def x(self, value: float) -> float:
        """Pixels from the left, clipped to the graphic."""
        share = (value - self.low) / (self.high - self.low)
        return round(MARGIN + min(1.0, max(0.0, share)) * (WIDTH - 2 * MARGIN), 1)


def axis(values: list[float]) -> Axis:
    """An axis that holds zero and every value, with 4 % air on both sides."""
    low, high = min([0.0, *values]), max([0.0, *values])
    air = 0.04 * (high - low) or 1.0
    return Axis(low - air, high + air)


def forest(
    outcome: Mapping[str, Any], kind: str, levels: Sequence[float | None] | None = None
) -> str:
    """SVG of effect, interval, zero and the band of effects too small to detect; "" without an
    effect. `levels` is the possible range of a mean: nothing is drawn beyond what is possible.
    """
    effect, low, high = (finite(outcome.get(name)) for name in ("effect", "low", "high"))
    if effect is None:
        return ""
    least, most = possible_effect(outcome, levels)
    low, high = (end if end is None else min(max(end, least), most) for end in (low, high))
    band = finite(outcome.get("smallest_detectable"))
    band = None if band is None else min(abs(band), most)
    known = [v for v in (effect, low, high) if v is not None]
    reach = max(abs(v) for v in known) if any(known) else 1.0
    shown_band = None if band is None else min(band, 3 * reach)
    scale = axis([*known, *([] if shown_band is None else [shown_band, -shown_band])])
    middle = HEIGHT / 2
    shapes = []
    if shown_band is not None:
        left, right = scale.x(-shown_band), scale.x(shown_band)
        shapes.append(
            f'<rect class="band" x="{left}" y="4" width="{right - left:.1f}" '
            f'height="{HEIGHT - 8:g}"/>'
        )
    zero = scale.x(0.0)
    shapes.append(f'<line class="zero" x1="{zero}" x2="{zero}" y1="1" y2="{HEIGHT - 1:g}"/>')
    if low is not None and high is not None:
        left, right = scale.x(low), scale.x(high)
        shapes.append(
            f'<path class="whisker" d="M{left} {middle - 4:g}v8M{left} {middle:g}H{right}'
            f'M{right} {middle - 4:g}v8"/>'
        )
    shapes.append(marker(kind, scale.x(effect), middle))
    return (
        f'<svg class="forest {kind}" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" aria-hidden="true" '
        f'focusable="false">{"".join(shapes)}</svg>'
    )


def marker(kind: str, x: float, y: float) -> str:
    """A shape per verdict, so that colour is never the only sign."""
    if kind == "found":
        return f'<circle class="mark" cx="{x}" cy="{y:g}" r="5"/>'
    if kind == "negligible":
        return f'<rect class="mark" x="{x - 4.5:.1f}" y="{y - 4.5:g}" width="9" height="9"/>'
    if kind == "invalid":
        return f'<path class="mark cross" d="M{x - 4:.1f} {y - 4:g}l8 8m0 -8l-8 8"/>'
    return f'<circle class="mark hollow" cx="{x}" cy="{y:g}" r="4.5"/>'
