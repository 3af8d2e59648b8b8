"""Which hosts a job has, from Slurm's variables alone: `scontrol` is missing in many containers.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from motet.core.hostlist import expand
from motet.slurm.errors import SlurmError


def hosts_by_group(environment: Mapping[str, str]) -> list[list[str]]:
    """Return the hosts of every component of this job, in order; one component where the job is not
    heterogeneous.

    Raises:
        SlurmError: this process runs in no job.
    """
    size = environment.get("SLURM_HET_SIZE", "")
    if size.isdecimal() and int(size) > 0:
        names = [f"SLURM_JOB_NODELIST_HET_GROUP_{group}" for group in range(int(size))]
    else:
        names = ["SLURM_JOB_NODELIST"]
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise SlurmError(f"{missing[0]} is not set; this runs inside of a Slurm job only")
    return [expand(environment[name]) for name in names]
