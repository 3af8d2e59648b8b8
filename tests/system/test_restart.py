"""Ranks that die and are started anew inside one `motet train`: the same numbers, no endless loop,
nothing left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from motet.core.processes import children, command_line
from motet.launcher.runs.metrics import read_metrics
from motet.launcher.runs.ranks import ranks_of
from tests.system.runs import (
    MOTET,
    environment,
    kill_rank,
    losses,
    motet,
    motet_here,
    rows,
    train_until,
    wait_for_step,
    write_yaml,
)


def attempts(run: Path) -> list[dict[str, Any]]:
    """Return attempt.json of every attempt."""
    folders = sorted((run / "attempts").iterdir(), key=lambda path: int(path.name))
    return [json.loads((folder / "attempt.json").read_text()) for folder in folders]


def leftovers(run: Path) -> list[int]:
    """Return the processes that still have to do with a run."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if str(run) in command_line(pid)]


def audit(run: Path) -> None:
    done = motet_here("experiments", "audit", str(run), "--replay")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing 0, repeated 0, unplanned 0" in done.stdout


def test_a_killed_rank_is_started_anew_and_the_run_ends_as_if_nothing_had_happened(
    corpus: Path, whole_run: Path, tmp_path: Path
) -> None:
    """The first rank, and then another."""
    yaml = write_yaml(tmp_path, corpus, "whole")
    process, run = train_until(yaml, 9)
    kill_rank(run, 0, signal.SIGKILL)
    wait_for_step(process, run, 15)
    kill_rank(run, 1, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    found = attempts(run)
    assert [attempt["reason"] for attempt in found] == ["crashed", "crashed", "finished"]
    assert "rank 0 " in found[0]["culprit"]
    assert "rank 1 " in found[1]["culprit"]
    assert [attempt["start_step"] for attempt in found] == [0, 6, 12], "an interval at most is lost"
    assert losses(run) == losses(whole_run), "bit-exact"
    audit(run)
    assert not leftovers(run)


POISON = """
import importlib.abc
import importlib.util
import sys


class Poison(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "motet.launcher.rank.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            train = module.train_step

            def train_step(job, step, lr):
                if step == {step} and job.world.rank == 1:
                    raise RuntimeError("poison")
                return train(job, step, lr)

            module.train_step = train_step

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Poison())
"""


@pytest.fixture
def poisoned(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose rank 1 crashes in the second of all further steps; its own code is as it was."""
    run, site = tmp_path / "whole", tmp_path / "site"
    shutil.copytree(whole_run, run)
    (finished,) = attempts(run)
    site.mkdir()
    (site / "sitecustomize.py").write_text(POISON.format(step=finished["end_step"] + 1))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    return run


def test_a_crash_loop_is_stopped_with_its_reason(poisoned: Path) -> None:
    step = attempts(poisoned)[0]["end_step"]
    longer = ("training.steps=30", "checkpoint.every_steps=100")
    done = motet("resume", str(poisoned), *longer)
    assert done.returncode == 1
    assert f"attempts 2 and 3 both started from step {step} and crashed" in done.stderr
    assert "rank 1 failed: RuntimeError: poison (crash-1.txt)" in done.stderr
    assert [found["reason"] for found in attempts(poisoned)] == [
        "finished",
        "crashed",
        "crashed",
        "crash_loop",
    ]
    again = motet("resume", str(poisoned), "training.max_restarts=0")
    assert again.returncode == 1, "a person may try once more"
    assert "RuntimeError: poison" in again.stderr
    assert attempts(poisoned)[-1]["reason"] == "crashed"
    assert not leftovers(poisoned)


def test_a_mistake_is_told_once_and_nothing_is_started_anew(
    whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "whole"
    shutil.copytree(whole_run, run)
    for step in run.glob("checkpoints/step-*"):
        (step / "manifest.json").write_text("{}")
    done_before = (run / "DONE").read_text()
    settings_before = (run / "resolved.yaml").read_text()
    done = motet("resume", str(run), "training.steps=30")
    assert done.returncode == 2
    assert "no checkpoint of this run can be used" in done.stderr
    assert len(attempts(run)) == 2, "the whole run's, and this one's"
    assert (run / "DONE").read_text() == done_before
    assert (run / "resolved.yaml").read_text() == settings_before


def test_when_the_launcher_is_killed_its_ranks_save_end_and_hold_the_run_until_then(
    corpus: Path, tmp_path: Path
) -> None:
    yaml = write_yaml(tmp_path, corpus, "r")
    process, run = train_until(yaml, 8, "training.steps=2000")
    torchrun = children(process.pid)[0]
    ranks = ranks_of(torchrun)
    assert len(ranks) == 2
    os.kill(torchrun, signal.SIGSTOP)  # it holds the lock and cannot pass anything on
    process.kill()
    second = motet("resume", str(run))
    assert second.returncode == 2
    assert "is being trained already" in second.stderr
    os.kill(torchrun, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while leftovers(run):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (facts,) = attempts(run)
    assert facts["reason"] == "stopped"
    assert (run / "checkpoints" / f"step-{facts['end_step']:08d}" / "manifest.json").exists()
    audit(run)


def test_a_resumed_run_measures_no_step_twice(corpus: Path, tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path, corpus, "r")
    process, run = train_until(yaml, 6, "probes.every=0.05", "checkpoint.every_steps=1")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert motet("resume", str(run)).returncode == 0
    probed = Counter(row["step"] for row in rows(run, "probe"))
    assert max(probed.values()) == 1, probed
    again = Counter(
        row["step"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "probe"
    )
    assert again == probed
    assert set(probed) >= {0, 24}


def test_two_machines_train_one_run_and_a_stop_of_either_stops_both(
    corpus: Path, whole_run: Path, tmp_path: Path
) -> None:
    """Both are this one: processes find each other at the endpoint, and number themselves by
    --node-rank.
    """
    yaml = write_yaml(tmp_path, corpus, "whole")
    run = tmp_path / "runs" / "whole"
    port = 29500 + os.getpid() % 1000

    def begin(*command: str) -> list[subprocess.Popen[str]]:
        together = ["layout.processes=1", "--nnodes", "2", "--endpoint", f"127.0.0.1:{port}"]
        return [
            subprocess.Popen(
                [*MOTET, *command, *together, "--node-rank", str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
                env=environment(),
            )
            for rank in (1, 0)
        ][::-1]

    for machine, command in enumerate((["train", str(yaml)], ["resume", str(run)])):
        both = begin(*command)
        for process in both:
            wait_for_step(process, run, 4 + len(losses(run)))
        both[machine].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert attempts(run)[-1]["reason"] == "stopped"
        assert attempts(run)[-1]["world_size"] == 2
    both = begin("resume", str(run))
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert losses(run) == losses(whole_run)
    audit(run)
