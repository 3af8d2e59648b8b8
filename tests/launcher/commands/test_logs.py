"""`motet logs`: the lines of all ranks, merged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from motet.core.files import atomic_write, write_json
from motet.launcher.commands import logs
from motet.launcher.follow.logs import JOB, LogChoice, Merged, sources
from motet.launcher.output import terminal
from motet.launcher.runs.rundir import RunDir
from tests.launcher.conftest import Main
from tests.launcher.followed import FakeClient, add_attempt, add_jobs, job, make_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "runs", "r")


def say(run: RunDir, place: str, text: str, attempt: int = 1) -> Path:
    """Add to a log file of an attempt."""
    path = run.logs(attempt) / place
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(text)
    return path


def labels(run: RunDir) -> dict[str, str]:
    return {source.label: source.path.name for source in sources(run)}


def test_ranks_of_all_nodes_and_restarts_are_found(run: RunDir) -> None:
    say(run, "ranks-0/id_a/attempt_0/0/stdout.log", "")
    say(run, "ranks-0/id_a/attempt_0/1/stderr.log", "")
    say(run, "ranks-4/id_b/attempt_0/1/stdout.log", "")
    say(run, "ranks-4/id_b/attempt_2/0/stdout.log", "")
    say(run, "rank-0.log", "", attempt=5)
    say(run, "id_c/attempt_0/1/stdout.log", "", attempt=6)
    say(run, "notes/other", "", attempt=6)
    atomic_write(run.job_files / "output-12.txt", "")
    assert labels(run) == {
        "1.0": "stdout.log",
        "1.1": "stderr.log",
        "1.5": "stdout.log",
        "3.4": "stdout.log",
        "5.0": "rank-0.log",
        "6.1": "stdout.log",
        "slurm": "output-12.txt",
    }


def test_every_line_says_attempt_and_rank_and_the_file_written_last_comes_last(
    run: RunDir,
    main: Main,
) -> None:
    add_attempt(run, "stopped")
    first = say(run, "ranks-0/id/attempt_0/1/stdout.log", "early\x1b[31m [red]x[/red]\n" * 30)
    second = say(run, "ranks-0/id/attempt_0/0/stdout.log", "a\nb\rc\n")
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    code, out, err = main("logs", "r")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["[1.1] early [red]x[/red]"] * 20 + ["[1.0] a", "[1.0] c"]
    assert main("logs", "r", "--rank", "0", "--lines", "1")[1] == "[1.0] c\n"
    rows = [json.loads(line) for line in main("logs", "r", "--json")[1].splitlines()]
    assert rows[-1] == {"attempt": 1, "rank": 0, "line": "c"}


def test_the_newest_attempt_is_shown_unless_another_is_asked_for(
    run: RunDir,
    main: Main,
) -> None:
    for _ in range(2):
        add_attempt(run, "crashed")
    say(run, "ranks-0/id/attempt_0/0/stdout.log", "old\n", attempt=1)
    say(run, "ranks-0/id/attempt_0/0/stdout.log", "new\n", attempt=2)
    assert main("logs", "r")[1] == "[2.0] new\n"
    assert main("logs", "r", "--attempt", "1")[1] == "[1.0] old\n"


def test_the_output_of_a_job_does_not_repeat_its_ranks(
    run: RunDir,
    main: Main,
) -> None:
    add_attempt(run, "stopped")
    say(run, "ranks-0/id/attempt_0/0/stdout.log", "step 1\n")
    older, newer = run.job_files / "output-7.txt", run.job_files / "output-8.txt"
    atomic_write(older, "old job\n")
    atomic_write(newer, "srun: starts\n[default0]:step 1\n")
    os.utime(older, (1, 1))
    lines = main("logs", "r")[1].splitlines()
    assert sorted(lines) == ["[1.0] step 1", "[slurm] srun: starts"]
    asked = main("logs", "r", "--rank", "slurm")[1].splitlines()
    assert asked == ["[slurm] srun: starts", "[slurm] [default0]:step 1"]


def test_mistakes_are_told(run: RunDir, main: Main) -> None:
    assert "give a number from 0 on" in main("logs", "r", "--rank", "x")[2]
    assert "none has begun" in main("logs", "r", "--attempt", "1")[2]
    assert "--lines=-1" in main("logs", "r", "--lines", "-1")[2]
    code, out, err = main("logs", "r")
    assert (code, out) == (0, "")
    assert "printed nothing" in err


class Script:
    """Stands in for time: each sleep takes the next action."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.actions = list(actions)
        self.pauses: list[float] = []
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds
        if self.actions:
            self.actions.pop(0)()

    def clock(self) -> float:
        return self.now_s


