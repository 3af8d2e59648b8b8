from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.core.files import (
    DamagedFile,
    atomic_write,
    read_json,
    read_sealed,
    remove_leftovers,
    whole_file,
    write_json,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def group_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_private_file_is_its_owner_s_and_another_follows_the_umask(
    tmp_path: Path, group_umask: None
) -> None:
    atomic_write(tmp_path / "a" / "secret", "x", private=True)
    atomic_write(tmp_path / "b" / "shared", "x")
    assert (mode(tmp_path / "a"), mode(tmp_path / "a" / "secret")) == (0o700, 0o600)
    assert (mode(tmp_path / "b"), mode(tmp_path / "b" / "shared")) == (0o750, 0o640)


def test_a_file_that_is_replaced_takes_the_mode_of_the_new_one(
    tmp_path: Path, group_umask: None
) -> None:
    path = tmp_path / "settings"
    path.write_text("old")
    assert mode(path) == 0o640
    atomic_write(path, "a secret", private=True)
    assert mode(path) == 0o600


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    atomic_write(path, b"old")
    with whole_file(path) as file:
        file.write(b"\0\0\0body")
        file.seek(0)
        file.write(b"top")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"topbody"


def test_what_writes_at_once_leaves_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "crash.txt"
    texts = [f"{i}" * 100_000 for i in range(8)]
    threads = [threading.Thread(target=atomic_write, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["crash.txt"]


def test_the_rest_of_a_killed_writer_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text("{}")
    (tmp_path / ".kept.json.0123456789ab.tmp").write_text("{")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["kept.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"old": True})
    with pytest.raises(ValueError):
        write_json(path, {"bad": float("nan")})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": True})
    assert read_json(path) == {"old": True}
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_damaged_or_missing_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json does not exist"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("text", ["", "\n"])
def test_settings_without_a_word_are_damaged_and_not_unsealed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(text)
    with pytest.raises(DamagedFile, match="is empty"):
        read_sealed(path)
