"""SIGTERM to one rank at bad moments: one step on all ranks, saved once, exit code 0, nothing left.
Timed in bench/survival.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motet.core.processes import catches, children, command_line
from motet.experiments.stream.ledger import read_records, readable_segments, segment_folder
from motet.launcher.runs.ranks import ranks_of
from tests.system.runs import MOTET, environment, motet_here, rows, write_yaml

WAIT_S = 120.0
SETTINGS = ["training.steps=400", "probes.every=0.05", "probes.batch_tokens=320"]


class Stopped:
    """One start of a run that is stopped at a moment."""

    def __init__(self, yaml: Path, run: Path) -> None:
        self.run = run
        resume = (run / "resolved.yaml").exists()
        command = ["resume", str(run)] if resume else ["train", str(yaml), *SETTINGS]
        self.known = len(self.all_rows())
        self.process = subprocess.Popen(
            [*MOTET, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=yaml.parent,
            env=environment(),
        )

    def all_rows(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"}")]

    def fresh(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.all_rows()[self.known :] if row["kind"] == kind]

    def wait(self, ready: Callable[[], Any], poll_s: float = 0.01) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not (found := ready()):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(poll_s)
        return found

    def ranks(self) -> list[int]:
        agents = children(self.process.pid)
        found = ranks_of(agents[0]) if agents else []
        return found if len(found) == 2 and all(catches(p, signal.SIGTERM) for p in found) else []

    def until(self, moment: str) -> None:
        self.wait(self.ranks)
        if moment == "the first imports":
            return
        if moment == "a save":
            self.wait(lambda: list((self.run / "checkpoints").glob(".*.part")), poll_s=0.002)
        elif moment == "a probe":
            self.wait(lambda: any(row["step"] % 20 == 0 for row in self.fresh("step")))
        else:
            self.wait(lambda: len(self.fresh("step")) > 3)

    def stop(self, rank: int) -> str:
        os.kill(self.wait(self.ranks)[rank], signal.SIGTERM)
        return self.process.communicate(timeout=WAIT_S)[0]


def last_steps(run: Path) -> set[int]:
    """Return after which step each rank's ledger ends."""
    newest = readable_segments(run / "ledger")[-1]
    files = segment_folder(run / "ledger", newest.segment).glob("rank-*.bin")
    return {list(read_records(path))[-1].step + 1 for path in files}


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_stop_at_any_moment_saves_once_at_one_step_and_ends(
    corpus: Path, tmp_path: Path, rank: int
) -> None:
    yaml, run = write_yaml(tmp_path, corpus), tmp_path / "runs" / "r"
    for moment in ("the first imports", "a step", "a save", "a probe"):
        start = Stopped(yaml, run)
        start.until(moment)
        output = start.stop(rank)
        assert start.process.returncode == 0, (moment, output)
        steps = [row["step"] for row in start.fresh("step")]
        saves = [row["step"] for row in start.fresh("checkpoint")]
        attempt = max((run / "attempts").iterdir(), key=lambda path: int(path.name))
        facts = json.loads((attempt / "attempt.json").read_text()) if steps else {"reason": ""}
        assert "motet resume runs/r" in output, moment
        assert not (run / "DONE").exists()
        if moment == "the first imports":
            assert (steps, saves) == ([], [])
        else:
            assert facts["reason"] == "stopped", moment
            assert last_steps(run) == {steps[-1]}, moment
            assert saves.count(steps[-1]) == 1, moment
            saved = run / "checkpoints" / f"step-{steps[-1]:08d}" / "manifest.json"
            assert json.loads(saved.read_text())["step"] == steps[-1]
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        assert not [pid for pid in pids if str(run) in command_line(pid)], moment
    probed = [row["step"] for row in rows(run, "probe")]
    assert len(probed) == len(set(probed))
    done = motet_here("experiments", "audit", str(run), "--replay")
    assert done.returncode == 0, done.stdout + done.stderr
