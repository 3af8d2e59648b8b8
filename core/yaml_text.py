"""Nested values -> YAML text that reads back the same under every YAML version."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*( [A-Za-z][A-Za-z0-9_./-]*)*")
_SPECIAL = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is not plainly a word."""

    as_written: Collection[str] = ()

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    if value not in dumper.as_written:
        value = value.replace("${", "\\${")
    simple = _PLAIN.fullmatch(value) and value.lower() not in _SPECIAL
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if simple else '"')


def _number(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:  # YAML 1.1 wants the point
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def dump(value: Any, as_written: Collection[str] = ()) -> str:
    """YAML of nested dictionaries, lists and scalars; texts in `as_written` keep their `${...}`
    alive.
    """
    kind: Any = type("_Bound", (_Dumper,), {"as_written": as_written})
    kind.add_representer(str, _text)
    kind.add_representer(float, _number)
    return yaml.dump(
        value, Dumper=kind, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )
