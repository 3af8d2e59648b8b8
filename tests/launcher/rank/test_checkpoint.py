"""Checkpoints: whole or absent, verified, and unable to run code."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.core.errors import UserError
from motet.core.files import read_json, write_json
from motet.core.hashing import sha256_file
from motet.launcher.rank import checkpoint
from motet.launcher.rank.checkpoint import Checkpoints, kept_out
from motet.launcher.rank.safe_reader import SafeReader
from motet.launcher.runs.rundir import RunDir
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((40, 3), value), "step.w": torch.tensor(value)}


def save(world: World, root: Path, steps: list[int], **policy: Any) -> list[int]:
    run = RunDir(root)
    run.create()
    checkpoints = Checkpoints(run, world, **policy)
    for step in steps:
        state = tensors(float(step))
        checkpoints.save(step, state, {"segment": 1})
        for tensor in state.values():
            tensor.zero_()  # training changes the weights while they are written
    checkpoints.close()
    return run.checkpoint_steps()


def load(world: World, root: Path, step: int) -> tuple[str, float]:
    state = tensors(-1.0)
    checkpoints = Checkpoints(RunDir(root), world)
    try:
        checkpoints.load(step, state)
    except ValueError as error:
        return str(error), float(state["model.w"].sum())
    finally:
        checkpoints.close()
    return "", float(state["model.w"].mean())


def test_what_was_saved_is_what_the_weights_were_at_the_time(tmp_path: Path) -> None:
    assert run_ranks(2, save, tmp_path, [5])[0] == [5]
    assert run_ranks(2, load, tmp_path, 5) == [("", 5.0)] * 2
    folder = RunDir(tmp_path).checkpoint(5)
    manifest = read_json(folder / "manifest.json")
    for name, facts in manifest["files"].items():
        assert sha256_file(folder / name) == facts["sha256"]
    assert {"__0_0.distcp", ".metadata"} <= set(manifest["files"])
    assert not list(RunDir(tmp_path).checkpoints.glob(".*"))


def load_late(world: World, folder: Path, after_s: float, waits_s: float) -> tuple[str, float]:
    """Rank 1 looks through a folder of its own, into which the checkpoint comes later."""
    checkpoint.LATE_S = waits_s
    root = folder / "r" if world.rank == 0 else folder / "late"
    mine, here = RunDir(root).checkpoint(5), RunDir(folder / "r").checkpoint(5)
    if world.rank:
        shutil.copytree(here, mine.with_name("aside"))
    comes = threading.Timer(after_s, lambda: mine.with_name("aside").rename(mine))
    if world.rank:
        comes.start()
    try:
        return load(world, root, 5)
    finally:
        comes.cancel()


def test_a_checkpoint_that_is_seen_late_is_waited_for_and_not_taken_for_damaged(
    tmp_path: Path,
) -> None:
    run_ranks(2, save, tmp_path / "r", [5])
    assert run_ranks(2, load_late, tmp_path, 0.5, 60.0) == [("", 5.0)] * 2
    shutil.rmtree(tmp_path / "late")
    for told, _ in run_ranks(2, load_late, tmp_path, 60.0, 0.2):
        assert "rank 1: does not see" in told
        assert "is damaged" not in told


def load_more(world: World, root: Path) -> str:
    checkpoints = Checkpoints(RunDir(root), world)
    try:
        checkpoints.load(5, {**tensors(-1.0), "model.other": torch.zeros(3)})
    except Exception as error:
        return str(error)
    finally:
        checkpoints.close()
    return ""


def test_a_checkpoint_that_cannot_be_read_is_an_error_that_is_caught(tmp_path: Path) -> None:
    """torch raises one that no `except Exception` sees: an attempt would end without a word."""
    run_ranks(1, save, tmp_path, [5])
    for told in run_ranks(2, load_more, tmp_path):
        assert "model.other" in told


def test_one_flipped_bit_a_cut_file_and_a_missing_file_are_named_on_every_rank(
    tmp_path: Path,
) -> None:
    run_ranks(1, save, tmp_path, [5])
    path = RunDir(tmp_path).checkpoint(5) / "__0_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    for message, _ in run_ranks(2, load, tmp_path, 5):
        assert "__0_0.distcp was altered" in message
    path.write_bytes(whole[:-1])
    assert "instead of" in run_ranks(1, load, tmp_path, 5)[0][0]
    path.unlink()
    assert "__0_0.distcp is missing" in run_ranks(1, load, tmp_path, 5)[0][0]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def replace_index(folder: Path, content: bytes) -> None:
    """Put another index in place, with a manifest that vouches for it."""
    (folder / ".metadata").write_bytes(content)
    manifest = read_json(folder / "manifest.json")
    manifest["files"][".metadata"] = {
        "sha256": sha256_file(folder / ".metadata"),
        "bytes": len(content),
    }
    write_json(folder / "manifest.json", manifest)


def test_an_index_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    run_ranks(1, save, tmp_path, [5])
    marker = tmp_path / "executed"
    replace_index(RunDir(tmp_path).checkpoint(5), pickle.dumps(Evil(marker)))
    message, _ = run_ranks(1, load, tmp_path, 5)[0]
    assert "index was refused" in message
    assert not marker.exists()


def test_an_entry_that_is_not_a_tensor_is_refused_because_it_would_be_unpickled(
    tmp_path: Path,
) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    run_ranks(1, save, tmp_path, [5])
    folder = RunDir(tmp_path).checkpoint(5)
    metadata = SafeReader(folder).read_metadata()
    metadata.state_dict_metadata["model.w"] = BytesStorageMetadata()
    replace_index(folder, pickle.dumps(metadata))
    assert "'model.w' is not a tensor; refused" in run_ranks(1, load, tmp_path, 5)[0][0]


def spoiling(target: bytes, state: bytes) -> bytes:
    """A pickle that gives a state to something that the allow-list lets it name."""
    return b"\x80\x02" + target + state + b"b."


GLOBAL = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
SLOTS = b"N}X\x0e\x00\x00\x00__setattr_me__K\x01s\x86"  # (None, {name: 1}): set on the class
PLAIN = b"}X\x0e\x00\x00\x00__setattr_me__K\x01s"


@pytest.mark.parametrize(
    "content",
    [
        spoiling(GLOBAL, SLOTS),
        spoiling(GLOBAL, PLAIN),
        spoiling(b"cpathlib\nPosixPath\n", SLOTS),
        spoiling(b"ccollections\nOrderedDict\n", SLOTS),
        spoiling(b"ctorch.serialization\n_get_layout\n", SLOTS),
        spoiling(b"ctorch.serialization\n_get_layout\n", PLAIN),
        spoiling(
            b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R", PLAIN
        ),
        spoiling(GLOBAL + b")\x81", PLAIN),
        spoiling(GLOBAL + b")\x81", SLOTS),
    ],
)
def test_an_index_cannot_change_what_it_did_not_make(tmp_path: Path, content: bytes) -> None:
    import collections
    import pathlib

    from torch import serialization
    from torch.distributed.checkpoint import metadata

    run_ranks(1, save, tmp_path, [5])
    folder = RunDir(tmp_path).checkpoint(5)
    replace_index(folder, content)
    with pytest.raises(UserError, match=r"its index was refused: it (changes|gives)"):
        SafeReader(folder).read_metadata()
    named = (metadata.Metadata, pathlib.PosixPath, collections.OrderedDict)
    others = (serialization._get_layout, *metadata._MEM_FORMAT_ENCODING)
    assert not any(hasattr(one, "__setattr_me__") for one in (*named, *others))


def test_the_hash_of_an_index_is_checked_before_anything_is_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(1, save, tmp_path, [5])
    folder = RunDir(tmp_path).checkpoint(5)
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes() + b" ")
    monkeypatch.setattr("motet.launcher.rank.safe_reader._IndexUnpickler", None)
    with pytest.raises(UserError, match="was altered since it was written"):
        SafeReader(folder).read_metadata()
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        SafeReader(folder).read_metadata()


@pytest.mark.parametrize("name", ["other.distcp", "../other.distcp", "/etc/passwd", ""])
@pytest.mark.parametrize("listed", [False, True])
def test_a_file_that_the_manifest_does_not_list_is_not_read(
    tmp_path: Path, name: str, listed: bool
) -> None:
    run_ranks(1, save, tmp_path, [5])
    folder = RunDir(tmp_path).checkpoint(5)
    index = SafeReader(folder).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = name
    if listed and Path(name).name != name:
        manifest = read_json(folder / "manifest.json")
        manifest["files"][name] = manifest["files"]["__0_0.distcp"]
        write_json(folder / "manifest.json", manifest)
    replace_index(folder, pickle.dumps(index))
    with pytest.raises(UserError, match="which its manifest does not list; refused"):
        SafeReader(folder).read_metadata()


def test_old_checkpoints_go_and_milestones_stay(tmp_path: Path) -> None:
    kept = run_ranks(1, save, tmp_path, [10, 20, 30, 40, 50], **{})[0]
    assert kept == [30, 40, 50]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    assert run_ranks(1, save, tmp_path, [5, 5])[0] == [5]
    assert run_ranks(1, load, tmp_path, 5)[0] == ("", 5.0)


@pytest.mark.parametrize(
    ("steps", "keep", "every", "gone"),
    [
        ([1, 2, 3], 3, 0, []),
        ([1, 2, 3, 4], 2, 0, [1, 2]),
        ([100, 150, 200, 250], 1, 100, [150]),
    ],
)
def test_retention_policy(steps: list[int], keep: int, every: int, gone: list[int]) -> None:
    assert kept_out(steps, keep, every) == gone
