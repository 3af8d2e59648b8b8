"""`motet cancel`: jobs, processes on this host, and loops that are not ours."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motet.core.files import atomic_write
from motet.launcher.commands import cancel
from motet.launcher.runs.rundir import RunDir
from tests.launcher.conftest import Main
from tests.launcher.followed import (
    DEAD_PID,
    NOW,
    FakeClient,
    add_attempt,
    add_jobs,
    iso,
    job,
    make_run,
)

TRAINER = """
import fcntl, json, os, pathlib, signal, sys, time
root, how, number = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def stop(*_):
    (root / "checkpoints/step-00000040").mkdir()
    path = root / "attempts" / number / "attempt.json"
    facts = {**json.loads(path.read_text()), "reason": "stopped", "ended": 1.0}
    facts.pop("sha256")  # of the text before
    path.write_text(json.dumps(facts))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop if how == "saves" else signal.SIG_IGN)
signal.signal(signal.SIGINT, stop if how == "guest" else signal.SIG_IGN)
lock = open(root / ".lock", "w")
if how != "guest":
    fcntl.flock(lock, fcntl.LOCK_EX)
print("ready", flush=True)
time.sleep(60)
"""
Train = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "runs", "r")


@pytest.fixture
def train(run: RunDir) -> Iterator[Train]:
    """Start a process that holds the run and does with signals as told."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str, name: str = "motet.launcher.worker") -> subprocess.Popen[str]:
        number = run.latest_attempt() + 1
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(run.root), how, str(number), name],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        add_attempt(run, pids={0: f"{process.pid} {socket.gethostname()}"}, seen=time.time())
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_run_on_this_machine_saves_and_stops(
    run: RunDir,
    train: Train,
    main: Main,
) -> None:
    process = train("saves")
    code, out, _ = main("cancel", "r", "--dry-run")
    assert (code, out) == (0, f"would ask rank 0 (process {process.pid}) to save and stop\n")
    assert process.poll() is None
    code, out, err = main("cancel", "r")
    assert (code, err) == (0, "")
    assert "stopped; the newest checkpoint is step 40" in out
    assert "to go on: motet resume" in out
    assert process.wait(5) == 0
    assert "there is nothing to cancel" in main("cancel", "r")[1]
    assert not run.cancelled.exists()  # it was no job


def test_a_run_that_does_not_end_in_time_is_told_and_can_be_killed(
    run: RunDir,
    train: Train,
    main: Main,
) -> None:
    process = train("ignores")
    code, out, _ = main("cancel", "r", "--wait", "0.3")
    assert code == 1
    assert "it has not ended in 0.3 s; `motet cancel --now` does not wait for it" in out
    assert main("cancel", "r", "--now")[0] == 0
    assert process.wait(5) == -9


def test_a_process_that_only_has_the_number_of_a_rank_is_left_alone(
    run: RunDir,
    main: Main,
) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        pids = {0: f"{other.pid} {socket.gethostname()}"}
        add_attempt(run, pids=pids, seen=time.time() - 1000)  # before the other one began
        assert "there is nothing to cancel" in main("cancel", "r")[1]
        add_attempt(run, pids=pids, seen=time.time())  # the clock cannot tell, its command does
        code, _, err = main("cancel", "r")
        assert code == 2
        assert "is not found on this machine" in err
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_run_on_another_machine_is_cancelled_there(run: RunDir, main: Main) -> None:
    add_attempt(run, pids={0: "12 node9"}, seen=time.time())
    code, _, err = main("cancel", "r")
    assert code == 2
    assert "is trained on node9, outside of Slurm; run `motet cancel` there" in err


def test_a_loop_of_its_own_gets_what_ctrl_c_does(
    tmp_path: Path,
    run: RunDir,
    train: Train,
    main: Main,
) -> None:
    make_run(tmp_path / "runs", "r", guest=True)
    process = train("guest", "train.py")
    code, out, _ = main("cancel", "r")
    assert code == 0
    assert f"interrupt process {process.pid}, as Ctrl-C does" in out
    assert process.wait(5) == 0
    assert "motet.Guest(..., resume=True)" in out


