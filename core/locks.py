"""Locks that go with the process that holds them, on file systems that have locks and on those that
have none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from motet.core.access import lock_mode
from motet.core.hashing import sha256_hex

WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What `flock` answers where the file system has no locks, or its lock service is down."""


class Taken(OSError):
    """Another process holds the lock."""


class Held(NamedTuple):
    """What holds a lock: the file that is locked, which may be a stand-in, and its descriptor."""

    path: Path
    descriptor: int


@contextlib.contextmanager
def held(path: Path, shared: bool = False) -> Iterator[Held]:
    """Hold a lock on a file, without waiting; the kernel lets go however this process ends, once
    all have ended that inherited its open file.

    Where the file system has no locks, a file of this machine stands in for it: then only processes
    of this user and this machine are kept apart.

    Raises:
        Taken: another process holds it.
        OSError: the file cannot be opened.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    file = _open(path)
    try:
        if not _taken(file, path, how):
            path = stand_in(path)
            _private(path.parent)
            there = file
            file = _open(path)
            os.close(there)
            if not _taken(file, path, how):
                raise OSError(errno.ENOLCK, f"neither it nor {path.parent} can be locked")
        yield Held(path, file)
    finally:
        os.close(file)


def _open(path: Path) -> int:
    """Open a file, which is made, or a folder."""
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, lock_mode(path.parent))


def _taken(file: int, path: Path, how: int) -> bool:
    """Take a lock; return whether the file system has any."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise Taken(errno.EWOULDBLOCK, f"{path} is held by another process") from None
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        return False
    return True


def stand_in(path: Path) -> Path:
    """Return the file of this machine that stands in for one that cannot be locked."""
    folder = Path(tempfile.gettempdir()) / f"motet-locks-{os.geteuid()}"
    return folder / f"{sha256_hex(str(path.resolve()))}.lock"


def _private(folder: Path) -> None:
    """Make the folder of stand-ins, or see that it is this user's alone."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(errno.EPERM, f"{folder} is not a folder of yours alone; remove it")
