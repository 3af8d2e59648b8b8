from __future__ import annotations

import pytest

from motet.slurm.errors import SlurmError
from motet.slurm.nodes import expand, hosts_by_group, port, seat


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1-3,07-09],a-b2", ["n1", "n2", "n3", "n07", "n08", "n09", "a-b2"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
        ("c.site.org,d[2]", ["c.site.org", "d2"]),
    ],
)
def test_a_node_list_is_expanded_without_scontrol(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n[a]", "n 1", "n1;id", "n[1-99999999]", "$(id)", "n[]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(SlurmError, match="node list"):
        expand(text)


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


def test_ranks_are_numbered_group_by_group_when_nodes_have_different_processes() -> None:
    hosts, processes = [["a1", "a2"], ["b1", "b2"]], [4, 1]
    seats = [seat(hosts, processes, node) for node in range(4)]
    assert [s.offset for s in seats] == [0, 4, 8, 9]
    assert [s.processes for s in seats] == [4, 4, 1, 1]
    assert [s.group for s in seats] == [0, 0, 1, 1]
    assert {(s.nodes, s.world_size, s.head) for s in seats} == {(4, 10, "a1")}


@pytest.mark.parametrize(("processes", "node"), [([1], 2), ([1], -1), ([1, 1], 0)])
def test_a_node_that_is_not_of_this_job_has_no_seat(processes: list[int], node: int) -> None:
    with pytest.raises(SlurmError):
        seat([["a", "b"]], processes, node)


def test_jobs_that_follow_each_other_meet_at_different_ports() -> None:
    ports = {port(str(job), 29_600, 1000) for job in range(100, 200)}
    assert len(ports) == 100
    assert all(29_600 <= number < 30_600 for number in ports)
