"""Files that are whole or absent: written beside their place, synced, then renamed. Read back
through one place, which names the file, the place in it and a remedy, and checks its hash.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from motet.core.errors import DamagedFile, UserError
from motet.core.hashing import canonical_json, sha256_hex

SEAL = "sha256"
"""Key of a JSON file under which it keeps the hash of all its other keys."""
_TEXT_SEAL = "# sha256 of the lines above: "
FROM_A_COPY = "restore it from a copy"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room: there may be some when something is removed."""
_T = TypeVar("_T")
ValueTypes = type | tuple[type, ...]


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
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


def append_whole(file: int, content: bytes) -> None:
    """Append to an open file all of `content`, or nothing.

    Raises:
        OSError: the disk is full, say; what was written of it is taken back, as a part of a record
            would spoil all that follow.
    """
    before = os.fstat(file).st_size
    written = 0
    try:
        while written < len(content):
            written += os.write(file, content[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, before)
        raise


def again_with_room(write: Callable[[], _T], make_room: Callable[[], bool]) -> _T:
    """Write what is whole or not at all; where the disk is full, once more when there may be room.

    Args:
        write: writes all or nothing.
        make_room: whether there may be room now, after what took it has given it back.
    """
    try:
        return write()
    except OSError as error:
        if error.errno not in FULL or not make_room():
            raise
    return write()


def atomic_write(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Write `content` to `path`, whole or not at all (see `whole_file`); text is UTF-8."""
    with whole_file(path, private=private) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sealed_text(text: str) -> str:
    """Return text for which `#` begins a comment with its hash as the last line (see
    `read_sealed`).
    """
    return f"{text}{_TEXT_SEAL}{sha256_hex(text)}\n"


def read_sealed(path: Path, remedy: str = FROM_A_COPY) -> tuple[str, bool]:
    """Return (text without its seal, whether it has one); its hash is checked.

    Raises:
        DamagedFile: it cannot be read, or was altered since it was written.
    """
    text = read_text(path, remedy)
    if not text.strip():
        raise DamagedFile(path, "is empty", remedy)
    body, mark, kept = text.rpartition(_TEXT_SEAL)
    if not mark:
        return text, False
    if kept.rstrip("\n") != sha256_hex(body):
        raise DamagedFile(path, "was altered since it was written", remedy)
    return body, True


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write `value` as indented JSON; a mapping ends with its own hash, which `read_json` checks.

    NaN and infinity are refused: they are not JSON.
    """
    if isinstance(value, Mapping):
        value = {**value, SEAL: seal_of(value)}
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write(path, text, private=private)


def seal_of(value: Mapping[str, Any]) -> str:
    """Return the hash that a JSON file of a mapping keeps of it: SHA-256 of the canonical text."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read back
    plain.pop(SEAL, None)
    return sha256_hex(canonical_json(plain))


def not_shown(paths: Sequence[Path], wait_s: float) -> list[Path]:
    """Return the files that are not to be seen here, once all are or `wait_s` seconds have passed:
    network file systems show what another machine wrote up to a minute late.
    """
    deadline = time.monotonic() + wait_s
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() >= deadline:
            return missing
        for folder in {path.parent for path in missing}:
            with contextlib.suppress(OSError):
                os.listdir(folder)  # lets the file system ask again
        time.sleep(0.1)
    return []


def read_bytes(path: Path, remedy: str = FROM_A_COPY) -> bytes:
    """Read a whole file.

    Raises:
        DamagedFile: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(path, "does not exist", remedy) from None
    except OSError as error:
        raise DamagedFile(path, f"cannot be read: {error.strerror}", remedy) from None


def read_text(path: Path, remedy: str = FROM_A_COPY) -> str:
    """Read a whole file of UTF-8.

    Raises:
        DamagedFile: it is missing, cannot be read or is no text; the message says where.
    """
    try:
        return read_bytes(path, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is no text: byte {error.start:,} is no UTF-8"
        raise DamagedFile(path, what, remedy) from None


def read_json(path: Path, remedy: str = FROM_A_COPY) -> Any:
    """Read JSON, and check the hash that `write_json` left in it; one of before there were any is
    taken as it is.

    Raises:
        DamagedFile: it is missing, no JSON, or altered since it was written.
    """
    text = read_text(path, remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, f"cannot be read as JSON: {error}", remedy) from None
    if isinstance(value, dict) and isinstance(kept := value.pop(SEAL, None), str):
        try:
            whole = kept == seal_of(value)
        except (ValueError, RecursionError):  # NaN, or half a character: not what was written
            whole = False
        if not whole:
            raise DamagedFile(path, "was altered since it was written", remedy)
    return value


def read_fields(
    path: Path, needs: Mapping[str, ValueTypes], remedy: str = FROM_A_COPY
) -> dict[str, Any]:
    """Read a JSON mapping that has the needed keys, each of its type.

    Raises:
        DamagedFile: as `read_json`, or it is the file of something else.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise DamagedFile(path, f"holds a {type(value).__name__}, not named values", remedy)
    for key, kinds in needs.items():
        if key not in value:
            raise DamagedFile(path, f"is not what belongs there: it has no {key!r}", remedy)
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        true_or_false = isinstance(value[key], bool) and bool not in allowed  # no number here
        if true_or_false or not isinstance(value[key], allowed):
            raise DamagedFile(path, f"has {key}={value[key]!r}, which is none that fits", remedy)
    return value


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
