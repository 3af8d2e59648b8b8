"""Whether ranks of a run are at work, also when whatever started them was killed: each holds a
shared lock on one file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from motet.core.locks import Taken, held
from motet.launcher.runs.rundir import RunDir


@contextlib.contextmanager
def be_present(run: RunDir) -> Iterator[None]:
    """Hold the run as one of its ranks; the kernel lets go however this process ends.

    Where nothing can be locked, here or on this machine, nothing is held.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(held(run.presence, shared=True))
        yield


def ranks_at_work(run: RunDir) -> bool:
    """Return whether a rank holds the run."""
    try:
        with held(run.presence):
            return False
    except Taken:
        return True
    except OSError:
        return False
