"""What a launch says when it is over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from motet.launcher.launch import local
from motet.launcher.runs.rundir import RunDir


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_folder_that_was_removed_is_called_so_and_nobody_is_told_to_go_on_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    run = RunDir(tmp_path / "gone")
    run.create()
    shutil.rmtree(run.root)
    run.attempt(1).mkdir(parents=True)  # made again by a log that was still open
    assert local._say_how_it_ended(run, 1, code) == 2
    said = capsys.readouterr()
    assert "was removed while the run was going on" in said.err
    assert "logs in" not in said.err
    assert not said.out
