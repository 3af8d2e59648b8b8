"""What Linux tells about processes, and how a process learns that its parent died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded now: nothing may be loaded between fork and exec
DEAD = ("Z", "X")


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for a signal to this process when the one that started it dies; also without
    warning, by kill -9.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def adopt_orphans(adopt: bool = True) -> None:
    """Become the parent of every descendant whose own parent dies, so that none is out of sight."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def children(parent: int) -> list[int]:
    """Return the living children of a process, lowest first; a zombie does not live."""
    return sorted(pid for pid, ppid, state in _table() if ppid == parent and state not in DEAD)


def reap(parent: int, but: frozenset[int]) -> list[int]:
    """Collect this process's children that have ended, `but` some; return those that live."""
    alive = []
    for pid, ppid, state in list(_table()):
        if ppid == parent and pid not in but:
            if state == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            else:
                alive.append(pid)
    return alive


def children_running(parent: int, word: str) -> list[int]:
    """Return the living children of a process whose command line has `word` among its arguments."""
    return [pid for pid in children(parent) if word in command_line(pid)]


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process, [] when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal: before that, the signal would just kill
    it.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt:0")
    return bool(int(caught.partition(":")[2], 16) >> (number - 1) & 1)


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, state and parent first; [] when the
    process is gone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return stat.rpartition(")")[2].split()  # the name in brackets may hold anything


def birth(pid: int) -> str:
    """Return what tells a process from every other one that had or will have its number: when it
    started, in the kernel's ticks since the boot that is named; "" when it is gone. No clock that
    can be set takes part.
    """
    fields = stat_fields(pid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{fields[19]}@{boot}" if len(fields) > 19 and fields[0] not in DEAD else ""


def _table() -> Iterator[tuple[int, int, str]]:
    """Yield (process, its parent, its state) of every process that this one may see."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (fields := stat_fields(int(entry))):
            yield int(entry), int(fields[1]), fields[0]
