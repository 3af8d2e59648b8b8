"""A report tells nothing of the machine that it was made on: paths in it begin at the folder that
holds the runs, and those outside are cut to their last two parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from motet.core.parsing import parse_yaml

PARTS = 2


def without_places(report: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return a report in which no text holds an absolute path that the run knows.

    Args:
        report: plain JSON.
        root: absolute folder of the run.
    """
    texts = [*_texts(report.get("run")), *_texts(report.get("definition"))]
    known = {path for text in texts for path in _paths(text)}
    base = root.parent.parent
    places = {path: short(path, base) for path in known | {str(root), str(root.parent)}}
    # the longest first: one may begin as another does
    ordered = sorted(places.items(), key=lambda item: -len(item[0]))
    if base != base.parent:
        ordered.append((f"{base}/", ""))
    found: dict[str, Any] = _mapped(report, ordered)
    return found


def short(path: str, base: Path) -> str:
    """Return an absolute path as a reader elsewhere may see it: `corpora/mine` below `base`, else
    `…/parent/name`.
    """
    pure = PurePosixPath(path)
    if pure.is_relative_to(base) and pure != PurePosixPath(base):
        return str(pure.relative_to(base))
    return "…/" + "/".join(pure.parts[1:][-PARTS:])


def _paths(text: str) -> Iterable[str]:
    """Absolute paths that are a whole text, or a whole value of a YAML text with lines."""
    if "\n" not in text:
        return [text] if re.fullmatch(r"/[^/\0]+(/[^/\0]+)+/?", text) else []
    try:
        values = parse_yaml(text)
    except ValueError:
        return []
    return [path for one in _texts(values) if "\n" not in one for path in _paths(one)]


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _mapped(value: Any, places: list[tuple[str, str]]) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(one, places) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, places) for one in value]
    if isinstance(value, str) and "/" in value:
        for path, told in places:
            value = value.replace(path, told)
    return value
