"""The plan: every exposure of a run in one immutable, hashed file.

Layout of `exposures.plan`: 8 magic bytes, header length (uint64), a JSON header, then columns
aligned to 64 bytes. The header holds the SHA-256 of every 16 MiB piece of every column; the plan's
own hash is the SHA-256 of the header, so one hash covers every byte and is checked in parallel.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import DamagedFile, UserError
from motet.core.files import whole_file
from motet.core.hashing import canonical_json, sha256_hex
from motet.core.parsing import parse_json
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.noise import EmbeddingNoise
from motet.experiments.stream.placement import (
    COLUMNS,
    NOISE_FLAG,
    SHIFT_FLAG,
    CompiledPlan,
    Exposures,
)
from motet.experiments.stream.random import U64

MAGIC = b"MOTETPL1"
PIECE_BYTES = 16 * 2**20
VERSION = 1
INDEX_ROWS = 512
MASKED = "masked"
"""Column of a plan in which texts have tokens without loss: how many after the first, by text."""
_PLACE = struct.Struct("<qii")
PLACE = np.dtype([("start", "<i8"), ("length", "<i4"), ("offset", "<i4")])
"""Of a row: where its tokens begin in the column "tokens", how many they are, and their offset in
the slot.
"""


class Span(NamedTuple):
    """Where one exposure lies in a batch: row, offset and length in tokens, and whether it moved
    base tokens right.
    """

    row: int
    offset: int
    length: int
    shift: bool


def write_plan(plan: CompiledPlan, path: Path) -> str:
    """Write a plan (aside, then renamed) and return its SHA-256."""
    columns = {name: getattr(plan.rows, name) for name in COLUMNS}
    columns["place"] = _places(plan)
    columns["slot_index"] = np.ascontiguousarray(plan.rows.slot[::INDEX_ROWS])
    columns["tokens"] = plan.texts.tokens
    if plan.texts.masked is not None:
        columns[MASKED] = plan.texts.masked
    blobs = {name: _bytes_of(column) for name, column in columns.items()}
    unhashed = {name: ["0" * 64 for _ in _pieces(blob)] for name, blob in blobs.items()}
    size = len(_header(plan, columns, unhashed))
    threads = min(8, os.cpu_count() or 1)
    with whole_file(path) as file, ThreadPoolExecutor(threads) as pool:
        hashing = {name: pool.map(sha256_hex, _pieces(blob)) for name, blob in blobs.items()}
        file.seek(16 + size)
        for blob in blobs.values():
            file.write(b"\0" * (-file.tell() % 64))
            file.write(blob)
        encoded = _header(plan, columns, {name: list(found) for name, found in hashing.items()})
        assert len(encoded) == size
        file.seek(0)
        file.write(MAGIC + size.to_bytes(8, "little") + encoded)
    return sha256_hex(encoded)


def _places(plan: CompiledPlan) -> npt.NDArray[np.void]:
    """Return the column "place"."""
    places = np.empty(len(plan.rows), dtype=PLACE)
    places["start"] = plan.texts.offsets[plan.rows.text]
    places["length"] = plan.texts.lengths()[plan.rows.text]
    places["offset"] = plan.rows.offset
    return places


def _header(
    plan: CompiledPlan, columns: dict[str, npt.NDArray[Any]], digests: dict[str, list[str]]
) -> bytes:
    """Return the header as JSON; its length does not depend on the digests."""
    header = {
        "version": VERSION,
        "sequence_length": plan.sequence_length,
        "seed": plan.seed,
        "experiments": list(plan.experiments),
        **({"noise": dict(plan.noise)} if plan.noise else {}),
        "columns": {
            name: {"dtype": _dtype_name(column.dtype), "rows": len(column), "sha256": digests[name]}
            for name, column in columns.items()
        },
    }
    return canonical_json(header).encode()


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return "place" if dtype == PLACE else dtype.str


def _bytes_of(column: npt.NDArray[Any]) -> memoryview:
    """Return an array's bytes without copying them (a contiguous array of any size, zero
    included).
    """
    return memoryview(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)


def _pieces(blob: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(blob), PIECE_BYTES):
        yield blob[start : start + PIECE_BYTES]


class ExposurePlan:
    """A plan on disk, read in small pieces through the kernel's cache.

    All readers of a machine share that cache, and a reader holds only a sparse index (one slot in
    512) and an open file: its memory does not grow with the plan. (A memory map did grow: see
    docs/decisions.md.)
    """

    def __init__(self, path: Path) -> None:
        """Open a plan; only its header and sparse index are read.

        Raises:
            UserError: no such file, not a plan, or cut short.
        """
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as the plan is
        except OSError as error:
            raise UserError(f"plan {path}: cannot be opened ({error})") from None
        self._handle = self._file.fileno()
        encoded = self._encoded_header()
        self.sha256 = sha256_hex(encoded)
        try:
            header = parse_json(encoded)
            if header.get("version") != VERSION:
                raise UserError(
                    f"plan {path}: has format {header.get('version')}, this Motet reads {VERSION}"
                )
            self.sequence_length: int = header["sequence_length"]
            self.seed: int = header["seed"]
            self.experiments: tuple[str, ...] = tuple(header["experiments"])
            self.noise: dict[str, float] = dict(header.get("noise", {}))
            self._columns = self._locate(header["columns"], 16 + len(encoded))
            self._rows = self._columns["slot"].rows
            self._last_block: tuple[int, memoryview] | None = None
            self._index: list[int] = self._read(
                "slot_index", 0, self._columns["slot_index"].rows
            ).tolist()
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            # whatever one bit of a header can bring about
            raise self._damaged(f"has an altered header ({error})") from None

    def _encoded_header(self) -> bytes:
        """Return the header's bytes; what stands for its length may be anything."""
        start = os.pread(self._handle, 16, 0)
        size = int.from_bytes(start[8:], "little")
        fits = start[:8] == MAGIC and size <= os.fstat(self._handle).st_size - 16
        encoded = os.pread(self._handle, size, 16) if fits else b""
        if not encoded:
            raise UserError(f"plan {self.path}: not a plan file, or cut short")
        return encoded

    def _damaged(self, what: str) -> DamagedFile:
        return DamagedFile(self.path, what, "restore it from a copy")

    def _locate(self, entries: dict[str, Any], position: int) -> dict[str, _Column]:
        """Return where each column lies in the file."""
        columns, end = {}, os.fstat(self._handle).st_size
        masked = [MASKED] if MASKED in entries else []
        for name in [*COLUMNS, "place", "slot_index", "tokens", *masked]:
            position += -position % 64
            entry = entries[name]
            columns[name] = _Column(
                PLACE if entry["dtype"] == "place" else np.dtype(entry["dtype"]),
                entry["rows"],
                position,
                tuple(entry["sha256"]),
            )
            position += columns[name].rows * columns[name].dtype.itemsize
            if position > end:
                raise UserError(f"plan {self.path}: cut short in column {name!r}")
        return columns

    def _read(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        """Return entries [first, last) of a column."""
        dtype, _, position, _ = self._columns[name]
        size = dtype.itemsize
        return np.frombuffer(
            os.pread(self._handle, (last - first) * size, position + first * size), dtype
        )

    def _whole(self, name: str) -> npt.NDArray[Any]:
        """Return a whole column as a memory map, for passes over all rows."""
        dtype, rows, position, _ = self._columns[name]
        if rows == 0:
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype, "r", position, (rows,))

    def __len__(self) -> int:
        return self._rows

    def verify(self, expected_sha256: str | None = None) -> None:
        """Read every byte and compare it with the hashes.

        Raises:
            UserError: the plan was altered, or is not the one with the expected hash.
        """
        if expected_sha256 is not None and self.sha256 != expected_sha256:
            raise DamagedFile(
                self.path,
                f"has the hash {self.sha256[:16]}..., but this run was frozen with "
                f"{expected_sha256[:16]}...",
                "restore the file from the run that froze it",
            )
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for name, column in self._columns.items():
                found = tuple(pool.map(sha256_hex, _pieces(_bytes_of(self._whole(name)))))
                if found != column.sha256:
                    raise self._damaged(f"was altered since it was frozen, in column {name!r}")

    def rows_between(self, first_slot: int, last_slot: int) -> tuple[int, int]:
        """Return the row range [a, b) of exposures with first_slot <= slot < last_slot."""
        block = max(bisect_left(self._index, first_slot) - 1, 0)
        slots = self._block(block)
        first = block * INDEX_ROWS + bisect_left(slots, first_slot)
        last_block = max(bisect_left(self._index, last_slot) - 1, 0)
        if last_block != block:
            slots = self._block(last_block)
        return first, last_block * INDEX_ROWS + bisect_left(slots, last_slot)

    def _block(self, number: int) -> memoryview:
        """Return the slots of one block of the index; consecutive steps mostly ask for the same
        one.
        """
        known = self._last_block
        if known is not None and known[0] == number:
            return known[1]
        size = min(INDEX_ROWS, self._rows - number * INDEX_ROWS) * 8
        position = self._columns["slot"].position + number * INDEX_ROWS * 8
        slots = memoryview(os.pread(self._handle, size, position)).cast("q")
        self._last_block = (number, slots)
        return slots

    def lookup(self, slot: int) -> list[tuple[int, npt.NDArray[np.unsignedinteger]]]:
        """Return (offset, tokens) of every exposure in a slot."""
        return self._inserted(*self.rows_between(slot, slot + 1))

    def _inserted(self, first: int, last: int) -> list[tuple[int, npt.NDArray[np.unsignedinteger]]]:
        """Return (offset, tokens) of rows [first, last)."""
        size, column = PLACE.itemsize, self._columns["tokens"]
        places = os.pread(
            self._handle, (last - first) * size, self._columns["place"].position + first * size
        )
        width, found = column.dtype.itemsize, []
        for start, length, offset in _PLACE.iter_unpack(places):
            data = os.pread(self._handle, length * width, column.position + start * width)
            found.append((offset, np.frombuffer(data, column.dtype)))
        return found

    def overlay(self, first_slot: int, tokens_BT: npt.NDArray[np.int32]) -> U64:
        """Write the exposures of slots [first_slot, first_slot + B) over base tokens; return their
        ids.

        Args:
            tokens_BT: base tokens of consecutive slots, changed in place.
        """
        length = tokens_BT.shape[1]
        assert length == self.sequence_length
        first, last = self.rows_between(first_slot, first_slot + len(tokens_BT))
        if first == last:
            return np.empty(0, dtype=np.uint64)
        slots = self._read("slot", first, last).tolist()
        flags = self._read("flags", first, last).tolist()
        rows = zip(slots, flags, self._inserted(first, last), strict=True)
        for slot, flag, (offset, inserted) in rows:
            target, end = tokens_BT[slot - first_slot], offset + len(inserted)
            if flag & SHIFT_FLAG:
                target[end:] = target[offset : length - len(inserted)].copy()
            target[offset:end] = inserted
        return self._read("id", first, last)

    def spans(self, first_slot: int, count: int) -> list[Span]:
        """Return where the exposures of slots [first_slot, first_slot + count) lie."""
        first, last = self.rows_between(first_slot, first_slot + count)
        slots = self._read("slot", first, last).tolist()
        flags = self._read("flags", first, last).tolist()
        rows = zip(slots, flags, self._inserted(first, last), strict=True)
        return [
            Span(slot - first_slot, offset, len(inserted), bool(flag & SHIFT_FLAG))
            for slot, flag, (offset, inserted) in rows
        ]

    def unlearned(self, first_slot: int, count: int) -> list[tuple[int, int, int]]:
        """Return (row, offset, tokens) of what carries no loss in slots [first_slot, first_slot +
        count), by its exposure.
        """
        if MASKED not in self._columns:
            return []
        first, last = self.rows_between(first_slot, first_slot + count)
        masked = [int(self._read(MASKED, i, i + 1)[0]) for i in self._read("text", first, last)]
        spans = self.spans(first_slot, count)
        return [
            (span.row, span.offset + 1, tokens)
            for span, tokens in zip(spans, masked, strict=True)
            if tokens
        ]

    def noises(self, first_slot: int, count: int) -> tuple[EmbeddingNoise, ...]:
        """Return the noise of slots [first_slot, first_slot + count), in order of position."""
        if not self.noise:
            return ()
        first, last = self.rows_between(first_slot, first_slot + count)
        columns = [self._read(name, first, last) for name in ("flags", "experiment", "unit")]
        found = []
        for span, flag, number, unit in zip(
            self.spans(first_slot, count), *(column.tolist() for column in columns), strict=True
        ):
            if flag & NOISE_FLAG:  # the end-of-document tokens around a text carry none
                name, length = self.experiments[number], span.length - 2
                whose = self.seed, name, unit, self.noise[name]
                found.append(EmbeddingNoise(span.row, span.offset + 1, length, *whose))
        return tuple(found)

    def exposures(self, first: int = 0, last: int | None = None) -> Exposures:
        """Return rows [first, last) (default: all), in memory."""
        rows = slice(first, self._rows if last is None else last)
        return Exposures(**{name: np.array(self._whole(name)[rows]) for name in COLUMNS})

    def row_lengths(self) -> npt.NDArray[np.int64]:
        """Return tokens per exposure, int64 [rows]."""
        return self._whole("place")["length"].astype(np.int64)

    def claims(self, experiment: str) -> Claims:
        """Return the token ranges that one experiment holds (the whole slot for placement
        "boundary").
        """
        rows = self.exposures()
        mine = rows.experiment == self.experiments.index(experiment)
        slot = rows.slot[mine]
        start = slot * self.sequence_length + rows.offset[mine]
        stop = start + self.row_lengths()[mine]
        shift = (rows.flags[mine] & SHIFT_FLAG) > 0
        start = np.where(shift, slot * self.sequence_length, start)
        stop = np.where(shift, (slot + 1) * self.sequence_length, stop)
        return Claims(start, stop)


class _Column(NamedTuple):
    """Where a column lies in a plan file."""

    dtype: np.dtype[Any]
    rows: int
    position: int
    sha256: tuple[str, ...]
