"""What a signal means for a rank, decided beside its main thread, which may be deep inside a
collective or an import.

A rank cannot tell by the signal alone why it came: torchrun sends SIGTERM to ask for a stop, and
also to clear away the ranks that are left when one of them died. It can tell by its peers: when a
rank of this machine is gone, there is nothing to save together any more, so this one ends at once
and torchrun can restart all of them. (A peer on another machine is missed by the next collective:
gloo fails at once; NCCL may not, and then torchrun kills what is left after 30 s.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from motet.core.files import atomic_write
from motet.core.processes import die_with_parent
from motet.launcher.runs import extension_locks
from motet.launcher.runs.attempts import STOP_MARKER
from motet.launcher.runs.ranks import ranks_of

STOPPED_EARLY, PEER_GONE = 75, 76
LOOKS, LOOK_S = 3, 0.1
PEER_GONE_TEXT = "Ended because another rank of this machine was gone (remote process exited)\n"


class Lifeline:
    """The phases of a rank's life: "starting", "training", "ending".

    Args:
        launch: folder of the attempt that the launcher started. A stop that comes before training
            leaves its marker there, so that ranks which torchrun starts anew end at once.
        ranks: of this machine.
    """

    def __init__(self, launch: Path, ranks: int) -> None:
        self.launch, self.ranks, self.parent = launch, ranks, os.getppid()
        self.phase = "starting"
        self.attempt: Path | None = None
        self.rank = 0

    def watch(self) -> Lifeline:
        """Learn of every handled signal from now on, and of the death of the parent (main thread
        only).
        """
        ours, kernels = socket.socketpair()
        kernels.setblocking(False)
        signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
        self._sockets = (ours, kernels)  # they live as long as this object
        threading.Thread(target=self._follow, args=(ours,), name="lifeline", daemon=True).start()
        die_with_parent(signal.SIGTERM)
        return self

    def belongs_to(self, attempt: Path, rank: int) -> None:
        """The group is formed: this is the folder of the attempt, and the rank's number."""
        self.attempt, self.rank = attempt, rank

    def trains(self) -> None:
        """From now on a stop is agreed on by all ranks, between steps."""
        self.phase = "training"

    def ends(self) -> None:
        """What matters is on disk: ranks end one after the other, and none is missed."""
        self.phase = "ending"

    def _follow(self, ours: socket.socket) -> None:
        while ours.recv(64):
            self.consider()

    def consider(self) -> None:
        """Act on a signal that came just now."""
        if self.phase == "ending":
            return
        if self._misses_a_rank():
            if self.attempt is not None:
                with contextlib.suppress(OSError):
                    atomic_write(self.attempt / f"crash-{self.rank}.txt", PEER_GONE_TEXT)
            # Straight to the log: the main thread may hold the stream.
            with contextlib.suppress(OSError):
                os.write(2, PEER_GONE_TEXT.encode())
            extension_locks.drop(os.getpid())
            end_now(PEER_GONE)
        if self.phase == "starting":
            with contextlib.suppress(OSError):
                atomic_write(self.launch / STOP_MARKER, "")
            extension_locks.drop(os.getpid())
            end_now(STOPPED_EARLY)

    def _misses_a_rank(self) -> bool:
        """Whether the parent lives and has lost a rank. A parent that is killed dies thread by
        thread: for a moment it is still there, and has no children.
        """
        for _ in range(LOOKS):
            if os.getppid() != self.parent or len(ranks_of(self.parent)) >= self.ranks:
                return False
            time.sleep(LOOK_S)
        return os.getppid() == self.parent


def end_now(code: int) -> NoReturn:
    """End this process without waiting for its threads, which may wait for a rank that is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
