"""One corpus and one uninterrupted run for all system tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.runs import make_corpus, motet, write_yaml


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first worker that asks has made, for all workers of this pytest."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made := folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _once(tmp_path_factory, "corpus", lambda folder: make_corpus(folder / "docs")) / "docs"


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run that nothing interrupted, which no test may change."""

    def train(folder: Path) -> None:
        yaml = write_yaml(folder, corpus, "whole")
        done = motet("train", str(yaml), cwd=folder, umask=0o027)
        assert done.returncode == 0, done.stdout + done.stderr

    return _once(tmp_path_factory, "whole", train) / "runs" / "whole"
