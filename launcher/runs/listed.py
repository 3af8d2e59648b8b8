"""Folders of a run that keep a list of their files: exported models, and results of benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from motet.core.listed import LIST, altered_files, listed_files, write_list
from motet.launcher.runs import seals
from motet.launcher.runs.findings import UNKNOWN, Findings
from motet.launcher.runs.rundir import RunDir

EXPORT_AGAIN = "export it again"
EVALUATE_AGAIN = "evaluate it again (motet eval)"


def exports(found: Findings) -> None:
    """Exported models against the list that `motet export` left beside each."""
    for folder in _folders(found.run.members):
        _compare(found, folder, EXPORT_AGAIN)


def evaluations(found: Findings) -> None:
    """Results of benchmarks, which a report shows, against the list of `motet eval`."""
    for folder in _folders(found.run.evaluations):
        _compare(found, folder, EVALUATE_AGAIN)


def seal(folder: Path, run: RunDir, step: int) -> None:
    """Leave beside the files of a folder of which run they are, and the hash of each."""
    write_list(folder, {"run_sha256": seals.run_sha256(seals.read_manifest(run)), "step": step})


def _compare(found: Findings, folder: Path, remedy: str) -> None:
    if not (folder / LIST).exists():
        if any(path.is_file() for path in folder.rglob("*")):
            found.unknown.append(f"{folder.relative_to(found.run.root)}: {UNKNOWN}")
        return
    for name, what in altered_files(folder, found.reading(listed_files, folder, remedy) or {}):
        found.add(folder / name, what, remedy)


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if path.is_dir())
