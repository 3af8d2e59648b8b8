"""Which processes of a run live on this host: the lock of its folder, and the processes that its
`pid-R` files name.

Read from /proc only: a lock is looked up, never taken, so that nobody who starts a run is turned
away.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motet.core.locks import stand_in
from motet.core.processes import DEAD, birth, stat_fields

START_SLACK_S = 5.0
"""Clocks of a file system and of this host may differ by so much."""
_LOCK = re.compile(r"FLOCK\s+\S+\s+WRITE\s+(-?\d+)\s+([0-9a-f]+):([0-9a-f]+):(\d+)")
Locks = Mapping[tuple[int, int], int]


@dataclass(frozen=True)
class Process:
    """What a rank wrote of itself when it started.

    Attributes:
        host: "" when the file does not say.
        seen: Unix time of its last sign of life.
        birth: which process of that number it is (`core.processes.birth`); "" in files of earlier
            versions, and then times decide.
    """

    rank: int
    pid: int
    host: str
    seen: float
    birth: str = ""

    @property
    def is_here(self) -> bool:
        """Whether it was started on this host."""
        return self.host in ("", socket.gethostname())

    def lives(self) -> bool:
        """Return whether this very process is alive on this host, and no later one with its
        number.
        """
        if self.birth:
            return self.is_here and birth(self.pid) == self.birth
        started = _started(self.pid) if self.is_here else None
        return started is not None and started <= self.seen + START_SLACK_S


def read_processes(attempt: Path) -> list[Process]:
    """Return the processes of an attempt, by rank; files that cannot be read are left out."""
    found = []
    for path in attempt.glob("pid-*"):
        try:
            words = path.read_text().split()
            rank, pid = int(path.name.removeprefix("pid-")), int(words[0])
            host, born = [*words[1:3], "", ""][:2]
            found.append(Process(rank, pid, host, path.stat().st_mtime, born))
        except (OSError, ValueError, IndexError):
            continue
    return sorted(found, key=lambda process: process.rank)


def held_locks(text: str | None = None) -> Locks:
    """Return (device, inode) of every file that is locked on this host -> who locked it; `text`
    stands in for /proc/locks.
    """
    if text is None:
        try:
            text = Path("/proc/locks").read_text()
        except OSError:
            return {}
    return {
        (os.makedev(int(major, 16), int(minor, 16)), int(inode)): int(pid)
        for pid, major, minor, inode in _LOCK.findall(text)
    }


def lock_holder(lock: Path, locks: Locks) -> int | None:
    """Return the process that locked a file, or what stands in for it here; None when nobody
    did.
    """
    for path in (lock, stand_in(lock)):
        with contextlib.suppress(OSError):
            found = path.stat()
            if (holder := locks.get((found.st_dev, found.st_ino))) is not None:
                return holder
    return None


def parent_of(pid: int) -> int | None:
    """Return the parent of a process; None when it is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """As `stat_fields`, [] for a zombie as well."""
    fields = stat_fields(pid)
    return [] if fields and fields[0] in DEAD else fields


def _started(pid: int) -> float | None:
    """Return the Unix time at which a process started, None when it is gone."""
    fields = _stat(pid)
    if not fields:
        return None
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
