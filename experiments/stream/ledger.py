"""The ledger: what the model really consumed, step by step, rank by rank.

A *segment* is one uninterrupted stretch of training: a start, a restart or a rollback opens a new
one, which names the checkpoint it grew from. Each rank appends one record per step to its own file,
without talking to others; records are checksummed, so a torn tail is recognised. `lineage` walks
from a checkpoint back to step 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import DamagedFile, UserError
from motet.core.files import append_whole, read_bytes, read_fields, write_json
from motet.core.parsing import parse_json
from motet.experiments.stream.random import U64

_HEAD = struct.Struct("<4sI")
_BODY = struct.Struct("<QQIIQI")
_TAG = b"MLG1"
APPLIED, WITH_MEMBERS = 1, 2
_PAGE, _FEWEST_ZEROS = 4096, 32
_TAIL = struct.Struct("<I")
_SEGMENT = {
    **dict.fromkeys(("segment", "parent", "attempt", "start_step", "world_size"), int),
    **dict.fromkeys(("plan_sha256", "definition_sha256"), str),
}


@dataclass(frozen=True)
class Record:
    """What one rank consumed in one step.

    Attributes:
        step: the step, counted from 0.
        first_slot, count: its slots.
        digest: 64-bit digest of its tokens (`Batch.digest`, summed over its batches).
        applied: False when the step's update was skipped (non-finite loss, say): consumed, but not
            learned from.
        exposure_ids: uint64, the exposures laid over those slots.
        members: who trained on each of equal shares of those slots, one after the other, by name,
            None for the whole model; empty where the whole model trained on all.
    """

    step: int
    first_slot: int
    count: int
    digest: int
    applied: bool
    exposure_ids: U64
    members: tuple[tuple[str | None, ...], ...] = ()

    def members_at(self, slot: int) -> tuple[str | None, ...]:
        """Return who trained on a slot of the record."""
        if not self.members:
            return (None,)
        return self.members[(slot - self.first_slot) * len(self.members) // self.count]

    def encode(self) -> bytes:
        """Return the record's bytes."""
        body = (
            _BODY.pack(
                self.step,
                self.first_slot,
                self.count,
                len(self.exposure_ids),
                self.digest,
                APPLIED * self.applied + WITH_MEMBERS * bool(self.members),
            )
            + self.exposure_ids.astype("<u8").tobytes()
        )
        if self.members:
            text = json.dumps(self.members, separators=(",", ":")).encode()
            body += _TAIL.pack(len(text)) + text
        return _HEAD.pack(_TAG, zlib.crc32(body)) + body


@dataclass(frozen=True)
class Segment:
    """One stretch of training; `parent` is the segment whose checkpoint at `start_step` it grew
    from, 0 for none. `draws`: in how many equal shares of a step's slots a family says who trains;
    None where the whole model trains alone.
    """

    segment: int
    parent: int
    attempt: int
    start_step: int
    world_size: int
    plan_sha256: str
    definition_sha256: str
    draws: int | None = None


def segment_folder(ledger: Path, segment: int) -> Path:
    """Return the folder of a segment."""
    return ledger / f"segment-{segment:05d}"


def open_segment(
    ledger: Path,
    parent: int,
    attempt: int,
    start_step: int,
    world_size: int,
    hashes: tuple[str, str],
    draws: int | None = None,
) -> Segment:
    """Create the next segment (one process does, then tells the others its number).

    Args:
        hashes: (plan SHA-256, definition SHA-256) under which it trains.
        draws: see `Segment`.
    """
    # By the folders, not by what they hold: a damaged segment must not stop the run for ever.
    number = 1 + max(segment_numbers(ledger), default=0)
    segment = Segment(number, parent, attempt, start_step, world_size, *hashes, draws)
    folder = segment_folder(ledger, number)
    folder.mkdir(parents=True, exist_ok=True)
    write_segment(ledger, segment)
    return segment


