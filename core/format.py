"""Numbers, rates, sizes and times as people read them: every number in words is made here."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
MINUS = "\u2212"


def decimals(value: float, digits: int = 3) -> int:
    """Return how many decimals show that many significant digits; at most 6, none for 0."""
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value else 0


def finite(value: Any) -> float | None:
    """`value` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, signed: bool = False) -> str:
    """At most three significant digits, with a real minus sign; `–` when missing."""
    x = finite(value)
    if x is None:
        return MISSING
    if x and (abs(x) >= 1e6 or abs(x) < 1e-4):
        return power_of_ten(x, signed)
    text = f"{abs(x):,.{decimals(x)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return sign_of(x, signed) + text


def sign_of(x: float, signed: bool) -> str:
    """A real minus sign, and a plus when asked."""
    return MINUS if x < 0 else ("+" if signed and x > 0 else "")


def power_of_ten(value: float, signed: bool = False) -> str:
    """`1.2 × 10¹⁵`."""
    mantissa, exponent = f"{abs(value):.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"{sign_of(value, signed)}{mantissa} × 10{raised}"


def count(value: Any) -> str:
    """`12,345`."""
    x = finite(value)
    return MISSING if x is None else f"{x:,.0f}"


def big(value: Any) -> str:
    """`9.83 million`; plain below ten thousand."""
    x = finite(value)
    if x is None:
        return MISSING
    for limit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(x) >= limit:
            return f"{number(x / limit)} {name}"
    return f"{x:,.0f}"


def percent(value: Any) -> str:
    """A share as `2.1 %`."""
    x = finite(value)
    if x is None:
        return MISSING
    places = 0 if abs(x) >= 0.1 else decimals(x, 0)
    return f"{number(round(100 * x, places))} %"


def duration(seconds: Any) -> str:
    """`42 s`, `5 min 12 s`, `3 h 07 min`, `2 d 4 h`."""
    x = finite(seconds)
    if x is None:
        return MISSING
    if x < 60:
        return f"{number(x)} s"
    minutes, s = divmod(round(x), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s"


def loss(value: float | None) -> str:
    """A loss: four significant digits, `nan` for what is missing or not finite."""
    return "nan" if value is None or not math.isfinite(value) else f"{value:.4g}"


def short(value: float) -> str:
    """`950`, `12.3k`, `4.5M`: how many, or how many per second."""
    if not math.isfinite(value):
        return "?"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def parameters(number: float, places: int = 1) -> str:
    """A number of parameters: `1.3 B`, `125.0 M`."""
    return f"{number / 1e9:,.{places}f} B" if number >= 1e9 else f"{number / 1e6:,.{places}f} M"


def clock(seconds: float | None) -> str:
    """`0:42`, `12:03`, `3:07:00`, `2d 04:00`; `?` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}:{m:02d}"
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def bandwidth(gb_s: float) -> str:
    """`450 GB/s`, `12.5 MB/s`."""
    return f"{gb_s:,.3g} GB/s" if gb_s >= 1 else f"{gb_s * 1e3:,.3g} MB/s"


def latency(us: float) -> str:
    """`3 µs`, `5 ms`."""
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} µs"
