"""The state of a run, from its folder and from what Slurm says."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from motet.core.files import atomic_write, write_json
from motet.launcher.config import run_yaml
from motet.launcher.follow import processes
from motet.launcher.follow.facts import read_facts
from motet.launcher.follow.overview import View, look
from motet.launcher.follow.processes import held_locks, read_processes
from motet.launcher.follow.state import STATES, epoch, more_jobs
from motet.launcher.jobs.submission import active_jobs
from motet.launcher.runs.blame import Heartbeat
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.starting import StartNote, StartStage, folder_of
from motet.slurm import states
from tests.launcher.followed import (
    NOW,
    FakeClient,
    add_attempt,
    add_jobs,
    iso,
    job,
    make_run,
    step_rows,
    write_rows,
)


def view_of(run: RunDir, client: Any = None, now: float = NOW) -> View:
    (view,), _ = look([run], client or FakeClient(), now)
    assert view.state.name in STATES
    return view


def told(run: RunDir, client: Any = None) -> tuple[str, str]:
    state = view_of(run, client).state
    return state.name, state.why


def test_a_run_with_its_marker_is_finished_whatever_slurm_says(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run, "finished", end_step=100)
    add_jobs(run, "7")
    atomic_write(run.done, "100\n")
    client = FakeClient(job("7", "PENDING"))
    assert told(run, client) == ("finished", "")
    assert client.calls == []  # a finished run needs no question


def test_a_run_that_was_never_started_is_new(tmp_path: Path) -> None:
    state = view_of(make_run(tmp_path, "r")).state
    assert state.name == "new"
    assert state.advice.startswith("motet resume ")


def test_a_held_lock_means_running_and_looking_does_not_take_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run)
    write_rows(run, step_rows(range(1, 41)))
    with run.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        view = view_of(run)
        assert view.facts.lock_pid == os.getpid()
        assert view.state.name == "running"
        assert view.seconds_left == pytest.approx(60 * 2.0)
        assert view.predicted_end == pytest.approx(NOW + 120)
    assert told(run)[0] == "lost"
    with run.lock.open("r") as reader:
        fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it now


def test_ranks_that_are_not_ready_are_starting(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    run.next_attempt()
    with run.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert told(run) == ("starting", "")
        since = time.time() - 7205
        note = StartNote("rank-1", StartStage.MEETING, "the others", since, True, "n1")
        folder_of(run.attempt(1)).mkdir()
        write_json(folder_of(run.attempt(1)) / "rank-1.json", asdict(note))
        state, why = told(run)
        assert state == "starting"
        assert why.startswith("rank 1 on n1 is waiting for the others, for 2:0")
        (folder_of(run.attempt(1)) / "rank-1.json").unlink()
        add_attempt(run, "crashed")  # torchrun starts the next one
        assert told(run) == ("starting", "")


def test_a_living_process_counts_without_a_lock_and_one_with_its_old_number_does_not(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, "r", guest=True)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        pids = {0: f"{process.pid} {socket.gethostname()}"}
        add_attempt(run, pids=pids, seen=time.time())
        assert told(run)[0] == "running"
        add_attempt(run, pids={0: str(process.pid)}, seen=time.time())
        assert told(run)[0] == "running"
        add_attempt(run, pids=pids, seen=time.time() - 3600)  # before this process began
        assert told(run)[0] == "lost"
        add_attempt(run, "stopped", pids=pids, seen=time.time())  # its script goes on without us
        assert told(run)[0] == "stopped"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_is_set_makes_no_process_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Ahead, a rank that lives was taken for dead; back, a later process for the rank: `motet
    cancel --now` kills it.
    """
    run = make_run(tmp_path, "r")
    add_attempt(run)
    Heartbeat(run.attempt(1), 0)
    now = time.time() + jump
    monkeypatch.setattr(processes.time, "time", lambda: now)
    (mine,) = read_processes(run.attempt(1))
    assert mine.lives()
    words = f"{os.getpid()} {socket.gethostname()} 17@{'0' * 36}"
    atomic_write(run.attempt(1) / "pid-0", words)  # of another process that had this number
    (other,) = read_processes(run.attempt(1))
    assert not other.lives()


