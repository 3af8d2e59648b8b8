"""SHA-256 of text, of files, and of the one text that stands for a value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PIECE_BYTES = 1 << 22


def canonical_json(value: Any) -> str:
    """Return the one text that stands for `value`: sorted keys, no spaces, no NaN (ValueError)."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )


def sha256_hex(content: str | bytes | memoryview) -> str:
    """Return the SHA-256 of text (as UTF-8) or bytes, in hexadecimal."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return a file's SHA-256, read in pieces; `progress` takes the bytes of each."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()
