"""Says what a launch waits for before it trains, and ends one that waits too long."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from motet.core import format
from motet.core.files import atomic_write
from motet.launcher.launch.agent import Agent
from motet.launcher.launch.command import NodePlace
from motet.launcher.runs.attempts import STOP_MARKER
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.starting import (
    TOLD_AFTER_S,
    TOLD_AGAIN_S,
    Starting,
    StartStage,
    Waiting,
    folder_of,
    waiting_in,
)

LOOK_S = 5.0
"""How often notes are looked for as long as there are none: their folder may be on a slow disk."""


class StartWatch:
    """What the launcher of one machine knows of a start.

    Args:
        run, attempt: which the launch began with.
        limit_s: how long a start may do nothing but wait.
        nodes: the machines, and which one this is.
        hosts: the names of all machines, () where they are not known.
        clock: Unix time, which may jump.
        steady: seconds that only grow: what lasts too long is judged by these.
        say: tells the user.
    """

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        limit_s: float,
        nodes: NodePlace,
        hosts: Sequence[str] = (),
        clock: Callable[[], float] = time.time,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.attempt = run.attempt(attempt)
        self.folder = folder_of(self.attempt)
        self.limit_s, self.nodes, self.hosts = limit_s, nodes, hosts
        self._clock, self._steady, self._say = clock, steady, say
        self._told: tuple[str, float] | None = None
        self._waiting: Waiting | None = None
        self._looked = float("-inf")
        self._began = steady()
        self._noted: tuple[float, float] | None = None
        self._own = Starting(self.folder, f"machine-{nodes.rank}")
        self._own.at(
            StartStage.MACHINES, "torchrun to start ranks", waits=True, detail=self._machines
        )
        if nodes.count > 1:
            self._arrive()

    def _arrive(self) -> None:
        """Leave word that this machine has come, for the others to see."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"came-{self.nodes.rank}").touch()

    def _machines(self) -> tuple[str, bool] | None:
        """Which machines have not come, by name where it is known."""
        if self.nodes.count == 1:
            return None
        came = {path.name for path in self.folder.glob("came-*")}
        late = [n for n in range(self.nodes.count) if f"came-{n}" not in came]
        names = [self.hosts[n] if self.hosts else f"machine {n}" for n in late]
        endpoint, folder = self.nodes.endpoint, self.nodes.folder
        at = f"the meeting in {folder}" if folder else f"the rendezvous at {endpoint}"
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" * (len(names) > 8))
            return f"{at}: {shown} of {self.nodes.count} machines did not come", True
        return f"{at}: all {self.nodes.count} machines have come, and do not meet there", True

    def look(self, agent: Agent) -> None:
        """Tell what is waited for, and end a launch that waited too long."""
        if agent.seen:
            self._own.over()
        now = self._steady()
        if self._waiting is None and now - self._looked < LOOK_S:
            return
        self._looked, self._waiting = now, waiting_in(self.folder)
        if self._waiting is None or (self.nodes.rank and agent.seen):
            return  # the first machine tells of ranks
        if why := self.overdue():
            self._refuse(why)
            agent.kill()
            return
        waited = self._waited(self._waiting)
        before = self._told
        if waited < TOLD_AFTER_S:
            return
        if before is None or before[0] != self._waiting.text or now - before[1] >= TOLD_AGAIN_S:
            self._told = (self._waiting.text, now)
            limit = f" (at most {format.clock(self.limit_s)})" if self._waiting.waits else ""
            self._say(
                f"motet: not training yet: {self._waiting.text}, for {format.clock(waited)}{limit}"
            )

    def _waited(self, found: Waiting) -> float:
        """Return the seconds that something has lasted: by the clock until it was seen first, but
        no longer than this launch; steadily from there on.
        """
        now = self._steady()
        if self._noted is None or self._noted[0] != found.since:
            known = min(max(0.0, self._clock() - found.since), now - self._began)
            self._noted = (found.since, now - known)
        return now - self._noted[1]

    def overdue(self) -> str:
        """Return why the launch must end, "" where it need not."""
        found = self._waiting
        if found is None or not found.waits or self._waited(found) < self.limit_s:
            return ""
        return (
            f"the start was given up: {found.text}, for {format.clock(self.limit_s)}; "
            "layout.timeout_s is the limit"
        )

    def _refuse(self, why: str) -> None:
        path = self.attempt / "error.txt"
        if not path.exists():
            atomic_write(path, f"{why}\n")
        self._say(f"motet: {why}")

    def close(self, agent: Agent) -> None:
        """Clear notes away, and leave word of how a launch ended that started no rank."""
        self._own.over()
        if not agent.seen:
            if agent.asked is not None:
                atomic_write(self.attempt / STOP_MARKER, "")
            elif agent.process.returncode and self._waiting is not None and self._waiting.waits:
                self._refuse(f"no rank was started: {self._waiting.text}")
        if self.nodes.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
