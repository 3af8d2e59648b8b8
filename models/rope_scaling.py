"""Scaled rotary positions, as config.json of Hugging Face describes them: a value that needs no
torch. `rotary.py` has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Scaling = tuple[tuple[str, Any], ...]
"""Sorted (key, value) pairs of a description: a value that can be hashed. See `ROPE_KINDS`."""

ORIGINAL = "original_max_position_embeddings"
# rope_type -> (keys that it needs, keys that it may have)
ROPE_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", ORIGINAL), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
NOT_HELD = {
    "longrope": "its factors change with the length of a sequence",
    "su": "it is longrope, whose factors change with the length of a sequence",
}
"""Kinds that are known and cannot be trained, with the reason."""


def scaling_of(value: Any) -> Any:
    """Return a mapping, or the lists of pairs that JSON gives back, as `Scaling`; others as is."""
    if isinstance(value, Mapping):
        value = list(value.items())
    pairs = isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    )
    return tuple(sorted((str(key), kept) for key, kept in value)) if pairs else value


def scaling_problem(scaling: Any) -> str:
    """Return why a value describes no scaling that can be trained; "" where it does."""
    if not isinstance(scaling, tuple) or not all(isinstance(pair, tuple) for pair in scaling):
        return f"{scaling!r} is no mapping with rope_type and factor"
    found = dict(scaling)
    kind = found.pop("rope_type", None)
    if kind not in ROPE_KINDS:
        why = f" ({NOT_HELD[kind]})" if kind in NOT_HELD else ""
        return f"rope_type={kind!r} is not one of {', '.join(ROPE_KINDS)}{why}"
    needed, able = ROPE_KINDS[kind]
    if missing := [key for key in needed if key not in found]:
        return f"rope_type={kind!r} needs {', '.join(missing)}"
    if unknown := [key for key in found if key not in (*needed, *able)]:
        return f"rope_type={kind!r} has no {', '.join(unknown)}"
    for key, value in found.items():
        if key == "truncate":
            if not isinstance(value, bool):
                return f"truncate={value!r} is not true or false"
        elif not _is_positive(value):
            return f"{key}={value!r} is not a number above 0"
    if kind == "llama3" and found["high_freq_factor"] <= found["low_freq_factor"]:
        return (
            f"high_freq_factor={found['high_freq_factor']!r} is not above "
            f"low_freq_factor={found['low_freq_factor']!r}"
        )
    return ""


def longest(scaling: Scaling | None) -> int | None:
    """Return the tokens beyond which frequencies would change with the length of a sequence."""
    found = dict(scaling or ())
    return int(found[ORIGINAL]) if found.get("rope_type") == "dynamic" else None


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
