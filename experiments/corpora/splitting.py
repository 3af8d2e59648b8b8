"""One long text cut into documents: at a pattern, or by length.

The text is read in pieces and cut as it comes, so memory holds one document at a time.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

from motet.core.errors import UserError

MARGIN = 1 << 14
"""Characters that a match may span, and that it may look back at."""


def split_problem(split: str) -> str:
    """Return what is wrong with a way of cutting, or ""."""
    if split.isdecimal():
        return "" if int(split) else "0 characters make no document; name at least 1"
    try:
        pattern = re.compile(split, re.MULTILINE)
    except re.error as error:
        return f"{split!r} is no regular expression ({error})"
    if pattern.fullmatch(""):
        return (
            f"{split!r} matches nothing at all, so everywhere; name what stands between documents"
        )
    return ""


def split_text(pieces: Iterable[bytes], split: str) -> Iterator[str]:
    """Yield the documents of a text.

    Bytes that are not UTF-8 become lone surrogates, so that they spoil their own document only.

    Args:
        pieces: the text's bytes, cut anywhere.
        split: a whole number: at most so many characters each, cut after the last line end or else
            the last space of the second half; nothing is lost. Else a regular expression, `^` and
            `$` at every line: cut at each match, which is left out, and so are documents of nothing
            but space.

    Raises:
        UserError: `split` is unusable.
    """
    problem = split_problem(split)
    if problem:
        raise UserError(f"split={split!r}: {problem}")
    texts = _decoded(pieces)
    if split.isdecimal():
        yield from _by_length(texts, int(split))
        return
    for document in _by_pattern(texts, re.compile(split, re.MULTILINE)):
        if document.strip():
            yield document


def _decoded(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    first = True
    for piece in pieces:
        text = decoder.decode(piece)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        yield text
    yield decoder.decode(b"", final=True)


def _by_length(texts: Iterable[str], most: int) -> Iterator[str]:
    waiting = ""
    for text in texts:
        waiting += text
        start = 0
        while len(waiting) - start > most:
            stop = _end_of(waiting, start, most)
            yield waiting[start:stop]
            start = stop
        waiting = waiting[start:]
    if waiting:
        yield waiting


def _end_of(text: str, start: int, most: int) -> int:
    """Return where the document that begins at `start` ends."""
    for mark in ("\n", " "):
        found = text.rfind(mark, start + most // 2, start + most)
        if found >= 0:
            return found + 1
    return start + most


def _by_pattern(texts: Iterable[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """Cut at every match that can no longer become another with what follows."""
    waiting, start, search = "", 0, 0
    for text in texts:
        waiting += text
        sure = len(waiting) - MARGIN
        for match in pattern.finditer(waiting, search):
            if match.end() > sure:
                break
            yield waiting[start : match.start()]
            start = match.end()
        search = max(start, sure - MARGIN)
        kept = max(0, start - MARGIN)  # what a match may look back at
        waiting, start, search = waiting[kept:], start - kept, search - kept
    for match in pattern.finditer(waiting, search):
        yield waiting[start : match.start()]
        start = match.end()
    yield waiting[start:]
