"""`motet status` and `motet ls`."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motet.core.files import atomic_write
from motet.launcher.commands import status
from motet.launcher.runs.rundir import RunDir
from tests.launcher.conftest import Main
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


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one run of each kind."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    done = make_run(folder, "done", created=NOW - 10)
    add_attempt(done, "finished", end_step=100)
    write_rows(done, step_rows(range(90, 101), loss=2.5))
    atomic_write(done.done, "100\n")
    waiting = make_run(folder, "waiting", created=NOW - 500)
    add_jobs(waiting, "41")
    broken = make_run(folder, "broken", created=NOW - 900)
    add_attempt(broken, "stopped", end_step=40)
    number = add_attempt(broken, "crashed", start_step=40)
    atomic_write(broken.attempt(number) / "crash-1.txt", "RuntimeError: [red]boom[/red]\n")
    (folder / "notes").mkdir()
    return folder


PENDING = job("41", "PENDING", reason="Priority", start="2026-11-22T03:00:00")


def test_every_run_has_a_line_and_the_reasons_are_in_words(
    runs: Path, main: Main, slurm: Callable[..., FakeClient]
) -> None:
    client = slurm(PENDING)
    code, out, err = main("status")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "finished  100/100   2.5" in lines["done"]
    assert "starts 2026-11-22 03:00" in lines["waiting"]
    assert "other jobs come first (Priority)" in lines["waiting"]
    assert "rank 1 failed: RuntimeError: [red]boom[/red]" in lines["broken"]
    assert out.splitlines()[-1] == "3 runs: 1 pending, 1 crashed, 1 finished"
    assert client.calls == [("queue", "41")]


def test_the_list_is_short_and_the_newest_run_is_last(
    runs: Path, main: Main, slurm: Callable[..., FakeClient]
) -> None:
    slurm(PENDING)
    code, out, _ = main("ls")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["name", "broken", "waiting", "done"]
    assert "84.1k" in out


def test_one_run_is_shown_with_its_attempts_its_jobs_and_the_next_command(
    runs: Path, main: Main, slurm: Callable[..., FakeClient]
) -> None:
    slurm()
    code, out, _ = main("status", "broken")
    assert code == 0
    assert "crashed: rank 1 failed" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "stopped", "0", "40"] in [row[:4] for row in rows]
    assert ["2", "crashed", "40"] in [row[:3] for row in rows]
    assert out.rstrip().endswith(f"next: motet resume {Path('runs/broken')}")
    slurm(PENDING)
    out = main("status", "runs/waiting")[1]
    assert "pending: other jobs come first (Priority)" in out
    assert "41   PENDING  Priority" in out


def test_the_json_has_the_same_keys_in_every_state(
    runs: Path, main: Main, slurm: Callable[..., FakeClient]
) -> None:
    slurm(PENDING)
    told = json.loads(main("status", "--json")[1])
    assert set(told) == {"version", "slurm_problem", "runs"}
    assert len({tuple(row) for row in told["runs"]}) == 1
    page = (Path(__file__).parents[3] / "docs" / "following.md").read_text()
    for key in told["runs"][0]:
        assert f"`{key}`" in page, key
    one = json.loads(main("status", "waiting", "--json")[1])["runs"][0]
    assert set(one) - set(told["runs"][0]) == {"attempt_list", "jobs"}
    assert one["jobs"][0]["record"]["state"] == "PENDING"
    assert json.loads(main("ls", "--json")[1])["runs"][-1]["name"] == "done"


def test_a_slurm_that_does_not_answer_costs_one_line(
    runs: Path, main: Main, slurm: Callable[..., FakeClient]
) -> None:
    slurm(fails="squeue gave no answer in 15 s")
    code, out, _ = main("status")
    assert code == 0
    assert "Slurm: squeue gave no answer in 15 s; shown from folders alone" in out
    assert "2.5" in out
    assert "Slurm: " in main("ls")[1]
    assert json.loads(main("ls", "--json")[1])["slurm_problem"].startswith("squeue")


def test_mistakes_are_told_in_one_line(runs: Path, main: Main) -> None:
    assert main("status", "nothing")[0] == 2
    assert "runs/NAME" in main("status", "nothing")[2]
    assert "--runs=elsewhere is no folder" in main("ls", "--runs", "elsewhere")[2]
    assert "leave one of them out" in main("status", "--watch", "--json")[2]
    assert "motet demo" in main("status", "--runs", "runs/notes")[1]


def watched(run: RunDir | None = None, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(run=run and run.name, runs="runs", json=False, watch=True, **more)


def test_watching_redraws_less_and_less_often_and_ends_with_the_last_active_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(PENDING)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 12:
            client.jobs.clear()

    assert status._watch(watched(), client, sleep) == 0  # type: ignore[arg-type]
    assert len(pauses) == 12
    assert pauses[0] == status.FIRST_PAUSE_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == status.LONGEST_PAUSE_S
    assert sum(call[0] == "queue" for call in client.calls) == 13
    assert "lost" in capsys.readouterr().out


def test_a_run_that_trains_shows_speed_and_end(
    runs: Path, main: Main, slurm: Callable[..., FakeClient]
) -> None:
    run = make_run(runs, "going")
    add_attempt(run)
    add_jobs(run, "50")
    write_rows(run, step_rows(range(1, 51)))
    slurm(job("50", "RUNNING", start=iso(NOW - 700), end=iso(NOW + 30), nodes="n[1-2]"))
    out = main("status", "going")[1]
    assert "step        50/100 (51,200 tokens)" in out
    assert "speed       1.0k tokens/s" in out
    assert "will not finish before its limit" in out
    line = next(line for line in main("status")[1].splitlines() if line.startswith("going"))
    assert "running" in line
    assert "1:40" in line


def test_status_imports_nothing_heavy_and_works_without_slurm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "r")
    add_attempt(run)
    with run.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code = (
            "import sys; from motet.launcher import cli; cli.main(['status']); "
            "print(sorted({'torch', 'numpy', 'omegaconf', 'scipy'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PATH": "/nowhere"},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "running" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
