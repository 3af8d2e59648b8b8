"""Results that can be computed again, kept in the user's cache by the hash of what they depend on.

One small JSON file each in `$XDG_CACHE_HOME/motet/KIND` (`~/.cache/motet/KIND`). Any may be deleted
at any time; a cache that cannot be written, and a damaged file, only cost the computation again.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from motet.core.files import atomic_write
from motet.core.parsing import parse_json


def cache_file(kind: str, key: str) -> Path:
    """Return where a result is kept.

    Args:
        kind: of results, the name of a folder.
        key: hash of everything that the result depends on.
    """
    return cache_folder(kind) / f"{key}.json"


def cache_folder(kind: str) -> Path:
    """Return the user's folder of one kind of file."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "motet" / kind


def recall(file: Path) -> Any:
    """Return a kept result; None where there is none that can be read."""
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember(file: Path, result: Any) -> None:
    """Keep a result, where the cache can be written."""
    with contextlib.suppress(OSError):
        atomic_write(file, json.dumps(result), private=True)
