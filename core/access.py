"""Who may read and write what a run makes: the mode of its folder says so, and every process that
works in it follows that one place, whoever started it, on whichever machine.

Only what may hold a secret, or what machines believe when they meet, has a mode of its own.
"""

from __future__ import annotations

import contextlib
import grp
import os
import stat
from pathlib import Path

from motet.core.errors import UserError

UMASK, PRIVATE, GROUP = "umask", "private", "group"
CHOICES = (UMASK, PRIVATE, GROUP)
_NO_STRANGER_WRITES = 0o002
_GROUP_WRITES = stat.S_IWGRP


def umask_of(mode: int) -> int:
    """Return the umask under which what is made is as open as a folder of this mode; nobody outside
    of its group may ever write.
    """
    return ~mode & 0o077 | _NO_STRANGER_WRITES


def follow(folder: Path) -> None:
    """From now on this process, and those that it starts, make files as open as `folder` is."""
    with contextlib.suppress(OSError):  # it is gone: told by who reads there next
        os.umask(umask_of(folder.stat().st_mode))


def lock_mode(folder: Path) -> int:
    """Return the mode of a lock in `folder`: who may only read there may not open it, as whoever
    can open a file can hold its lock, and so hold up a run.
    """
    return 0o660 if folder.stat().st_mode & _GROUP_WRITES else 0o600


def make_shared(folder: Path, access: str) -> None:
    """Make a folder, with those above it, as open as `access` says; what it will hold follows it.

    Args:
        folder: one that exists keeps its mode where `access` is "umask".
        access: "umask" as this process's; "private" for its owner only; "group": also to be written
            to by the group of the folder above it, which everything inside inherits.

    Raises:
        UserError: the folder above it belongs to a group that this user is not in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if access == GROUP:
        _give_to_group(folder)
    elif access == PRIVATE:
        folder.chmod(0o700)
    elif (mode := stat.S_IMODE(folder.stat().st_mode)) & _NO_STRANGER_WRITES:
        folder.chmod(mode & ~_NO_STRANGER_WRITES)


def _give_to_group(folder: Path) -> None:
    group = folder.parent.stat().st_gid
    refused = UserError(
        f"access=group: {folder.parent} belongs to the group {group_name(group)}, which you are "
        f"not in; chgrp GROUP {folder.parent} to one that you are in, or leave access out"
    )
    if os.geteuid() and group not in (os.getegid(), *os.getgroups()):
        raise refused
    try:
        os.chown(folder, -1, group)
        folder.chmod(folder.stat().st_mode & 0o005 | 0o2770)
    except PermissionError:
        raise refused from None
    if not folder.stat().st_mode & stat.S_ISGID:  # the kernel drops it without a word
        raise refused


def group_name(number: int) -> str:
    """Return the name of a group, its number where it has none."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
