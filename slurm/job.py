"""Where a process of a job stands, from Slurm's variables alone: `scontrol` is missing in many
containers. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from motet.core.jobs import CurrentJob, JobNode
from motet.slurm.errors import SlurmError
from motet.slurm.nodes import hosts_by_group

RECORDED = ("SLURM_JOB_",)
"""What begins the names of variables that are worth keeping with an attempt, and no secret."""


def current_job(environment: Mapping[str, str]) -> CurrentJob | None:
    """Return the job of this process, ARRAY_TASK in an array, and that of the first component of a
    heterogeneous job; None outside of one.
    """
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    single = environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID", "")
    job_id = f"{array}_{task}" if array and task else single
    count = environment.get("SLURM_RESTART_COUNT", "0")
    return CurrentJob(job_id, int(count) if count.isdecimal() else 0) if job_id else None


def this_node(environment: Mapping[str, str]) -> JobNode:
    """Return the node of a step that runs one task on each.

    Raises:
        SlurmError: this process is no task of a step.
    """
    rank = environment.get("SLURM_PROCID", "")
    if not rank.isdecimal():
        raise SlurmError("SLURM_PROCID is not set; srun starts this, one per node")
    asked = environment.get("SLURM_CPUS_PER_TASK", "")
    cpus = int(asked) if asked.isdecimal() and int(asked) else None
    return JobNode(_component(environment), _hosts(environment), int(rank), cpus)


def probed_node(environment: Mapping[str, str]) -> JobNode | None:
    """Return the node where `srun` started one process on each node of a job; None outside of a job
    of several nodes.

    Raises:
        SlurmError: a job of several nodes, but not one process on each.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    hosts = _hosts(environment)
    number = sum(map(len, hosts))
    if number == 1:
        return None
    tasks = environment.get("SLURM_NTASKS") if "SLURM_STEP_ID" in environment else None
    if tasks != str(number) or not environment.get("SLURM_PROCID", "").isdecimal():
        groups = "" if len(hosts) == 1 else f" --het-group=0-{len(hosts) - 1}"
        raise SlurmError(
            f"this job has {number} nodes; start one process on each: "
            f"srun{groups} --ntasks-per-node=1 motet cluster probe"
        )
    return this_node(environment)


def _component(environment: Mapping[str, str]) -> str:
    """The id that all nodes of a job agree on; tasks of an array differ in it."""
    return environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID", "")


def _hosts(environment: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    return tuple(map(tuple, hosts_by_group(environment)))
