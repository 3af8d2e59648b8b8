"""A setting of run.yaml: a dataclass field that carries its documentation and its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    kind: str = "",
    key: str = "",
    omit_default: bool = False,
) -> Any:
    """A dataclass field with its documentation.

    `least`/`most` are inclusive bounds and `above`/`below` exclusive ones. `kind` is "path"
    (relative to the folder of the run.yaml), "free" (passed on as it is written) or "hidden" (not a
    setting). `key` is the name in YAML where that is a Python keyword.

    With `omit_default` a setting (or a whole section) at its default is left out of what is
    written: a setting that is new keeps the bytes of runs which do not use it, and older code
    reads them. It is not for paths whose default is a folder, which becomes absolute.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {
        "doc": doc,
        "unit": unit,
        "choices": tuple(choices),
        "kind": kind,
        "key": key,
        "omit_default": omit_default,
        "bounds": {name: value for name, value in bounds.items() if value is not None},
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
