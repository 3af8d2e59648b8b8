"""Lock files of extensions that torch compiles when they are first used, as DeepSpeed's are.

`torch.utils.file_baton` makes a file named "lock" and keeps it open while it compiles; a process
that is killed meanwhile leaves the file, and every later start waits for it without end. Whether a
process of this machine holds one is seen in its open files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from motet.core.processes import children

LOCK = "lock"
_WAITS_IN = "file_baton.py"
_COMPILES_IN = "cpp_extension.py"


def held_by(pid: int | str) -> list[Path]:
    """Return the locks that a process holds; [] when it may not be looked at."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                path = Path(os.readlink(f"/proc/{pid}/fd/{entry}"))
                if path.name == LOCK and any("extension" in part for part in path.parts):
                    found.append(path)
    return found


def is_held(lock: Path) -> bool:
    """Return whether a process of this machine that this one may look at holds a lock."""
    return any(lock in held_by(entry) for entry in os.listdir("/proc") if entry.isdecimal())


def waited_for() -> Path | None:
    """Return the lock that the main thread of this process waits for."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_WAITS_IN) and frame.f_code.co_name == "wait":
            return Path(frame.f_locals["self"].lock_file_path)
        frame = frame.f_back
    return None


def compiles() -> bool:
    """Return whether the main thread of this process compiles an extension."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COMPILES_IN):
            return True
        frame = frame.f_back
    return False


def told(lock: Path) -> tuple[str, bool]:
    """Return what is said of a lock that is waited for, and whether nobody here will release it."""
    if is_held(lock):
        return f"another process of this machine builds the extension ({lock})", False
    made = ""
    with contextlib.suppress(OSError):
        made = time.strftime(" of %Y-%m-%d %H:%M", time.localtime(lock.stat().st_mtime))
    return (
        f"the lock file{made} of an extension, which no process of this machine holds: a start "
        f"that was killed while it compiled left it, unless another machine compiles there now; "
        f"if not: rm {lock}",
        True,
    )


def drop(pid: int) -> None:
    """End the compilers that a process started, and remove the locks that it holds: the process
    itself is about to end, or was killed just now.
    """
    if not (locks := held_by(pid)):
        return
    for child in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for lock in locks:
        with contextlib.suppress(OSError):
            lock.unlink()


def held_as(pid: int) -> dict[Path, int]:
    """Return the locks that a process holds, each with its inode: a later lock of that name is
    another's.
    """
    found = {}
    for path in held_by(pid):
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_ino
    return found


def clear(locks: Mapping[Path, int], orphans: Iterable[int]) -> list[Path]:
    """End compilers whose process was killed, and remove the locks that it held; return these."""
    for orphan in orphans:
        for process in (*descendants(orphan), orphan):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    removed = []
    for lock, inode in locks.items():
        with contextlib.suppress(OSError):
            if lock.stat().st_ino == inode and not is_held(lock):
                lock.unlink()
                removed.append(lock)
    return removed


def descendants(pid: int) -> list[int]:
    """Return the living children of a process, theirs, and so on."""
    return [found for child in children(pid) for found in (child, *descendants(child))]
