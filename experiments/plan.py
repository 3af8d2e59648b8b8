"""The plan: every exposure of a run in one immutable, hashed, memory-mapped file.

Layout of `exposures.plan`: 8 magic bytes, header length (uint64), a JSON header, then columns aligned to 64 bytes. The
header holds the SHA-256 of every 16 MiB piece of every column; the plan's own hash is the SHA-256 of the header, so
one hash covers every byte and is checked in parallel.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.experiments.errors import UserError
from motet.experiments.keys import U64, mix64, name_key
from motet.experiments.placement import Boundaries, Claims, Request, Texts, place, repeats

MAGIC = b"MOTETPL1"
PIECE_BYTES = 16 * 2**20
RESIDENT_BYTES = 4 * 2**20
_COLUMNS = {
    "slot": np.int64,
    "offset": np.int32,
    "text": np.int64,
    "id": np.uint64,
    "experiment": np.uint16,
    "unit": np.int32,
    "repetition": np.int32,
    "flags": np.uint8,
    "text_offsets": np.int64,
}
PLACEBO_FLAG, SHIFT_FLAG = 1, 2


@dataclass(frozen=True)
class Exposures:
    """Rows of a plan as columns; all arrays have one length."""

    slot: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int32]
    text: npt.NDArray[np.int64]
    id: U64
    experiment: npt.NDArray[np.uint16]
    unit: npt.NDArray[np.int32]
    repetition: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.slot)


class Span(NamedTuple):
    """Where one exposure lies in a batch: row, offset and length in tokens, and whether it moved base tokens right."""

    row: int
    offset: int
    length: int
    shift: bool


@dataclass(frozen=True)
class CompiledPlan:
    """A plan in memory, before it is written."""

    sequence_length: int
    seed: int
    experiments: tuple[str, ...]
    rows: Exposures
    texts: Texts


def exposure_ids(experiment: str, unit_keys: U64, repetition: npt.NDArray[np.int32]) -> U64:
    """Return the stable id of each exposure: it names (experiment, unit, repetition), never a row number."""
    key = np.uint64(name_key("exposure", experiment))
    return mix64(mix64(unit_keys ^ key) + repetition.astype(np.uint64))


def compile_plan(
    requests: Sequence[Request],
    seed: int,
    sequence_length: int,
    tombstones: Sequence[tuple[int, Claims]] = (),
    boundaries: Boundaries | None = None,
) -> CompiledPlan:
    """Place every request, in order of precedence, and sort the rows by slot.

    Args:
        requests: one per experiment, the oldest registration first.
        seed: keys every draw.
        sequence_length: tokens per slot.
        tombstones: (precedence, claims) of removed experiments: claims that come before request number `precedence` keep
            being respected, so that removing an experiment moves no other.
        boundaries: document starts of the base stream, for placement "boundary".
    """
    taken = Claims.none()
    parts: list[Exposures] = []
    text_base = 0
    for number, request in enumerate(requests):
        for precedence, claims in tombstones:
            if precedence == number:
                taken = taken.add(claims.start, claims.stop)
        placed = place(request, seed, sequence_length, taken, boundaries)
        taken = placed.claims
        flags = np.full(len(request), SHIFT_FLAG * (request.placement == "boundary"), np.uint8)
        if len(request.placebo):
            flags |= request.placebo.astype(np.uint8) * np.uint8(PLACEBO_FLAG)
        parts.append(
            Exposures(
                slot=placed.slot,
                offset=placed.offset.astype(np.int32),
                text=request.text.astype(np.int64) + text_base,
                id=exposure_ids(
                    request.experiment, request.unit_keys[request.unit], request.repetition
                ),
                experiment=np.full(len(request), number, dtype=np.uint16),
                unit=request.unit,
                repetition=request.repetition,
                flags=flags,
            )
        )
        text_base += len(request.texts.offsets) - 1
    rows = _sorted_rows(parts, sequence_length)
    texts = _join_texts([request.texts for request in requests])
    names = tuple(request.experiment for request in requests)
    return CompiledPlan(sequence_length, seed, names, rows, texts)


def _sorted_rows(parts: list[Exposures], sequence_length: int) -> Exposures:
    """Return all rows in order of position."""
    if not parts:
        return Exposures(**{name: np.empty(0, dtype) for name, dtype in _row_columns().items()})
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        if len(parts) > 1
        else getattr(parts[0], name)
        for name in _row_columns()
    }
    order = np.argsort(joined["slot"] * sequence_length + joined["offset"])
    rows = Exposures(**{name: column[order] for name, column in joined.items()})
    if repeats(rows.id):
        raise UserError("experiments: two exposures have the same (experiment, unit, repetition)")
    return rows


def _row_columns() -> dict[str, type]:
    return {name: dtype for name, dtype in _COLUMNS.items() if name != "text_offsets"}


def _join_texts(tables: list[Texts]) -> Texts:
    """Return one text table; text numbers of table k follow those of table k - 1."""
    if len(tables) == 1:
        return tables[0]
    offsets, base = [np.zeros(1, dtype=np.int64)], 0
    for table in tables:
        offsets.append(table.offsets[1:] + base)
        base += int(table.offsets[-1])
    dtype = np.result_type(*[table.tokens.dtype for table in tables]) if tables else np.uint16
    tokens = np.concatenate([table.tokens for table in tables]) if tables else np.empty(0)
    return Texts(tokens.astype(dtype), np.concatenate(offsets))


def write_plan(plan: CompiledPlan, path: Path) -> str:
    """Write a plan (aside, then renamed) and return its SHA-256."""
    columns = {name: getattr(plan.rows, name) for name in _row_columns()}
    columns["text_offsets"] = plan.texts.offsets
    columns["tokens"] = plan.texts.tokens
    blobs = {name: _bytes_of(column) for name, column in columns.items()}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = {name: list(pool.map(_sha256, _pieces(blob))) for name, blob in blobs.items()}
    header = {
        "version": 1,
        "sequence_length": plan.sequence_length,
        "seed": plan.seed,
        "experiments": list(plan.experiments),
        "columns": {
            name: {
                "dtype": columns[name].dtype.str,
                "rows": len(columns[name]),
                "sha256": digests[name],
            }
            for name in columns
        },
    }
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        file.write(MAGIC + len(encoded).to_bytes(8, "little") + encoded)
        for blob in blobs.values():
            file.write(b"\0" * (-file.tell() % 64))
            file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return hashlib.sha256(encoded).hexdigest()


def _bytes_of(column: npt.NDArray[Any]) -> memoryview:
    """Return an array's bytes without copying them (a contiguous array of any size, zero included)."""
    return memoryview(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)


