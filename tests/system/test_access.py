"""Whom the files of real runs are for: every file of one, and a run that two users of a group
train in turn.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.modes import unlike
from tests.system.runs import MOTET, TIMEOUT_S, environment, write_yaml

USERS, GROUP = (41_001, 41_002), 41_000


def test_every_file_of_a_run_of_two_ranks_follows_the_umask(whole_run: Path) -> None:
    """It was trained under umask 027 (see `conftest.py`), which gives the group what others do not
    get.
    """
    assert unlike(whole_run, 0o750) == []
    inside = {path.name for path in whole_run.rglob("*")}
    assert {
        "manifest.json",
        "environment.json",
        "__1_0.distcp",
        "rank-00001.bin",
        "stdout.log",
    } <= inside


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter, as those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="motet-group-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def become(number: int) -> list[str]:
    """Words that run a command as one of two users of a group who may read everything, as Python
    may lie in root's home, and write what is theirs.
    """
    user, reads = str(USERS[number]), "+dac_read_search"
    words = ["setpriv", "--reuid", user, "--regid", user, "--groups", str(GROUP)]
    return [*words, "--inh-caps", reads, "--ambient-caps", reads]


def are_users() -> bool:
    """Whether this process may be others."""
    if os.geteuid() or not shutil.which("setpriv"):
        return False
    return subprocess.run([*become(0), sys.executable, "-c", ""]).returncode == 0


def as_user(number: int, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as one of two users; as this one where there is no right to."""
    home = folder / f"home-{number}"
    return subprocess.run(
        [*(become(number) if are_users() else []), *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=folder,
        umask=0o022,
        env={**environment(), "HOME": str(home), "LOGNAME": f"user{number}"},
    )


@pytest.mark.long
def test_two_users_of_a_group_train_one_run_in_turn(corpus: Path, open_folder: Path) -> None:
    shutil.copytree(corpus, open_folder / "docs")
    runs = open_folder / "runs"
    for number, user in enumerate(USERS):
        (open_folder / f"home-{number}").mkdir()
        if are_users():
            os.chown(open_folder / f"home-{number}", user, user)
    runs.mkdir()
    if are_users():
        os.chown(runs, USERS[0], GROUP)

    def edit(text: str) -> str:
        return text.replace("processes: 2", "processes: 1").replace(
            "seed: 3", "seed: 3\naccess: group"
        )

    yaml = write_yaml(open_folder, open_folder / "docs", "g", edit)
    first = as_user(0, open_folder, *MOTET, "train", str(yaml))
    assert first.returncode == 0, first.stderr
    second = as_user(1, open_folder, *MOTET, "resume", "runs/g", "training.steps=30")
    assert second.returncode == 0, second.stderr
    told = as_user(1, open_folder, *MOTET, "report", "runs/g")
    assert told.returncode == 0, told.stderr
    run = runs / "g"
    assert (run / "DONE").read_text().strip() == "30"
    assert unlike(run, 0o2775) == []
    if are_users():
        assert {path.stat().st_gid for path in run.rglob("*")} == {GROUP}
        assert {path.stat().st_uid for path in (run / "attempts").iterdir()} == set(USERS)
