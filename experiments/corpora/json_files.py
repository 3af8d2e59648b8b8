"""`.json` files: one JSON object a line, or one array or several objects over many lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.parsing import parse_json
from motet.experiments.corpora.blocks import read_pieces

DECODER = json.JSONDecoder()


def is_lines(path: Path) -> bool:
    """Return whether the first line of a file is a JSON object of its own."""
    line = _beginning(path).split("\n", 1)[0]
    if not line.startswith("{"):
        return False
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def records_of(path: Path) -> Iterator[Any]:
    """Yield what a file holds: the items of arrays, and every other value.

    Raises `UserError` naming file and line if it is not JSON.
    """
    try:
        text = b"".join(read_pieces(path)).decode("utf-8-sig")
        at = _next(text, 0)
        while at < len(text):
            value, at = DECODER.raw_decode(text, at)
            yield from value if isinstance(value, list) else [value]
            at = _next(text, at)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def why_no_documents(path: Path, text_field: str) -> str:
    """Return why a file holds no documents, as far as its first record tells; "" if it may.

    A `.json` in a folder is as often a setting as it is data.
    """
    text = _beginning(path)
    if not text:
        return "it is empty"
    at = _next(text, 1) if text[0] == "[" else 0
    try:
        record, _ = DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        longer = len(text) > 1 << 16  # the record may go on after what was looked at
        return "" if longer and text[at : at + 1] == "{" else f"it is not JSON ({error})"
    if not isinstance(record, dict):
        return f"its first record is {type(record).__name__}, not an object"
    if text_field not in record:
        return f"its first record has no field {text_field!r} (set text_field)"
    return ""


def _beginning(path: Path) -> str:
    """Return the beginning of a file, without space before it."""
    piece = next(read_pieces(path), b"")
    return piece.decode("utf-8-sig", errors="replace").lstrip()


def _next(text: str, at: int) -> int:
    """Return the first place from `at` on that is no space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at
