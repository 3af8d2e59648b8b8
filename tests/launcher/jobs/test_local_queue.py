"""A scheduler of the tests' own goes through submit, status, preemption, requeue and cancel:
nothing outside of its file knows of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motet.launcher.runs.rundir import RunDir
from tests.launcher.jobs import local_queue
from tests.launcher.jobs.local_queue import LocalQueue
from tests.system.conftest import corpus as corpus
from tests.system.conftest import whole_run as whole_run
from tests.system.runs import MOTET, environment, losses, motet, rows, write_yaml

WAIT_S = 180.0
FAST_S, HELD_S = 0.3, 100.0
PACE = """
import time
from pathlib import Path
from motet.launcher.rank.hooks import Hook, HookContext

class Slow(Hook):
    def before_step(self, context: HookContext) -> None:
        began = time.monotonic()
        while time.monotonic() - began < float(Path({path!r}).read_text() or 0):
            time.sleep(0.05)
"""


class Bench:
    """A run that its own queue trains, with steps slow enough to be hit in the middle."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.queue = folder, LocalQueue()
        self.pace_s = folder / "pace_s"
        self.pace(FAST_S)
        shutil.copy(local_queue.__file__, folder / "local_queue.py")
        (folder / "slow.py").write_text(PACE.format(path=str(self.pace_s)))
        self.yaml = write_yaml(folder, corpus, "r", self.edited)
        self.run = RunDir(folder / "runs" / "r")

    @staticmethod
    def edited(text: str) -> str:
        text = text.replace("  steps: 24\n", "  steps: 24\n  hooks: ['slow.py:Slow']\n")
        return (
            f"{text}scheduler: local_queue.py:LocalQueue\nscheduler_options: {{max_requeues: 5}}\n"
        )

    def pace(self, seconds: float) -> None:
        """Let every step wait so long before it begins, also the one that waits now."""
        self.pace_s.write_text(str(seconds))

    def motet(self, *arguments: str) -> str:
        done = motet(*arguments, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.motet("status", "r", "--json"))["runs"][0])

    def until(self, seen: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not seen():
            output = "".join(p.read_text() for p in self.run.job_files.glob("output-*"))
            assert time.monotonic() < deadline, f"{what}\n{output}"
            time.sleep(0.05)

    def hold_at(self, step: int, held_s: float = HELD_S) -> None:
        """Let it train up to a step, or one more, and wait there."""
        self.pace(FAST_S)
        there = lambda: any(row["step"] >= step for row in rows(self.run.root, "step"))  # noqa: E731
        self.until(there, f"step {step}")
        self.pace(held_s)

    def tell(self, job_id: str, name: str) -> None:
        """Send the job a signal; ranks hear it once their step is done."""
        self.queue.signal([job_id], name)
        self.pace(FAST_S)

    def attempt(self, number: int) -> dict[str, Any]:
        path = self.run.attempt(number) / "attempt.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def state(self, job_id: str) -> str:
        return self.queue.query([job_id])[job_id].state.value


@pytest.fixture
def bench(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    queue = tmp_path / "queue"
    queue.mkdir()
    monkeypatch.setenv("LOCAL_QUEUE", str(queue))
    return Bench(tmp_path, corpus)


def test_a_run_of_ones_own_scheduler_survives_what_happens_to_its_job_and_ends_as_if_nothing_had(
    bench: Bench, whole_run: Path
) -> None:
    dry = bench.motet("submit", str(bench.yaml), "--dry-run")
    assert f"-m motet.launcher.jobs.job {bench.run.root}" in dry
    assert not bench.run.root.exists()
    job_id = bench.motet("submit", str(bench.yaml)).splitlines()[0]
    kept = bench.run.plugins / "local_queue.py"
    assert kept.read_bytes() == Path(local_queue.__file__).read_bytes()

    bench.hold_at(3)
    row = bench.status()
    assert (row["state"], row["job"]["id"], row["job"]["state"]) == ("running", job_id, "running")
    refused = subprocess.run(
        [*MOTET, "resume", "runs/r"], cwd=bench.folder, capture_output=True, env=environment()
    )
    assert refused.returncode == 2
    assert f"{job_id} (running)".encode() in refused.stderr

    bench.tell(job_id, "TERM")  # it is preempted: told first, then requeued
    bench.until(lambda: bench.attempt(1).get("reason") == "stopped", "the ranks save")
    saved = bench.attempt(1)["end_step"]
    assert saved >= 3
    bench.queue.requeue(job_id)

    bench.until(lambda: bench.attempt(2).get("start_step") == saved, "it goes on from there")
    bench.hold_at(saved + 3)
    bench.tell(job_id, "USR1")  # its time limit is near: it asks for a requeue itself
    bench.until(lambda: bench.attempt(3).get("start_step"), "it requeues itself")
    assert bench.queue.query([job_id])[job_id].restarts == 2

    bench.hold_at(bench.attempt(3)["start_step"] + 2)
    ranks = [(bench.run.attempt(3) / f"pid-{rank}").read_text().split()[0] for rank in range(2)]
    os.killpg(local_queue.read(bench.queue.folder, job_id)["pid"], signal.SIGKILL)
    for pid in ranks:  # its machine is gone, and all that it ran
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    bench.until(lambda: bench.attempt(4).get("reason") == "running", "it begins anew")
    assert bench.attempt(3)["reason"] in ("lost", "crashed")

    bench.pace(0)
    bench.until(bench.run.done.exists, "it ends")
    bench.until(lambda: bench.state(job_id) == "succeeded", "the job ends")
    assert bench.status()["state"] == "finished"
    assert losses(bench.run.root) == losses(whole_run)
    bench.motet("experiments", "audit", str(bench.run.root), "--replay")
    recorded = json.loads((bench.run.attempt(1) / "environment.json").read_text())["environment"]
    assert recorded["LOCAL_JOB"] == job_id


def test_a_run_of_ones_own_scheduler_is_cancelled_after_a_checkpoint(bench: Bench) -> None:
    job_id = bench.motet("submit", str(bench.yaml)).splitlines()[0]
    bench.hold_at(2)
    bench.pace(1.0)  # slow enough that it is not over before it is cancelled
    told = bench.motet("cancel", "r", "--wait", str(WAIT_S))
    assert f"ask job {job_id} to save and end" in told
    assert "the newest checkpoint is step" in told
    bench.until(lambda: bench.state(job_id) == "succeeded", "the job ends")
    assert bench.status()["state"] == "cancelled"
    assert bench.queue.query([job_id])[job_id].restarts == 0
    bench.pace(0)
    again = bench.motet("resume", "runs/r").splitlines()[0]
    assert again != job_id
    bench.until(bench.run.done.exists, "it ends")
    assert sorted(losses(bench.run.root)) == list(range(1, 25))


def test_a_job_that_is_killed_at_once_is_not_requeued(bench: Bench) -> None:
    job_id = bench.motet("submit", str(bench.yaml)).splitlines()[0]
    bench.hold_at(1, held_s=10.0)  # ranks end with their step once the launcher is gone
    bench.motet("cancel", "r", "--now", "--wait", str(WAIT_S))
    bench.until(lambda: bench.state(job_id) == "cancelled", "the job ends")
    assert bench.queue.query([job_id])[job_id].restarts == 0


def test_what_is_wrong_with_a_scheduler_is_one_clear_error(bench: Bench) -> None:
    def error(*settings: str) -> str:
        done = motet("submit", str(bench.yaml), *settings, cwd=bench.folder)
        assert done.returncode == 2, done.stdout
        assert "Traceback" not in done.stderr
        assert not bench.run.root.exists()
        return done.stderr

    assert "did you mean 'slurm'?" in error("scheduler=slrum")
    assert "there is no file" in error("scheduler=nowhere.py:Queue")
    (bench.folder / "half.py").write_text(
        "from motet.launcher.jobs.scheduler import Scheduler\n\nclass Half(Scheduler):\n    pass\n"
    )
    assert "half.py:3: Half lacks cancel, current_job" in error("scheduler=half.py:Half")
    text = (bench.folder / "local_queue.py").read_text()
    broken = text.replace(
        "    recorded = (", "    def __init__(self) -> None:\n        1 / 0\n\n    recorded = ("
    )
    (bench.folder / "broken.py").write_text(broken)
    told = error("scheduler=broken.py:LocalQueue")
    assert "broken.py:33: ZeroDivisionError" in told
    assert "scheduler: is 'slow.py:Slow'" in error("scheduler=slow.py:Slow")


def test_a_scheduler_that_was_changed_after_the_run_was_made_is_refused(bench: Bench) -> None:
    bench.pace(0)
    bench.motet("submit", str(bench.yaml))
    bench.until(bench.run.done.exists, "it ends")
    kept = bench.run.plugins / "local_queue.py"
    kept.chmod(0o600)
    kept.write_text(kept.read_text() + "\n")
    done = motet("resume", "runs/r", "training.steps=30", cwd=bench.folder)
    assert done.returncode == 2
    assert "is not the source that the run was frozen with" in done.stderr
    (bench.run.root / "DONE").unlink()
    assert "is not the source that the run was frozen with" in bench.motet("status", "r")
