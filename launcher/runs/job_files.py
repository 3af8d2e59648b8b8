"""What a run's folder keeps of its jobs, read back through one place that names what is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from motet.core.errors import DamagedFile
from motet.core.files import FROM_A_COPY, read_fields, read_json, write_json
from motet.launcher.runs.rundir import RunDir

_REMEDY = f"{FROM_A_COPY}; the scheduler's own list has the jobs as well"
_BEGUN = {"job_id": str, "restarts": int, "attempt": int, "step": int}
_COMMAND = {"since_attempt": int}


def read_jobs(run: RunDir, strict: bool = True) -> list[dict[str, Any]]:
    """Return the submitted jobs, newest last; [] where none was. Each has a `job_id`.

    Args:
        strict: False leaves out what is listed and is no job.

    Raises:
        DamagedFile: it cannot be read, was altered, or lists something else.
    """
    path = run.jobs_json
    if not path.exists():
        return []
    found = read_json(path, _REMEDY)
    jobs = found.get("jobs") if isinstance(found, dict) else found  # once a list without a hash
    if not isinstance(jobs, list):
        raise DamagedFile(path, "holds no list of jobs", _REMEDY)
    others = [one for one in jobs if not _is_job(one)]
    if strict and others:
        raise DamagedFile(path, f"lists {str(others[0])[:40]!r}, which is no job", _REMEDY)
    return [one for one in jobs if _is_job(one)]


def _is_job(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("job_id"), str)


def write_jobs(run: RunDir, jobs: Sequence[dict[str, Any]]) -> None:
    """Write the list down, with its hash."""
    write_json(run.jobs_json, {"jobs": list(jobs)})


def read_begun(run: RunDir) -> dict[str, Any]:
    """Return where the run stood when its newest job began.

    Raises:
        DamagedFile: it cannot be read, was altered, or is the file of something else.
    """
    return read_fields(run.job_begun, _BEGUN)


def read_command(run: RunDir) -> dict[str, Any]:
    """Return what the nodes of a job must know.

    Raises:
        DamagedFile: as `read_begun`.
    """
    remedy = f"`motet resume {run.root}` writes it anew"
    return read_fields(run.job_command, _COMMAND, remedy)
