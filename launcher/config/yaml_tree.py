"""YAML text and `a.b.c=value` settings as one tree whose scalars keep their raw text.

YAML 1.1 turns `no` into False, `012` into 10 and `12:30` into 750. Here a scalar stays text until
the type of its setting is known. Aliases are followed, with a limit on what they may unfold to.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from motet.core.errors import Problem, UserError
from motet.core.files import read_sealed

MOST_NODES = 200_000  # after aliases are unfolded
MOST_DEPTH = 40
COMMAND_LINE = "command line"
SETTINGS_REMEDY = (
    "put the settings of the newest attempt in its place (attempts/N/resolved.yaml); settings of a "
    "run are changed by `motet resume RUN a.b.c=value`"
)
NULLS = ("", "~", "null", "Null", "NULL")
_PREFIX = "tag:yaml.org,2002:"
_KNOWN_TAGS = {
    _PREFIX + t
    for t in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge", "value")
}
_ALONE = re.compile(r"\$\{[^{}]*\}")
_INT = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Leaf(NamedTuple):
    """A scalar as it was written; `where` is "run.yaml:12" or the command line."""

    text: str
    quoted: bool = False
    where: str = ""

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.text in NULLS


class Map(dict[str, Any]):
    """A mapping of names to nodes."""

    where = ""


class Items(list[Any]):
    """A list of nodes."""

    where = ""


Node = Leaf | Map | Items


@dataclass
class _Reader:
    """Turns PyYAML's nodes into ours and counts them, so that an alias bomb ends early."""

    source: str
    count: int = 0

    def fail(self, node: Any, why: str) -> UserError:
        return UserError(f"{self.source}:{node.start_mark.line + 1}: {why}")

    def read(self, node: Any, depth: int = 0) -> Node:
        self.count += 1
        if self.count > MOST_NODES or depth > MOST_DEPTH:
            limit = f"{MOST_NODES:,} values or {MOST_DEPTH} levels"
            raise self.fail(node, f"unfolds to more than {limit}; remove the nested aliases")
        if node.tag not in _KNOWN_TAGS:
            raise self.fail(node, f"the tag {node.tag} is not allowed; write a plain value")
        if isinstance(node, yaml.ScalarNode):
            quoted = node.style is not None
            return Leaf(node.value, quoted, f"{self.source}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.SequenceNode):
            items = Items(self.read(child, depth + 1) for child in node.value)
            items.where = f"{self.source}:{node.start_mark.line + 1}"
            return items
        return self.read_map(node, depth)

    def read_map(self, node: Any, depth: int) -> Map:
        out = Map()
        out.where = f"{self.source}:{node.start_mark.line + 1}"
        merged: list[Node] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a name must be a plain word")
            child = self.read(value, depth + 1)
            if key.value == "<<" and key.style is None:
                merged.extend(child if isinstance(child, Items) else [child])
                continue
            if key.value in out:
                raise self.fail(key, f"{key.value!r} is given twice")
            out[key.value] = child
        for other in merged:
            if not isinstance(other, Map):
                raise self.fail(node, "`<<` takes a mapping")
            for name, child in other.items():
                out.setdefault(name, child)
        return out


def parse(text: str, source: str) -> Node | None:
    """The tree of one YAML document, None when it is empty; `UserError` with file and line when it
    is none.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Reader(source).read(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{source}: not valid YAML: {reason}") from None


def read_file(path: Path, checked: bool = False) -> Node | None:
    """Parse a file; `UserError` names it when it cannot be read.

    Args:
        checked: it was written by us: the hash in its last line must fit.
    """
    if checked:
        return parse(read_sealed(path, SETTINGS_REMEDY)[0], str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}") from None
    return parse(text, str(path))


def from_python(value: Any, where: str = "") -> Node:
    """A tree from nested dictionaries, lists and scalars."""
    if isinstance(value, Mapping):
        out = Map({str(key): from_python(child, where) for key, child in value.items()})
        out.where = where
        return out
    if isinstance(value, list | tuple):
        items = Items(from_python(child, where) for child in value)
        items.where = where
        return items
    if value is None:
        return Leaf("null", False, where)
    if isinstance(value, bool):
        return Leaf(str(value).lower(), False, where)
    return Leaf(str(value), isinstance(value, str), where)


def plain(node: Node) -> Any:
    """The Python value of a node whose type nothing declares: the core schema of YAML 1.2, without
    octals.
    """
    if isinstance(node, Map):
        return {key: plain(child) for key, child in node.items()}
    if isinstance(node, Items):
        return [plain(child) for child in node]
    if node.quoted:
        return node.text
    if node.is_null:
        return None
    if node.text.lower() in ("true", "false"):
        return node.text.lower() == "true"
    if _INT.fullmatch(node.text):
        return int(node.text)
    if _FLOAT.fullmatch(node.text) and not re.match(r"[-+]?0\d", node.text):
        return float(node.text)
    return node.text


def merge(below: Node, above: Node) -> Node:
    """`above` laid over `below`: mappings are merged, anything else is replaced."""
    if not (isinstance(below, Map) and isinstance(above, Map)):
        return above
    out = Map(below)
    out.where = above.where or below.where
    for key, child in above.items():
        out[key] = merge(out[key], child) if key in out else child
    return out


def keys_of(path: str) -> list[str]:
    """`data.corpora[0].path` or `data.corpora.0.path` as its parts."""
    return [part for part in re.sub(r"\[(\d+)\]", r".\1", path).split(".") if part]


def assign(root: Map, keys: list[str], value: Node) -> str:
    """Set one value in place; return why it cannot be set, or ""."""
    node: Any = root
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, Items):
            if not key.isdecimal() or int(key) >= len(node):
                return f"{'.'.join(keys[:depth])} is a list of {len(node)}; {key!r} is not in it"
            index: Any = int(key)
        elif isinstance(node, Map):
            index = key
            if not last and isinstance(node.get(key), Leaf | None):
                node[key] = Map()
        else:
            return f"{'.'.join(keys[:depth])} holds no settings"
        if last:
            known = not isinstance(node, Map) or key in node
            node[index] = merge(node[index], value) if known else value
        else:
            node = node[index]
    return ""


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every scalar with its dotted path."""
    if isinstance(node, Leaf):
        yield path, node
        return
    pairs = node.items() if isinstance(node, Map) else ((str(i), n) for i, n in enumerate(node))
    for key, child in pairs:
        yield from leaves(child, f"{path}.{key}" if path else key)


def _texts(node: Node, malformed: Collection[str]) -> Any:
    """A tree of plain values; of `malformed` texts, which no tree may hold, nothing."""
    if isinstance(node, Map):
        return {key: _texts(child, malformed) for key, child in node.items()}
    if isinstance(node, Items):
        return [_texts(child, malformed) for child in node]
    return None if node.is_null or node.text in malformed else node.text


def _malformed(texts: Iterable[str]) -> dict[str, str]:
    """{text: why} of those whose `${...}` cannot be read at all."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found = {}
    for text in texts:
        try:
            OmegaConf.create([text])
        except (OmegaConfBaseException, ValueError, RecursionError) as error:
            found[text] = str(error).splitlines()[0]
    return found


def resolve(root: Map, prefix: str = "") -> tuple[dict[str, str], list[Problem]]:
    """Replace `${...}` under `prefix` in place.

    Returns the raw text of every setting whose value came out of the environment, directly or
    through other settings, by path; and the problems. The values themselves appear in no message.
    """
    everywhere = [(path, leaf) for path, leaf in leaves(root) if "${" in leaf.text]
    interpolated = [(path, leaf) for path, leaf in everywhere if path.startswith(prefix)]
    if not interpolated:
        return {}, []
    from omegaconf import Container, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from omegaconf.resolvers import oc

    env_names: list[str] = []

    def recorded_env(*arguments: Any) -> Any:
        env_names.append(str(arguments[0]))
        return oc.env(*arguments)

    written: dict[str, str] = {}
    problems: list[Problem] = []
    malformed = _malformed({leaf.text: None for _, leaf in everywhere})
    tree = OmegaConf.create(_texts(root, malformed))
    _register(recorded_env)
    try:
        for path, leaf in interpolated:
            if leaf.text in malformed:
                said = f"{leaf.text} cannot be read: {malformed[leaf.text]}; it is ${{SETTING}}"
                problems.append(Problem(path, f"{said} or ${{oc.env:NAME}}, with its brackets"))
                continue
            env_names.clear()
            try:
                value = OmegaConf.select(tree, path, throw_on_missing=True)
                if isinstance(value, Container):
                    value = OmegaConf.to_container(value, resolve=True)
            except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
                unset = [name for name in env_names if name not in os.environ]
                reason = str(error).splitlines()[0]
                if env_names:
                    reason = f"{unset[0]} is not set in the environment" if unset else "bad value"
                problems.append(Problem(path, f"{leaf.text} cannot be resolved: {reason}"))
                continue
            node = from_python(value, leaf.where)
            if isinstance(node, Leaf):
                alone = _ALONE.fullmatch(leaf.text) is not None
                node = Leaf(node.text, leaf.quoted and not alone, leaf.where)
            _replace(root, keys_of(path), node)
            if env_names:
                written[path] = leaf.text
    finally:
        _register(oc.env)
    return written, problems


def _register(env: Any) -> None:
    from omegaconf import OmegaConf

    with warnings.catch_warnings():  # 2.4 renames the function that 2.3 has
        warnings.simplefilter("ignore")
        OmegaConf.register_new_resolver("oc.env", env, replace=True)


def _replace(root: Map, keys: list[str], value: Node) -> None:
    node: Any = root
    for key in keys[:-1]:
        node = node[int(key)] if isinstance(node, Items) else node[key]
    node[int(keys[-1]) if isinstance(node, Items) else keys[-1]] = value
