"""What would work instead: the nearest values to one that breaks a rule. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BrokenRule = tuple[str, str]
"""(setting, message)"""


def nearest(value: int, fits: Callable[[int], bool], least: int, most: int) -> list[int]:
    """Return the nearest number below `value` and the nearest above it, within bounds, that fit;
    there may be none.
    """
    below = next((n for n in range(min(value - 1, most), least - 1, -1) if fits(n)), None)
    above = next((n for n in range(max(value + 1, least), most + 1) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


def nearest_text(found: Sequence[int], otherwise: str = "no value fits") -> str:
    """Return "nearest: A and B" for what `nearest` found, or `otherwise`."""
    return f"nearest: {' and '.join(f'{n:,}' for n in found)}" if found else otherwise
