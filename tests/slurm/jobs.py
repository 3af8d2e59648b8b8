"""Real jobs on the testbed: submit, wait, look."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from motet.core.jobs import JobRecord
from motet.launcher.runs.rundir import RunDir
from motet.slurm.client import Client
from motet.slurm.testbed.bed import Testbed
from tests.system.runs import MOTET

WAIT_S = 150.0


def environment(bed: Testbed, **more: str) -> dict[str, str]:
    return {**os.environ, **bed.environment(), "OMP_NUM_THREADS": "1", **more}


def motet(
    bed: Testbed, *arguments: str, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of ours against the testbed."""
    return subprocess.run(
        [*MOTET, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=environment(bed, **more),
    )


def submit(bed: Testbed, yaml: Path, *settings: str, **more: str) -> tuple[RunDir, str]:
    """Submit a run that lies beside its YAML; return it and its job's id."""
    done = motet(bed, "submit", str(yaml), *settings, **more)
    assert done.returncode == 0, done.stderr
    return RunDir(yaml.parent / "runs" / yaml.stem), done.stdout.splitlines()[0]


def job(bed: Testbed, job_id: str) -> JobRecord:
    """What Slurm knows of a job."""
    return Client(environment(bed)).queue([job_id])[job_id]


def until(seen: Callable[[], bool], run: RunDir, wait_s: float = WAIT_S) -> None:
    """Wait for something to come true; a failure shows what the job printed."""
    deadline = time.monotonic() + wait_s
    while not seen():
        assert time.monotonic() < deadline, output(run)
        time.sleep(0.3)


def output(run: RunDir) -> str:
    """What the jobs of a run printed."""
    return "\n".join(path.read_text() for path in sorted(run.job_files.glob("output-*")))
