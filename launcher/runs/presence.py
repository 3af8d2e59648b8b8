"""Whether ranks of a run are at work, also when whatever started them was killed: each holds a
shared lock on one file.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

from motet.launcher.runs.rundir import RunDir


@contextlib.contextmanager
def be_present(run: RunDir) -> Iterator[None]:
    """Hold the run as one of its ranks; the kernel lets go however this process ends.

    A file system without locks holds nothing.
    """
    with open(run.presence, "a", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def ranks_at_work(run: RunDir) -> bool:
    """Return whether a rank holds the run."""
    with open(run.presence, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