def _sha256(piece: memoryview) -> str:
    return hashlib.sha256(piece).hexdigest()


def _pieces(blob: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(blob), PIECE_BYTES):
        yield blob[start : start + PIECE_BYTES]


class Plan:
    """A plan on disk, read through one shared memory map.

    A reader's memory does not grow with the plan: pages that look-ups touched are handed back to the kernel's cache
    whenever about 4 MiB of them have been used.
    """

    def __init__(self, path: Path) -> None:
        """Open a plan without reading it.

        Raises:
            UserError: no such file, not a plan, or cut short.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                magic, size = file.read(8), int.from_bytes(file.read(8), "little")
                encoded = file.read(size) if magic == MAGIC else b""
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"plan {path}: cannot be opened ({error})") from None
        if magic != MAGIC or len(encoded) != size:
            raise UserError(f"plan {path}: not a plan file, or cut short")
        self.sha256 = hashlib.sha256(encoded).hexdigest()
        header = json.loads(encoded)
        self.sequence_length: int = header["sequence_length"]
        self.seed: int = header["seed"]
        self.experiments: tuple[str, ...] = tuple(header["experiments"])
        self._header = header["columns"]
        self._columns = self._map_columns(16 + size)
        self._slots = self._columns["slot"]
        self._touched_bytes = 0

    def _map_columns(self, position: int) -> dict[str, npt.NDArray]:
        columns = {}
        for name in [*_COLUMNS, "tokens"]:
            entry = self._header[name]
            dtype, rows = np.dtype(entry["dtype"]), entry["rows"]
            position += -position % 64
            if position + rows * dtype.itemsize > len(self._map):
                raise UserError(f"plan {self.path}: cut short in column {name!r}")
            columns[name] = np.frombuffer(self._map, dtype, rows, position)
            position += rows * dtype.itemsize
        return columns

    def __len__(self) -> int:
        return len(self._slots)

    def verify(self, expected_sha256: str | None = None) -> None:
        """Read every byte and compare it with the hashes.

        Raises:
            UserError: the plan was altered, or is not the one with the expected hash.
        """
        if expected_sha256 is not None and self.sha256 != expected_sha256:
            raise UserError(
                f"plan {self.path}: its hash is {self.sha256[:16]}..., but this run was frozen with {expected_sha256[:16]}...; "
                "restore the file from the run that froze it"
            )
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for name, column in self._columns.items():
                if (
                    list(pool.map(_sha256, _pieces(_bytes_of(column))))
                    != self._header[name]["sha256"]
                ):
                    raise UserError(
                        f"plan {self.path}: column {name!r} was altered since the plan was frozen"
                    )
        self._forget_pages(RESIDENT_BYTES)

    def rows_between(self, first_slot: int, last_slot: int) -> tuple[int, int]:
        """Return the row range [a, b) of exposures with first_slot <= slot < last_slot."""
        bounds = np.searchsorted(self._slots, np.array([first_slot, last_slot], dtype=np.int64))
        return int(bounds[0]), int(bounds[1])

    def lookup(self, slot: int) -> list[tuple[int, npt.NDArray[np.unsignedinteger]]]:
        """Return (offset, tokens) of every exposure in a slot."""
        first, last = self.rows_between(slot, slot + 1)
        offsets = self._columns["offset"]
        self._forget_pages(16384)
        return [(int(offsets[row]), self.tokens_of_row(row)) for row in range(first, last)]

    def tokens_of_row(self, row: int) -> npt.NDArray[np.unsignedinteger]:
        """Return the tokens that the exposure in a row inserts (a view)."""
        text = self._columns["text"][row]
        bounds = self._columns["text_offsets"][text : text + 2]
        return self._columns["tokens"][bounds[0] : bounds[1]]

    def overlay(self, first_slot: int, tokens_BT: npt.NDArray[np.int32]) -> U64:
        """Write the exposures of slots [first_slot, first_slot + B) over base tokens; return their ids.

        Args:
            tokens_BT: base tokens of consecutive slots, changed in place.
        """
        length = tokens_BT.shape[1]
        assert length == self.sequence_length
        first, last = self.rows_between(first_slot, first_slot + len(tokens_BT))
        columns = self._columns
        for row in range(first, last):
            target = tokens_BT[int(columns["slot"][row]) - first_slot]
            offset, inserted = int(columns["offset"][row]), self.tokens_of_row(row)
            end = offset + len(inserted)
            if columns["flags"][row] & SHIFT_FLAG:
                target[end:] = target[offset : length - len(inserted)].copy()
            target[offset:end] = inserted
        self._forget_pages(16384 * (last - first + 1))
        return columns["id"][first:last].copy()

    def spans(self, first_slot: int, count: int) -> list[Span]:
        """Return where the exposures of slots [first_slot, first_slot + count) lie."""
        columns = self._columns
        return [
            Span(
                int(columns["slot"][row]) - first_slot,
                int(columns["offset"][row]),
                len(self.tokens_of_row(row)),
                bool(columns["flags"][row] & SHIFT_FLAG),
            )
            for row in range(*self.rows_between(first_slot, first_slot + count))
        ]

    def _forget_pages(self, touched_bytes: int) -> None:
        """Give touched pages back once enough have gathered; the kernel's cache keeps their contents."""
        self._touched_bytes += touched_bytes
        if self._touched_bytes >= RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0

    def exposures(self, first: int = 0, last: int | None = None) -> Exposures:
        """Return rows [first, last) as copies."""
        part = slice(first, len(self) if last is None else last)
        return Exposures(**{name: self._columns[name][part].copy() for name in _row_columns()})

    def n_texts(self) -> int:
        """Return how many texts the plan holds."""
        return len(self._columns["text_offsets"]) - 1

    def row_lengths(self) -> npt.NDArray[np.int64]:
        """Return tokens per exposure, int64 [rows]."""
        return np.diff(self._columns["text_offsets"])[self._columns["text"]]

    def claims(self, experiment: str) -> Claims:
        """Return the token ranges that one experiment holds (the whole slot for placement "boundary")."""
        number = self.experiments.index(experiment)
        rows = np.flatnonzero(self._columns["experiment"] == number)
        slot = self._columns["slot"][rows]
        start = slot * self.sequence_length + self._columns["offset"][rows]
        stop = start + self.row_lengths()[rows]
        shift = (self._columns["flags"][rows] & SHIFT_FLAG) > 0
        start = np.where(shift, slot * self.sequence_length, start)
        stop = np.where(shift, (slot + 1) * self.sequence_length, stop)
        return Claims(start, stop)
