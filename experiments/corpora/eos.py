"""Which end-of-sequence token a Hugging Face folder names, and where.

The tokenizer's own files come first, as in transformers; a model's say only an id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.parsing import parse_json

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
MODEL_FILES = ("generation_config.json", "config.json")


def configured_eos(folder: Path) -> str | None:
    """Return the `eos_token` of the folder's tokenizer files, None where none names one.

    Raises `UserError` naming a file that is damaged.
    """
    for name in TOKENIZER_FILES:
        eos = _read(folder / name).get("eos_token")
        token = eos.get("content") if isinstance(eos, dict) else eos
        if isinstance(token, str) and token:
            return token
    return None


def configured_eos_id(folder: Path) -> int | None:
    """Return the `eos_token_id` of the folder's model files; of several, the first.

    Raises `UserError` naming a file that is damaged.
    """
    for name in MODEL_FILES:
        found = _read(folder / name).get("eos_token_id")
        eos = found[0] if isinstance(found, list) and found else found
        if isinstance(eos, int):
            return eos
    return None


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty where there is no such file."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # broken JSON and broken UTF-8
        raise UserError(
            f"{file} is damaged ({error}); it may name the end-of-document token: mend it, or "
            "delete it and name that with eod_token"
        ) from error
    return content if isinstance(content, dict) else {}
