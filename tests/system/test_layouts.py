"""Layouts through the installed command: a grid of ranks trains, resumes elsewhere, and fails with
a name.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.system.runs import kill_rank, losses, motet, motet_here, train_until, write_yaml


def test_a_grid_of_ranks_trains_the_same_run_and_resumes_as_another_grid(
    corpus: Path, whole_run: Path, tmp_path: Path
) -> None:
    yaml = write_yaml(tmp_path, corpus, "whole")
    grid = ["layout.processes=4", "layout.pp=2", "layout.cp=2", "layout.micro_sequences=4"]
    process, run = train_until(yaml, 13, *grid)
    kill_rank(run, 3, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    other = ["layout.processes=2", "layout.pp=1", "layout.cp=1", "layout.dp_replicate=2"]
    done = motet("resume", str(run), *other, "layout.shares=[3,1]", "layout.micro_sequences=2")
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = losses(run), losses(whole_run)
    assert sorted(found) == sorted(expected)
    np.testing.assert_allclose(
        [found[step] for step in expected], list(expected.values()), rtol=1e-5
    )
    text = motet_here("experiments", "audit", str(run), "--replay")
    assert text.returncode == 0, text.stdout
    assert "ranks 4 -> 2" in text.stdout
    assert "missing 0, repeated 0, unplanned 0" in text.stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_falls_silent_stops_the_others_and_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    yaml = write_yaml(tmp_path, corpus, "r")
    once = ("training.steps=2000", "training.max_restarts=0", "layout.timeout_s=10")
    process, run = train_until(yaml, 8, *once, "layout.processes=4", "layout.cp=2")
    kill_rank(run, 2, number)
    started = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert time.monotonic() - started < 60
    assert "motet: rank 2 (process" in output
    assert "died or fell silent" in output
    assert "motet resume" in output


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["layout.tp=3", "layout.processes=3"], ["layout.tp"]),
        (["layout.processes=4", "layout.tp=2", "layout.pp=2", "layout.dp_shard=2"], ["layout"]),
        (["layout.processes=4", "layout.pp=4"], ["layers"]),
        (["layout.ep=2"], ["layout.ep"]),
        (["layout.processes=2", "layout.ep=2", "model.n_experts=3"], ["n_experts", "layout.ep"]),
        (["layout.device=cuda"], ["layout.device"]),
        (["layout.engine=deepspeed", "layout.tp=2"], ["layout"]),
        (["layout.schedule=interleaved_1f1b"], ["layout.schedule"]),
        (["batch.sequences=9"], ["batch.sequences"]),
        (["layout.placement=[0,0]"], ["layout.placement"]),
    ],
)
def test_a_layout_that_cannot_be_is_told_before_anything_starts(
    corpus: Path, tmp_path: Path, settings: list[str], told: list[str]
) -> None:
    if "layout.device=cuda" in settings:
        import torch

        if torch.cuda.is_available():
            settings = ["layout.device=cuda", f"layout.processes={torch.cuda.device_count() + 1}"]
    yaml = write_yaml(tmp_path, corpus, "r")
    done = motet_here("train", str(yaml), *settings)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert any(word in done.stderr for word in told), done.stderr
    assert not (tmp_path / "runs").exists()