def segment_numbers(ledger: Path) -> list[int]:
    """Return the numbers of the segments that have a folder, ascending."""
    names = (folder.name.removeprefix("segment-") for folder in ledger.glob("segment-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_segment(ledger: Path, number: int) -> Segment:
    """Return one segment.

    Raises:
        DamagedFile: it cannot be read, was altered, or is another one's.
    """
    path = segment_folder(ledger, number) / "segment.json"
    found = read_fields(path, _SEGMENT)
    if found["segment"] != number:
        what = f"is that of segment {found['segment']}, not of {number}"
        raise DamagedFile(path, what, "put each back into its own folder")
    return segment_from(found)


def segment_from(found: Mapping[str, Any]) -> Segment:
    """Return the segment that a mapping describes; what else it holds is left out."""
    return Segment(**{one.name: found[one.name] for one in fields(Segment) if one.name in found})


def ancestry(
    ledger: Path, segment: Segment, grew_from: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the segments that lead from step 0 to a new one, itself last: what a checkpoint keeps
    of them, so that a damaged `segment.json` can be written again. [] where they are not known.

    Args:
        grew_from: the manifest of the checkpoint that the segment grew from.
    """
    before: list[dict[str, Any]] = list((grew_from or {}).get("lineage") or ())
    if segment.parent and not before:  # a checkpoint of before they were kept
        try:
            older = lineage(ledger, segment.parent, segment.start_step)
        except UserError:
            return []
        before = [asdict(stretch.segment) for stretch in older]
    return [*before, asdict(segment)]


def write_segment(ledger: Path, segment: Segment) -> None:
    """Write the facts of a segment into its folder; the same facts give the same bytes."""
    write_json(segment_folder(ledger, segment.segment) / "segment.json", asdict(segment))


def readable_segments(ledger: Path) -> list[Segment]:
    """Return the segments of a run that are not damaged, oldest first."""
    found = []
    for number in segment_numbers(ledger):
        with contextlib.suppress(DamagedFile):
            found.append(read_segment(ledger, number))
    return found


def _is_begun(ledger: Path, number: int) -> bool:
    """Whether a segment was opened: a kill may leave its folder with nothing in it."""
    folder = segment_folder(ledger, number)
    return (folder / "segment.json").exists() or any(folder.glob("rank-*.bin"))


class LedgerWriter:
    """One rank's appending end of the ledger."""

    def __init__(self, ledger: Path, segment: int, rank: int) -> None:
        path = segment_folder(ledger, segment) / f"rank-{rank:05d}.bin"
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)

    def append(self, record: Record) -> None:
        """Hand a record to the kernel, whole: it survives the death of this process.

        Raises:
            OSError: there is no room for it; nothing of it is left.
        """
        append_whole(self._file, record.encode())

    def sync(self) -> None:
        """Wait until everything appended is on disk: it survives the death of the machine."""
        os.fsync(self._file)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self._file)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the whole records of one rank's file; a torn tail ends it, also one of zeros.

    Raises:
        UserError: a record inside the file does not match its checksum (the file was altered).
    """
    data = read_bytes(path)
    position = 0
    while position + _HEAD.size + _BODY.size <= len(data):
        tag, checksum = _HEAD.unpack_from(data, position)
        head = _BODY.unpack_from(data, position + _HEAD.size)
        ids_end = size = _BODY.size + 8 * head[3]
        if head[5] & WITH_MEMBERS:
            tail = data[position + _HEAD.size + size :][: _TAIL.size]
            size += _TAIL.size + (_TAIL.unpack(tail)[0] if len(tail) == _TAIL.size else 0)
        body = data[position + _HEAD.size : position + _HEAD.size + size]
        if tag != _TAG or (len(body) == size and zlib.crc32(body) != checksum):
            if _never_written(data, position, position + _HEAD.size + size):
                return
            what = f"was altered in the record at byte {position:,}"
            raise DamagedFile(path, what, "restore it from a copy; else no audit can pass")
        if len(body) < size:
            return
        step, first_slot, count, _, digest, flags = head
        ids = np.frombuffer(body[_BODY.size : ids_end], dtype="<u8").astype(np.uint64)
        members = parse_json(body[ids_end + _TAIL.size :]) if flags & WITH_MEMBERS else ()
        who = tuple(tuple(names) for names in members)
        yield Record(step, first_slot, count, digest, bool(flags & APPLIED), ids, who)
        position += _HEAD.size + size


def _never_written(data: bytes, start: int, stop: int) -> bool:
    """Whether the record [start, stop) cannot be read because the machine or its disk died before
    what it ends in was written: a file then has its length, and zeros from the end of what was
    synced, or from the border of a page, to its own end. No record begins with zeros, or has so
    many at its end.
    """
    zeros = len(data.rstrip(b"\0"))
    if zeros <= start:
        return True
    border = -(-zeros // _PAGE) * _PAGE
    return start < border < stop and border + _FEWEST_ZEROS <= len(data)


@dataclass(frozen=True)
class Stretch:
    """Steps [start_step, stop_step) of one segment that the weights of a checkpoint grew from."""

    segment: Segment
    start_step: int
    stop_step: int


def lineage(ledger: Path, segment: int, step: int) -> list[Stretch]:
    """Return the stretches that lead from step 0 to a checkpoint, oldest first.

    No other segment is read: what happened to one that nothing grew from says nothing of these.

    Args:
        ledger: the run's ledger folder.
        segment, step: the checkpoint's.

    Raises:
        UserError: a segment on the way is missing or damaged.
    """
    begun = {number for number in segment_numbers(ledger) if _is_begun(ledger, number)}
    stretches: list[Stretch] = []
    while len(stretches) <= len(begun):
        if segment not in begun:
            raise UserError(
                f"ledger: segment {segment} is missing, so the lineage cannot be proved"
            )
        entry = read_segment(ledger, segment)
        stretches.append(Stretch(entry, entry.start_step, step))
        if entry.parent == 0:
            return stretches[::-1]
        segment, step = entry.parent, entry.start_step
    raise UserError("ledger: its segments grew from each other, so the lineage cannot be proved")


def stretch_records(ledger: Path, stretch: Stretch) -> Iterator[tuple[int, Record]]:
    """Yield (rank, record) of a stretch, rank by rank."""
    folder = segment_folder(ledger, stretch.segment.segment)
    for path in sorted(folder.glob("rank-*.bin")):
        rank = int(path.stem.removeprefix("rank-"))
        for record in read_records(path):
            if stretch.start_step <= record.step < stretch.stop_step:
                yield rank, record
