"""Rows of a user's JSONL, or invented ones -> checked units, in blocks and clusters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from motet.core.errors import Problem, UserError, suggest
from motet.core.parsing import parse_json
from motet.experiments.design.clusters import with_groups
from motet.experiments.design.spec import ExperimentSpec
from motet.experiments.types import ProbeItem, Unit

Fields = dict[str, tuple[type, ...]]
ITEM_PARTS = ("id", "kind", "prompt", "target")
HALF_PAIR = re.compile("[\ud800-\udfff]")


class UnitMaker(Protocol):
    """What reading units needs of an experiment; see `Experiment`, which is one."""

    @property
    def spec(self) -> ExperimentSpec: ...

    @property
    def fields(self) -> Fields: ...

    @property
    def optional_fields(self) -> Fields: ...

    def unit_of(self, row: Mapping[str, Any]) -> Unit: ...

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]: ...


def read_units(experiment: UnitMaker) -> tuple[list[Unit], list[Problem]]:
    """Return the units of an experiment, in blocks and clusters, and every problem of its rows.

    Raises:
        UserError: the file of items cannot be read.
    """
    units: list[Unit] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for place, row in _rows(experiment):
        try:
            unit = checked_unit(experiment, row)
            if unit.id in seen:
                raise ValueError(f"repeats the id {unit.id!r} of {seen[unit.id]}")
        except ValueError as error:
            problems.append(Problem(place, str(error)))
            continue
        seen[unit.id] = place
        units.append(unit)
    if len(units) < 2 and not problems:
        where = f"experiments.{experiment.spec.name}.items"
        problems.append(Problem(where, f"has {len(units)} units; at least 2 are needed"))
    if problems:
        return units, problems
    return with_groups(units, experiment.spec)


def _rows(experiment: UnitMaker) -> Iterable[tuple[str, Any]]:
    """Yield (place for messages, row)."""
    spec = experiment.spec
    if spec.items is not None:
        yield from jsonl_rows(spec.items)
        return
    asked = spec.generate
    for number, row in enumerate(experiment.generate_rows(asked["count"], asked["seed"])):
        yield f"experiments.{spec.name}.items[{number}]", row


MOST_WRITTEN = 4096
"""The most tokens that a probe may ask for."""


def checked_unit(experiment: UnitMaker, row: Any) -> Unit:
    """One row -> unit; ValueError says what is wrong with the row."""
    row = _checked_row(experiment, row)
    unit = experiment.unit_of({**row, "id": str(row["id"])})
    if not isinstance(unit, Unit):
        raise TypeError(f"unit_of returned {unit!r:.60}; it must be a Unit")
    for name, values, kind in (("texts", unit.texts, str), ("items", unit.items, ProbeItem)):
        good = isinstance(values, (tuple, list)) and all(isinstance(v, kind) for v in values)
        if not good:
            message = f"unit_of returned {name}={values!r:.60}; it must be a tuple of"
            raise TypeError(f"{message} {kind.__name__}")
    if wrong := _unlike_unit(unit):
        raise TypeError(f"unit_of returned a Unit with {wrong}")
    if not unit.texts or not all(text.strip() for text in unit.texts):
        raise ValueError("has an empty text")
    if any(not item.prompt or not (item.target or item.max_tokens) for item in unit.items):
        raise ValueError("has a probe with an empty prompt, or an empty target and no max_tokens")
    words = [unit.id, *unit.texts, *(w for item in unit.items for w in (item.prompt, item.target))]
    for text in words:
        if not text.isascii() and HALF_PAIR.search(text):
            raise ValueError(f"has half of a surrogate pair, which is no text: {text!r:.60}")
    known = {"id", *experiment.fields, *experiment.optional_fields}
    extra = {
        str(key): value
        for key, value in row.items()
        if key not in known and isinstance(value, (str, int, float))
    }
    return replace(unit, attributes={**extra, **unit.attributes})


def _unlike_unit(unit: Unit) -> str | None:
    """Say which part of a unit, apart from its texts and items, is of another type."""
    for part in ("id", "cluster", "block"):
        if type(text := getattr(unit, part)) is not str:
            return f"{part}={text!r:.60}; it must be text"
    for item in unit.items:
        for part in ITEM_PARTS:
            if type(text := getattr(item, part)) is not str:
                return f"items: {part}={text!r:.60}; it must be text"
        if type(item.max_tokens) is not int or not 0 <= item.max_tokens <= MOST_WRITTEN:
            return f"items: max_tokens={item.max_tokens!r:.60}; it must be 0 to {MOST_WRITTEN}"
    if not isinstance(unit.attributes, dict):
        return f"attributes={unit.attributes!r:.60}; it must be a dict"
    for name, value in unit.attributes.items():
        plain = isinstance(name, str) and type(value) in (str, int, float, bool)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            return f"attributes {{{name!r}: {value!r:.60}}}; it must be text or a finite number"
    return None


def _checked_row(experiment: UnitMaker, row: Any) -> Mapping[str, Any]:
    if isinstance(row, ValueError):
        raise ValueError(f"is not JSON: {row}")
    if not isinstance(row, Mapping):
        raise ValueError(f"is {type(row).__name__}; each line must be an object with an id")
    wanted: Fields = {"id": (str, int), **experiment.fields}
    for name, types in wanted.items():
        if name not in row:
            near = suggest(name, [str(key) for key in row])
            needed = ", ".join(wanted)
            raise ValueError(f"has no field {name!r}{near}; a row needs {needed}")
        check_field(name, row[name], types)
    for name, types in experiment.optional_fields.items():
        if row.get(name) not in (None, "", []):
            check_field(name, row[name], types)
    return row


def check_field(name: str, value: Any, types: tuple[type, ...]) -> None:
    """ValueError when a field has another type or is an empty text or list."""
    good = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
    if not good:
        names = " or ".join("text" if t is str else t.__name__ for t in types)
        raise ValueError(f"has {name}={value!r:.80}; it must be {names}")
    if isinstance(value, (str, list)) and len(value) == 0:
        raise ValueError(f"has an empty {name}")


def texts_of(row: Mapping[str, Any], name: str) -> list[str]:
    """A list field whose members must all be text. ValueError otherwise."""
    values = row.get(name) or []
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"has {name}={values!r:.80}; it must be a list of texts")
    return [str(value) for value in values]


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", row) per non-empty line; a line that is not JSON yields the error.

    Raises UserError when the file cannot be read as UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", parse_json(line)
        except ValueError as error:
            yield f"{path}:{number}", error
