"""torchrun and its ranks, played by small scripts: what reaches them, what stays behind, and how a
launch is judged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from motet.core.files import atomic_write, write_json
from motet.core.processes import catches, children
from motet.launcher.launch import agent
from motet.launcher.rank.signals import Lifeline
from motet.launcher.runs.attempts import facts_of
from motet.launcher.runs.ranks import WORKER, ranks_of
from motet.launcher.runs.rundir import RunDir

ROOT = Path(__file__).parents[3]
RANK = """
import os, signal, sys, time
time.sleep(0.3)  # imports; a signal now would kill
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open(sys.argv[1] + str(os.getpid()), "w").close()
time.sleep(60)
"""
TORCHRUN = """
import signal, subprocess, sys
rank, folder = sys.argv[1:]
ranks = [subprocess.Popen([sys.executable, "-c", rank, folder, "motet.launcher.worker"]) for _ in range(2)]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""
START = """
import sys
sys.path.insert(0, {root!r})
from motet.launcher.launch.agent import run_agent
from motet.launcher.runs.rundir import RunDir
import os
sys.exit(run_agent([sys.executable, "-c", sys.argv[1], sys.argv[2], sys.argv[3]], os.environ, RunDir(sys.argv[4]), 1))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r")
    run.create()
    run.next_attempt()
    return run


def start(run: RunDir, tmp_path: Path, *ignored: signal.Signals) -> subprocess.Popen[bytes]:
    """Start a process that runs the agent over a played torchrun, some signals ignored as a shell
    leaves them.
    """

    def prepare() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    script = START.format(root=str(ROOT))
    (tmp_path / "up").mkdir()
    ups = str(tmp_path / "up") + "/"
    return subprocess.Popen(
        [sys.executable, "-c", script, textwrap.dedent(TORCHRUN), RANK, ups, str(run.root)],
        preexec_fn=prepare,
    )


def wait(ready: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and pid in _living()]


def _living() -> set[int]:
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            if stat.rpartition(")")[2].split()[0] != "Z":
                found.add(int(entry))
    return found


def descendants(pid: int) -> list[int]:
    return [p for child in children(pid) for p in (child, *descendants(child))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_waits_until_ranks_can_hear_it_and_reaches_each(
    run: RunDir, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(run, tmp_path)
    wait(lambda: len(descendants(process.pid)) == 3)
    ranks = ranks_of(descendants(process.pid)[0])
    assert not any(catches(rank, signal.SIGTERM) for rank in ranks), "they are still starting"
    write_json(run.attempt(1) / "attempt.json", {"attempt": 1, "reason": "stopped"})
    process.send_signal(number)
    assert process.wait(20) == 0
    assert len(list((tmp_path / "up").iterdir())) == 2, "no rank was killed before it could hear"
    assert not alive(ranks)


def test_a_run_that_a_script_put_behind_stops_on_the_interrupt_that_shells_ignore_for_it(
    run: RunDir, tmp_path: Path
) -> None:
    process = start(run, tmp_path, signal.SIGINT, signal.SIGHUP)
    wait(lambda: len(list((tmp_path / "up").iterdir())) == 2)
    write_json(run.attempt(1) / "attempt.json", {"attempt": 1, "reason": "stopped"})
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None, "nohup holds"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def test_no_rank_stays_when_torchrun_is_killed(run: RunDir, tmp_path: Path) -> None:
    process = start(run, tmp_path)
    wait(lambda: len(list((tmp_path / "up").iterdir())) == 2)
    torchrun, *ranks = descendants(process.pid)
    os.kill(torchrun, signal.SIGKILL)
    wait(lambda: set(children(process.pid)) == set(ranks))  # adopted, not lost
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)  # what the kernel does for ranks that asked for it
    assert process.wait(20) == 1
    assert not alive([torchrun, *ranks])


def test_a_second_interrupt_kills_at_once(run: RunDir, tmp_path: Path) -> None:
    process = start(run, tmp_path)
    wait(lambda: len(descendants(process.pid)) == 3)
    everyone = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert not alive(everyone)


def test_torchrun_ends_when_the_launcher_is_killed(run: RunDir, tmp_path: Path) -> None:
    process = start(run, tmp_path)
    wait(lambda: len(list((tmp_path / "up").iterdir())) == 2)
    torchrun, *ranks = descendants(process.pid)
    process.kill()
    wait(lambda: not alive([torchrun]))
    for rank in alive(ranks):  # real ranks ask the kernel for a signal of their own
        os.kill(rank, signal.SIGKILL)


@pytest.mark.parametrize(
    ("reason", "code", "expected"),
    [
        ("finished", 0, 0),
        ("stopped", 1, 0),  # torchrun itself was told to end, after the ranks had saved
        ("crashed", 1, 1),
        ("running", 1, 1),
        (None, 1, 1),
    ],
)
def test_a_launch_is_judged_by_what_its_ranks_wrote(
    run: RunDir, reason: str | None, code: int, expected: int
) -> None:
    if reason:
        write_json(run.attempt(1) / "attempt.json", {"attempt": 1, "reason": reason})
    assert agent.outcome(run, 1, code) == expected


def test_a_refusal_is_the_users_mistake_but_a_crash_loop_is_a_crash(run: RunDir) -> None:
    atomic_write(run.attempt(1) / "error.txt", "no\n")
    assert agent.outcome(run, 1, 0) == 2
    write_json(run.attempt(1) / "attempt.json", {"attempt": 1, "reason": "crash_loop"})
    assert agent.outcome(run, 1, 0) == 1


def ending(run: RunDir, phase: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """What a rank ends with when a signal comes, None when it goes on; `ranks` of 2 live."""
    codes: list[int] = []
    monkeypatch.setattr("motet.launcher.rank.signals.ranks_of", lambda parent: list(range(ranks)))

    def end_now(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr("motet.launcher.rank.signals.end_now", end_now)
    lifeline = Lifeline(run.attempt(1), 2)
    lifeline.belongs_to(run.attempt(1), 1)
    lifeline.phase = phase
    try:
        lifeline.consider()
    except SystemExit:
        return codes[0]
    return None


def test_a_signal_stops_a_rank_at_once_only_while_it_is_starting(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ending(run, "training", 2, monkeypatch) is None, "all ranks agree on the step"
    assert not (run.attempt(1) / "stop").exists()
    assert ending(run, "starting", 2, monkeypatch) == 75
    assert (run.attempt(1) / "stop").exists()


@pytest.mark.parametrize("phase", ["starting", "training"])
def test_a_signal_that_comes_because_a_peer_died_is_no_stop(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    assert ending(run, phase, 1, monkeypatch) == 76
    assert not (run.attempt(1) / "stop").exists()
    assert "remote process exited" in (run.attempt(1) / "crash-1.txt").read_text()


def test_ranks_that_end_one_after_the_other_miss_nobody(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ending(run, "ending", 1, monkeypatch) is None
    assert facts_of(run.attempt(1)) == {}


def test_only_ranks_count_as_ranks() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", WORKER])
    try:
        wait(lambda: rank.pid in ranks_of(os.getpid()))
        assert other.pid not in ranks_of(os.getpid())
    finally:
        other.kill()
        rank.kill()
        other.wait()
        rank.wait()
    assert rank.pid not in ranks_of(os.getpid())


BUILDER = """
import os, pathlib, subprocess, sys, time
lock = pathlib.Path(sys.argv[1], "torch_extensions", "x", "lock")
if pathlib.Path(sys.argv[1], "first").exists():
    while lock.exists():  # as ranks that start anew wait for it
        time.sleep(0.05)
    sys.exit(0)
lock.parent.mkdir(parents=True)
pathlib.Path(sys.argv[1], "first").touch()
held = os.open(lock, os.O_CREAT | os.O_EXCL)
compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1], "pids").write_text(f"{os.getpid()} {compiler.pid}")
time.sleep(600)
"""
BUILDS_TWICE = """
import subprocess, sys
rank, folder = sys.argv[1:]
for _ in range(2):
    subprocess.run([sys.executable, "-c", rank, folder, "motet.launcher.worker"])
"""


def test_a_rank_that_is_killed_while_it_compiles_leaves_no_lock_and_no_compiler(
    run: RunDir, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", START.format(root=str(ROOT / ".src"))]
    words += [BUILDS_TWICE, BUILDER, str(tmp_path), str(run.root)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    pids = tmp_path / "pids"
    wait(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    rank, compiler = map(int, pids.read_text().split())
    time.sleep(3 * agent.LOOK_S)  # the launcher looks twice a second
    os.kill(rank, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert "a rank was killed while it compiled an extension; removed" in said
    assert not (tmp_path / "torch_extensions" / "x" / "lock").exists()
    assert compiler not in children(os.getpid())
    assert not Path(f"/proc/{compiler}").exists()
