"""What a start waits for is told by who waits, and one that only waits ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motet.core.files import write_json
from motet.launcher.launch.command import ONE_NODE, NodePlace
from motet.launcher.launch.start_watch import StartWatch
from motet.launcher.runs import extension_locks
from motet.launcher.runs.attempts import STOP_MARKER
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.starting import (
    Starting,
    StartNote,
    StartStage,
    folder_of,
    notes_in,
    waiting_of,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r")
    run.create()
    run.next_attempt()
    return run


def note(run: RunDir, who: str, stage: StartStage, what: str, since: float, waits: bool) -> None:
    folder = folder_of(run.attempt(1))
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{who}.json", asdict(StartNote(who, stage, what, since, waits, "n1")))


class Agent:
    """Stands in for torchrun."""

    def __init__(self, seen: bool = True, asked: Any = None, code: int = 0) -> None:
        self.seen, self.asked, self.killed = seen, asked, False
        self.process = SimpleNamespace(returncode=code)

    def kill(self) -> None:
        self.killed = True


class Told:
    """A watch with a clock and an ear."""

    def __init__(
        self, run: RunDir, nodes: NodePlace = ONE_NODE, hosts: tuple[str, ...] = ()
    ) -> None:
        self.lines: list[str] = []
        self.now = 1000.0
        self.clock: Any = lambda: self.now
        self.watch = StartWatch(
            run, 1, 600.0, nodes, hosts, lambda: self.clock(), self.lines.append, lambda: self.now
        )

    def look(self, now: float, agent: Agent) -> list[str]:
        self.now, self.lines[:] = now, []
        self.watch.look(agent)  # type: ignore[arg-type]
        return list(self.lines)


def test_a_stage_is_written_down_once_it_lasts_and_gone_when_it_is_over(tmp_path: Path) -> None:
    quick = Starting(tmp_path, "rank-0", after_s=60.0)
    quick.at(StartStage.MEETING, "the others")
    slow = Starting(tmp_path, "rank-1", after_s=0.0)
    slow.at(StartStage.ENGINE, "the model", detail=lambda: ("a lock", True))
    deadline = time.monotonic() + 30
    while not notes_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    (found,) = notes_in(tmp_path)
    assert (found.who, found.what, found.waits) == ("rank-1", "a lock", True)
    slow.over()
    quick.over()
    assert not notes_in(tmp_path) or slow._over.is_set()


def test_who_is_in_the_earliest_stage_is_what_the_others_wait_for(run: RunDir) -> None:
    note(run, "rank-0", StartStage.MEETING, "all 4 ranks to meet", 10.0, True)
    note(run, "rank-1", StartStage.MEETING, "all 4 ranks to meet", 9.0, True)
    note(run, "rank-3", StartStage.IMPORTS, "torch to be imported", 8.0, False)
    found = waiting_of(run)
    assert found is not None
    assert found.text == "rank 3 on n1 is waiting for torch to be imported"
    assert not found.waits
    (folder_of(run.attempt(1)) / "rank-3.json").unlink()
    found = waiting_of(run)
    assert found is not None
    assert (found.text, found.since) == ("ranks 0, 1 are waiting for all 4 ranks to meet", 9.0)


def test_a_start_is_told_of_after_twenty_seconds_then_each_minute_and_ends_at_its_limit(
    run: RunDir,
) -> None:
    told, agent = Told(run), Agent()
    note(run, "rank-0", StartStage.MEETING, "all 2 ranks to meet at h:1", 1000.0, True)
    assert told.look(1012.0, agent) == []
    text = "motet: not training yet: rank 0 on n1 is waiting for all 2 ranks to meet at h:1"
    assert told.look(1020.0, agent) == [f"{text}, for 0:20 (at most 10:00)"]
    assert told.look(1060.0, agent) == []
    assert told.look(1080.0, agent) == [f"{text}, for 1:20 (at most 10:00)"]
    assert not agent.killed
    (line,) = told.look(1600.0, agent)
    assert agent.killed
    error = (run.attempt(1) / "error.txt").read_text()
    assert "all 2 ranks to meet at h:1" in error
    assert "layout.timeout_s" in error
    assert line == f"motet: {error}".rstrip()


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_is_set_neither_ends_a_start_nor_lets_it_wait_on(
    run: RunDir, jump: float
) -> None:
    told, agent = Told(run), Agent()
    note(run, "rank-0", StartStage.MEETING, "all 2 ranks to meet", 1000.0, True)
    told.clock = lambda: told.now + (jump if told.now > 1005.0 else 0.0)
    assert told.look(1012.0, agent) == []
    told.look(1590.0, agent)
    assert not agent.killed
    told.look(1650.0, agent)
    assert agent.killed


def test_work_has_no_limit_and_what_is_over_is_not_told(run: RunDir) -> None:
    told, agent = Told(run), Agent()
    note(run, "rank-0", StartStage.CHECKS, "the corpora", 1000.0, False)
    assert len(told.look(9000.0, agent)) == 1
    assert not agent.killed
    (folder_of(run.attempt(1)) / "rank-0.json").unlink()
    assert told.look(9100.0, agent) == []


def test_machines_that_did_not_come_are_told_by_name(run: RunDir) -> None:
    nodes = NodePlace(3, 0, "n1:29400", 0, 6)
    told = Told(run, nodes, ("n1", "n2", "n3"))
    (folder_of(run.attempt(1)) / "came-2").touch()
    assert told.watch._machines() == (
        "the rendezvous at n1:29400: n2 of 3 machines did not come", True,
    )  # fmt: skip
    (folder_of(run.attempt(1)) / "came-1").touch()
    found = told.watch._machines()
    assert found is not None
    assert "do not meet" in found[0]
    by_files = Told(run, replace(nodes, folder="/runs/r/attempts/1/meeting")).watch._machines()
    assert by_files is not None
    assert by_files[0].startswith("the meeting in /runs/r/attempts/1/meeting: ")
    unnamed = Told(run, NodePlace(4, 1, "h:1", 0, 8)).watch._machines()
    assert unnamed is not None
    assert "machine 3 of 4" in unnamed[0]


def test_a_stop_before_there_are_ranks_is_a_stop_and_a_rendezvous_that_failed_says_so(
    run: RunDir,
) -> None:
    told = Told(run)
    note(run, "machine-0", StartStage.MACHINES, "the rendezvous at h:1", 1000.0, True)
    told.look(1030.0, Agent(seen=False))
    told.watch.close(Agent(seen=False, code=1))  # type: ignore[arg-type]
    assert "the rendezvous at h:1" in (run.attempt(1) / "error.txt").read_text()
    assert not folder_of(run.attempt(1)).exists()
    other = Told(run)
    other.watch.close(Agent(seen=False, asked=15, code=-9))  # type: ignore[arg-type]
    assert (run.attempt(1) / STOP_MARKER).exists()


WAITER = """
import sys
from torch.utils.file_baton import FileBaton
from motet.launcher.runs import extension_locks
import threading, time
def look():
    while (lock := extension_locks.waited_for()) is None:
        time.sleep(0.02)
    print(*extension_locks.told(lock), sep="|", flush=True)
