"""Who may read and write what a run leaves: every file and folder of it, one by one."""

from __future__ import annotations

import fnmatch
import os
import stat
from pathlib import Path

PRIVATE = {
    ".lock": "who may only read the run must not hold it up",
    ".ranks": "who may only read the run must not hold it up",
    "attempts/*/environment.json": "variables of the user's shell",
    "attempts/*/meeting": "machines believe what lies there",
    "joining": "machines believe what lies there",
    "wandb": "made by W&B, of what it knows of its user",
}
"""What is its owner's alone whatever the umask, and why."""
GROUP_LOCKS = (".lock", ".ranks")
"""Of these, what a group that may write to the run may lock as well."""


def unlike(root: Path, folder_mode: int) -> list[str]:
    """Return what is not as open as a run folder of this mode makes it, with its mode."""
    found = []
    for folder, names, files in os.walk(root):
        for name in [".", *files]:
            path = Path(folder, name)
            inside = path.relative_to(root).as_posix()
            if not path.is_symlink() and (wanted := _wanted(inside, path, folder_mode)) is not None:
                mode = stat.S_IMODE(path.stat().st_mode)
                found += [] if mode == wanted else [f"{inside} {mode:o}, not {wanted:o}"]
        here = Path(folder).relative_to(root)
        names[:] = [
            n for n in names if _why(here / n) is None or not _check(root / here / n, found)
        ]
    return found


def _check(path: Path, found: list[str]) -> bool:
    """A private folder hides what it holds."""
    if path.stat().st_mode & 0o077:
        found.append(f"{path} is not private")
    return True


def _why(inside: Path) -> str | None:
    return next((why for p, why in PRIVATE.items() if fnmatch.fnmatch(str(inside), p)), None)


def _wanted(inside: str, path: Path, folder_mode: int) -> int | None:
    if path.is_dir():
        return folder_mode
    writable = folder_mode & 0o020
    if inside in GROUP_LOCKS:
        return 0o660 if writable else 0o600
    if _why(Path(inside)):
        return 0o600
    return folder_mode & 0o666
