from __future__ import annotations

import os
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.launcher.jobs.node import cores_of, place, read_secret
from motet.launcher.launch.command import NodePlace
from motet.slurm.errors import SlurmError

TOLD = {
    "groups": [{"nodes": 2, "processes": 4}, {"nodes": 1, "processes": 2}],
    "ports": [29_600, 1000],
}
JOB = {
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-2]",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "b1",
}


def test_every_node_of_a_heterogeneous_job_finds_its_place_and_the_same_head() -> None:
    found = [place(TOLD, {**JOB, "SLURM_PROCID": str(n)}, "1234")[1] for n in range(3)]
    assert found == [
        NodePlace(3, 0, "a1:29834", 0, 10),
        NodePlace(3, 1, "a1:29834", 4, 10),
        NodePlace(3, 2, "a1:29834", 8, 10),
    ]


def test_a_job_of_one_kind_of_nodes_needs_no_component() -> None:
    told = {"groups": [{"nodes": 1, "processes": 2}], "ports": [29_600, 1000]}
    environment = {"SLURM_JOB_NODELIST": "n7", "SLURM_PROCID": "0"}
    assert place(told, environment, "5")[1] == NodePlace(1, 0, "n7:29605", 0, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0"},
        {**JOB, "SLURM_PROCID": "3"},
        {"SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "a1"},
    ],
)
def test_a_node_that_slurm_does_not_place_says_why(environment: dict[str, str]) -> None:
    with pytest.raises(SlurmError):
        place(TOLD, environment, "5")


def test_threads_share_what_slurm_gave_the_node() -> None:
    assert cores_of({"SLURM_CPUS_PER_TASK": "12"}) == 12
    assert cores_of({}) == len(os.sched_getaffinity(0))


def test_a_secret_is_read_from_a_file_of_ones_own_and_said_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    path.chmod(0o600)
    assert read_secret("KEY", str(path)) == "s3cret"
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(UserError, match="chmod 600") as caught:
            read_secret("KEY", str(path))
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "  \n", "s3cret\nLD_PRELOAD=/x", "a" * 70_000, "s3\x00t"])
def test_what_is_no_single_line_is_no_secret(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UserError, match="as one line") as caught:
        read_secret("KEY", str(path))
    assert "s3" not in str(caught.value).replace(str(path), "")


def test_a_secret_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_secret("KEY", str(tmp_path / "none"))
    with pytest.raises(UserError, match="KEY="):
        read_secret("KEY", str(tmp_path))
