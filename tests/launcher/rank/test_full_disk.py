"""A disk that is full: told before a checkpoint is begun, nothing half written, one clear end."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from motet.core.errors import UserError
from motet.core.files import again_with_room, append_whole
from motet.experiments.stream.ledger import LedgerWriter, Record, read_records
from motet.launcher.rank import loop
from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.rank.disk import disk_is_out
from motet.launcher.runs.rundir import RunDir
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, leave: int) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - leave)


def record(step: int) -> Record:
    return Record(step, step * 8, 8, 1, True, np.arange(500, dtype=np.uint64))


def test_a_record_that_does_not_fit_leaves_nothing_and_is_told(small: Path) -> None:
    (small / "segment-00001").mkdir()
    writer = LedgerWriter(small, 1, 0)
    writer.append(record(0))
    fill(small, leave=4096)
    whole = 1
    with pytest.raises(OSError, match="No space"):
        for step in range(1, 9):
            writer.append(record(step))
            whole += 1
    (small / "filler").unlink()
    writer.append(record(whole))
    path = small / "segment-00001/rank-00000.bin"
    assert [one.step for one in read_records(path)] == list(range(whole + 1))


def test_a_write_that_the_kernel_cuts_short_is_completed_or_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_write = os.write
    file = os.open(tmp_path / "f", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    monkeypatch.setattr(os, "write", lambda fd, data: true_write(fd, bytes(data)[:3]))
    append_whole(file, b"0123456789")

    def then_full(fd: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true_write(fd, bytes(data)[:3])

    monkeypatch.setattr(os, "write", then_full)
    with pytest.raises(OSError, match="No space"):
        append_whole(file, b"abcdefgh")
    os.close(file)
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def save_twice(world: World, root: Path) -> str:
    run = RunDir(root)
    run.create()
    checkpoints = Checkpoints(run, world, background=False)
    checkpoints.save(1, {"w": torch.zeros(40_000)}, {})
    try:
        checkpoints.save(2, {"w": torch.zeros(40_000_000, device="meta")}, {})
    except UserError as error:
        return str(error)
    finally:
        checkpoints.close()
    return ""


def test_room_for_a_checkpoint_is_looked_for_before_it_is_begun(small: Path) -> None:
    for told in run_ranks(2, save_twice, small / "r"):
        assert "no room for the checkpoint after step 2: it takes 160,000,000 bytes" in told
        assert "motet resume" in told
    run = RunDir(small / "r")
    assert run.checkpoint_steps() == [1]
    assert not list(run.checkpoints.glob(".*"))


def skip_and_try_again(world: World, root: Path) -> list[object]:
    run = RunDir(root)
    run.create()
    checkpoints = Checkpoints(run, world, background=False)
    large, small = torch.zeros(40_000_000, device="meta"), torch.zeros(40_000)
    why = checkpoints.save(1, {"w": large}, {}, may_skip=True)
    again = checkpoints.save(2, {"w": small}, {}, may_skip=True)
    checkpoints.close()
    return [why, again]


def test_a_checkpoint_that_may_be_skipped_is_and_the_next_is_tried(small: Path) -> None:
    for why, again in run_ranks(2, skip_and_try_again, small / "r"):
        assert "no room for the checkpoint after step 1" in str(why)
        assert again == ""
    assert RunDir(small / "r").checkpoint_steps() == [2]


def fill_within(world: World, root: Path, may_skip: bool) -> list[str]:
    """The disk looks large enough, and is not: rank 1 finds out while it writes."""
    run = RunDir(root)
    run.create()
    checkpoints = Checkpoints(run, world)
    checkpoints._lacks_room = lambda *_: None  # type: ignore[method-assign]
    small = {"w": torch.zeros(40_000)}
    checkpoints.save(1, small, {})
    large = {"large": torch.zeros(400_000)} if world.rank else {}
    said = [checkpoints.wait()]
    checkpoints.save(2, small | large, {}, may_skip=may_skip)
    try:
        assert checkpoints.gives_room()
        said += [checkpoints.skipped(), checkpoints.wait(), checkpoints.skipped()]
    except UserError as error:
        said.append(str(error))
    left = [path.name for path in run.checkpoints.glob(".*")]
    checkpoints.save(3, small, {}, may_skip=may_skip)
    checkpoints.close()
    return [*said, *left]


def test_a_save_within_which_the_disk_fills_is_skipped_by_policy_and_nothing_is_left_of_it(
    small: Path,
) -> None:
    first, other = run_ranks(2, fill_within, small / "r", True)
    assert first == other
    before, seen, told, after = first
    assert (before, after) == ("", "")
    assert seen == told
    assert "after step 2: the disk was full before all of it was written (rank" in told
    assert "No space left on device" in told
    assert RunDir(small / "r").checkpoint_steps() == [1, 3]


def test_a_save_within_which_the_disk_fills_ends_a_run_that_does_not_skip(small: Path) -> None:
    first, other = run_ranks(2, fill_within, small / "r", False)
    assert first == other
    assert "no room for the checkpoint after step 2" in first[-1]
    assert "motet resume" in first[-1]
    assert RunDir(small / "r").checkpoint_steps() == [1, 3]


def one_rank_fails(world: World, root: Path) -> str:
    run = RunDir(root)
    run.create()
    checkpoints = Checkpoints(run, world)

    def sync() -> None:
        if world.rank == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpoints.save(1, {"w": torch.zeros(40)}, {}, sync, may_skip=True)
    try:
        checkpoints.close()
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


def test_what_fails_on_one_rank_within_a_save_every_rank_is_told_at_once(tmp_path: Path) -> None:
    for told in run_ranks(2, one_rank_fails, tmp_path / "r"):
        assert "rank 1: [Errno 5] Input/output error" in told
    assert RunDir(tmp_path / "r").checkpoint_steps() == []


def test_what_a_full_disk_refused_is_written_once_room_was_given_back(small: Path) -> None:
    (small / "segment-00001").mkdir()
    writer = LedgerWriter(small, 1, 0)
    fill(small, leave=0)
    asked: list[str] = []

    def make_room(gives: bool) -> bool:
        asked.append("room")
        if gives:
            (small / "filler").unlink()
        return gives

    write = partial(writer.append, record(0))
    with pytest.raises(OSError, match="No space"):
        again_with_room(write, lambda: make_room(False))
    again_with_room(write, lambda: make_room(True))
    assert asked == ["room", "room"]
    path = small / "segment-00001/rank-00000.bin"
    assert [one.step for one in read_records(path)] == [0]


@pytest.mark.parametrize(("last", "grows", "policy"), [(True, False, "skip"), (False, True, "skip"), (False, False, "stop"), (False, False, "skip")])  # fmt: skip
def test_only_by_policy_and_never_the_last_one_or_one_that_a_model_grows_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool, grows: bool, policy: str
) -> None:
    asked: list[bool] = []

    def save(*_: object, may_skip: bool) -> str:
        asked.append(may_skip)
        return "no room" if may_skip else ""

    logged: list[object] = []
    run = RunDir(tmp_path)
    run.attempt(1).mkdir(parents=True)
    job: Any = SimpleNamespace(
        settings=SimpleNamespace(checkpoint=SimpleNamespace(no_room=policy)),
        checkpoints=SimpleNamespace(save=save, wait=str),
        told_skipped="",
        reached=10,
        engine=SimpleNamespace(tensors=dict),
        ledger=SimpleNamespace(sync=None),
        seconds={},
        world=SimpleNamespace(rank=0),
        segment=SimpleNamespace(attempt=1),
        run=run,
        progress=SimpleNamespace(print=lambda text: None),
        metrics=SimpleNamespace(log=lambda *words, **facts: logged.append(facts["event"])),
        at=lambda moment, step, folder: logged.append(moment),
    )
    monkeypatch.setattr(loop, "growth_due", lambda job, step: grows)
    monkeypatch.setattr(loop, "facts_of", lambda job: {})
    loop.save(job, 10, last=last)
    skips = policy == "skip" and not (last or grows)
    assert asked == [skips]
    assert logged == (["checkpoint_skipped"] if skips else ["at_checkpoint"])
    assert run.skipped(1).exists() == skips


def test_a_full_disk_is_recognized_behind_other_errors() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    outer = RuntimeError("the checkpoint failed")
    outer.__cause__ = full
    assert disk_is_out(outer) == "No space left on device"
    assert disk_is_out(ValueError("x")) == ""
