"""A run on a disk that fills up: it ends by itself, once, with its reason, and goes on when there
is room.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.system.runs import motet, motet_here, rows, write_yaml

MANY = (
    "experiments.list=[]",
    "training.steps=60",
    "checkpoint.every_steps=1",
    "checkpoint.keep=99",
)


def attempts(run: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("attempts/*/attempt.json"))]


def test_a_run_on_a_full_disk_ends_once_with_its_reason_and_goes_on_when_there_is_room(
    corpus: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yaml = write_yaml(tmp_path, corpus, "r")
        done = motet("train", str(yaml), *MANY)
        run = disk / "r"
        assert done.returncode == 2, done.stdout + done.stderr
        assert "no room for the checkpoint after step" in done.stderr
        (facts,) = attempts(run)
        assert (facts["reason"], bool(facts["end_step"])) == ("refused", True)
        assert "no room for the checkpoint" in motet_here("status", str(run)).stdout
        saved = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
        assert max(row["step"] for row in rows(run, "step")) >= saved
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        done = motet("resume", str(run))
        assert done.returncode == 0, done.stdout + done.stderr
        assert attempts(run)[-1]["reason"] == "finished"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
