"""One holder at a time, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.core.locks import Taken, held, stand_in
from motet.launcher.follow.processes import held_locks, lock_holder
from motet.launcher.launch.holding import only_one
from motet.launcher.runs.presence import be_present, ranks_at_work
from motet.launcher.runs.rundir import RunDir


@pytest.fixture
def lockless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Make a folder a file system whose `flock` answers with an error."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    true_flock = fcntl.flock

    def make(answer: int) -> Path:
        def flock(file: Any, how: int) -> None:
            number = file if isinstance(file, int) else file.fileno()
            if "/no-locks/" in os.readlink(f"/proc/self/fd/{number}"):
                raise OSError(answer, os.strerror(answer))
            true_flock(file, how)

        monkeypatch.setattr(fcntl, "flock", flock)
        folder = tmp_path / "no-locks"
        folder.mkdir()
        return folder

    return make


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_starts_on_this_machine_are_kept_apart_and_it_is_said(
    lockless: Callable[[int], Path], capsys: pytest.CaptureFixture[str], answer: int
) -> None:
    run = RunDir(lockless(answer) / "r")
    run.create()
    with only_one(run):
        assert "has no locks (flock)" in capsys.readouterr().err
        assert lock_holder(run.lock, held_locks()) == os.getpid()
        with pytest.raises(UserError, match="is being trained already"), only_one(run):
            pass
    with be_present(run), be_present(run):
        assert ranks_at_work(run)
        with pytest.raises(UserError, match="still at work"), only_one(run):
            pass
    assert not ranks_at_work(run)
    with only_one(run):
        pass


def test_another_error_of_the_disk_is_told(lockless: Callable[[int], Path]) -> None:
    run = RunDir(lockless(errno.EIO) / "r")
    run.create()
    with pytest.raises(UserError, match=r"cannot be held: .*Input/output error"), only_one(run):
        pass


def test_a_stand_in_that_is_someone_elses_is_not_believed(
    lockless: Callable[[int], Path],
) -> None:
    folder = lockless(errno.ENOLCK)
    stand_in(folder / "f").parent.mkdir(mode=0o777)
    stand_in(folder / "f").parent.chmod(0o777)
    with pytest.raises(OSError, match="not a folder of yours alone"), held(folder / "f"):
        pass


def test_a_lock_is_one_processs_and_shared_ones_are_many(tmp_path: Path) -> None:
    with held(tmp_path / "f", shared=True) as one, held(tmp_path / "f", shared=True):
        assert one.path == tmp_path / "f"
        with pytest.raises(Taken), held(tmp_path / "f"):
            pass
    with held(tmp_path / "f"), pytest.raises(Taken), held(tmp_path / "f"):
        pass
