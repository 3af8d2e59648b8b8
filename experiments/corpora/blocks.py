"""Blocks: pieces of input small enough to hand to another process, which parses them.

A block knows how to turn itself into documents (id, text), and reports what it cannot read by
file and line. `sources.py` cuts inputs into blocks.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from motet.core.errors import UserError

PIECE_BYTES = 1 << 19
BLOCK_BYTES = 1 << 19
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".gzip": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
}
ZST_SUFFIXES = frozenset({".zst", ".zstd"})
COMPRESSED_SUFFIXES = ZST_SUFFIXES | OPENERS.keys()
INSTALL_HINT = "pip install 'motet[data]'"


class Document(NamedTuple):
    """One text and where it comes from."""

    id: str
    text: str


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read."""

    text_field: str = "text"  # JSON lines, parquet and data sets: the field that holds the text
    id_field: str = "id"  # the field that holds the document's id; absent: FILE:LINE
    glob: str | None = None  # folders: which files (default: all with a known suffix)
    hub_config: str | None = None  # data sets: configuration name
    hub_split: str = "train"  # data sets: split
    streaming: bool = False  # data sets: read while downloading, keep nothing on disk
    skip_bad: bool = False  # leave out unreadable documents and count them, instead of stopping
    split: str | None = None  # text files: where they are cut into documents (see splitting.py)


@dataclass
class Parsed:
    """The documents of one block, and those left out as unreadable: where, and why."""

    documents: list[Document] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


class SourceBlock(Protocol):
    """A piece of input that another process can parse."""

    n_bytes: int  # of input, for the progress bar

    def parse(self, options: ReadOptions) -> Parsed:
        """Return the documents. Raises `UserError` naming file and line, unless `skip_bad`."""


class TextFile(NamedTuple):
    """A file that is one document."""

    id: str
    path: Path


@dataclass
class FilesBlock:
    """Some text files, read and decoded where the block is parsed."""

    files: list[TextFile]
    n_bytes: int

    def parse(self, options: ReadOptions) -> Parsed:
        parsed = Parsed()
        for file in self.files:
            content = b"".join(read_pieces(file.path))
            try:
                parsed.documents.append(Document(file.id, content.decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                _bad(parsed, options, f"{file.path}:{line}", f"not UTF-8 ({error.reason})")
        return parsed


@dataclass
class LinesBlock:
    """Whole lines of JSON."""

    path: Path
    name: str  # what the file is called in document ids
    first_line: int  # counted from 1
    content: bytes
    n_bytes: int

    def parse(self, options: ReadOptions) -> Parsed:
        parsed = Parsed()
        for number, line in enumerate(self.content.split(b"\n"), start=self.first_line):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # both bad JSON and bad UTF-8
                _bad(parsed, options, f"{self.path}:{number}", f"not a line of JSON ({error})")
                continue
            _add_record(parsed, options, record, f"{self.path}:{number}", f"{self.name}:{number}")
        return parsed


@dataclass
class RowsBlock:
    """Rows of a table or data set."""

    name: str
    first_row: int  # number of rows[0]
    rows: list[Any]
    n_bytes: int

    def parse(self, options: ReadOptions) -> Parsed:
        parsed = Parsed()
        for number, row in enumerate(self.rows, start=self.first_row):
            _add_record(parsed, options, row, f"{self.name}:{number}", f"{self.name}:{number}")
        return parsed


def _add_record(
    parsed: Parsed, options: ReadOptions, record: Any, where: str, default_id: str
) -> None:
    """Add the document of one record, or report why it cannot be read."""
    if not isinstance(record, dict):
        _bad(parsed, options, where, f"a JSON object is needed, not {type(record).__name__}")
        return
    text = record.get(options.text_field)
    if not isinstance(text, str):
        reason = f"field {options.text_field!r} is {type(text).__name__}, not a string"
        if options.text_field not in record:
            reason = missing_field("the record", options.text_field, record)
        _bad(parsed, options, where, reason)
        return
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _bad(parsed, options, where, f"the text is not valid Unicode ({error.reason})")
            return
    given = record.get(options.id_field)
    parsed.documents.append(Document(default_id if given is None else str(given), text))


def _bad(parsed: Parsed, options: ReadOptions, where: str, reason: str) -> None:
    """Note a document that cannot be read, or stop at it."""
    if not options.skip_bad:
        raise UserError(f"{where}: {reason} (skip_bad leaves such documents out)")
    parsed.bad.append(f"{where}: {reason}")


def missing_field(where: str, name: str, fields: Iterable[str]) -> str:
    return f"{where} has no field {name!r}; it has {', '.join(sorted(fields))} (set text_field)"


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, decompressed if its suffix is in `COMPRESSED_SUFFIXES`.

    Raises `UserError` naming the file if it cannot be opened, is damaged, or was cut short.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in COMPRESSED_SUFFIXES and not path.stat().st_size:
            raise EOFError("it is empty, which no compressed file is")
        if suffix in ZST_SUFFIXES:
            yield from _zst_pieces(path)
        else:
            with OPENERS.get(suffix, _open_plain)(path) as file:
                while piece := file.read(PIECE_BYTES):
                    yield piece
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _zst_pieces(path: Path) -> Iterator[bytes]:
    """Decompress the frames of a `.zst` file; its stream reader would overlook a missing end."""
    zstandard = needed("zstandard", path)
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                while piece:
                    if decompressor.eof:
                        decompressor = zstandard.ZstdDecompressor().decompressobj()
                    yield decompressor.decompress(piece)
                    piece = decompressor.unused_data
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if not decompressor.eof:
        raise EOFError("it ends in the middle of a compressed frame")


def needed(module: str, wanted_by: object) -> Any:
    """Import an optional dependency, or raise `UserError` saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{wanted_by} needs the package {package}: {INSTALL_HINT}") from error
