"""Several machines by hand: what they must have in common, how they are numbered, and what each
says while it waits.
"""

from __future__ import annotations

import argparse
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.core.files import atomic_write, write_json
from motet.launcher.commands.train import asked_nodes
from motet.launcher.config.sections import LayoutSettings, RunSettings
from motet.launcher.launch import joining
from motet.launcher.launch.command import NodePlace
from motet.launcher.launch.joining import JoinRequest, ask_to_join, gather, places, request_of
from motet.launcher.runs.rundir import RunDir
from motet.models.config import preset


def settings(processes: int = 2, **layout: object) -> RunSettings:
    return RunSettings(name="r", layout=LayoutSettings(processes=processes, **layout))  # type: ignore[arg-type]


def requests(*machines: RunSettings) -> dict[int, JoinRequest]:
    return {rank: request_of(machine) for rank, machine in enumerate(machines)}


def test_ranks_follow_the_order_of_machines_of_any_size() -> None:
    found, wrong = places(requests(settings(4), settings(1), settings(2)), "a:1")
    assert wrong is None
    assert [found[k].offset for k in range(3)] == [0, 4, 5]
    assert {place.total for place in found.values()} == {7}


def test_settings_that_differ_are_named() -> None:
    other = replace(settings(), seed=1)
    _, wrong = places(requests(settings(), other), "a:1")
    assert wrong is not None
    assert "seed" in wrong
    elsewhere = replace(settings(), runs="/mnt/runs")
    assert places(requests(settings(), elsewhere), "a:1")[1] is None, "the folder's name may differ"


def test_accelerate_needs_machines_of_one_size() -> None:
    uneven = requests(settings(2, engine="accelerate"), settings(1, engine="accelerate"))
    assert "Accelerate" in (places(uneven, "a:1")[1] or "")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r")
    run.create()
    write_json(run.manifest, {"model": vars(preset("1m", 320))})
    atomic_write(run.resolved_yaml, "")
    return run


def test_machines_meet_although_an_earlier_launch_left_its_papers(run: RunDir) -> None:
    run.joining.mkdir(mode=0o700)
    write_json(run.joining / "1.json", vars(request_of(settings())))
    write_json(run.joining / "answer.json", {"words": ["stale"], "attempt": 9})
    found: list[tuple[int, NodePlace]] = []
    asking = threading.Thread(
        target=lambda: found.append(ask_to_join(run, settings(1), NodePlace(2, 1, "a:1")))
    )
    asking.start()
    attempt, first = gather(run, settings(3), 2, "a:1")
    asking.join(20)
    assert attempt == 1
    assert (first.offset, first.total) == (0, 4)
    assert found == [(1, NodePlace(2, 1, "a:1", 3, 4))]


def test_a_machine_that_does_not_come_is_named(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "WAIT_S", 0.3)
    with pytest.raises(UserError, match="machine 1 of 2 did not come"):
        gather(run, settings(), 2, "a:1")
    with pytest.raises(UserError, match="machine 0 did not make"):
        ask_to_join(RunDir("/no/such/run"), settings(), NodePlace(2, 1, "a:1"))


def test_a_refusal_reaches_every_machine(run: RunDir) -> None:
    told: list[str] = []

    def ask() -> None:
        try:
            ask_to_join(run, replace(settings(), seed=5), NodePlace(2, 1, "a:1"))
        except UserError as error:
            told.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(UserError, match="other settings"):
        gather(run, settings(), 2, "a:1")
    asking.join(20)
    assert told
    assert told[0].startswith("machine 0 refused")
    assert not run.latest_attempt(), "no attempt was claimed"


@pytest.mark.parametrize(
    ("count", "rank", "endpoint", "said"),
    [
        (0, 0, "", "at least 1 machine"),
        (2, 2, "a:1", "numbered from 0 to 1"),
        (2, 0, "", "needs --endpoint HOST:PORT"),
        (2, 0, "a", "needs --endpoint HOST:PORT"),
        (2, 0, "a:b", "no port"),
        (2, 0, "a:70000", "no port"),
        (1, 0, "a:1", "--nnodes as well"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(
    count: int, rank: int, endpoint: str, said: str
) -> None:
    arguments = argparse.Namespace(nnodes=count, node_rank=rank, endpoint=endpoint)
    with pytest.raises(UserError, match=said):
        asked_nodes(arguments)
