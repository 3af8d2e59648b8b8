"""A list of hashes beside files: what a folder vouches for, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import SEAL, read_fields, write_json
from motet.core.hashing import sha256_file

LIST = "motet.json"
"""File of a folder that has the hashes of the others: exported models, results of benchmarks."""
SMALL_BYTES = 1 << 26
"""Files up to this size are hashed also where the weights beside them are not."""
FileHashes = Mapping[str, Mapping[str, Any]]


def hash_of(path: Path) -> dict[str, Any]:
    """Return what is kept of a file: SHA-256 and size."""
    return {SEAL: sha256_file(path), "bytes": path.stat().st_size}


def altered_files(
    folder: Path, files: FileHashes, most_bytes: int | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong) of every file that is missing, cut short or altered.

    Args:
        most_bytes: of larger files the size alone is compared.
    """
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            yield name, "is missing"
        elif path.stat().st_size != facts["bytes"]:
            yield name, f"has {path.stat().st_size:,} bytes instead of {facts['bytes']:,}"
        elif most_bytes is not None and facts["bytes"] > most_bytes:
            continue
        elif sha256_file(path) != facts[SEAL]:
            yield name, "was altered: its SHA-256 is another one"


def damage(folder: Path, files: FileHashes) -> str | None:
    """Return the first file that is missing, cut short or altered, in words, or None."""
    inside = {Path(name).name: facts for name, facts in files.items()}  # never leave the folder
    return next((f"{name} {what}" for name, what in altered_files(folder, inside)), None)


def write_list(folder: Path, facts: Mapping[str, Any]) -> None:
    """Leave beside the files of a folder the hash of each, with facts of where they come from."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LIST]
    listed = {path.relative_to(folder).as_posix(): hash_of(path) for path in files}
    write_json(folder / LIST, {**facts, "files": listed})


def listed_files(folder: Path, remedy: str) -> FileHashes | None:
    """Return the hashes that a folder keeps of its files; None where it has no list.

    Raises:
        DamagedFile: the list itself is damaged.
    """
    if not (folder / LIST).exists():
        return None
    listed: FileHashes = read_fields(folder / LIST, {"files": dict}, remedy)["files"]
    return {Path(name).as_posix(): facts for name, facts in listed.items()}


def refuse_altered(folder: Path, where: str, remedy: str, most_bytes: int | None = None) -> None:
    """Raise `UserError` where files of a folder are not those that its list names; a folder
    without a list is taken as it is.

    Args:
        where: the setting that names the folder.
        most_bytes: see `altered_files`.
    """
    for name, what in altered_files(folder, listed_files(folder, remedy) or {}, most_bytes):
        raise UserError(f"{where}={folder}: {name} {what}; {remedy}")
