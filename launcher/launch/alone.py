"""The processes of a launch find each other through files that nobody else can read or write, and
talk over the one network that the launch uses.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from motet.core.errors import UserError
from motet.launcher.launch.command import NodePlace

CLOSED = "closed"
"""File of a meeting that is over (`meeting.py`, which imports nothing of Motet)."""
_IS_UP = 1  # IFF_UP of Linux's netdevice(7)
_SIOCGIFADDR = 0x8915


@contextlib.contextmanager
def found_here(nodes: NodePlace, meeting: Path) -> Iterator[NodePlace]:
    """Yield the place of a machine with a private folder: of several machines `meeting`, which all
    of them see; of a single one a folder on its own disk (files of a shared one may not be
    lockable), which is removed at the end.

    Args:
        meeting: of this launch alone.

    Raises:
        UserError: the folder is someone else's, or its files cannot be locked.
    """
    if nodes.count > 1:
        private_folder(meeting)
        interface = interface_towards(nodes.host)
        try:
            yield replace(nodes, folder=str(meeting), interface=interface)
        finally:
            with contextlib.suppress(OSError):  # nobody need wait for this machine
                (meeting / CLOSED).touch()
        return
    with tempfile.TemporaryDirectory(prefix="motet-", ignore_cleanup_errors=True) as folder:
        yield replace(nodes, folder=folder, interface=_loopback())


def closed(meeting: Path) -> bool:
    """Return whether a machine of a launch has ended."""
    try:
        return CLOSED in os.listdir(meeting)
    except OSError:
        return False


def private_folder(folder: Path) -> None:
    """Make a folder that is its owner's alone, or check that it is: what lies in it is believed.

    Raises:
        UserError: it is not, or its files cannot be locked; says why.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        above = folder.parent.stat()
        # Where root is nobody, as on many NFS, what it makes is nobody's: told by the folder above,
        # which must be for nobody else to write to.
        mine = found.st_uid == os.geteuid() or (
            found.st_uid == above.st_uid and not above.st_mode & 0o022
        )
        if not folder.is_dir() or folder.is_symlink() or not mine or found.st_mode & 0o077:
            raise UserError(
                f"{folder} is not a folder of yours alone: machines of a launch meet there and "
                "believe what they find; remove it, and see who may write to "
                f"{folder.parent}"
            )
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; several machines meet in the run's folder, on a file "
            "system that all of them see and that has flock (Lustre: mounted with -o flock; NFS: "
            "not with nolock or local_lock)"
        ) from None


def interface_towards(host: str) -> str:
    """Return the name of this machine's interface that has the address by which `host` is reached
    from here; "" where it is not known. Nothing is sent.
    """
    try:
        found = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(found[0][4])
            own = probe.getsockname()[0]
    except OSError:
        return ""
    names = [name for _, name in socket.if_nameindex()]
    if own.startswith("127."):
        return _loopback()
    return next((name for name in names if _address(name) == own), "")


def _address(interface: str) -> str:
    """The IPv4 address of an interface; "" where it has none."""
    asked = array.array("B", struct.pack("256s", interface.encode()[:15]))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SIOCGIFADDR, asked)
    except OSError:
        return ""
    return socket.inet_ntoa(asked.tobytes()[20:24])


def _loopback() -> str:
    """Return the name of the loopback interface; "" where there is none, or it is down."""
    try:
        flags = int(Path("/sys/class/net/lo/flags").read_text(), 16)
    except (OSError, ValueError):
        return ""
    return "lo" if flags & _IS_UP else ""