def test_following_shows_restarts_and_new_attempts_and_ends_with_the_run(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    add_attempt(run, pids={0: "1 elsewhere"})
    say(run, "ranks-0/id/attempt_0/0/stdout.log", "".join(f"{i}\n" for i in range(30)))
    script = Script(
        lambda: say(run, "ranks-0/id/attempt_0/0/stdout.log", "more\n"),
        lambda: None,
        lambda: say(run, "ranks-0/id/attempt_1/0/stdout.log", "restarted\n"),
        *[lambda: None] * 6,
        lambda: [add_attempt(run, pids={0: "1 elsewhere"}) for _ in range(2)],
        lambda: say(run, "ranks-0/id/attempt_0/0/stdout.log", "resumed, and torn", attempt=3),
        lambda: write_json(run.attempt(3) / "attempt.json", {"reason": "stopped", "ended": 1.0}),
    )
    merged = Merged(run, LogChoice(), lines=2, clock=script.clock)
    watched = logs.Watched(run, FakeClient(), script.clock)  # type: ignore[arg-type]
    assert logs.follow(merged, logs.painter(terminal.console()), watched, script.sleep) == 0
    out = capsys.readouterr()
    assert out.out.splitlines() == [
        "[1.0] 28",
        "[1.0] 29",
        "[1.0] more",
        "[2.0] restarted",
        "[3.0] resumed, and torn",
    ]
    assert out.err == "motet: r is stopped: as asked, after a checkpoint\n"
    assert max(script.pauses) <= logs.LONGEST_PAUSE_S


def test_a_waiting_job_is_asked_after_less_and_less_often(run: RunDir) -> None:
    add_jobs(run, "7")
    client = FakeClient(job("7", "PENDING"))
    script = Script(*[lambda: None] * 150, client.jobs.clear)
    watched = logs.Watched(run, client, script.clock)  # type: ignore[arg-type]
    merged = Merged(run, LogChoice(), lines=2, clock=script.clock)
    assert logs.follow(merged, logs._as_json, watched, script.sleep) == 0
    asked = [call for call in client.calls if call[0] == "queue"]
    assert script.pauses[-1] == logs.LONGEST_PAUSE_S
    assert 5 <= len(asked) <= 15


def test_a_slurm_that_falls_silent_does_not_end_the_following(run: RunDir) -> None:
    add_jobs(run, "7")
    client = FakeClient(fails="no answer")
    watched = logs.Watched(run, client)  # type: ignore[arg-type]
    assert watched.ended() is None


def test_only_one_rank_is_chosen() -> None:
    from motet.launcher.follow.logs import LogSource

    of_rank = LogSource(2, 3, Path("x"))
    of_job = LogSource(0, JOB, Path("y"))
    assert LogChoice(rank=3).takes(of_rank, 2)
    assert not LogChoice(rank=3).takes(of_rank, 3)
    assert not LogChoice(rank=3).takes(of_job, 2)
    assert LogChoice(rank=JOB, attempt=1).takes(of_job, 2)
    assert not LogChoice(attempt=2).takes(of_job, 2)


def test_following_shows_the_whole_start_first_also_while_its_ranks_restart(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    for attempt, text in ((0, "before\n"), (1, "after\n")):
        folder = run.logs(1) / "ranks-0" / "x" / f"attempt_{attempt}" / "0"
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(text)
    (run.logs(3) / "ranks-0" / "x" / "attempt_0" / "0").mkdir(parents=True)
    newest = Merged(run, LogChoice(), 20).poll()
    assert [(line.source.attempt, line.text) for line in newest] == [(2, "after")]
    following = Merged(run, LogChoice(whole_launch=True), 20)
    lines = {(line.source.attempt, line.text) for line in following.poll()}
    assert lines == {(1, "before"), (2, "after")}
    third = run.logs(3) / "ranks-0" / "x" / "attempt_0" / "0" / "stdout.log"
    third.write_text("third\n")
    assert [line.text for line in following.poll(flush=True)] == ["third"]
