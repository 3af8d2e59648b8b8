"""What a file says -> values that can be meant: every problem is gathered, none stops the reading.

A run.yaml, the experiments in it and a cluster.yaml are read with these rules, each in its words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

from motet.core.errors import Problem, suggest

Options = TypeVar("Options")
_LIMITS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", lambda value, limit: value >= limit),
    "above": ("more than", lambda value, limit: value > limit),
    "most": ("at most", lambda value, limit: value <= limit),
    "below": ("less than", lambda value, limit: value < limit),
}


def is_number(value: Any) -> bool:
    """A finite int or float; YAML's true and false are not numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """An int that is not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def hint_of(key: Any, known: Iterable[str], listed: str = "; known are") -> str:
    """Return what to write instead of a key that is not known: the nearest one, or all of them."""
    names = list(known)
    return suggest(str(key), names) or f"{listed} {', '.join(names)}"


def not_one_of(shown: str, options: Collection[str]) -> str:
    """Return what to say of a value that is none of the choices."""
    return f"is not one of {', '.join(options)}{suggest(shown, options)}"


def beyond(value: Any, limits: Mapping[str, float], unit: str = "") -> str:
    """Return which of the limits "least", "above", "most", "below" a number breaks; "" if none."""
    for name, limit in limits.items():
        words, holds = _LIMITS[name]
        if not holds(value, limit):
            return f"must be {words} {limit:,}" + (f" {unit}" if unit else "")
    return ""


class MappingReader:
    """One mapping of a file: knows its name for messages, and gathers problems.

    Every method returns a value that can be worked with: after a problem, the default. A room
    that has words of its own for a mistake sets `UNKNOWN` and `WRONG`.
    """

    UNKNOWN: ClassVar[str] = "is no setting"
    WRONG: ClassVar[str] = "{value} is not {what}"

    def __init__(
        self, values: Any, where: str, problems: list[Problem], known: Sequence[str]
    ) -> None:
        """Keep the keys of `values` that are `known`, and complain about the others."""
        self.where = where
        self.problems = problems
        self.values: dict[str, Any] = {}
        if not isinstance(values, Mapping):
            self.refuse("", values, f"a mapping with {', '.join(known)}")
            return
        for key, value in values.items():
            if key in known:
                self.values[key] = value
            else:
                self.problem(str(key), f"{self.UNKNOWN}{hint_of(key, known)}")

    def problem(self, key: str, message: str) -> None:
        """Report a problem of one key; "" = of the mapping itself."""
        self.problems.append(Problem(f"{self.where}.{key}" if key else self.where, message))

    def refuse(self, key: str, value: Any, what: str) -> None:
        """Report that a value is not `what` it must be."""
        self.problem(key, self.WRONG.format(value=repr(value), what=what))

    def checked(self, key: str, default: Any, accepts: Callable[[Any], Any], what: str) -> Any:
        """Return the value of a key if it is accepted; one that is missing is the default."""
        value = self.values.get(key, default)
        if value is default or accepts(value):
            return value
        self.refuse(key, value, what)
        return default

    def number(
        self, key: str, default: Any, least: float, most: float, unit: str = "", what: str = ""
    ) -> Any:
        what = what or f"a number from {least:g} to {most:,g}" + (f" ({unit})" if unit else "")
        return self.checked(key, default, lambda v: is_number(v) and least <= v <= most, what)

    def whole(self, key: str, default: Any, least: int, most: float = math.inf) -> Any:
        bounds = f"from {least} to {most:,}" if math.isfinite(most) else f">= {least}"
        accepts = lambda v: is_whole(v) and least <= v <= most  # noqa: E731
        return self.checked(key, default, accepts, f"a whole number {bounds}")

    def text(self, key: str, default: str = "") -> str:
        return str(self.checked(key, default, lambda v: isinstance(v, str), "text"))

    def choice(self, key: str, options: Sequence[str], default: str) -> str:
        value = self.values.get(key, default)
        what = f"one of {', '.join(options)}{suggest(str(value), options)}"
        return str(self.checked(key, default, lambda v: v in options, what))

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping, empty where there is none."""
        accepts = lambda v: v is None or isinstance(v, Mapping)  # noqa: E731
        return dict(self.checked(key, None, accepts, "a mapping (key: value)") or {})

    def sequence(self, key: str) -> list[Any]:
        """Return a list, empty where there is none."""
        return list(self.checked(key, None, is_sequence, "a list") or [])

    def inner(self, key: str, known: Sequence[str]) -> Self:
        """Return the reader of a mapping inside this one, empty where there is none."""
        value = self.values.get(key)
        value = {} if value is None else value
        return type(self)(value, f"{self.where}.{key}", self.problems, known)

    def options(self, key: str, kind: type[Options]) -> Options:
        """Fill a dataclass from a mapping inside this one; types are those of its defaults."""
        defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
        inner = self.inner(key, list(defaults))
        chosen: dict[str, Any] = {}
        for name in inner.values:
            default = defaults[name]
            assert default is not MISSING, f"{kind.__name__}.{name} must have a default"
            listed = isinstance(default, tuple)  # YAML has lists
            what = f"{'list' if listed else type(default).__name__}, for example "
            what += repr(list(default) if listed else default)
            value = inner.checked(name, default, partial(_is_like, default), what)
            chosen[name] = type(default)(value)
        return kind(**chosen)


def is_sequence(value: Any) -> bool:
    """A list or tuple, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_like(default: Any, value: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return is_whole(value)
    if isinstance(default, tuple):
        members = list(value) if is_sequence(value) else [None]
        return all(one is not None and _is_like((*default, one)[0], one) for one in members)
    return is_number(value) if isinstance(default, float) else isinstance(value, type(default))