def test_a_loop_that_ignores_ctrl_c_is_told_to_end_after_a_while(
    tmp_path: Path,
    run: RunDir,
    train: Train,
    main: Main,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cancel, "GUEST_GRACE_S", 0.3)
    make_run(tmp_path / "runs", "r", guest=True)
    process = train("saves", "train.py")  # on SIGTERM
    assert main("cancel", "r")[0] == 0
    assert process.wait(5) == 0


def submitted(run: RunDir, *jobs: Any) -> FakeClient:
    add_attempt(run, pids={0: f"{DEAD_PID} node1"})
    add_jobs(run, *(one.id for one in jobs))
    return FakeClient(*jobs)


def test_a_running_job_is_asked_to_save_and_the_rest_of_its_chain_ends_first(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = submitted(
        run,
        job("7", "RUNNING", start=iso(NOW - 900)),
        job("8", "PENDING", reason="Dependency"),
        job("9_3", "PENDING", reason="Dependency"),
    )
    view, records = cancel._look(run, client)  # type: ignore[arg-type]
    todo = cancel.actions(view, records, False, time.time())
    assert [(a.kind, a.jobs, a.signal) for a in todo] == [
        ("mark", (), ""),
        ("end", ("8", "9_3"), ""),
        ("save", ("7",), "USR1"),
    ]
    cancel.carry_out(todo, view.facts, client)  # type: ignore[arg-type]
    assert run.cancelled.exists()
    assert [call for call in client.calls if call[0] == "cancel"] == [
        ("cancel", None, "8", "9_3"),
        ("cancel", "USR1", "7"),
    ]
    at_once = cancel.actions(view, records, True, time.time())
    assert [(a.kind, a.jobs) for a in at_once] == [("mark", ()), ("end", ("7", "8", "9_3"))]


def test_a_job_that_has_not_begun_to_train_has_nothing_to_save(run: RunDir) -> None:
    client = submitted(run, job("7", "RUNNING", start=iso(time.time() - 5)))
    view, records = cancel._look(run, client)  # type: ignore[arg-type]
    assert view.state.name == "starting"
    kinds = [action.kind for action in cancel.actions(view, records, False, time.time())]
    assert kinds == ["mark", "end"]


def test_cancelling_a_waiting_job_ends_it_and_says_so(
    run: RunDir,
    main: Main,
    slurm: Callable[..., FakeClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cancel, "FIRST_JOB_PAUSE_S", 0.01)
    add_jobs(run, "41")
    client = slurm(job("41", "PENDING"))
    out = main("cancel", "r", "--dry-run")[1]
    assert out.splitlines()[1] == "would end job 41"
    assert not run.cancelled.exists()
    code, out, _ = main("cancel", "r")
    assert code == 0
    assert "cancelled; nothing is saved yet" in out
    assert ("cancel", None, "41") in client.calls
    assert json.loads(main("cancel", "r", "--json")[1])["actions"] == []


def test_a_slurm_that_does_not_answer_leaves_the_mark_and_an_error(
    run: RunDir,
    main: Main,
    slurm: Callable[..., FakeClient],
) -> None:
    add_attempt(run, pids={0: f"{DEAD_PID} node1"})
    add_jobs(run, "41")
    slurm(fails="squeue gave no answer in 15 s")
    code, _, err = main("cancel", "r")
    assert code == 2
    assert "cancel again when Slurm answers" in err
    assert run.cancelled.exists()


def test_a_finished_run_needs_no_cancelling(
    run: RunDir,
    main: Main,
    slurm: Callable[..., FakeClient],
) -> None:
    client = slurm(job("41", "RUNNING"))
    add_attempt(run, "finished")
    add_jobs(run, "41")
    atomic_write(run.done, "100\n")
    assert "is finished: there is nothing to cancel" in main("cancel", "r")[1]
    assert "--wait=-1 is below 0" in main("cancel", "r", "--wait", "-1")[2]
    assert client.calls == []
