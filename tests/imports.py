"""Which module imports which, over all imports: in functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import motet

ROOT = Path(__file__).parents[1]
ARROWS: Mapping[str, set[str]] = {
    # room: rooms that it may use
    "core": set(),
    "experiments": {"core"},
    "models": {"core"},
    "parallel": {"core", "models"},
    "slurm": {"core"},
    "launcher": {"core", "experiments", "models", "parallel", "slurm"},
}
PUBLIC: Mapping[str, str] = motet._PUBLIC
SHORT = {f"motet.{name}" for name in PUBLIC}
TOP = "."
"""The modules that lie in a room itself, in none of its folders."""


def sources() -> list[Path]:
    """Every file of the package."""
    return sorted(path for room in ARROWS for path in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    """`motet.core.errors` of core/errors.py."""
    parts = ("motet", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every name that a file imports, with the module before it.

    A public name of `motet` imports the module that it comes from.
    """
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                home = PUBLIC.get(alias.name) if node.module == "motet" else None
                yield f"{home or node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in SHORT:
            yield f"{PUBLIC[node.attr]}.{node.attr}"


@cache
def modules() -> dict[str, Path]:
    """Module -> file."""
    return {module_name(path): path for path in sources()}


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    known = modules()
    out = {}
    for name, path in known.items():
        found = {f if f in known else f.rpartition(".")[0] for f in imports(path)}
        out[name] = (found & known.keys()) - {name}
    return out


def room_of(module: str) -> str:
    """`launcher` of motet.launcher.rank.loop."""
    return module.split(".")[1]


def folder_of(module: str) -> str:
    """`launcher/rank` of motet.launcher.rank.loop; what lies deeper belongs to the same folder."""
    parts = modules()[module].relative_to(ROOT).parts
    return f"{parts[0]}/{parts[1]}" if len(parts) > 2 else f"{parts[0]}/{TOP}"


def folder_graph() -> dict[str, dict[str, int]]:
    """Folder -> folder that it imports from -> number of imports."""
    out: dict[str, dict[str, int]] = {folder_of(module): {} for module in modules()}
    for module, used in graph().items():
        for other in used:
            mine, theirs = folder_of(module), folder_of(other)
            if mine != theirs:
                out[mine][theirs] = out[mine].get(theirs, 0) + 1
    return out


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Every set of more than one name in which each reaches each (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    trail: list[str] = []
    out: list[set[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        trail.append(name)
        for other in sorted(edges.get(name, ())):
            if other not in number:
                visit(other)
            if other in trail:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            at = trail.index(name)
            found = set(trail[at:])
            del trail[at:]
            if len(found) > 1:
                out.append(found)

    for name in sorted(edges):
        if name not in number:
            visit(name)
    return out
