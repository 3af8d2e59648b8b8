"""What a source imports, by reading its import statements; nothing is imported here that finding a
module does not import.

A class in a package is made of the modules of that package that its own module needs. Other
packages' modules are left out: their versions are the user's to keep.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

OURS = "motet"


def needed_modules(module: str) -> dict[str, bytes]:
    """Return {module: source} of all modules of the same top-level package that `module` imports,
    directly or through others, and of the packages that they lie in; itself and empty files left
    out.

    An import inside a function counts; one by a computed name is not seen.

    Args:
        module: absolute name of an installed module.
    """
    top = module.partition(".")[0]
    found: dict[str, bytes] = {}
    seen, waiting = {module}, [module]
    while waiting and top != OURS:
        name = waiting.pop()
        path = _source_of(name)
        if path is None:
            continue
        content = _read(path)
        if name != module and content.strip():
            found[name] = content
        is_package = path.name == "__init__.py"
        for other in [*_parents(name), *_imported(content, name, is_package)]:
            if other not in seen and f"{other}.".startswith(f"{top}."):
                seen.add(other)
                waiting.append(other)
    return dict(sorted(found.items()))


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _source_of(name: str) -> Path | None:
    """The source file of a module; None for a name inside a module, or what has no source."""
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # its package is no package, or fails: the import itself will tell
        return None
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        return None
    return Path(str(spec.origin))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _imported(content: bytes, name: str, is_package: bool) -> Iterator[str]:
    """Every name that may be a module in the import statements of a source."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return  # the import itself will tell
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                yield from _parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = _resolved(node, package)
            if base is not None:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _resolved(node: ast.ImportFrom, package: str) -> str | None:
    """The absolute module that `from ... import` names; None above the top-level package."""
    if not node.level:
        return node.module
    try:
        return importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    except ImportError:
        return None


def imported_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (top-level module, line) of every import; a relative one by its first name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name.partition(".")[0], node.lineno) for name in names)


def origin_of(name: str) -> Path | None:
    """Return the file or folder that a top-level module is imported from; None when built in or
    nowhere.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.has_location and spec.origin else Path(sys.prefix)