def test_whose_attempt_it_is_is_read_and_not_guessed_from_times(tmp_path: Path) -> None:
    """`cancel` ends what only starts, and lets what trains save first."""
    run = make_run(tmp_path, "r")
    add_jobs(run, "7")
    number = add_attempt(run, started=NOW - 7200.0)  # the clock was set ahead since it began
    running = job("7", "RUNNING", start=iso(NOW - 700))
    again = replace(running, restarts=1)
    assert told(run, FakeClient(running))[0] == "starting", "only times are known"
    begun = {"job_id": "7", "restarts": 0, "attempt": number, "step": 0}
    write_json(run.job_begun, begun)
    assert told(run, FakeClient(running))[0] == "running"
    assert told(run, FakeClient(again))[0] == "starting", "requeued, and not begun again"


def test_checkpoints_that_are_skipped_are_told_while_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    number = add_attempt(run, pids={0: f"{os.getpid()} {socket.gethostname()}"}, seen=time.time())
    atomic_write(run.skipped(number), "no room for the checkpoint after step 20\n")
    assert "checkpoints are skipped: no room" in " ".join(view_of(run).fields()["warnings"])
    run.skipped(number).unlink()
    assert "skipped" not in " ".join(view_of(run).fields()["warnings"])


def test_a_process_on_another_host_counts_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run, pids={0: "12 elsewhere"}, seen=NOW - 10)
    assert told(run) == ("running", "on elsewhere")
    add_attempt(run, pids={0: "12 elsewhere"}, seen=NOW - 3600)
    name, why = told(run)
    assert name == "lost"
    assert "on elsewhere" in why


@pytest.mark.parametrize(
    ("reason", "name"), [("stopped", "stopped"), ("crashed", "crashed"), ("lost", "lost")]
)
def test_the_newest_attempt_says_how_a_run_ended(tmp_path: Path, reason: str, name: str) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run, "stopped" if reason == "crashed" else "crashed")
    add_attempt(run, reason, end_step=30)
    assert told(run)[0] == name


def test_a_crash_is_told_with_its_cause(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    number = add_attempt(run)
    atomic_write(run.attempt(number) / "crash-1.txt", "Traceback\nRuntimeError: boom\n")
    assert told(run) == ("crashed", "rank 1 failed: RuntimeError: boom (crash-1.txt)")
    atomic_write(run.attempt(number) / "error.txt", "layout.dp=3 does not fit\nmore\n")
    assert told(run) == ("crashed", "layout.dp=3 does not fit")
    assert told(run)[1] == view_of(run).fields()["why"]
    number = add_attempt(run, "crashed", culprit="rank 5 died")
    assert told(run) == ("crashed", "rank 5 died")


def test_a_stop_before_training_is_no_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    atomic_write(run.attempt(run.next_attempt()) / "stop", "")
    assert told(run) == ("stopped", "as asked, before it trained")


@pytest.mark.parametrize(
    ("record", "name", "why"),
    [
        (job("7", "PENDING", reason="Resources"), "pending", "waits until enough nodes are free"),
        (job("7", "PENDING", reason="(Priority)"), "pending", "other jobs come first"),
        (job("7", "PENDING", reason="Dependency"), "pending", "waits for an earlier job"),
        (job("7", "PENDING", reason="DependencyNeverSatisfied"), "pending", "will never start"),
        (job("7", "PENDING", reason="QOSMaxGRESPerUser"), "pending", "for one user"),
        (job("7", "PENDING", reason="AssocGrpGRES"), "pending", "of your account"),
        (job("7", "PENDING", reason="WhoKnows"), "pending", "WhoKnows"),
        (job("7", "COMPLETING"), "completing", ""),
        (job("7", "SUSPENDED"), "suspended", ""),
        (job("7", "CONFIGURING"), "starting", "CONFIGURING"),
        (job("7", "RUNNING", start=iso(NOW - 30)), "starting", ""),
        (job("7", "RUNNING", start=iso(NOW - 900)), "running", ""),
        (job("7", "CANCELLED"), "cancelled", "job 7: it was cancelled"),
        (job("7", "TIMEOUT"), "lost", "job 7: it reached its time limit"),
        (job("7", "NODE_FAIL"), "lost", "job 7: a node failed"),
    ],
)
def test_slurm_decides_for_a_submitted_run(
    tmp_path: Path, record: Any, name: str, why: str
) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run)  # began 600 s ago
    add_jobs(run, "7")
    found = told(run, FakeClient(record))
    assert found[0] == name
    assert why in found[1]


