"""run.yaml + `a.b.c=value` -> checked `RunSettings`, and back to text.

Every problem is reported at once. A value that comes from `${oc.env:...}` is used but never
written: `public`, `to_yaml` and `resolved_json` hold the text as it was written, and only these may
be stored or sent anywhere.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import atomic_write, sealed_text
from motet.core.hashing import canonical_json
from motet.launcher.config.sections import RunSettings
from motet.launcher.config.typed import Builder, absolute, fields_of, options_of
from motet.launcher.config.yaml_tree import (
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
    read_file,
    resolve,
)

# Where a value of the environment may stand: it names a place, and decides no number of the run.
_ENVIRONMENT_ALLOWED = (
    "runs",
    "data.corpora.*.path",
    "validation.corpora.*.path",
    "model.from_hf",
    "metrics.*",
    "layout.*",
)


def load(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    *,
    text: str | None = None,
    base: Path | None = None,
    nodes: int = 1,
    world: Callable[[RunSettings], int] | None = None,
    begun: Callable[[RunSettings], bool] | None = None,
) -> RunSettings:
    """Read and check the settings of a run; one `UserError` lists every problem.

    `path` is a run.yaml (None: only `defaults` and `overrides`; `text` stands in for the file's
    content). Relative paths in it start from its folder (or `base`), those in `overrides` from the
    working directory. The layout is checked for `layout.processes` on each of `nodes` machines, or
    for as many ranks as `world` makes of the settings, unless the run was begun: its ranks are
    counted when it starts. `begun` says whether the settings are of a run that was begun under a
    run.yaml of the user's: its experiments are those of its snapshot, and are not checked here.
    """
    settings, problems = inspect(
        path, overrides, defaults, text=text, base=base, nodes=nodes, world=world, begun=begun
    )
    raise_problems(problems)
    return settings


def inspect(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    *,
    text: str | None = None,
    base: Path | None = None,
    nodes: int = 1,
    world: Callable[[RunSettings], int] | None = None,
    begun: Callable[[RunSettings], bool] | None = None,
) -> tuple[RunSettings, list[Problem]]:
    """As `load`, but hand back the problems: settings that have one hold their default.

    Raises `UserError` when the file is missing or is no YAML.
    """
    folder = (base or (Path(path).parent if path else Path.cwd())).absolute()
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
    builder = Builder(folder, written, problems)
    settings = builder.section(RunSettings, tree, "")
    settings = dataclasses.replace(settings, base=str(folder), as_written=builder.written)
    ranks = world(settings) if world else settings.layout.processes * nodes
    problems += _cross_problems(settings, problems, 0 if _is_frozen(path) else ranks)
    frozen = _is_frozen(path) or (begun is not None and begun(settings))
    if not frozen and not any(p.setting.startswith("experiments") for p in problems):
        problems += _experiment_problems(settings)
    return settings, problems


def _is_frozen(path: Path | str | None) -> bool:
    """Whether these are the settings of a run that was begun: its units lie in `plan/`, not in the
    user's files.
    """
    if not path:
        return False
    folder = Path(path).absolute().parent
    if folder.parent.name == "attempts":  # the settings of one attempt
        folder = folder.parents[1]
    return (folder / "manifest.json").exists()


def _experiment_problems(settings: RunSettings) -> list[Problem]:
    from motet.experiments.design.parser import parse_experiments
    from motet.experiments.library.kinds import Library

    base = Path(settings.base)
    asked = settings.experiments
    return parse_experiments(asked.list, base, Library(base), asked.alpha)[1]


def _cross_problems(settings: RunSettings, found: Sequence[Problem], ranks: int) -> list[Problem]:
    """Contradictions among the settings; with 0 ranks their number is not known yet.

    A check is left out when something that it reads has a problem already: it would judge a
    default.
    """
    from motet.launcher.config.checks import CHECKS, LAYOUT_READS, layout_problems

    wrong = [problem.setting for problem in found]
    out = []
    for check, reads in CHECKS:
        if not any(setting.startswith(tuple(reads)) for setting in wrong):
            out += check(settings)
    if ranks and not any(setting.startswith(LAYOUT_READS) for setting in wrong):
        out += layout_problems(settings, ranks)
    return out


def _document(path: Path | str | None, text: str | None) -> Node:
    source = str(path) if path else "settings"
    if text is not None:
        node = parse(text, source)
    else:
        node = read_file(Path(path), checked=_is_frozen(path)) if path else None
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
            hint = fields_of(typing.cast(type, hint)).get(key, (None, None))[1]
        elif typing.get_origin(hint) is tuple and key.isdecimal():
            hint = typing.get_args(hint)[0]
        else:
            return False
    return str in (hint, *options_of(hint))


def _default_tree() -> Map:
    return typing.cast(Map, from_python(_listed(RunSettings()), "default"))


def _picked(shape: Node, values: Any) -> Node:
    """`values` restricted to what `shape` has (interpolation may turn a scalar into more)."""
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
            f"{raw} comes from the environment, but this setting is stored, hashed and logged; "
            "write its value, or give "
            f"{path}=... on the command line",
        )
        for path, raw in written.items()
        if not any(re.fullmatch(pattern, path) for pattern in allowed)
    ]


def _add_experiment_files(tree: Map, folder: Path) -> list[Problem]:
    """Read `experiments.files` into `experiments.list`, so that the resolved settings hold every
    question.
    """
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
        root = Path(absolute(leaf, folder))
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
    """The experiments of one file: a list, `experiments: [...]`, or a single one.

    Their items lie beside the file.
    """
    if isinstance(node, Map):
        node = node["experiments"] if "experiments" in node else Items([node])
    if not isinstance(node, Items) or not all(isinstance(entry, Map) for entry in node):
        raise UserError(f"{file}: is not a list of experiments")
    for entry in node:
        if isinstance(entry.get("items"), Leaf) and not entry["items"].is_null:
            items = entry["items"]
            entry["items"] = Leaf(absolute(items, file.parent), True, items.where)
    return list(node)


def _listed(value: Any, written: Collection[str] | None = None, path: str = "") -> Any:
    """Dataclasses as dictionaries with YAML keys, tuples as lists, hidden fields left out.

    Fields with `omit_default` are left out at their default, unless `written` names them or is
    None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {}
        for key, (field, _) in fields_of(type(value)).items():
            child, inner = getattr(value, field.name), f"{path}.{key}" if path else key
            if written is None or not _is_omitted(field, child, written, inner):
                out[key] = _listed(child, written, inner)
        return out
    if isinstance(value, Mapping):
        return {str(key): _listed(child, written, f"{path}.{key}") for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(child, written, f"{path}.{i}") for i, child in enumerate(value)]
    return value


