from __future__ import annotations

import pytest

from motet.slurm.errors import SlurmError
from motet.slurm.nodes import hosts_by_group


def test_the_groups_of_a_heterogeneous_job_come_in_order() -> None:
    environment = {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST": "a1",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-2]",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "b7",
    }
    assert hosts_by_group(environment) == [["a1", "a2"], ["b7"]]
    assert hosts_by_group({"SLURM_JOB_NODELIST": "n[1-2]"}) == [["n1", "n2"]]


def test_outside_of_a_job_there_are_no_hosts() -> None:
    with pytest.raises(SlurmError, match="SLURM_JOB_NODELIST is not set"):
        hosts_by_group({})
