"""One testbed for a pytest process. Tests that use it carry `@pytest.mark.xdist_group("testbed")`.

With `--dist loadgroup` they run in one worker, one after the other; with another distribution each
worker has its own testbed. Other folders of tests import the fixture into their conftest.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from motet.slurm.testbed import needs
from motet.slurm.testbed.bed import Testbed
from motet.slurm.testbed.processes import wait_for

SLURM_TIMEOUT_S = 60


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """A running testbed; call `heal()` first when another test may have broken it."""
    if problems := needs.missing():
        pytest.skip("no testbed here: " + "; ".join(problems))
    remove_orphans(tmp_path_factory.getbasetemp())
    bed = Testbed(tmp_path_factory.getbasetemp() / "testbed")  # the same one for every conftest
    bed.start()
    yield bed
    bed.stop()


def remove_orphans(base: Path) -> None:
    """Stop the testbeds of pytest processes that were killed: pytest's own lock files name their
    process.
    """
    root = next((folder for folder in base.parents if folder.name.startswith("pytest-of-")), None)
    for marker in root.glob("pytest-*/**/testbed.json") if root else ():
        lock = root / marker.relative_to(root).parts[0] / ".lock"
        alive = lock.exists() and Path("/proc", lock.read_text().strip() or "none").exists()
        if not alive and Testbed(marker.parent).leftovers():
            Testbed(marker.parent).stop()


@pytest.fixture
def healed(testbed: Testbed) -> Iterator[Testbed]:
    """The testbed with every node idle, no job, and the default rate; no process may outlive the
    test's jobs.
    """
    testbed.heal()
    yield testbed
    assert testbed.heal() == []


def slurm(bed: Testbed, *command: str) -> str:
    """Run one of Slurm's commands on a testbed and return what it printed."""
    done = subprocess.run(
        command,
        env={**os.environ, **bed.environment()},
        capture_output=True,
        text=True,
        timeout=SLURM_TIMEOUT_S,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def submit(bed: Testbed, folder: Path, commands: str, *options: str) -> str:
    """Submit lines of shell as a job and return its id; output goes to the folder."""
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{commands}\n")
    return slurm(bed, "sbatch", "--parsable", f"--output={folder}/%j.txt", *options, str(script))


def job_field(bed: Testbed, job: str, name: str) -> str:
    """A field of `scontrol show job`, such as JobState or Restarts."""
    text = slurm(bed, "scontrol", "--oneliner", "show", "job", job)
    fields = dict(word.partition("=")[::2] for word in text.split())
    return fields[name]


def wait_until_done(bed: Testbed, job: str) -> None:
    """Wait for a job's success (`sbatch --wait` looks after 2 s, then after 8 more)."""

    def ended() -> bool:
        return job_field(bed, job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    wait_until(ended, SLURM_TIMEOUT_S, f"job {job} ends")
    assert job_field(bed, job, "JobState") == "COMPLETED"


def wait_until(ready: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Fail with `what` unless `ready()` becomes true in time."""
    assert wait_for(ready, timeout_s, poll_s=0.1), f"not after {timeout_s:.0f} s: {what}"
