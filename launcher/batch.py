"""`python -m motet.launcher.batch begin|end RUN ...`: what a batch script calls (jobs/batch.py).

The name stays here because run folders of every age know it: a job executes the snapshot that its
run was frozen with, and a newer Motet submits it.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from motet.core.jobs import JobExit
from motet.core.marks import marking
from motet.launcher.jobs.batch import main
from motet.launcher.runs.rundir import RunDir


def run(arguments: list[str]) -> int:
    """Do what is asked; after the end of a run, tell those who asked for it."""
    code = main(arguments)
    if arguments[:1] == ["end"] and code in (JobExit.FINE, JobExit.FAILED):
        from motet.launcher.report import ended

        with_secrets(RunDir(Path(arguments[1])))
        why = "the job is not requeued; its output says why" if code == JobExit.FAILED else ""
        ended.after(RunDir(Path(arguments[1])), why)
    return code


def with_secrets(rundir: RunDir) -> None:
    """Read the secrets of the job into this process, as on its nodes: trackers and alerts may need
    them. What cannot be read is missed where it is used.
    """
    import os

    from motet.core.errors import UserError
    from motet.core.files import read_json
    from motet.launcher.jobs.secrets import read_secret

    told: dict[str, str] = {}
    with contextlib.suppress(UserError):
        told = read_json(rundir.job_command).get("secrets") or {}
    for name, path in told.items():
        with contextlib.suppress(UserError):
            os.environ.setdefault(name, read_secret(name, path, "slurm"))


if __name__ == "__main__":
    with marking():
        sys.exit(run(sys.argv[1:]))