threading.Thread(target=look, daemon=True).start()
FileBaton(sys.argv[1]).wait()
"""
HOLDER = """
import subprocess, sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(compiler.pid, flush=True)
time.sleep(600)
"""


def test_a_lock_that_nobody_holds_is_told_and_one_that_is_ours_goes_with_its_compilers(
    tmp_path: Path,
) -> None:
    lock = tmp_path / "torch_extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    start = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], **start) as holder:
        assert holder.stdout is not None
        compiler = int(holder.stdout.readline())
        assert extension_locks.held_by(holder.pid) == [lock]
        with subprocess.Popen([sys.executable, "-c", WAITER, str(lock)], **start) as waiter:
            assert waiter.stdout is not None
            text, forever = waiter.stdout.readline().strip().split("|")
            assert "another process of this machine builds" in text
            assert forever == "False"
            waiter.kill()
        extension_locks.drop(holder.pid)
        assert not lock.exists()
        assert extension_locks.is_held(lock) is False
        holder.kill()
    gone = f"/proc/{compiler}/stat"
    deadline = time.monotonic() + 30
    while os.path.exists(gone) and " Z " not in Path(gone).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.touch()
    text, forever = extension_locks.told(lock)  # type: ignore[assignment]
    assert f"rm {lock}" in text
    assert forever is True
