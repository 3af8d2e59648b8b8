"""What a launch does before it trains, and what it waits for.

Each rank, and the launcher of each machine, keeps one note in `attempts/N/starting/`, N the attempt
that the launch began with: `rank-3` or `machine-0`. A start that is quick writes none.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from motet.core.errors import DamagedFile
from motet.core.files import read_fields, write_json
from motet.launcher.runs.rundir import RunDir

NOTED_AFTER_S, TOLD_AFTER_S, TOLD_AGAIN_S = 10.0, 20.0, 60.0
"""A stage that lasts so long is written down; the launcher says so after 20 s, and then each
minute."""
LOOK_S = 1.0


class StartStage(IntEnum):
    """The stages of a start, in order: whoever is in the earliest is what the others wait for."""

    MACHINES = 0
    IMPORTS = 1
    MEETING = 2
    CHECKS = 3
    ENGINE = 4
    CHECKPOINT = 5
    FIRST_STEP = 6


@dataclass(frozen=True)
class StartNote:
    """What one process is at.

    Attributes:
        who: "rank-3", "machine-0".
        stage: see `StartStage`.
        what: in words, after "waiting for".
        since: Unix time.
        waits: whether it only waits, so that a limit holds.
        host: its machine.
    """

    who: str
    stage: int
    what: str
    since: float
    waits: bool
    host: str


Detail = Callable[[], tuple[str, bool] | None]
"""What is waited for just now, and whether nothing but waiting is done; None: as the stage says."""


class Starting:
    """The notes of this process.

    Args:
        folder: `starting` of the attempt that the launch began with.
        who: "rank-3" or "machine-0".
        after_s: how long a stage may last before it is written down.
    """

    def __init__(self, folder: Path, who: str, after_s: float = NOTED_AFTER_S) -> None:
        self.path, self.who, self._after_s = folder / f"{who}.json", who, after_s
        self._stage: tuple[StartStage, str, bool, Detail | None, float] | None = None
        self._began = 0.0
        self._written: StartNote | None = None
        self._over = threading.Event()
        self._remove()
        threading.Thread(target=self._follow, name="starting", daemon=True).start()

    def at(
        self, stage: StartStage, what: str, waits: bool = False, detail: Detail | None = None
    ) -> None:
        """Begin a stage: `what` is waited for, unless `detail`, asked again and again, knows
        better.
        """
        self._began = time.monotonic()
        self._stage = (stage, what, waits, detail, time.time())

    def over(self) -> None:
        """It trains, or ends: nothing is waited for any more."""
        if not self._over.is_set():
            self._over.set()
            self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()  # the last one

    def _follow(self) -> None:
        while not self._over.wait(min(LOOK_S, self._after_s)):
            with contextlib.suppress(OSError):  # a note is no reason to fail
                self._look()
            if self._over.is_set():
                self._remove()

    def _look(self) -> None:
        if self._stage is None:
            return
        stage, what, waits, detail, since = self._stage
        if time.monotonic() - self._began < self._after_s:
            return
        if detail is not None and (known := detail()) is not None:
            what, waits = known
        note = StartNote(self.who, int(stage), what, since, waits, socket.gethostname())
        if note != self._written:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, asdict(note))
            self._written = note


def folder_of(attempt: Path) -> Path:
    """Return the folder of the notes of a launch, in that of the attempt that it began with."""
    return attempt / "starting"


def notes_in(folder: Path) -> list[StartNote]:
    """Return the notes of a launch, by name."""
    found = []
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError:
        return []
    for name in names:
        with contextlib.suppress(DamagedFile, TypeError):
            found.append(StartNote(**read_fields(folder / name, {})))
    return found


@dataclass(frozen=True)
class Waiting:
    """What a launch waits for.

    Attributes:
        text: in words.
        since: Unix time.
        waits: whether it only waits.
    """

    text: str
    since: float
    waits: bool


def waiting_in(folder: Path) -> Waiting | None:
    """Return what a launch waits for: what those in the earliest stage are at; None where nothing
    lasts.
    """
    notes = notes_in(folder)
    if not notes:
        return None
    stage = min(note.stage for note in notes)
    last = [note for note in notes if note.stage == stage]
    first = min(last, key=lambda note: note.since)
    same = [note for note in last if note.what == first.what]
    return Waiting(f"{_names(same)} waiting for {first.what}", first.since, first.waits)


def waiting_of(run: RunDir) -> Waiting | None:
    """Return what the newest launch of a run waits for, None where nothing lasts."""
    for number in range(run.latest_attempt(), 0, -1):
        folder = folder_of(run.attempt(number))
        if folder.is_dir():
            return waiting_in(folder)
    return None


def _names(notes: list[StartNote]) -> str:
    """Return "rank 3 on n2 is", "ranks 0, 1, 2 are"."""
    kind = notes[0].who.partition("-")[0]
    numbers = sorted(int(note.who.partition("-")[2]) for note in notes)
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    if len(numbers) > 1:
        return f"{kind}s {shown} are"
    return f"{kind} {shown} on {notes[0].host} is"