def _is_omitted(
    field: dataclasses.Field[Any], value: Any, written: Collection[str], path: str
) -> bool:
    if not field.metadata["omit_default"]:
        return False
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return bool(value == default) and not any(f"{name}.".startswith(f"{path}.") for name in written)


def public(settings: RunSettings, *, whole: bool = False) -> dict[str, Any]:
    """Every setting as nested dictionaries, fit to store and to send: what came from the
    environment stays `${...}`.

    Settings with `omit_default` are left out at their default unless `whole`.
    """
    out = _listed(settings, None if whole else settings.as_written)
    for path, raw in settings.as_written.items():
        node, keys = out, keys_of(path)
        for key in keys[:-1]:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = raw
    return typing.cast("dict[str, Any]", out)


def resolved_json(settings: RunSettings) -> str:
    """`public` as canonical JSON: sorted keys, no spaces, no NaN."""
    return canonical_json(public(settings))


def store(path: Path, settings: RunSettings) -> None:
    """Write `to_yaml` into a run folder, with its hash: `load` refuses it once it was altered."""
    atomic_write(path, sealed_text(to_yaml(settings)))


def to_yaml(settings: RunSettings) -> str:
    """`public` as YAML that `load` reads back to the same settings."""
    from motet.core.yaml_text import dump

    return dump(public(settings), set(settings.as_written.values()))
