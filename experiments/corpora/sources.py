"""Where text comes from: files, folders, JSON lines, parquet and Hugging Face data sets.

Every input is cut into `SourceBlock`s of about `BLOCK_BYTES`, in an order that depends on the input
alone. A block is small enough to hand to another process, which parses it into documents
(id, text). Cutting is cheap (plain reading); parsing JSON and decoding text happen in `documents`.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from motet.core.errors import Problem, UserError, raise_problems
from motet.experiments.corpora import json_files
from motet.experiments.corpora.blocks import (
    BLOCK_BYTES,
    COMPRESSED_SUFFIXES,
    FilesBlock,
    LinesBlock,
    ReadOptions,
    SourceBlock,
    TextFile,
    read_pieces,
)
from motet.experiments.corpora.splitting import split_text
from motet.experiments.corpora.tables import (
    HubSource,
    ParquetSource,
    file_state,
    is_saved_dataset,
    row_blocks,
)

PROSE_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm"})
CODE_SUFFIXES = frozenset(
    {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh"}
)
LINES_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
KNOWN_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES | LINES_SUFFIXES | {".parquet"}
# Given by name, such a file would be read as one text, which nobody wants.
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather"})
HUB_PREFIX = "hf:"
STDLIB_INPUT = "stdlib:"
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Source(Protocol):
    """One input."""

    n_bytes: int | None  # of input in all; None when it is not known before reading

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        """Cut the input into blocks, always the same ones."""

    def state(self) -> list[Any]:
        """Return names, sizes and times (JSON) that change when the input changes."""


class OpenedInputs(NamedTuple):
    """What is read of the inputs, and every file in their folders that is not, with the reason."""

    sources: list[Source]
    left_out: list[Problem]


def open_inputs(inputs: Sequence[str], options: ReadOptions) -> OpenedInputs:
    """Return the sources of `inputs`, in order; adjacent text files become one source.

    An input is a file, a folder, `hf:NAME` (a data set on the hub, or a local folder of data
    files), a folder written by `Dataset.save_to_disk`, or `stdlib:` (Python's own sources).
    Raises one `UserError` that lists every input that cannot be read.
    """
    problems: list[Problem] = []
    sources: list[Source] = []
    left_out: list[Problem] = []
    for name in inputs:
        try:
            opened = _open_input(name, options)
            sources.extend(opened.sources)
            left_out.extend(opened.left_out)
        except UserError as error:
            problems.append(Problem(name, str(error)))
    raise_problems(problems)
    if options.split and not any(isinstance(source, SplitSource) for source in sources):
        raise UserError(
            f"split={options.split!r} cuts text files, and no input is one; leave it out"
        )
    return OpenedInputs(_merge_text(sources), left_out)


def open_sources(inputs: Sequence[str], options: ReadOptions) -> list[Source]:
    """Return the sources of `inputs`, as `open_inputs` does."""
    return open_inputs(inputs, options).sources


def read_documents(
    inputs: Sequence[str], options: ReadOptions | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (document id, text) of every document of `inputs`, in order."""
    options = options or ReadOptions()
    for source in open_sources(inputs, options):
        for block in source.blocks(options):
            yield from block.parse(options).documents


def stdlib_sources() -> list[Path]:
    """Return the running Python's own `.py` sources, sorted; no tests, no installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if not STDLIB_LEFT_OUT.intersection(path.relative_to(root).parts)
    )


class TextSource:
    """Text files, each one document."""

    def __init__(self, files: Sequence[TextFile]):
        self.files = list(files)
        self.n_bytes: int | None = sum(_size(file.path) for file in files)

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        block = FilesBlock([], 0)
        for file in self.files:
            block.files.append(file)
            block.n_bytes += _size(file.path)
            if block.n_bytes >= BLOCK_BYTES:
                yield block
                block = FilesBlock([], 0)
        if block.files:
            yield block

    def state(self) -> list[Any]:
        return [file_state(file.path) for file in self.files]


class SplitSource:
    """A text file that is cut into documents, called `NAME:1`, `NAME:2`, ..."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.n_bytes: int | None = None if _compressed(path) else _size(path)

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        assert options.split is not None
        texts = split_text(read_pieces(self.path), options.split)
        rows = ({options.text_field: text} for text in texts)
        yield from row_blocks(self.name, rows, options, first=1)

    def state(self) -> list[Any]:
        return [file_state(self.path)]


class JsonSource:
    """A `.json` file that is not one object a line; it is read whole."""

    n_bytes: int | None = None

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        yield from row_blocks(self.name, json_files.records_of(self.path), options)

    def state(self) -> list[Any]:
        return [file_state(self.path)]


class LinesSource:
    """A file of JSON lines, plain or compressed; its lines are cut apart but not parsed."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.n_bytes: int | None = None if _compressed(path) else _size(path)

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        line = 1
        for content in _cut_lines(read_pieces(self.path)):
            n_bytes = len(content)
            if line == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")
            yield LinesBlock(self.path, self.name, line, content, n_bytes)
            line += content.count(b"\n")

    def state(self) -> list[Any]:
        return [file_state(self.path)]


def is_dataset(name: str) -> bool:
    """Return whether an input is a data set: of the hub, or saved by the `datasets` library."""
    return name.startswith(HUB_PREFIX) or is_saved_dataset(Path(name))


def _open_input(name: str, options: ReadOptions) -> OpenedInputs:
    """Return the sources of one input."""
    if name == STDLIB_INPUT:
        root = Path(sysconfig.get_path("stdlib"))
        files = [TextFile(_id(path, root), path) for path in stdlib_sources()]
        return OpenedInputs([TextSource(files)], [])
    if is_dataset(name):
        return OpenedInputs([HubSource(name.removeprefix(HUB_PREFIX))], [])
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, options)
    if not path.is_file():
        raise UserError("no such file or folder (a data set on the hub is written hf:NAME)")
    if _kind(path) in TABLE_SUFFIXES:
        raise UserError("is a table, not text; save it as JSON lines or parquet")
    return OpenedInputs([_open_file(path, name, options)], [])


def _open_folder(folder: Path, options: ReadOptions) -> OpenedInputs:
    """Return the sources of a folder's files, sorted by path, and which files are left out."""
    chosen, left_out, hidden = [], [], set()
    for path in sorted(path for path in folder.glob(options.glob or "**/*") if path.is_file()):
        place = _hidden(path.relative_to(folder))
        if place is not None:
            hidden.add(place)
            continue
        reason = "" if options.glob else _why_left_out(path, options)
        if reason:
            left_out.append(Problem(str(path), reason))
        else:
            chosen.append(path)
    left_out += [Problem(str(folder / place), "it is hidden") for place in sorted(hidden)]
    if not chosen:
        looked_for = options.glob or "files with a known suffix (.txt, .md, .py, .jsonl, ...)"
        told = f"; {left_out[0]}" if left_out else ""
        raise UserError(f"the folder holds no {looked_for}{told}; choose files with glob")
    root = folder.resolve().parent
    sources = [_open_file(path, _id(path.resolve(), root), options) for path in chosen]
    return OpenedInputs(sources, left_out)


def _why_left_out(path: Path, options: ReadOptions) -> str:
    """Return why a file of a folder is not read, "" if it is."""
    kind = _kind(path)
    if kind == ".json":
        return json_files.why_no_documents(path, options.text_field)
    if kind in KNOWN_SUFFIXES:
        return ""
    return f"its suffix {kind} is not known" if kind else "it has no suffix"


def _open_file(path: Path, name: str, options: ReadOptions) -> Source:
    """Return the source of one file; a suffix that is not known means text."""
    kind = _kind(path)
    if kind == ".json" and not json_files.is_lines(path):
        return JsonSource(path, name)
    if kind in LINES_SUFFIXES:
        return LinesSource(path, name)
    if kind == ".parquet":
        return ParquetSource(path, name)
    if options.split:
        return SplitSource(path, name)
    return TextSource([TextFile(name, path)])


def _merge_text(sources: Iterable[Source]) -> list[Source]:
    """Join neighbouring text sources, so that small files share blocks."""
    merged: list[Source] = []
    for source in sources:
        last = merged[-1] if merged else None
        if isinstance(source, TextSource) and isinstance(last, TextSource):
            last.files.extend(source.files)
            last.n_bytes = (last.n_bytes or 0) + (source.n_bytes or 0)
        else:
            merged.append(source)
    return merged


def _cut_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join pieces of any size into runs of whole lines, each just over `BLOCK_BYTES`."""
    waiting = bytearray()
    searched = BLOCK_BYTES - 1
    for piece in pieces:
        waiting += piece
        while (end := waiting.find(b"\n", searched) + 1) > 0:
            yield bytes(waiting[:end])
            del waiting[:end]
            searched = BLOCK_BYTES - 1
        searched = max(searched, len(waiting))
    if waiting:
        yield bytes(waiting)


def _kind(path: Path) -> str:
    """Return the suffix that says what a file holds, without that of its compression."""
    return (path.with_suffix("") if _compressed(path) else path).suffix.lower()


def _compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def _hidden(relative: Path) -> str | None:
    """Return the hidden file or folder that a path is or lies in."""
    for number, part in enumerate(relative.parts, start=1):
        if part.startswith(".") or part == "__pycache__":
            return str(Path(*relative.parts[:number]))
    return None


def _id(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _size(path: Path) -> int:
    return path.stat().st_size