def test_a_job_that_slurm_forgot_is_looked_up_in_the_accounts(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run)
    add_jobs(run, "6", "7_2")
    client = FakeClient(history=[job("7_2", "OUT_OF_MEMORY")])
    assert told(run, client) == ("lost", "job 7_2: a node ran out of memory")
    assert client.calls == [("queue", "6", "7_2"), ("history", "7_2")]
    name, why = told(run, FakeClient())
    assert name == "lost"
    assert "Slurm has forgotten its job" in why


def test_a_job_that_went_before_it_began_points_to_its_output(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_jobs(run, "7")
    name, why = told(run, FakeClient())
    assert name == "lost"
    assert "motet logs" in why


def test_the_end_that_the_attempt_wrote_down_counts_more_than_the_accounts(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run, "stopped", end_step=20)
    add_jobs(run, "7")
    assert told(run, FakeClient(history=[job("7", "FAILED")]))[0] == "stopped"
    atomic_write(run.cancelled, "")
    assert told(run, FakeClient(history=[job("7", "FAILED")]))[0] == "cancelled"


def test_a_chain_is_running_when_one_of_its_jobs_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run)
    add_jobs(run, "7", "8", "9")
    client = FakeClient(job("9", "PENDING", reason="Dependency"), job("8", "RUNNING"))
    assert view_of(run, client).state.job == job("8", "RUNNING")


def test_a_run_that_outlasts_its_job_is_warned_of_with_the_jobs_that_it_needs(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, "r", steps=1000)
    add_attempt(run)
    add_jobs(run, "7")
    write_rows(run, step_rows(range(1, 101), step_s=2.0))  # 1,800 s are left
    limited = job("7", start=iso(NOW - 700), end=iso(NOW + 400))
    (warning,) = view_of(run, FakeClient(limited)).state.warnings
    assert warning == "will not finish before its limit in 6:40; 2 more jobs of this length"
    enough = job("7", start=iso(NOW - 700), end=iso(NOW + 1900))
    assert view_of(run, FakeClient(enough)).state.warnings == ()
    assert more_jobs(1800, NOW, None, NOW + 400) == 0
    assert more_jobs(1800, NOW, NOW - 600, NOW + 300) == 2


def test_a_run_that_falls_silent_is_warned_of(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run, started=NOW - 4000)
    write_rows(run, step_rows(range(1, 31), end=NOW - 1000))
    with run.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert view_of(run).state.warnings == ("no step for 16:40",)


@pytest.mark.parametrize("client", [FakeClient(fails="no answer in 15 s"), FakeClient(absent=True)])
def test_without_an_answer_of_slurm_the_folder_decides_and_one_line_says_so(
    tmp_path: Path, client: FakeClient
) -> None:
    run, local = make_run(tmp_path, "r"), make_run(tmp_path, "s")
    add_attempt(run, pids={0: "1 node7"}, seen=NOW - 5)
    add_jobs(run, "7")
    add_attempt(local, "stopped")
    views, records = look([run, local], client, NOW)
    assert [view.state.name for view in views] == ["running", "stopped"]
    assert records.problem


