"""A copy of the package inside the run folder: the code that a run executes cannot change under
it.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from motet.core.hashing import sha256_file, sha256_hex
from motet.launcher.runs.rundir import RunDir

_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.pyo", ".*.tmp")


def package_folder() -> Path:
    """Folder of the package that runs now (its rooms may be links)."""
    import motet

    return Path(motet.__file__).parent


def take(rundir: RunDir, package: Path | None = None) -> Path:
    """Copy the package to `code/motet`, links followed, and return it.

    A snapshot that exists is kept.
    """
    target = rundir.code / "motet"
    if target.is_dir():
        return target
    rundir.code.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".motet.", dir=rundir.code) as temporary:
        copy = Path(temporary) / "motet"
        shutil.copytree(
            package or package_folder(),
            copy,
            ignore=_LEFT_OUT,
            symlinks=False,
            copy_function=shutil.copyfile,
        )
        mode = stat.S_IMODE(rundir.code.stat().st_mode)
        for folder, _, _ in os.walk(copy):  # copytree gives them that of the installed package
            os.chmod(folder, mode)
        os.replace(copy, target)
    return target


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of every source file: two snapshots are equal when it
    is.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    lines = (f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n" for path in paths)
    return sha256_hex("".join(lines))
