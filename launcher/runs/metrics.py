"""The run's own record: one JSON line per event in `metrics.jsonl`, written by rank 0.

This file is the truth about a run; Weights & Biases mirrors it (`wandb_mirror.py`). A line is
appended with one `os.write`, so a kill leaves whole lines and at most one torn one, which the next
writer closes and every reader skips. A background thread makes lines durable (`fdatasync`) about
once a second; the step waits for neither.

A row ends with the CRC-32 of what is before it, so that one altered digit is seen.

Rows share `kind`, `step` (optimizer updates completed) and `time` (Unix seconds). A resumed or
rolled back
run repeats steps: the row `{"kind": "attempt", "start_step": S}` tells readers to forget steps
after S.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from motet.core.files import again_with_room, append_whole

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

KINDS = frozenset(
    {"step", "probe", "evaluation", "validation", "checkpoint", "event", "attempt", "hook"}
)
SKIPPED = "checkpoint_skipped"
"""Event: the disk had no room for a checkpoint, and the run went on without."""
SYNC_INTERVAL_S = 1.0
UNSURE_S = 300.0
"""How long a row may take to reach Weights & Biases, or the disk in its offline file."""
Row = dict[str, Any]
_CHECK = b',"crc32":"'
_CHECK_BYTES = len(_CHECK) + 8 + len(b'"}')


class Tracker(Protocol):
    """A service that shows a run while it trains: Weights & Biases, TensorBoard, Trackio. No method
    may raise or wait, but `close`.
    """

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row of `metrics.jsonl`."""

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Take a table of the run, such as its answers, as of a step."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Take values of the whole run, by name."""

    def close(self, wait_s: float | None = None) -> None:
        """Send what is left, for at most `wait_s` (None: as long as the tracker thinks right)."""


class MetricsWriter:
    """Appends rows on rank 0; every method does nothing on other ranks.

    `config` is the run's configuration as plain data; only `config["metrics"]["log_every"]` is read
    here: `step` rows of other steps are left out, except those of skipped updates. `mirror` gets
    the same rows.
    """

    def __init__(
        self,
        rundir: RunDir,
        config: Mapping[str, Any] | None = None,
        rank: int = 0,
        mirror: Tracker | None = None,
    ) -> None:
        section = (config or {}).get("metrics") or {}
        self._log_every = max(1, int(section.get("log_every", 1)))
        self._mirror = mirror if rank == 0 else None
        self._file: int | None = None
        self._sync_error: OSError | None = None
        self.make_room: Callable[[], bool] = lambda: False
        """Whether a line that the disk had no room for may be tried again."""
        if rank != 0:
            return
        self._file = _open_for_append(rundir.metrics)
        self._digest, self._bytes = _digest_of(rundir.metrics)
        self._dirty = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sync_often, name="metrics-sync", daemon=True)
        self._thread.start()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, kind: str, step: int, **fields: Any) -> None:
        """Append one row. Numbers that are not finite become null and are named in `nonfinite`.

        Raises `OSError` when the disk refuses the line: a run without a record is not worth its
        cost.
        """
        if self._file is None:
            return
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {sorted(KINDS)}")
        if kind == "step" and step % self._log_every and not fields.get("skipped"):
            return
        row: Row = {"kind": kind, "step": int(step), "time": round(time.time(), 3), **fields}
        line = encode_row(row)
        again_with_room(partial(append_whole, self._file, line), self.make_room)
        self._digest.update(line)
        self._bytes += len(line)
        self._dirty.set()
        if self._mirror is not None:
            self._mirror.log(row)

    def mark(self) -> dict[str, Any]:
        """Return length and SHA-256 of all rows so far, by which a checkpoint vouches for them."""
        if self._file is None:
            return {}
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        """Return when every row is on the disk. Raises the `OSError` of an earlier failed sync."""
        if self._file is None:
            return
        self._dirty.clear()
        os.fdatasync(self._file)
        if self._sync_error is not None:
            error, self._sync_error = self._sync_error, None
            raise error

    def close(self) -> None:
        """Sync and close; a second call does nothing. The mirror is closed by whoever opened it."""
        if self._file is None:
            return
        self._stop.set()
        self._dirty.set()
        self._thread.join()
        try:
            self.sync()
        finally:
            os.close(self._file)
            self._file = None

    def _sync_often(self) -> None:
        while not self._stop.is_set():
            self._dirty.wait()
            if self._stop.wait(SYNC_INTERVAL_S) or self._file is None:
                return
            self._dirty.clear()
            try:
                os.fdatasync(self._file)
            except OSError as error:
                self._sync_error = error


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One JSON line.

    Tensors and NumPy values become numbers or lists; NaN and infinity become null.
    """
    try:
        text = json.dumps(row, default=_plain, allow_nan=False, separators=(",", ":"))
    except ValueError:
        nonfinite: list[str] = []
        clean = _finite(json.loads(json.dumps(row, default=_plain)), "", nonfinite)
        clean["nonfinite"] = nonfinite
        text = json.dumps(clean, allow_nan=False, separators=(",", ":"))
    body = text.encode()
    return body[:-1] + _CHECK + b'%08x"}\n' % zlib.crc32(body)


def decode_row(line: bytes) -> Row | None:
    """Return the row of one line without its checksum; None when it is torn or altered. Rows of
    before there were checksums are taken as they are.
    """
    body, line = line, line.rstrip(b"\r\n")
    if line[-_CHECK_BYTES:].startswith(_CHECK):
        body, kept = line[:-_CHECK_BYTES] + b"}", line[-10:-2]
        if kept != b"%08x" % zlib.crc32(body):
            return None
    try:
        row = json.loads(body)
        row["kind"], row["step"] = str(row["kind"]), int(row["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(row)


def all_rows(path: Path) -> list[Row]:
    """Every row that was written whole, also those of steps that were trained again."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := decode_row(line)) is not None]


