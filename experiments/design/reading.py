"""One mapping of a YAML entry being read: typed values, every problem collected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from motet.core.errors import Problem, suggest


class Reader:
    """One mapping being read: knows its name for messages and collects problems."""

    def __init__(self, values: Mapping[str, Any], where: str, problems: list[Problem]) -> None:
        self.values = values
        self.where = where
        self.problems = problems

    def problem(self, key: str, message: str) -> None:
        self.problems.append(Problem(f"{self.where}.{key}" if key else self.where, message))

    def known(self, keys: Sequence[str]) -> None:
        """Report every key that is not one of `keys`."""
        for key in self.values:
            if key not in keys:
                hint = suggest(str(key), keys) or f"; known are {', '.join(keys)}"
                self.problem(str(key), f"is not a setting{hint}")

    def choice(self, key: str, options: Sequence[str], default: str) -> str:
        value = self.values.get(key, default)
        if value in options:
            return str(value)
        hint = suggest(str(value), options)
        self.problem(key, f"is {value!r}; it must be one of {', '.join(options)}{hint}")
        return default

    def number(self, key: str, default: Any, low: float, high: float, what: str) -> Any:
        value = self.values.get(key, default)
        if is_number(value) and low <= value <= high:
            return value
        self.problem(key, f"is {value!r}; it must be {what}")
        return default

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return dict(value)
        self.problem(key, f"is {value!r}; it must be a mapping (key: value)")
        return {}

    def sequence(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if value is None:
            return []
        if isinstance(value, Sequence) and not isinstance(value, str):
            return list(value)
        self.problem(key, f"is {value!r}; it must be a list")
        return []


def is_number(value: Any) -> bool:
    """A finite int or float; YAML's true and false are not numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_time(value: Any) -> bool:
    """A step (int >= 0) or a fraction of the run (float in [0, 1])."""
    return is_number(value) and (value >= 0 if isinstance(value, int) else 0.0 <= value <= 1.0)
