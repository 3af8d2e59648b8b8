"""A tree of raw scalars -> typed sections: each value is read as the type of its setting."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from motet.core.errors import Problem
from motet.core.schema import beyond, hint_of, not_one_of
from motet.launcher.config.layout import MOVED
from motet.launcher.config.yaml_tree import COMMAND_LINE, Items, Leaf, Map, Node, plain

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_MISSING = object()


def absolute(leaf: Leaf, folder: Path) -> str:
    """The path a scalar names: from `folder`, or from the working directory when it was typed on
    the command line.
    """
    start = Path.cwd() if leaf.where == COMMAND_LINE else folder
    return os.path.abspath(start / Path(leaf.text).expanduser())


def fields_of(section: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """YAML key -> (field, type) of a section, without hidden fields."""
    hints = typing.get_type_hints(section)
    return {
        f.metadata["key"] or f.name: (f, hints[f.name])
        for f in dataclasses.fields(section)
        if f.metadata["kind"] != "hidden"
    }


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of `X | None`."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


class Builder:
    """Makes typed sections out of a tree and collects every problem."""

    def __init__(self, folder: Path, written: Mapping[str, str], problems: list[Problem]) -> None:
        self.folder = folder
        self.written = dict(written)
        self.problems = problems

    def problem(self, path: str, node: Node, message: str) -> Any:
        where = f" [{node.where}]" if node.where and node.where != COMMAND_LINE else ""
        self.problems.append(Problem(path or "run.yaml", message + where))
        return _MISSING

    def show(self, path: str, leaf: Leaf) -> str:
        return self.written.get(path, leaf.text)

    def section(self, cls: type, node: Node, path: str) -> Any:
        if isinstance(node, Leaf) and node.is_null:
            node = Map()
        if not isinstance(node, Map):
            known = ", ".join(fields_of(cls))
            return self.problem(path, node, f"is a section; its settings are {known}")
        fields = fields_of(cls)
        values: dict[str, Any] = {}
        for key, child in node.items():
            inner = f"{path}.{key}" if path else key
            if key not in fields:
                hint = hint_of(key, fields, "; known here:")
                hint = f"; write {MOVED[inner]}" if inner in MOVED else hint
                self.problem(inner, child, f"is no setting{hint}")
                continue
            field, hint = fields[key]
            value = self.value(field, hint, child, inner)
            if value is not _MISSING:
                values[field.name] = value
        for field, _ in fields.values():  # a default place starts from the same folder
            if field.metadata["kind"] == "path" and isinstance(field.default, str):
                start = absolute(Leaf(field.default), self.folder) if field.default else ""
                values.setdefault(field.name, start)
        return cls(**values)

    def value(self, field: dataclasses.Field[Any], hint: Any, node: Node, path: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type, hint), node, path)
        if typing.get_origin(hint) is tuple:
            return self.items(field, typing.get_args(hint)[0], node, path)
        if field.metadata["kind"] == "free":
            return self.mapping(node, path)
        return self.scalar(field, hint, node, path)

    def items(self, field: dataclasses.Field[Any], hint: Any, node: Node, path: str) -> Any:
        if isinstance(node, Leaf) and node.is_null:
            return ()
        if not isinstance(node, Items):
            shown = f"; write [{self.show(path, node)}]" if isinstance(node, Leaf) else ""
            return self.problem(path, node, f"is a list{shown}")
        out = [
            self.free(child, f"{path}.{i}")
            if field.metadata["kind"] == "free"
            else self.value(field, hint, child, f"{path}.{i}")
            for i, child in enumerate(node)
        ]
        return tuple(value for value in out if value is not _MISSING)

    def free(self, node: Node, path: str) -> Any:
        """One experiment, for its own room to judge."""
        if not isinstance(node, Map):
            return self.problem(path, node, "is one experiment: a mapping with `name` and `use`")
        out = plain(node)
        items = node.get("items")
        if isinstance(items, Leaf) and not items.is_null:
            out["items"] = absolute(items, self.folder)
        return out

    def mapping(self, node: Node, path: str) -> Any:
        """Settings of another program, for it to judge."""
        if isinstance(node, Leaf) and node.is_null:
            return {}
        return plain(node) if isinstance(node, Map) else self.problem(path, node, "is a mapping")

    def scalar(self, field: dataclasses.Field[Any], hint: Any, node: Node, path: str) -> Any:
        options = options_of(hint)
        wanted = next(option for option in options if option is not types.NoneType)
        if not isinstance(node, Leaf):
            return self.problem(path, node, f"is one {_noun(wanted)}, not a {_shape(node)}")
        if node.is_null:
            if types.NoneType in options:
                return None
            return self.problem(path, node, f"is empty; it is {_article(_noun(wanted))}")
        shown = self.show(path, node)
        value, why = _converted(wanted, node)
        if why:
            return self.problem(path, node, f"{shown} {why}")
        why = _out_of_bounds(value, field)
        if why:
            return self.problem(path, node, f"{shown} {why}")
        if field.metadata["kind"] == "path":
            return self.path(node, path)
        return value

    def path(self, node: Leaf, path: str) -> str:
        if path in self.written and not Path(node.text).expanduser().is_absolute():
            start = Path.cwd() if node.where == COMMAND_LINE else self.folder
            self.written[path] = f"{start}/{self.written[path]}"
        return absolute(node, self.folder)


def _noun(wanted: type) -> str:
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[wanted]


def _article(noun: str) -> str:
    return f"a {noun}" if noun.endswith("number") else noun


def _shape(node: Node) -> str:
    return "mapping" if isinstance(node, Map) else "list"


def _converted(wanted: type, leaf: Leaf) -> tuple[Any, str]:
    """The value of a scalar's raw text, or why it is none."""
    text = leaf.text.strip()
    if wanted is str:
        return leaf.text, ""
    if wanted is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE, ""
        return None, "is neither true nor false"
    if re.fullmatch(r"[-+]?0\d+", text):
        return None, f"starts with a 0 (octal in YAML); write {int(text)}"
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        return None, f"is not {_article(_noun(wanted))}"
    if not number.is_finite():
        return None, "is not a finite number"
    if wanted is float:
        return float(number), "" if math.isfinite(float(number)) else "is too large"
    if number.adjusted() > 30:
        return None, "is too large"
    if number != number.to_integral_value():
        return None, "is not a whole number"
    return int(number), ""


def _out_of_bounds(value: Any, field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    if choices and value not in choices:
        return not_one_of(str(value), choices)
    return beyond(value, field.metadata["bounds"], field.metadata["unit"])
