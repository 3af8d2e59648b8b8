"""JSON and YAML that others wrote, of any depth: a text that is none, or that no file of ours
would hold, is one `ValueError` in words, never a `RecursionError`, a hang or full memory.
"""

from __future__ import annotations

import json
from typing import Any

MOST_VALUES, MOST_LEVELS = 200_000, 40
"""Of YAML, aliases unfolded."""
TOO_DEEP = "is nested too deeply"


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_yaml(text: str) -> Any:
    """Return the plain value of one YAML document, None where it is empty.

    Raises:
        ValueError: it is none, asks for anything but plain values, is nested too deeply, or unfolds
            to more than anybody writes.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _count(node, MOST_VALUES, MOST_LEVELS)
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _count(node: Any, values: int, levels: int) -> int:
    """Return how many of `values` are left after a node with all that is in it."""
    if levels < 0:
        raise ValueError(f"{TOO_DEEP}: more than {MOST_LEVELS} levels")
    if values <= 0:
        raise ValueError(f"unfolds to more than {MOST_VALUES:,} values; remove the nested aliases")
    values -= 1
    inside = node.value if isinstance(node.value, list) else ()
    for child in inside:
        for one in child if isinstance(child, tuple) else (child,):
            values = _count(one, values, levels - 1)
    return values
