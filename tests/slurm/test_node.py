from __future__ import annotations

from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.core.jobs import SchedulerError
from motet.launcher.jobs.place import place_of
from motet.launcher.jobs.secrets import read_secret
from motet.launcher.launch.command import NodePlace
from motet.slurm.job import this_node

PROCESSES, FIRST_PORT = [4, 2], 29_600
JOB = {
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "a[1-2]",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "b1",
}


def test_every_node_of_a_heterogeneous_job_finds_its_place_and_the_same_head() -> None:
    variables = {**JOB, "SLURM_JOB_ID": "1235", "SLURM_HET_JOB_ID": "1234"}
    nodes = [this_node({**variables, "SLURM_PROCID": str(n)}) for n in range(3)]
    found = [place_of(node, PROCESSES, FIRST_PORT)[1] for node in nodes]
    assert found == [
        NodePlace(3, 0, "a1:29834", 0, 10),
        NodePlace(3, 1, "a1:29834", 4, 10),
        NodePlace(3, 2, "a1:29834", 8, 10),
    ]


def test_a_job_of_one_kind_of_nodes_needs_no_component() -> None:
    environment = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n7", "SLURM_PROCID": "0"}
    place = NodePlace(1, 0, "n7:29605", 0, 2)
    assert place_of(this_node(environment), [2], FIRST_PORT) == (2, place)


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
    with pytest.raises(SchedulerError):
        place_of(this_node(environment), PROCESSES, FIRST_PORT)


def test_threads_share_what_slurm_gave_the_node() -> None:
    variables = {"SLURM_JOB_NODELIST": "n7", "SLURM_PROCID": "0"}
    assert this_node({**variables, "SLURM_CPUS_PER_TASK": "12"}).cpus == 12
    assert this_node(variables).cpus is None


def test_a_secret_is_read_from_a_file_of_ones_own_and_said_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    path.chmod(0o600)
    assert read_secret("KEY", str(path), "slurm") == "s3cret"
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(UserError, match="chmod 600") as caught:
            read_secret("KEY", str(path), "slurm")
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "  \n", "s3cret\nLD_PRELOAD=/x", "a" * 70_000, "s3\x00t"])
def test_what_is_no_single_line_is_no_secret(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UserError, match="as one line") as caught:
        read_secret("KEY", str(path), "slurm")
    assert "s3" not in str(caught.value).replace(str(path), "")


def test_a_secret_that_is_missing_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_secret("KEY", str(tmp_path / "none"), "slurm")
    with pytest.raises(UserError, match="KEY="):
        read_secret("KEY", str(tmp_path), "slurm")
