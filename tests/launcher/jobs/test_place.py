from __future__ import annotations

import pytest

from motet.core.jobs import JobNode, SchedulerError
from motet.launcher.jobs.place import place_of, port

HOSTS = (("a1", "a2"), ("b1", "b2"))


def test_ranks_are_numbered_group_by_group_when_nodes_have_different_processes() -> None:
    found = [place_of(JobNode("1234", HOSTS, node), [4, 1], 29_600) for node in range(4)]
    assert [processes for processes, _ in found] == [4, 4, 1, 1]
    assert [place.offset for _, place in found] == [0, 4, 8, 9]
    assert [place.rank for _, place in found] == [0, 1, 2, 3]
    assert {(p.count, p.total, p.endpoint) for _, p in found} == {(4, 10, "a1:29834")}


@pytest.mark.parametrize(("processes", "node"), [([1], 2), ([1], -1), ([1, 1], 0)])
def test_a_node_that_is_not_of_this_job_has_no_place(processes: list[int], node: int) -> None:
    with pytest.raises(SchedulerError):
        place_of(JobNode("1", (("a", "b"),), node), processes, 29_600)


def test_jobs_that_follow_each_other_meet_at_different_ports() -> None:
    ports = {port(str(job), 29_600) for job in range(100, 200)}
    assert len(ports) == 100
    assert all(29_600 <= number < 30_600 for number in ports)