def test_many_runs_are_asked_for_with_one_call_for_each_kind(tmp_path: Path) -> None:
    runs = []
    for i in range(40):
        runs.append(make_run(tmp_path, f"r{i}"))
        add_attempt(runs[-1])
        add_jobs(runs[-1], str(100 + i))
    client = FakeClient(*(job(str(100 + i), "PENDING") for i in range(20)))
    views, _ = look(runs, client, NOW)
    assert [call[0] for call in client.calls] == ["queue", "history"]
    assert len(client.calls[1]) == 21
    assert sum(view.state.name == "pending" for view in views) == 20


def test_a_damaged_folder_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run)
    for path in (run.manifest, run.jobs_json, run.attempt(1) / "attempt.json", run.metrics):
        atomic_write(path, b"\xff{[")
    atomic_write(run.attempt(1) / "pid-0", "what")
    atomic_write(run.attempt(1) / "pid-x", "1")
    row = view_of(run).fields()
    assert (row["state"], row["steps"], row["step"]) == ("lost", None, 0)
    atomic_write(run.jobs_json, '[{"job_id": "1; rm"}, 3, {"job_id": "5"}]')
    assert [entry["job_id"] for entry in read_facts(run, {}).jobs] == ["5"]


@pytest.mark.parametrize(
    "length",
    [
        "training: {steps: 4000}",
        "training: {tokens: 1000000}",
        "training: {tokens: 1000000}\nbatch: {sequences: 4, ramp: [{step: 100, sequences: 16}]}",
        "training: {steps: 700}\nbatch: {sequences: 4, ramp: [{step: 100, sequences: 16}]}",
    ],
)
def test_the_length_of_a_run_is_that_of_its_settings(tmp_path: Path, length: str) -> None:
    (tmp_path / "corpus").mkdir()
    text = f"name: r\ndata: {{sequence_length: 128, corpora: [{{path: corpus}}]}}\n{length}\n"
    settings, _ = run_yaml.inspect(None, text=text, base=tmp_path)
    assert settings is not None
    batch = run_yaml.public(settings)["batch"]
    run = make_run(
        tmp_path,
        "r",
        sequence_length=128,
        tokens_per_step=settings.batch.sequences * 128,
        config={"batch": batch},
    )
    atomic_write(run.resolved_yaml, run_yaml.to_yaml(settings))
    facts = read_facts(run, {})
    assert facts.steps == settings.steps
    assert facts.tokens == settings.slots_before(settings.steps) * 128


def test_locks_are_read_as_the_kernel_writes_them() -> None:
    text = (
        "1: POSIX  ADVISORY  WRITE 4 fe:00:1 0 EOF\n"
        "2: FLOCK  ADVISORY  WRITE 10719 fe:10:2147174 0 EOF\n"
        "2: -> FLOCK  ADVISORY  READ 5 fe:10:2147175 0 EOF\n"
    )
    assert held_locks(text) == {(os.makedev(0xFE, 0x10), 2147174): 10719}


def test_slurm_times_and_ends_are_read() -> None:
    assert epoch("2026-11-21T14:00:00") == time.mktime((2026, 11, 21, 14, 0, 0, 0, 0, -1))
    assert epoch("") is None
    assert states.why("CANCELLED", "") == "it was cancelled"
    assert states.why("STRANGE", "") == "Slurm says STRANGE"
    assert states.why("PENDING", "") == "Slurm has not looked at it yet"


def test_every_state_of_slurm_that_nothing_follows_is_a_finished_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    add_attempt(run, "lost")
    add_jobs(run, "7")
    for word in ("REVOKED", "DEADLINE", "PREEMPTED", "COMPLETED", "BOOT_FAIL"):
        client = FakeClient(job("7", word))
        assert view_of(run, client).state.name == "lost"
        assert active_jobs(run, client.scheduler) == {}
    assert active_jobs(run, FakeClient(job("7", "STAGE_OUT")).scheduler) == {"7": "STAGE_OUT"}
