"""The documentation as a site, and what machines without a network are given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from motet.launcher.commands.options import EXIT_USER_ERROR
from tests.imports import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DOCKER = (ROOT / "containers" / "Dockerfile").read_text()
APPTAINER = (ROOT / "containers" / "motet.def").read_text()


def test_the_site_is_built_has_a_search_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert any("randomized" in entry["text"] for entry in index["docs"])
    for source in (ROOT / "docs").rglob("*.md"):
        name = source.relative_to(ROOT / "docs").with_suffix(".html")
        name = name.with_name("index.html") if name.stem == "README" else name
        assert (tmp_path / name).exists(), f"{source} is not in the site"
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|img|iframe)[^>]*src=\"(?:https?:)?//|<link[^>]*href=\"(?:https?:)?//",
            page.read_text(),
        )
        assert not fetched, page


def test_both_containers_install_the_pinned_torch_and_extras_that_exist() -> None:
    torch = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    for text in (DOCKER, APPTAINER):
        assert f"TORCH={torch[1]}" in text
        extras = re.search(r"EXTRAS=(\S+)", text)
        assert extras is not None
        assert set(extras[1].split(",")) <= set(EXTRAS)
        assert "gcc g++" in text, "torch.compile and DeepSpeed build kernels"
        assert "motet --version" in text, "an image that cannot start is not made"
        assert not re.search(r"(?i)token|password|secret", text)


def test_the_files_of_the_containers_are_whole() -> None:
    sections = re.findall(r"^%(\w+)", APPTAINER, re.MULTILINE)
    assert sections == ["arguments", "files", "post", "environment", "runscript"]
    assert 'exec motet "$@"' in APPTAINER
    assert "set -eu" in APPTAINER
    assert 'ENTRYPOINT ["motet"]' in DOCKER
    first = [line.split()[0] for line in DOCKER.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert first[0] == "FROM"
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "!launcher/runs"} <= set(ignored)


def test_motet_starts_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "motet", "trian"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == EXIT_USER_ERROR
    assert "did you mean 'train'" in done.stderr
