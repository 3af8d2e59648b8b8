"""Which rank made an attempt fail, from what the ranks left in the attempt's folder.

Every rank leaves `pid-N` when it starts, touches it while it trains, and removes nothing. A rank
that fails leaves `crash-N.txt`. One that is killed, or falls silent, leaves no more than an old
`pid-N`, while the others fail for want of it.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from motet.core.files import atomic_write
from motet.core.processes import birth

TOUCH_EVERY_S = 5.0
_LOST_A_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out",
    "timed out",
    "NCCL communicator was aborted",
    "remote process exited",
)


class Heartbeat:
    """This rank's sign of life."""

    def __init__(self, attempt: Path, rank: int) -> None:
        self.path = attempt / f"pid-{rank}"
        self.touched = time.monotonic()
        atomic_write(self.path, f"{os.getpid()} {socket.gethostname()} {birth(os.getpid())}")

    def touch(self) -> None:
        """Say that this rank lives; at most every `TOUCH_EVERY_S`."""
        now = time.monotonic()
        if now - self.touched >= TOUCH_EVERY_S:
            self.touched = now
            os.utime(self.path)


def blame(attempt: Path) -> str | None:
    """Return which rank failed first, as far as the folder tells, in one line; None when it does
    not tell.
    """
    signs = {int(path.name.removeprefix("pid-")): path for path in attempt.glob("pid-*")}
    crashes = {
        int(path.stem.removeprefix("crash-")): path.read_text(errors="replace")
        for path in attempt.glob("crash-*.txt")
    }
    own_faults = {
        rank: text
        for rank, text in crashes.items()
        if not any(sign in text for sign in _LOST_A_PEER)
    }
    if own_faults:
        rank = min(own_faults, key=lambda r: (attempt / f"crash-{r}.txt").stat().st_mtime)
        last = own_faults[rank].strip().splitlines()[-1]
        return f"rank {rank} failed: {last} (crash-{rank}.txt)"
    silent = [rank for rank in signs if rank not in crashes]
    if not silent or not crashes:
        return None
    rank = min(silent, key=lambda r: signs[r].stat().st_mtime)
    pid, host, *_ = [*signs[rank].read_text().split(), "?", "?"]
    seen = time.strftime("%H:%M:%S", time.localtime(signs[rank].stat().st_mtime))
    return (
        f"rank {rank} (process {pid} on {host}) died or fell silent, and the others failed for "
        "want of it; "
        f"its last sign of life was at {seen}: was it killed, or out of memory?"
    )
