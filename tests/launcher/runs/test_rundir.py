from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.core.files import atomic_write, write_json
from motet.launcher.runs import snapshot
from motet.launcher.runs.rundir import RunDir


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_run_folder_is_for_its_owner_only_when_it_is_asked_for(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "x")
    run.create("private")
    run.create("private")
    write_json(run.manifest, {"a": 1})
    atomic_write(run.run_yaml, "name: x\n")
    run.attempt(run.next_attempt())
    assert mode(run.root) == mode(run.checkpoints) == mode(run.attempt(1)) == 0o700
    assert mode(run.manifest) == mode(run.run_yaml) == 0o600


def test_every_path_of_a_run_lies_in_its_folder() -> None:
    run = RunDir("/r/x")
    paths = [
        getattr(run, name)
        for name in vars(RunDir)
        if isinstance(getattr(RunDir, name), property) and name != "name"
    ]
    assert len(set(paths)) == len(paths) >= 14
    assert all(path.parent in (run.root, run.job_files, run.code) for path in paths)
    assert run.checkpoint(100) == Path("/r/x/checkpoints/step-00000100")
    assert run.attempt(2) == Path("/r/x/attempts/2")


def test_only_published_checkpoints_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.checkpoint_steps() == []
    for name in (
        "step-00000200",
        "step-00000100",
        ".step-00000300.part",
        "step-x",
        "step-123456789",
    ):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.checkpoint_steps() == [100, 200, 123456789]


def test_attempts_are_numbered_from_one_and_never_shared(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "x")
    run.create()
    assert run.latest_attempt() == 0
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.append(run.next_attempt())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))
    assert run.latest_attempt() == 8


def test_opening_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        RunDir.open(tmp_path / "nope")
    with pytest.raises(UserError, match="not the folder of a run"):
        RunDir.open(tmp_path)


def test_a_snapshot_holds_every_room_as_real_files_and_runs_alone(tmp_path: Path) -> None:
    import subprocess
    import sys

    run = RunDir(tmp_path / "x")
    run.create()
    copy = snapshot.take(run)
    assert copy == run.code / "motet"
    for room in ("experiments", "models", "parallel", "launcher", "slurm"):
        assert (copy / room / "__init__.py").is_file()
        assert not (copy / room).is_symlink()
    assert not [p for p in copy.rglob("*") if p.is_symlink() or p.name == "__pycache__"]
    code = "import motet.launcher.config.sections as s; print(s.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(run.code), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(copy / "launcher" / "config" / "sections.py")


def test_a_snapshot_is_taken_once_and_its_digest_sees_any_change(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    (package / "room" / "a.py").write_text("x = 1\n")
    run = RunDir(tmp_path / "x")
    run.create()
    copy = snapshot.take(run, package)
    assert snapshot.digest(copy) == snapshot.digest(package)
    (package / "room" / "a.py").write_text("x = 2\n")
    assert snapshot.take(run, package) == copy
    assert (copy / "room" / "a.py").read_text() == "x = 1\n"
    assert snapshot.digest(copy) != snapshot.digest(package)
    assert os.listdir(run.code) == ["motet"]
