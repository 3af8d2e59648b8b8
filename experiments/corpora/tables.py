"""Rows of tables: parquet files, data sets of the Hugging Face hub, data sets saved to disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.experiments.corpora.blocks import (
    BLOCK_BYTES,
    ReadOptions,
    RowsBlock,
    SourceBlock,
    missing_field,
    needed,
)

ROWS_AT_ONCE = 512


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
                yield from row_blocks(
                    self.name, (row for batch in batches for row in batch.to_pylist()), options
                )
        except UserError:
            raise
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise UserError(f"{self.path} is not readable as parquet: {error}") from error

    def state(self) -> list[Any]:
        return [file_state(self.path)]


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
        yield from row_blocks(f"{self.name}/{options.hub_split}", data, options)

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


def row_blocks(
    name: str, rows: Iterable[Any], options: ReadOptions, first: int = 0
) -> Iterator[SourceBlock]:
    """Group rows, counted from `first`, into blocks by the length of their text."""
    block = RowsBlock(name, first, [], 0)
    for row in rows:
        block.rows.append(row)
        text = row.get(options.text_field) if isinstance(row, dict) else None
        block.n_bytes += len(text) if isinstance(text, str) else 0
        if block.n_bytes >= BLOCK_BYTES:
            yield block
            block = RowsBlock(name, block.first_row + len(block.rows), [], 0)
    if block.rows:
        yield block


def file_state(path: Path) -> list[Any]:
    """Return name, size and time of a file, which change when it does."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
