"""The end of files that others write: read from behind, followed by polling (works on NFS), made
harmless for a terminal.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from motet.core.marks import marked

BLOCK_BYTES = 1 << 16
MOST_BYTES = 1 << 22
LONGEST_LINE_BYTES = 1 << 14
"""A longer line is shown in pieces."""
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and the cursor (CSI)
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links, device strings (OSC, DCS, ...)
    r"|\x1b[ -/]*[0-~]"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)


def clean(line: bytes) -> str:
    """Return a line as text that a terminal can show: no escape sequences, no control characters,
    what a progress bar left last.

    Other control characters and those that turn the direction of writing become `\\x07`, `\\u202e`;
    bytes that are no UTF-8 become U+FFFD.
    """
    text = _ESCAPES.sub("", line.decode("utf-8", "replace"))
    text = text.rstrip("\r\n").rpartition("\r")[2]
    return marked(text).replace("\n", "\\x0a")


def last_bytes(path: Path, count: int) -> bytes:
    """Return the whole lines among the last `count` bytes and a torn last one; a missing file is an
    empty one.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - count))
            block = stream.read(count)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    return block if size <= count else block[block.find(b"\n") + 1 :]


class Tail:
    """Follows one file from its last `lines` lines on; `read` returns what has been added since.

    `written_ns` is when the file was last written, as of the last `read`.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self.path = path
        self._torn = b""
        self._file = _identity(path)
        self._offset = _start_of_last(path, lines)
        self.written_ns = 0

    def read(self, flush: bool = False) -> list[str]:
        """Return the lines that are whole now, at most about `MOST_BYTES` of them; `flush` adds a
        last one without its end.

        A file that was cut or replaced is read from its start. One that is gone or cannot be read
        has nothing new.
        """
        try:
            now = self.path.stat()
            if (now.st_size, now.st_mtime_ns) == (self._offset, self.written_ns) and not flush:
                return []
            self.written_ns = now.st_mtime_ns
            with self.path.open("rb") as stream:
                now = os.fstat(stream.fileno())
                if now.st_size < self._offset or (now.st_dev, now.st_ino) != self._file:
                    self._offset, self._torn = 0, b""
                    self._file = (now.st_dev, now.st_ino)
                stream.seek(self._offset)
                block = stream.read(MOST_BYTES)
        except OSError:
            block = b""
        self._offset += len(block)
        *whole, self._torn = (self._torn + block).split(b"\n")
        lines = [piece for line in whole for piece in _pieces(line)]
        while len(self._torn) > LONGEST_LINE_BYTES:
            lines.append(self._torn[:LONGEST_LINE_BYTES])
            self._torn = self._torn[LONGEST_LINE_BYTES:]
        if flush and self._torn:
            lines.append(self._torn)
            self._torn = b""
        return [clean(line) for line in lines]


def _pieces(line: bytes) -> list[bytes]:
    if len(line) <= LONGEST_LINE_BYTES:
        return [line]
    return [line[i : i + LONGEST_LINE_BYTES] for i in range(0, len(line), LONGEST_LINE_BYTES)]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _start_of_last(path: Path, lines: int) -> int:
    """Return the offset where the last `lines` lines start, read from behind; not more than
    `MOST_BYTES` before the end.
    """
    try:
        with path.open("rb") as stream:
            size = end = stream.seek(0, os.SEEK_END)
            if lines <= 0:
                return size
            missing = lines + 1  # the end of the line before the first
            while end > max(0, size - MOST_BYTES):
                start = max(0, end - BLOCK_BYTES)
                stream.seek(start)
                block = stream.read(end - start)
                if end == size and not block.endswith(b"\n"):
                    missing -= 1  # the last line is torn: it has no end of its own
                found = block.count(b"\n")
                if found >= missing:
                    return start + _nth_from_behind(block, missing) + 1
                missing, end = missing - found, start
            return end
    except OSError:
        return 0


def _nth_from_behind(block: bytes, count: int) -> int:
    """Return the place of the `count`-th line end from behind."""
    place = len(block)
    for _ in range(count):
        place = block.rfind(b"\n", 0, place)
    return place
