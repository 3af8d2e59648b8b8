"""The ranks of one machine find each other through files that nobody else can read or write."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from motet.launcher.launch.command import NodePlace

_IS_UP = 1  # IFF_UP of Linux's netdevice(7)


@contextlib.contextmanager
def found_here(nodes: NodePlace) -> Iterator[NodePlace]:
    """Yield the place of a machine; where it is the only one, with a private folder on its own disk
    (files of a shared one may not be lockable), which is removed at the end.
    """
    if nodes.count > 1:
        yield nodes
        return
    with tempfile.TemporaryDirectory(prefix="motet-", ignore_cleanup_errors=True) as folder:
        yield replace(nodes, endpoint=folder, interface=_loopback())


def _loopback() -> str:
    """Return the name of the loopback interface; "" where there is none, or it is down."""
    try:
        flags = int(Path("/sys/class/net/lo/flags").read_text(), 16)
    except (OSError, ValueError):
        return ""
    return "lo" if flags & _IS_UP else ""
