from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.core import access
from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.core.locks import held

UMASKS = (0o022, 0o027, 0o077, 0o002, 0o007, 0o000)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", UMASKS)
@pytest.mark.parametrize("asked", access.CHOICES)
def test_what_a_process_makes_in_a_folder_is_as_open_as_the_folder(
    tmp_path: Path, umask: int, asked: str
) -> None:
    os.umask(umask)
    folder = tmp_path / "runs" / "r"
    access.make_shared(folder, asked)
    os.umask(0o077)  # another process, started anywhere
    access.follow(folder)
    atomic_write(folder / "file", "x")
    (folder / "inner").mkdir()
    wanted = {
        "umask": 0o777 & ~umask & ~0o002,
        "private": 0o700,
        "group": 0o770 | (0o005 & ~umask),
    }[asked]
    setgid = 0o2000 if asked == "group" else 0
    assert (mode(folder), mode(folder / "inner")) == (wanted | setgid,) * 2
    assert mode(folder / "file") == wanted & 0o666


@pytest.mark.parametrize("umask", UMASKS)
def test_a_secret_is_its_owner_s_under_any_umask(tmp_path: Path, umask: int) -> None:
    os.umask(umask)
    atomic_write(tmp_path / "new" / "secret", "x", private=True)
    assert (mode(tmp_path / "new"), mode(tmp_path / "new" / "secret")) == (0o700, 0o600)


def test_the_group_is_that_of_the_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access.make_shared(tmp_path / "r", "group")
    assert (tmp_path / "r").stat().st_gid == tmp_path.stat().st_gid
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setattr(os, "getegid", lambda: -1)
    monkeypatch.setattr(os, "getgroups", lambda: [])
    with pytest.raises(UserError, match=r"access=group: .* belongs to the group .*chgrp GROUP"):
        access.make_shared(tmp_path / "s", "group")


@pytest.mark.parametrize(("open_to", "expected"), [(0o755, 0o600), (0o750, 0o600), (0o2770, 0o660)])
def test_only_who_may_write_to_a_folder_may_hold_its_lock(
    tmp_path: Path, open_to: int, expected: int
) -> None:
    tmp_path.chmod(open_to)
    access.follow(tmp_path)
    with held(tmp_path / ".lock"):
        pass
    assert mode(tmp_path / ".lock") == expected


def test_a_folder_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    access.follow(tmp_path / "gone")
    assert os.umask(0o022) == 0o022
