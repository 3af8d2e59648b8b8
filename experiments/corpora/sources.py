"""Where text comes from: files, folders, JSON lines, parquet and Hugging Face data sets.

Every input is cut into `SourceBlock`s of about `BLOCK_BYTES`, in an order that depends on the input
alone. A block is small enough to hand to another process, which parses it into documents
(id, text). Cutting is cheap (plain reading); parsing JSON and decoding text happen in `documents`.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from motet.core.errors import Problem, UserError, raise_problems
from motet.experiments.corpora.blocks import (
    FilesBlock,
    LinesBlock,
    ReadOptions,
    RowsBlock,
    SourceBlock,
    TextFile,
    missing_field,
    needed,
    read_pieces,
)

BLOCK_BYTES = 1 << 19
ROWS_AT_ONCE = 512
PROSE_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm"})
CODE_SUFFIXES = frozenset(
    {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh"}
)
LINES_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
KNOWN_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES | LINES_SUFFIXES | {".parquet"}
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})
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


def open_sources(inputs: Sequence[str], options: ReadOptions) -> list[Source]:
    """Return the sources of `inputs`, in order; adjacent text files become one source.

    An input is a file, a folder, `hf:NAME` (a data set on the hub, or a local folder of data
    files), a folder written by `Dataset.save_to_disk`, or `stdlib:` (Python's own sources).
    Raises one `UserError` that lists every input that cannot be read.
    """
    problems: list[Problem] = []
    sources: list[Source] = []
    for name in inputs:
        try:
            sources.extend(_open_input(name, options))
        except UserError as error:
            problems.append(Problem(name, str(error)))
    raise_problems(problems)
    return _merge_text(sources)


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
        return [_file_state(file.path) for file in self.files]


class LinesSource:
    """A file of JSON lines, plain or compressed; its lines are cut apart but not parsed."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        compressed = path.suffix in COMPRESSED_SUFFIXES
        self.n_bytes: int | None = None if compressed else _size(path)

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        line = 1
        for content in _cut_lines(read_pieces(self.path)):
            n_bytes = len(content)
            if line == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")
            yield LinesBlock(self.path, self.name, line, content, n_bytes)
            line += content.count(b"\n")

    def state(self) -> list[Any]:
        return [_file_state(self.path)]


class ParquetSource:
    """A parquet file; only the columns of text and id are read."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.n_bytes: int | None = None
        self._parquet = needed("pyarrow.parquet", path)

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        try:
            with self._parquet.ParquetFile(self.path) as file:
                names = set(file.schema_arrow.names)
                if options.text_field not in names:
                    raise UserError(missing_field(str(self.path), options.text_field, names))
                wanted = [name for name in (options.text_field, options.id_field) if name in names]
                batches = file.iter_batches(ROWS_AT_ONCE, columns=wanted)
                yield from _row_blocks(
                    self.name, (row for batch in batches for row in batch.to_pylist()), options
                )
        except UserError:
            raise
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise UserError(f"{self.path} is not readable as parquet: {error}") from error

    def state(self) -> list[Any]:
        return [_file_state(self.path)]


class HubSource:
    """A Hugging Face data set: a hub name, a folder of data files, or one saved to disk."""

    n_bytes: int | None = None

    def __init__(self, name: str):
        self.name = name
        self._datasets = needed("datasets", name)

    def blocks(self, options: ReadOptions) -> Iterator[SourceBlock]:
        data = self._load(options)
        names = data.column_names
        if names is not None:
            if options.text_field not in names:
                raise UserError(missing_field(self.name, options.text_field, names))
            wanted = [name for name in (options.text_field, options.id_field) if name in names]
            data = data.select_columns(wanted)
        yield from _row_blocks(f"{self.name}/{options.hub_split}", data, options)

    def state(self) -> list[Any]:
        return [[self.name]]

    def _load(self, options: ReadOptions) -> Any:
        try:
            if is_saved_dataset(Path(self.name)):
                data = self._datasets.load_from_disk(self.name)
                return data[options.hub_split] if isinstance(data, dict) else data
            return self._datasets.load_dataset(
                self.name,
                options.hub_config,
                split=options.hub_split,
                streaming=options.streaming,
            )
        except Exception as error:  # network, names, splits: the library raises many kinds
            where = f"config={options.hub_config!r} split={options.hub_split!r}"
            raise UserError(f"data set {self.name} ({where}) cannot be loaded: {error}") from error


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of the `datasets` library."""
    return (path / "dataset_dict.json").exists() or (
        (path / "state.json").exists() and (path / "dataset_info.json").exists()
    )


def _open_input(name: str, options: ReadOptions) -> list[Source]:
    """Return the sources of one input."""
    if name == STDLIB_INPUT:
        root = Path(sysconfig.get_path("stdlib"))
        return [TextSource([TextFile(_id(path, root), path) for path in stdlib_sources()])]
    if name.startswith(HUB_PREFIX):
        return [HubSource(name.removeprefix(HUB_PREFIX))]
    path = Path(name)
    if is_saved_dataset(path):
        return [HubSource(name)]
    if path.is_dir():
        return _open_folder(path, options)
    if not path.is_file():
        raise UserError("no such file or folder (a data set on the hub is written hf:NAME)")
    return [_open_file(path, name)]


def _open_folder(folder: Path, options: ReadOptions) -> list[Source]:
    """Return the sources of a folder's files, sorted by path; hidden files are left out."""
    files = sorted(
        path
        for path in folder.glob(options.glob or "**/*")
        if path.is_file() and not _hidden(path.relative_to(folder))
    )
    if options.glob is None:
        # A bare .json in a folder is more often one object (a setting) than lines of text.
        files = [p for p in files if _kind(p) in KNOWN_SUFFIXES and p.suffix != ".json"]
    if not files:
        looked_for = options.glob or "files with a known suffix (.txt, .md, .py, .jsonl, ...)"
        raise UserError(f"the folder holds no {looked_for}; choose files with glob")
    root = folder.resolve().parent
    return [_open_file(path, _id(path.resolve(), root)) for path in files]


def _open_file(path: Path, name: str) -> Source:
    """Return the source of one file; a suffix that is not known means text."""
    kind = _kind(path)
    if kind in LINES_SUFFIXES:
        return LinesSource(path, name)
    if kind == ".parquet":
        return ParquetSource(path, name)
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


def _row_blocks(name: str, rows: Iterable[Any], options: ReadOptions) -> Iterator[SourceBlock]:
    """Group rows into blocks by the length of their text."""
    block = RowsBlock(name, 0, [], 0)
    for row in rows:
        block.rows.append(row)
        text = row.get(options.text_field)
        block.n_bytes += len(text) if isinstance(text, str) else 0
        if block.n_bytes >= BLOCK_BYTES:
            yield block
            block = RowsBlock(name, block.first_row + len(block.rows), [], 0)
    if block.rows:
        yield block


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
    return (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix.lower()


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _id(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _size(path: Path) -> int:
    return path.stat().st_size


def _file_state(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