def altered_lines(path: Path) -> list[int]:
    """Return the numbers of the lines, from 1, that are whole and no rows: altered since they were
    written. One that a killed writer left torn has no end, and is none of them.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [
        number
        for number, line in enumerate(lines, start=1)
        if line.endswith(b"}") and decode_row(line) is None
    ]


def _plain(value: Any) -> Any:
    """What `json` cannot write: NumPy and torch values by `tolist`, the rest by `str`."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _finite(value: Any, path: str, nonfinite: list[str]) -> Any:
    """Copy `value` with null for each number that is not finite; their dotted paths go to
    `nonfinite`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(path)
        return None
    if isinstance(value, dict):
        return {
            k: _finite(v, f"{path}.{k}" if path else str(k), nonfinite) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_finite(v, f"{path}[{i}]", nonfinite) for i, v in enumerate(value)]
    return value


def _open_for_append(path: Path) -> int:
    """Open for appending; end a line that a killed writer left torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        append_whole(file, b"\n")
    return file


def _digest_of(path: Path) -> tuple[Any, int]:
    """Return the running SHA-256 of a file, and its size."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return digest, size


class MetricsReader:
    """Follows a growing `metrics.jsonl`: `update()` reads only what is new."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.damaged_lines = 0
        self._offset = 0
        self._rows: list[Row] = []
        self._place: dict[tuple[str, int], int] = {}

    def update(self) -> list[Row]:
        """Every row that holds now, in the order written. A missing file is an empty one."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < self._offset:
                self.__init__(self.path)  # type: ignore[misc]
            stream.seek(self._offset)
            block = stream.read()
            whole = block.rfind(b"\n") + 1
            self._offset += whole
            for line in block[:whole].splitlines():
                self._add(line)
        return list(self._rows)

    def _add(self, line: bytes) -> None:
        if not line.strip():
            return
        row = decode_row(line)
        if row is None:
            self.damaged_lines += 1
            return
        kind, step = str(row["kind"]), int(row["step"])
        if kind == "attempt":
            self._forget_after(int(row.get("start_step", step)))
        elif kind in ("step", "probe"):
            if (kind, step) in self._place:  # a resumed run may measure once more where it starts
                self._rows[self._place[kind, step]] = row
                return
            self._place[kind, step] = len(self._rows)
        self._rows.append(row)

    def _forget_after(self, start_step: int) -> None:
        """Drop what lies after `start_step`; events and attempts happened, so they stay."""
        if all(row["step"] <= start_step for row in self._rows):
            return
        self._rows = [
            row
            for row in self._rows
            if row["step"] <= start_step or row["kind"] in ("event", "attempt")
        ]
        self._place = {
            (row["kind"], row["step"]): place
            for place, row in enumerate(self._rows)
            if row["kind"] in ("step", "probe")
        }


def read_metrics(path: Path) -> list[Row]:
    """All rows of the run's final lineage: torn lines skipped, superseded steps dropped.

    A step row replaces an earlier one of the same step, and so does a probe row; an `attempt` row
    drops steps, probes and checkpoints after its `start_step`. A missing file gives no rows.
    """
    return MetricsReader(path).update()


def unmirrored(path: Path, start_step: int, seconds: float = UNSURE_S) -> list[Row]:
    """The measured rows that a mirror may have lost when the attempt before was killed: its last
    `seconds`, up to `start_step`. The order of rows decides: a clock that was set, back or ahead,
    leaves none out.
    """
    kinds = ("step", "probe", "evaluation", "validation")
    rows = [row for row in read_metrics(path) if row["kind"] in kinds]
    lasted, first = 0.0, len(rows)
    while first and lasted <= seconds:
        first -= 1
        if first:
            lasted += _apart(rows[first - 1], rows[first])
    return [row for row in rows[first:] if row["step"] <= start_step]


def _apart(before: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Return the seconds between two rows; for a step no more than it says that it took."""
    apart = max(0.0, float(row.get("time", 0.0)) - float(before.get("time", 0.0)))
    took = row.get("seconds")
    return min(apart, sum(took.values())) if isinstance(took, dict) else apart


def rows_of(rows: Iterable[Row], kind: str) -> list[Row]:
    """The rows of one kind, in order."""
    return [row for row in rows if row["kind"] == kind]
