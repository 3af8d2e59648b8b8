from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from motet.launcher.config.sections import LayoutSettings, RunSettings, TrainingSettings
from motet.launcher.launch.command import (
    NodePlace,
    launch_environment,
    recorded_environment,
    shell_text,
    torchrun_command,
)
from motet.launcher.runs.rundir import RunDir

GOLDEN = Path(__file__).parents[2] / "golden" / "torchrun.txt"
RUN = RunDir("/runs/a run")


def settings(processes: int) -> RunSettings:
    return RunSettings(name="first", layout=LayoutSettings(processes=processes))


def test_the_torchrun_commands_are_the_golden_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    commands = [
        torchrun_command(settings(1), RUN, 1),
        torchrun_command(settings(3), RUN, 2),
        torchrun_command(settings(8), RUN, 1, NodePlace(4, 2, "head:29500")),
        torchrun_command(settings(2), RUN, 1, terminal=True),
    ]
    nodes = NodePlace(4, 2, "head:29500")
    environment = launch_environment(settings(2), RUN, {"PYTHONPATH": "/mine"}, 16, 3, nodes)
    lines = [*map(shlex.join, commands), shell_text(["python"], environment)]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()


def test_torchrun_understands_the_arguments() -> None:
    from torch.distributed.run import get_args_parser

    for nodes in (NodePlace(), NodePlace(2, 1, "head:29500")):
        command = torchrun_command(settings(2), RUN, 1, nodes)
        parsed = get_args_parser().parse_args(command[3:])
        assert parsed.nproc_per_node == "2"
        assert parsed.max_restarts == 3
        assert parsed.training_script == "motet.launcher.worker"
        assert parsed.training_script_args == ["/runs/a run"]
        assert parsed.standalone == (nodes.count == 1)


def test_machines_of_unequal_size_are_numbered_one_after_the_other() -> None:
    nodes = NodePlace(3, 2, "head:1", offset=6, total=7)
    made = launch_environment(settings(1), RUN, {"MOTET_RANK_OFFSET": "99"}, 4, 5, nodes)
    assert (made["MOTET_ATTEMPT"], made["MOTET_RANK_OFFSET"]) == ("5", "6")
    assert "/runs/a run/attempts/5/logs/ranks-6" in torchrun_command(settings(1), RUN, 5, nodes)


def test_what_another_launch_told_its_ranks_does_not_reach_this_one() -> None:
    inherited = {"MOTET_ATTEMPT": "9", "MOTET_RANK_OFFSET": "4", "MOTET_HOLDS_STORE": "0"}
    assert not inherited.keys() & launch_environment(settings(1), RUN, inherited, 4).keys()


@pytest.mark.parametrize(
    "nodes", [NodePlace(2, 0), NodePlace(2, 2, "h:1"), NodePlace(2, -1, "h:1")]
)
def test_several_nodes_need_an_endpoint_and_a_rank_among_them(nodes: NodePlace) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        torchrun_command(settings(1), RUN, 1, nodes)


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(16, 2, "8"), (2, 2, "1"), (2, 8, "1"), (7, 2, "3")]
)
def test_processes_share_the_cores(cores: int, processes: int, threads: str) -> None:
    made = launch_environment(settings(processes), RUN, {}, cores)
    assert made["OMP_NUM_THREADS"] == threads


def test_the_snapshot_comes_before_anything_else_that_python_searches() -> None:
    made = launch_environment(settings(1), RUN, {"PYTHONPATH": "/a:/b", "HOME": "/h"}, 1)
    assert made["PYTHONPATH"] == "/runs/a run/code:/a:/b"
    assert made["PYTHONSAFEPATH"] == "1"
    assert made["HOME"] == "/h"


def test_what_the_user_set_stays() -> None:
    inherited = {"OMP_NUM_THREADS": "5", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    assert inherited.items() <= launch_environment(settings(2), RUN, inherited, 16).items()
    free = RunSettings(name="x", training=TrainingSettings(deterministic=False))
    assert "CUBLAS_WORKSPACE_CONFIG" not in launch_environment(free, RUN, {}, 1)


def test_no_secret_of_the_environment_is_recorded() -> None:
    secrets = {
        "WANDB_API_KEY": "s3cret",
        "HF_TOKEN": "s3cret",
        "NCCL_SECRET_KEY": "s3cret",
        "TORCH_HUB_TOKEN": "s3cret",
        "AWS_SESSION": "s3cret",
        "HOME": "s3cret",
    }
    made = launch_environment(settings(2), RUN, {**secrets, "NCCL_DEBUG": "INFO"}, 4)
    assert made["WANDB_API_KEY"] == "s3cret"
    recorded = recorded_environment(made)
    assert recorded["NCCL_DEBUG"] == "INFO"
    assert "s3cret" not in "".join(recorded.values()) + shell_text(["x"], made)
