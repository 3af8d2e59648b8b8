"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from motet.core.errors import UserError

PRIVATE_UMASK = 0o077


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = True) -> Iterator[BinaryIO]:
    """Yield a file to write; it becomes `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part, also after a power cut. A `private`
    file has mode 0600 and its folder, if it is made here, 0700; any other follows the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    # a name of its own: several processes may write the same file
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers of `whole_file` left in a folder when they were killed.

    Only where no other process writes: it would lose its file.
    """
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str, *, private: bool = True) -> None:
    """Write `content` to `path`, whole or not at all (see `whole_file`); text is UTF-8."""
    with whole_file(path, private=private) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, private: bool = True) -> None:
    """Write `value` as indented JSON. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write(path, text, private=private)


def read_json(path: Path) -> Any:
    """Read JSON; `UserError` names the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


@contextlib.contextmanager
def whole_folders(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield an empty folder for each target; they become the targets when the block ends without an
    error, and vanish otherwise.

    A target may exist while it is empty. A reader sees each of them whole or not at all.

    Raises:
        UserError: a target is no folder, or holds files.
    """
    for target in targets:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} holds files already; give another folder")
    asides = [t.with_name(f".{t.name}.{secrets.token_hex(6)}.tmp") for t in targets]
    try:
        for aside in asides:
            aside.mkdir(parents=True)
        yield asides
        for aside, target in zip(asides, targets, strict=True):
            for path in aside.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            fsync_folder(aside)
            aside.replace(target)
            fsync_folder(target.parent)
    except BaseException:
        for aside in asides:
            shutil.rmtree(aside, ignore_errors=True)
        raise
