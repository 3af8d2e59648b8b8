"""Machines that meet by papers in a folder: rounds, ends, and what a paper may hold."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousTimeoutError,
)

from motet.core.errors import UserError
from motet.launcher.launch import meeting
from motet.launcher.launch.command import NodePlace
from motet.launcher.launch.joining import fresh_meeting
from motet.launcher.launch.meeting import FolderMeeting


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "POLL_S", 0.01)
    monkeypatch.setattr(meeting, "LOOK_S", 0.0)
    monkeypatch.setenv(meeting.ROUND, "")


def machines(folder: Path, count: int, join_s: float = 20.0) -> list[FolderMeeting]:
    return [FolderMeeting(folder, rank, count, "r-1", join_s) for rank in range(count)]


def all_come(which: list[FolderMeeting]) -> list[RendezvousInfo]:
    found: dict[int, RendezvousInfo] = {}

    def come(one: FolderMeeting) -> None:
        found[one.rank] = one.next_rendezvous()

    threads = [threading.Thread(target=come, args=(one,)) for one in reversed(which)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[one.rank] for one in which]


def test_machines_are_numbered_as_they_were_told_and_share_a_store_for_each_round(
    tmp_path: Path,
) -> None:
    three = machines(tmp_path, 3)
    infos = all_come(three)
    assert [(info.rank, info.world_size) for info in infos] == [(0, 3), (1, 3), (2, 3)]
    infos[0].store.set("a", "1")
    assert infos[2].store.get("a") == b"1"
    assert not any(one.num_nodes_waiting() for one in three)
    again = all_come(three)
    assert not again[1].store.check(["a"]), "a round does not see what an earlier one left"
    assert {one.round for one in three} == {2}


def test_a_machine_whose_ranks_died_is_seen_by_the_others_to_wait(tmp_path: Path) -> None:
    first, second = machines(tmp_path, 2)
    all_come([first, second])
    waiting = threading.Thread(target=second.next_rendezvous)
    waiting.start()
    while not first.num_nodes_waiting():
        pass
    assert first.next_rendezvous().rank == 0
    waiting.join(30)
    assert (first.round, second.round) == (2, 2)
    assert not first.num_nodes_waiting()


def test_who_comes_too_late_or_too_often_is_told(tmp_path: Path) -> None:
    first, second = machines(tmp_path, 2)
    first.join_s = 0.05
    with pytest.raises(RendezvousTimeoutError, match="machines 1 did not come within 0 s"):
        first.next_rendezvous()
    with pytest.raises(RendezvousConnectionError, match="another process has come as machine 0"):
        machines(tmp_path, 2)[0].next_rendezvous()
    first.shutdown()
    assert second.is_closed()
    alone = machines(tmp_path, 3)[2]
    with pytest.raises(RendezvousClosedError):
        alone.next_rendezvous()


def test_a_folder_that_is_gone_ends_the_wait(tmp_path: Path) -> None:
    (one,) = machines(tmp_path / "gone", 1)
    assert one.is_closed()
    assert one.num_nodes_waiting() == 0
    with pytest.raises(RendezvousConnectionError, match="No such file"):
        one.next_rendezvous()
    one.shutdown()  # says so, and raises nothing


class RunsCode:
    """A pickle that would leave a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_that_lies_in_the_folder_is_unpickled(tmp_path: Path) -> None:
    (one,) = machines(tmp_path, 1)
    (tmp_path / "round-1").mkdir()
    planted = pickle.dumps(RunsCode(tmp_path / "code-ran"))
    (tmp_path / "round-1/7").write_bytes(planted)
    (tmp_path / "machines").write_bytes(planted)
    one.next_rendezvous()
    two = FolderMeeting(tmp_path, 1, 2, "r-1", 5.0)
    two.round = 1
    (tmp_path / "round-2").mkdir()
    (tmp_path / "round-2/0").write_bytes(planted)
    with pytest.raises(ValueError, match=r"codec|JSON|Expecting"):
        two.next_rendezvous()
    assert not (tmp_path / "code-ran").exists()


def test_machines_without_a_run_meet_in_a_folder_that_only_this_launch_has(tmp_path: Path) -> None:
    base, found = tmp_path / "meetings", []
    for _ in range(2):
        other = threading.Thread(
            target=lambda: found.append(fresh_meeting(base, NodePlace(2, 1, "a:1"), 20.0))
        )
        other.start()
        found.append(fresh_meeting(base, NodePlace(2, 0, "a:1"), 20.0))
        other.join(30)
    assert len(found) == 4
    assert len(set(found)) == 2
    assert not found[0].exists(), "what an earlier launch left is removed"
    with pytest.raises(UserError, match="machine 1 did not come"):
        fresh_meeting(base, NodePlace(2, 0, "b:1"), 0.1)
