"""What starts the Accelerate engine, and the DeepSpeed engine on a CPU."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from motet.launcher.config.sections import LayoutSettings, RunSettings
from motet.launcher.launch.command import (
    MEETING,
    NodePlace,
    attempt_command,
    launch_environment,
    torchrun_command,
)
from motet.launcher.runs.rundir import RunDir

GOLDEN = Path(__file__).parents[2] / "golden" / "accelerate.txt"
RUN = RunDir("/runs/a run")
KINDS = [
    (LayoutSettings(engine="accelerate", processes=1), NodePlace()),
    (LayoutSettings(engine="accelerate", processes=2), NodePlace()),
    (LayoutSettings(engine="accelerate", processes=2, dp_shard=1, dp_replicate=2), NodePlace()),
    (
        LayoutSettings(engine="accelerate", processes=8, accelerate_config="/my own.yaml"),
        NodePlace(4, 2, "head:29500"),
    ),
]


def settings(layout: LayoutSettings) -> RunSettings:
    return RunSettings(name="first", layout=layout)


def test_the_accelerate_commands_are_the_golden_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    lines = [
        shlex.join(attempt_command(settings(layout), RUN, 1, nodes)) for layout, nodes in KINDS
    ]
    lines = [line.replace(str(MEETING), "/motet/meeting.py") for line in lines]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()


@pytest.mark.parametrize(("layout", "nodes"), KINDS)
def test_accelerate_understands_the_arguments(layout: LayoutSettings, nodes: NodePlace) -> None:
    from accelerate.commands.launch import launch_command_parser

    command = attempt_command(settings(layout), RUN, 1, nodes)
    parsed = launch_command_parser().parse_args(command[3:])
    assert parsed.num_processes == layout.processes * nodes.count
    assert parsed.num_machines == nodes.count
    assert parsed.module
    assert parsed.training_script == "motet.launcher.worker"
    assert parsed.training_script_args == ["/runs/a run"]
    assert parsed.max_restarts == 3
    assert parsed.use_fsdp == (layout.dp_shard is None and layout.accelerate_config is None)
    assert parsed.config_file == layout.accelerate_config
    if nodes.count > 1:
        assert (parsed.machine_rank, parsed.main_process_ip, parsed.main_process_port) == (
            2,
            "head",
            0,
        )


def test_several_nodes_need_an_endpoint() -> None:
    with pytest.raises(ValueError, match="endpoint"):
        attempt_command(settings(KINDS[1][0]), RUN, 1, NodePlace(2, 0))


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_the_other_engines_are_started_by_torchrun(engine: str) -> None:
    run = settings(LayoutSettings(engine=engine, processes=2))
    assert attempt_command(run, RUN, 1) == torchrun_command(run, RUN, 1)


def test_deepspeed_on_the_cpu_is_told_so_before_it_is_imported() -> None:
    cpu = settings(LayoutSettings(engine="deepspeed", device="cpu"))
    assert launch_environment(cpu, RUN, {}, 1)["DS_ACCELERATOR"] == "cpu"
    assert launch_environment(cpu, RUN, {"DS_ACCELERATOR": "xpu"}, 1)["DS_ACCELERATOR"] == "xpu"
    auto = settings(LayoutSettings(engine="deepspeed"))
    assert "DS_ACCELERATOR" not in launch_environment(auto, RUN, {}, 1)
