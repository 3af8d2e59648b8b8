"""Characters that command a terminal or turn the direction of writing, shown as marks wherever text
leaves Motet: `\\x1b`, `\\u202e`.

Names, documents and messages come from corpora, models and folders of others, who may have put
anything into them.
"""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_KEPT = "\t\n"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories: controls, formats (directions, joiners), surrogates, separators of lines
and paragraphs.
"""


def marked(text: str) -> str:
    """Return text with a mark for every control or format character but tabs and ends of lines."""
    if text.isprintable():
        return text
    return "".join(_mark(c) for c in text.replace("\r\n", "\n"))


def _mark(character: str) -> str:
    if character.isprintable() or character in _KEPT:
        return character
    if unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 256:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def marked_json(text: str) -> str:
    """Return JSON with JSON's own escapes in place of such characters: it means the same."""
    if text.isprintable():
        return text
    units = (c.encode("utf-16-be", "surrogatepass").hex() if _mark(c) != c else c for c in text)
    return "".join(
        u if len(u) == 1 else "".join(f"\\u{u[at : at + 4]}" for at in range(0, len(u), 4))
        for u in units
    )


class MarkedStream:
    """A text stream that shows such characters as marks; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text with marks in it; returns how long it was without."""
        self.stream.write(marked(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Mark what is written to standard output and standard error meanwhile."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", MarkedStream(one)) for one in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def rich_console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a console that marks what it is given; the codes that it makes itself reach the
    terminal.
    """
    stream = sys.stderr if stderr else sys.stdout
    own = stream.stream if isinstance(stream, MarkedStream) else stream
    return _console_class()(file=own, **options)


@cache
def _console_class() -> type[Console]:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class MarkingConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(marked(segment.text), segment.style)

    return MarkingConsole
