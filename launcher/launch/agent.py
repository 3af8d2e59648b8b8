"""torchrun on one machine, watched: signals reach its ranks, and no process stays behind, however
one of them ends.

Used by `motet train` at a terminal and by a Slurm job on each of its nodes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from motet.core.processes import adopt_orphans, catches, children, die_with_parent, reap
from motet.launcher.launch.alone import closed
from motet.launcher.runs import extension_locks
from motet.launcher.runs.attempts import (
    HANDED_OVER,
    facts_of,
    numbers,
    refusal,
    settle,
    stopped_early,
)
from motet.launcher.runs.ranks import ranks_of
from motet.launcher.runs.rundir import RunDir

FINISHED_OR_STOPPED, CRASHED, USER_ERROR, OTHER_RANKS = 0, 1, 2, 4
POLL_S, LOOK_S = 0.1, 0.5
ORPHAN_GRACE_S = 120.0
"""How long ranks may save when torchrun is gone: longer than a checkpoint takes to write."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class LaunchWatcher(Protocol):
    """Who looks at a launch while it goes on."""

    def look(self, agent: Agent) -> None:
        """Called twice a second."""

    def close(self, agent: Agent) -> None:
        """Called once, when no process is left."""


class Agent:
    """torchrun (or `accelerate launch`) and the ranks that it starts on this machine."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], held: int) -> None:
        """Start it; `held` is a file descriptor that it keeps open (the lock of the run), -1 for
        none.
        """
        self.asked: signal.Signals | None = None
        self.told: set[int] = set()
        self.killed = False
        self.seen = False
        """Whether a rank was ever started here."""
        self.building: dict[int, dict[Path, int]] = {}
        """The locks of extensions that each rank holds while it compiles."""
        starter = os.getpid()
        self.others = frozenset(children(starter))

        def prepare() -> None:
            """Between fork and exec.

            SIGUSR1 would kill torchrun, which knows nothing of it; ranks handle it themselves.
            """
            die_with_parent(signal.SIGTERM)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            if os.getppid() != starter:
                os._exit(1)

        adopt_orphans()
        self.process = subprocess.Popen(
            list(command),
            env=dict(environment),
            start_new_session=True,
            pass_fds=(held,) if held >= 0 else (),
            preexec_fn=prepare,
        )

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Ask all ranks here to stop (they agree with the others); a second Ctrl-C kills them."""
        if self.asked is None:
            self.asked = signal.Signals(number)
            print(
                "motet: stopping: saving a checkpoint first (Ctrl-C again to stop at once)",
                file=sys.stderr,
            )
        elif number == signal.SIGINT:
            self.kill()

    def wait(
        self,
        over: Callable[[], bool] = lambda: False,
        look: Callable[[Agent], None] = lambda agent: None,
    ) -> int:
        """Return torchrun's exit code; passes a stop on to ranks as they appear.

        Args:
            over: whether ranks have left word that nothing is to be done any more; torchrun, which
                would start them anew, is killed.
            look: called twice a second.
        """
        looked = time.monotonic()
        while (code := self.process.poll()) is None:
            if self.asked is not None:
                self._pass_on()
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                ranks = self.ranks()
                self.seen = self.seen or bool(ranks)
                self._clear_builds(ranks)
                if over() or (self.asked is not None and not self.seen):
                    self.kill()  # before there are ranks, torchrun waits and hears no stop
                look(self)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(POLL_S)
        return code

    def _clear_builds(self, ranks: Sequence[int]) -> None:
        """When a rank was killed from outside while it compiled, end its compilers, which are
        orphans of this process by now, and remove its lock: every later start would wait for it.
        """
        for rank in self.building.keys() - set(ranks):
            mine = {*self.others, self.process.pid}
            orphans = [child for child in children(os.getpid()) if child not in mine]
            for lock in extension_locks.clear(self.building[rank], orphans):
                print(
                    f"motet: a rank was killed while it compiled an extension; removed {lock}",
                    file=sys.stderr,
                )
        self.building = {rank: locks for rank in ranks if (locks := extension_locks.held_as(rank))}

    def _pass_on(self) -> None:
        """Tell each rank once, as soon as it can hear it: one that is still starting would just
        die.
        """
        for rank in self.ranks():
            if rank not in self.told and catches(rank, signal.SIGTERM):
                self.told.add(rank)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGTERM)

    def ranks(self) -> list[int]:
        """Return the living ranks."""
        return ranks_of(self.process.pid)

    def kill(self) -> None:
        """End torchrun and its ranks at once."""
        self.killed = True
        ranks = self.ranks()
        locks = [lock for rank in ranks for lock in extension_locks.held_by(rank)]
        for process in (self.process.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for lock in locks:  # nobody else removes them, and every later start would wait
            with contextlib.suppress(OSError):
                lock.unlink()

    def clear_away(self) -> None:
        """Wait for processes that torchrun left behind (the kernel asked them to stop when it
        died), and kill what stays.
        """
        deadline = time.monotonic() + (0 if self.killed else ORPHAN_GRACE_S)
        while left := reap(os.getpid(), self.others):
            if time.monotonic() > deadline:
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            time.sleep(POLL_S)
        adopt_orphans(False)


@contextlib.contextmanager
def _handling(agent: Agent) -> Iterator[None]:
    """Turn signals to this process into a stop of the run; SIGHUP stays ignored under `nohup`.

    A shell's script starts what it puts behind with SIGINT ignored, and may still send it.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [n for n in FORWARDED if not (nohup and n == signal.SIGHUP)]
    before = {number: signal.signal(number, agent.ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_agent(
    command: Sequence[str],
    environment: Mapping[str, str],
    rundir: RunDir,
    attempt: int,
    held: int = -1,
    first_node: bool = True,
    superseded: Callable[[], bool] = lambda: False,
    watch: LaunchWatcher | None = None,
    meeting: Path | None = None,
) -> int:
    """Run the ranks of this machine to their end.

    Args:
        command, environment: of torchrun (see `command.py`).
        attempt: the one that this launch begins with; restarts by torchrun make more.
        held: file descriptor of the run's lock, which torchrun keeps open as well; -1 for none.
        first_node: whether this machine writes down how attempts ended.
        superseded: whether the run was started elsewhere meanwhile, so that the ranks here, which
            wait for lost ones, must end.
        watch: says what a start waits for.
        meeting: of several machines. torchrun, once its ranks have ended, waits minutes for those
            of a machine whose own was killed; it is ended when that machine has.

    Returns:
        0 when the run finished or stopped as asked, 1 when it crashed, 2 when it was refused, 4
        when other ranks go on with the next stage, unless a stop was asked for.
    """
    agent = Agent(command, environment, held)
    with _handling(agent):
        try:
            look = (lambda _: None) if watch is None else watch.look
            code = agent.wait(
                lambda: (
                    stopped_early(rundir, attempt)
                    or superseded()
                    or (meeting is not None and not agent.ranks() and closed(meeting))
                ),
                look,
            )
        except BaseException:
            agent.kill()
            raise
        finally:
            agent.clear_away()
            if watch is not None:
                watch.close(agent)
    if first_node:
        settle(rundir, attempt)
    found = outcome(rundir, attempt, code)
    return FINISHED_OR_STOPPED if found == OTHER_RANKS and agent.asked is not None else found


def outcome(rundir: RunDir, attempt: int, code: int) -> int:
    """Return how a launch ended, from what its ranks wrote; torchrun's exit code says only whether
    all was well.

    A stop that all ranks agreed on is a good end, whatever killed torchrun meanwhile.
    """
    last = facts_of(rundir.attempt(numbers(rundir, attempt)[-1])).get("reason")
    if last in ("finished", "stopped") or stopped_early(rundir, attempt):
        return FINISHED_OR_STOPPED
    if last == HANDED_OVER:
        return OTHER_RANKS
    if refusal(rundir, attempt):
        return CRASHED if last == "crash_loop" else USER_ERROR
    return FINISHED_OR_STOPPED if code == 0 and last is not None else CRASHED
