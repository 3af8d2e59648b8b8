"""One corpus and one uninterrupted run for all system tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.runs import make_corpus, motet, write_yaml


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "docs")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run that nothing interrupted."""
    yaml = write_yaml(tmp_path_factory.mktemp("whole"), corpus, "whole")
    done = motet("train", str(yaml), cwd=yaml.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.parent / "runs" / "whole"
