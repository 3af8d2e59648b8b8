"""The folder of a testbed on disk: its check, its files, its record, the errors in its logs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from typing import Any

from motet.core.parsing import parse_json
from motet.slurm.errors import SlurmError
from motet.slurm.testbed import shape
from motet.slurm.testbed.shape import Files

MUNGE_KEY_BYTES = 128
LOG_TAIL_CHARACTERS = 2000
ERRORS_PER_LOG = 3


def check_ours(files: Files) -> None:
    """Raise SlurmError unless the folder is new, or root's and holding nothing but a testbed:
    `start` empties it.
    """
    folder = files.folder
    shape.check_folder(files)
    if not folder.exists():
        return
    if not folder.is_dir() or folder.stat().st_uid != os.geteuid():
        raise SlurmError(f"{folder} is not a folder of yours; give a new one")
    if not files.marker.exists() and any(folder.iterdir()):
        raise SlurmError(f"{folder} holds other files; give an empty or a new folder")


def write(files: Files, record: dict[str, Any], version: tuple[int, int]) -> None:
    """Empty the folder and write record, configuration and a new key.

    The record is first: it marks the folder as ours.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    files.folder.chmod(0o700)
    write_record(files, record)
    for entry in files.folder.iterdir():
        if entry != files.marker:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in files.folders:
        folder.mkdir(parents=True, mode=0o700)
    key = files.munge / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(MUNGE_KEY_BYTES))
    files.hosts.write_text(shape.hosts_text(record["subnet"]), encoding="utf-8")
    files.cgroup_conf.write_text(shape.cgroup_text(version), encoding="utf-8")
    conf = shape.slurm_conf_text(files, record["subnet"])
    files.slurm_conf.write_text(conf, encoding="utf-8")


def read_record(files: Files) -> dict[str, Any]:
    """{"subnet": third byte of the addresses, "rate_mbit": of the link, "killed": whether slurmctld
    once was}.
    """
    record: dict[str, Any] = parse_json(files.marker.read_text(encoding="utf-8"))
    return record


def write_record(files: Files, record: dict[str, Any]) -> None:
    """Replace the record in one move."""
    part = files.marker.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n", encoding="utf-8")
    part.replace(files.marker)


def log_errors(files: Files) -> str:
    """The last errors of each log, one a line."""
    told = []
    for path in sorted(files.logs.glob("*")):
        lines = path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:].splitlines()
        wrong = [line for line in lines if "error" in line or "fatal" in line]
        told += [f"{path.name}: {line}" for line in wrong[-ERRORS_PER_LOG:]]
    return "\n".join(told)
