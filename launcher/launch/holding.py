"""One launch at a time holds a run folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from motet.core.errors import UserError
from motet.core.locks import Taken, held
from motet.launcher.runs.presence import ranks_at_work
from motet.launcher.runs.rundir import RunDir


@contextlib.contextmanager
def only_one(rundir: RunDir) -> Iterator[int]:
    """Hold the run folder for one launch; the kernel lets go of it however this process ends.

    Yields the file descriptor that holds it: a child that inherits it holds the folder as well.

    Raises:
        UserError: another attempt of the run is under way, or its last ranks are still at work.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(held(rundir.lock))
        except Taken:
            raise UserError(f"{rundir.root} is being trained already, by another process") from None
        except OSError as error:
            raise UserError(f"{rundir.lock} cannot be held: {error}") from None
        if lock.path != rundir.lock:
            print(
                f"motet: warning: the file system of {rundir.root} has no locks (flock), so only "
                "starts on this machine are kept apart: start this run nowhere else meanwhile",
                file=sys.stderr,
            )
        if ranks_at_work(rundir):
            raise UserError(
                f"{rundir.root} is being trained already: ranks of its last attempt are still at "
                "work; "
                "they save and end by themselves once what started them is gone"
            )
        yield lock.descriptor
