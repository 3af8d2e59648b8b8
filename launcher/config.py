"""run.yaml + `a.b.c=value` -> checked `RunSettings`, and back to text.

Every problem is reported at once. A value that comes from `${oc.env:...}` is used but never written: `public`,
`to_yaml` and `resolved_json` hold the text as it was written, and only these may be stored or sent anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from motet.experiments.errors import Problem, UserError, raise_problems, suggest
from motet.launcher.document import (
    COMMAND_LINE,
    Items,
    Leaf,
    Map,
    Node,
    assign,
    from_python,
    keys_of,
    merge,
    parse,
    plain,
    read_file,
    resolve,
)
from motet.launcher.settings import RunSettings

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
# Where a value of the environment may stand: it names a place, and decides no number of the run.
_ENVIRONMENT_ALLOWED = ("runs", "data.corpora.*.path", "model.from_hf", "metrics.*", "layout.*")
_MISSING = object()


def load(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    *,
    text: str | None = None,
    base: Path | None = None,
) -> RunSettings:
    """Read and check the settings of a run.

    `path` is a run.yaml (None: only `defaults` and `overrides`; `text` stands in for the file's content). Relative paths in
    it start from its folder (or `base`), those in `overrides` from the working directory. Raises one `UserError` that lists
    every problem.
    """
    folder = base or (Path(path).absolute().parent if path else Path.cwd())
    document = _document(path, text)
    problems: list[Problem] = []
    tree = Map()
    for layer in (from_python(defaults or {}, "defaults"), document):
        tree = typing.cast(Map, merge(tree, _normal(layer)))
    for override in overrides:
        problems += _override(tree, override)
    resolving = typing.cast(Map, merge(_default_tree(), tree))
    written, found = resolve(resolving)
    problems += found
    tree = typing.cast(Map, _picked(tree, resolving))
    problems += _add_experiment_files(tree, folder)
    problems += _misplaced_environment(written)
    builder = _Builder(folder, written, problems)
    settings = builder.section(RunSettings, tree, "")
    if settings is None or problems:
        raise_problems(problems)
    settings = dataclasses.replace(
        typing.cast(RunSettings, settings), base=str(folder), as_written=builder.written
    )
    raise_problems(cross_checks(settings))
    return settings


def cross_checks(settings: RunSettings) -> list[Problem]:
    """Contradictions between settings, and what the experiments' own texts get wrong."""
    from motet.experiments.spec import parse_experiments
    from motet.launcher.checks import cross_problems

    _, problems = parse_experiments(settings.experiments.list, Path(settings.base))
    return cross_problems(settings) + list(problems)


def _document(path: Path | str | None, text: str | None) -> Node:
    source = str(path) if path else "settings"
    if text is not None:
        node = parse(text, source)
    else:
        node = read_file(Path(path)) if path else None
    if node is None:
        return Map()
    if not isinstance(node, Map):
        raise UserError(f"{source}: is not a mapping of settings, such as `name: first-run`")
    return node


def _normal(node: Node) -> Node:
    """A bare list under `experiments:` becomes `experiments.list`."""
    if isinstance(node, Map) and isinstance(node.get("experiments"), Items):
        node = Map(node)
        node["experiments"] = Map(list=node["experiments"])
    return node


def _override(tree: Map, override: str) -> list[Problem]:
    path, equals, value = override.partition("=")
    keys = keys_of(path)
    if not equals or not keys:
        return [Problem(override, "is no setting; write a.b.c=value")]
    if keys[0] == "experiments" and isinstance(tree.get("experiments"), Items):
        tree["experiments"] = Map(list=tree["experiments"])
    try:
        node: Node = Leaf(value, where=COMMAND_LINE)
        if not _is_text(keys):
            parsed = parse(value, f"{path}=")
            node = Leaf("", where=COMMAND_LINE) if parsed is None else _at_command_line(parsed)
    except UserError as error:
        return [Problem(path, str(error))]
    why = assign(tree, keys, node)
    return [Problem(path, why)] if why else []


def _at_command_line(node: Node) -> Node:
    if isinstance(node, Leaf):
        return node._replace(where=COMMAND_LINE)
    if isinstance(node, Map):
        out = Map({key: _at_command_line(child) for key, child in node.items()})
        out.where = COMMAND_LINE
        return out
    items = Items(_at_command_line(child) for child in node)
    items.where = COMMAND_LINE
    return items


def _is_text(keys: Sequence[str]) -> bool:
    """Whether the setting is a string: its raw token is its value."""
    hint: Any = RunSettings
    for key in keys:
        if dataclasses.is_dataclass(hint):
            hint = _fields(typing.cast(type, hint)).get(key, (None, None))[1]
        elif typing.get_origin(hint) is tuple and key.isdecimal():
            hint = typing.get_args(hint)[0]
        else:
            return False
    return str in (hint, *_options(hint))


def _default_tree() -> Map:
    return typing.cast(Map, from_python(_listed(RunSettings()), "default"))


def _picked(shape: Node, values: Any) -> Node:
    """`values` restricted to what `shape` has (interpolation may have turned a scalar into more)."""
    if not isinstance(shape, Map) or not isinstance(values, Map):
        return typing.cast(Node, values)
    out = Map({key: _picked(child, values[key]) for key, child in shape.items()})
    out.where = shape.where
    return out


def _misplaced_environment(written: Mapping[str, str]) -> list[Problem]:
    allowed = [re.escape(p).replace(r"\*", r"[\w.]+") for p in _ENVIRONMENT_ALLOWED]
    return [
        Problem(
            path,
            f"{raw} comes from the environment, but this setting is stored, hashed and logged; write its value, or give "
            f"{path}=... on the command line",
        )
        for path, raw in written.items()
        if not any(re.fullmatch(pattern, path) for pattern in allowed)
    ]


def _add_experiment_files(tree: Map, folder: Path) -> list[Problem]:
    """Read `experiments.files` into `experiments.list`, so that the resolved settings hold every question."""
    section = tree.get("experiments")
    if not isinstance(section, Map) or not isinstance(section.get("files"), Items):
        return []
    problems: list[Problem] = []
    listed = section.get("list")
    entries = Items(listed if isinstance(listed, Items) else [])
    for i, leaf in enumerate(section["files"]):
        if not isinstance(leaf, Leaf):
            problems.append(Problem(f"experiments.files.{i}", "is not a path"))
            continue
        root = Path(_absolute(leaf, folder))
        found = sorted(p for p in root.glob("*") if p.suffix in (".yaml", ".yml"))
        if root.is_dir() and not found:
            problems.append(Problem(f"experiments.files.{i}", f"{root} holds no .yaml file"))
        for file in found if root.is_dir() else [root]:
            try:
                entries.extend(_entries(read_file(file), file))
            except UserError as error:
                problems.append(Problem(f"experiments.files.{i}", str(error)))
    section["list"] = entries
    section["files"] = Items()
    return problems


def _entries(node: Node | None, file: Path) -> list[Node]:
    """The experiments of one file: a list, `experiments: [...]`, or a single one. Their items lie beside the file."""
    if isinstance(node, Map):
        node = node["experiments"] if "experiments" in node else Items([node])
    if not isinstance(node, Items) or not all(isinstance(entry, Map) for entry in node):
        raise UserError(f"{file}: is not a list of experiments")
    for entry in node:
        if isinstance(entry.get("items"), Leaf) and not entry["items"].is_null:
            items = entry["items"]
            entry["items"] = Leaf(_absolute(items, file.parent), True, items.where)
    return list(node)


def _absolute(leaf: Leaf, folder: Path) -> str:
    start = Path.cwd() if leaf.where == COMMAND_LINE else folder
    return os.path.abspath(start / Path(leaf.text).expanduser())


def _fields(section: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """YAML key -> (field, type) of a section, without hidden fields."""
    hints = typing.get_type_hints(section)
    return {
        f.metadata["key"] or f.name: (f, hints[f.name])
        for f in dataclasses.fields(section)
        if f.metadata["kind"] != "hidden"
    }


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of `X | None`."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


class _Builder:
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
            return cls()
        if not isinstance(node, Map):
            known = ", ".join(_fields(cls))
            return self.problem(path, node, f"is a section; its settings are {known}")
        fields = _fields(cls)
        values: dict[str, Any] = {}
        for key, child in node.items():
            inner = f"{path}.{key}" if path else key
            if key not in fields:
                hint = suggest(key, fields) or f"; known here: {', '.join(fields)}"
                self.problem(inner, child, f"is no setting{hint}")
                continue
            field, hint = fields[key]
            value = self.value(field, hint, child, inner)
            if value is not _MISSING:
                values[field.name] = value
        return cls(**values)

    def value(self, field: dataclasses.Field[Any], hint: Any, node: Node, path: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type, hint), node, path)
        if typing.get_origin(hint) is tuple:
            return self.items(field, typing.get_args(hint)[0], node, path)
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
            out["items"] = _absolute(items, self.folder)
        return out

    def scalar(self, field: dataclasses.Field[Any], hint: Any, node: Node, path: str) -> Any:
        options = _options(hint)
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
        absolute = _absolute(node, self.folder)
        if path in self.written and not Path(node.text).expanduser().is_absolute():
            start = Path.cwd() if node.where == COMMAND_LINE else self.folder
            self.written[path] = f"{start}/{self.written[path]}"
        return absolute


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
    choices, unit = field.metadata["choices"], field.metadata["unit"]
    if choices and value not in choices:
        return f"is not one of {', '.join(choices)}{suggest(str(value), choices)}"
    words = {"least": "at least", "above": "more than", "most": "at most", "below": "less than"}
    for bound, limit in field.metadata["bounds"].items():
        fits = {
            "least": value >= limit,
            "above": value > limit,
            "most": value <= limit,
            "below": value < limit,
        }[bound]
        if not fits:
            return f"must be {words[bound]} {limit:,}" + (f" {unit}" if unit else "")
    return ""


def _listed(value: Any) -> Any:
    """Dataclasses as dictionaries with YAML keys, tuples as lists, hidden fields left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = _fields(type(value))
        return {key: _listed(getattr(value, field.name)) for key, (field, _) in fields.items()}
    if isinstance(value, Mapping):
        return {str(key): _listed(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(child) for child in value]
    return value


def public(settings: RunSettings) -> dict[str, Any]:
    """Every setting as nested dictionaries, fit to store and to send: what came from the environment stays `${...}`."""
    out = _listed(settings)
    for path, raw in settings.as_written.items():
        node, keys = out, keys_of(path)
        for key in keys[:-1]:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = raw
    return typing.cast("dict[str, Any]", out)


def resolved_json(settings: RunSettings) -> str:
    """`public` as canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(
        public(settings), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )


def to_yaml(settings: RunSettings) -> str:
    """`public` as YAML that `load` reads back to the same settings."""
    from motet.launcher.yaml_text import dump

    return dump(public(settings), set(settings.as_written.values()))
