"""How wide the ids of a file without a header are: two bytes or four.

Nothing in such a file says so, and the wrong answer gives tokens that look like tokens. It follows,
in this order, from what the user says, from a file beside it that counts its tokens or names their
type, from ids that need four bytes, and from the words themselves. Where these fit both, it is
asked.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.core.parsing import parse_json

WIDTHS = {"uint16": 2, "uint32": 4}  # bytes
WINDOW_BYTES = 1 << 20  # read at the beginning, in the middle and at the end of each file
LARGEST_UINT16 = (1 << 16) - 1
MOST_TOKENS = 1 << 24  # no vocabulary is larger
USUAL_HIGH = 31  # high halves of four-byte ids of vocabularies up to two million
WIDE_LOW = 1024  # low halves reach this where ids are wide
ENOUGH_PAIRS = 64  # fewer words may agree by chance


class _Words(NamedTuple):
    """Samples of all files as two-byte words, in pairs that four-byte ids would be made of."""

    low: npt.NDArray[np.uint16]
    high: npt.NDArray[np.uint16]

    @property
    def wide(self) -> npt.NDArray[np.uint32]:
        return self.low | (self.high.astype(np.uint32) << np.uint32(16))

    def has(self, eod: int) -> tuple[bool, bool]:
        """Return whether `eod` occurs among two-byte and among four-byte ids."""
        narrow = bool((self.low == eod).any() or (self.high == eod).any())
        return narrow, bool((self.wide == eod).any())


def raw_dtype(
    files: Sequence[Path], eod: int, vocabulary_size: int | None, given: str | None
) -> tuple[str, list[str]]:
    """Return "uint16" or "uint32" for files of nothing but tokens, and what to tell about it.

    Args:
        files: of one corpus; they have one type.
        eod: the end-of-document id.
        vocabulary_size: tokens, where known.
        given: what the user says.

    Raises:
        UserError: the type is unknown, fits no file, or cannot be told from the files.
    """
    if given is not None and given not in WIDTHS:
        raise UserError(f"dtype={given!r} cannot be read; uint16 or uint32 can")
    chosen = given or _beside(files)
    words = _sample(files)
    if chosen is not None:
        _check_multiple(files, chosen)
        return chosen, _doubts(chosen, words)
    _check_multiple(files, "uint16")
    reasons = _reasons_against(files, words, eod, vocabulary_size)
    fitting = [dtype for dtype, reason in reasons.items() if not reason]
    if not fitting:
        told = "; ".join(f"not {dtype}, {reason}" for dtype, reason in reasons.items())
        raise UserError(
            f"{files[0]} has no header, and its ids fit no type: {told}. Another tokenizer, or not "
            "a file of ids"
        )
    dtype = fitting[0] if len(fitting) == 1 else _likelier(words, eod)
    if dtype is None or (dtype == "uint32" and _every_second_is_zero(words.wide)):
        raise UserError(
            f"{files[0]} has no header, and its {len(words.low) * 2:,} words read may be uint16 or "
            "uint32 (or, if every second one is 0, wider); say which with dtype=uint16 or "
            "dtype=uint32"
        )
    return dtype, []


def _beside(files: Sequence[Path]) -> str | None:
    """Return the type that a file beside one of `files` tells.

    That is Dolma's `NAME.csv.gz`, whose rows begin with the first token of a document and the one
    after its last, or a `NAME.json` with `dtype`.
    """
    for file in files:
        for table in (file.with_suffix(".csv.gz"), file.with_suffix(".csv")):
            if table.is_file():
                return _by_count(file, table)
        for note in (file.with_suffix(".json"), Path(f"{file}.json")):
            dtype = _noted(note)
            if dtype is not None:
                return dtype
    return None


def _by_count(file: Path, table: Path) -> str:
    n_bytes = file.stat().st_size
    try:
        content = table.read_bytes()
        text = gzip.decompress(content) if table.suffix == ".gz" else content
        rows = csv.reader(io.StringIO(text.decode()))
        n_tokens = max((int(row[1]) for row in rows if row and row[1].isdecimal()), default=0)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{table} is damaged: {error}; it counts the tokens of {file}") from error
    for dtype, width in WIDTHS.items():
        if n_tokens and n_tokens * width == n_bytes:
            return dtype
    raise UserError(
        f"{table} counts {n_tokens:,} tokens, but {file} has {n_bytes:,} bytes, which is neither 2 "
        "nor 4 for each: one of them is cut short, or of another file; or say dtype=uint16 or "
        "dtype=uint32"
    )


def _noted(note: Path) -> str | None:
    try:
        content = parse_json(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    dtype = content.get("dtype") if isinstance(content, dict) else None
    return dtype if isinstance(dtype, str) and dtype in WIDTHS else None


def _sample(files: Sequence[Path]) -> _Words:
    """Read words at several places of each file; a word without a partner is left out."""
    pieces = [np.empty(0, "<u2")]
    for file in files:
        n_bytes = file.stat().st_size
        starts = {0, n_bytes // 2 // 8 * 8, max(0, n_bytes - WINDOW_BYTES) // 8 * 8}
        if n_bytes <= WINDOW_BYTES:
            starts = {0}
        with file.open("rb") as opened:
            for start in sorted(starts):
                opened.seek(start)
                content = opened.read(WINDOW_BYTES)
                pieces.append(np.frombuffer(content, "<u2", count=len(content) // 4 * 2))
    words = np.concatenate(pieces)
    return _Words(words[0::2], words[1::2])


def _check_multiple(files: Sequence[Path], dtype: str) -> None:
    for file in files:
        n_bytes = file.stat().st_size
        if n_bytes % WIDTHS[dtype]:
            raise UserError(
                f"{file} has {n_bytes} bytes, not a multiple of {WIDTHS[dtype]} ({dtype})"
            )


def _reasons_against(
    files: Sequence[Path], words: _Words, eod: int, vocabulary_size: int | None
) -> dict[str, str]:
    """Return what speaks against each type, "" where nothing does."""
    narrow, wide = "", ""
    if eod > LARGEST_UINT16:
        narrow = f"which cannot hold eod={eod}"
    elif vocabulary_size is not None and vocabulary_size > LARGEST_UINT16 + 1:
        narrow = f"which cannot hold the {vocabulary_size:,} tokens of the vocabulary"
    elif (largest := max(_largest(words.low), _largest(words.high))) >= (
        vocabulary_size or MOST_TOKENS
    ):
        narrow = f"whose ids would reach {largest} of {vocabulary_size}"
    odd = next((file for file in files if file.stat().st_size % 4), None)
    if odd is not None:
        wide = f"as {odd.name} has {odd.stat().st_size} bytes"
    elif (largest := _largest(words.wide)) >= (vocabulary_size or MOST_TOKENS):
        wide = f"whose ids would reach {largest} of {vocabulary_size or 'any'}"
    return {"uint16": narrow, "uint32": wide}


def _likelier(words: _Words, eod: int) -> str | None:
    """Return the type that the words speak for where both fit, or None."""
    narrow, wide = words.has(eod)
    low, high = _largest(words.low), _largest(words.high)
    if high == 0 and len(words.high):
        # One document in two tokens, each ended by id 0, would look the same.
        return None if narrow and not wide else "uint32"
    if len(words.high) >= ENOUGH_PAIRS and high <= USUAL_HIGH and low >= WIDE_LOW:
        return "uint32"
    if high > USUAL_HIGH or (narrow and not wide) or not len(words.high):
        return "uint16"
    return None


def _doubts(dtype: str, words: _Words) -> list[str]:
    """Return what speaks against a type that was named."""
    ids = words.wide if dtype == "uint32" else np.stack([words.low, words.high], 1).ravel()
    if _every_second_is_zero(ids):
        return [f"every second id is 0: the files may hold wider ids than {dtype}"]
    if _largest(ids) >= MOST_TOKENS:
        return [f"ids reach {_largest(ids):,}: the files may hold narrower ids than {dtype}"]
    return []


def _every_second_is_zero(ids: npt.NDArray[np.integer]) -> bool:
    return len(ids) > 1 and not ids[1::2].any() and bool(ids[0::2].any())


def _largest(ids: npt.NDArray[np.integer]) -> int:
    return int(ids.max(initial=0))
