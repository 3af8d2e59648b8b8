"""Settings of the DeepSpeed engine: contradictions are told with all others, and a dry run shows
DeepSpeed's configuration.
"""

from __future__ import annotations

import json

import pytest

from motet.launcher.commands.train import print_command
from motet.launcher.config import run_yaml
from motet.launcher.config.checks import deepspeed_library_problems
from motet.launcher.runs.rundir import RunDir

BASE = ["name=x", "training.steps=200", "batch.sequences=8", "layout.processes=2"]
BASE += ["layout.micro_sequences=2", "data.corpora=[{path: corpus}]", "layout.engine=deepspeed"]


def told(*overrides: str) -> dict[str, str]:
    _, problems = run_yaml.inspect(None, [*BASE, *overrides])
    return {problem.setting: str(problem) for problem in problems}


def test_contradictions_are_told_with_all_others() -> None:
    assert told() == {}
    found = told(
        "layout.deepspeed.gradient_clipping=1.0",
        "layout.deepspeed.zero_optimization.stage=1",
        "layout.offload=parameters",
        "layout.dp_replicate=2",
        "training.schedule.warmup_steps=999",
    )
    assert "training.clip_norm" in found["layout.deepspeed.gradient_clipping"]
    assert "layout.zero_stage" in found["layout.deepspeed.zero_optimization.stage"]
    assert "layout.zero_stage=3" in found["layout.offload"]
    assert "all ranks" in found["layout.dp_replicate"]
    assert "training.schedule.warmup_steps" in found


def test_compiled_blocks_are_refused_under_zero_3_only() -> None:
    assert "layout.zero_stage" in told("training.compile=true", "layout.zero_stage=3")
    assert told("training.compile=true", "layout.zero_stage=2") == {}


def test_deepspeed_is_asked_only_where_it_is_the_engine() -> None:
    extra = "layout.deepspeed.zero_optimization.sub_grup_size=1"
    (problem,) = deepspeed_library_problems(run_yaml.inspect(None, [*BASE, extra])[0])
    assert problem.setting == "layout.deepspeed.zero_optimization.sub_grup_size"
    assert (
        deepspeed_library_problems(run_yaml.inspect(None, [*BASE, "layout.engine=native"])[0]) == []
    )


def test_a_dry_run_shows_the_configuration_of_deepspeed(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["layout.zero_stage=3", "layout.offload=optimizer", "training.clip_norm=0.25"]
    settings = run_yaml.load(None, [*BASE, *overrides])
    print_command(settings, RunDir("/runs/x"))
    shown = capsys.readouterr().out.split("# DeepSpeed's configuration: ")[1]
    text = "\n".join(line.removeprefix("# ") for line in shown.splitlines())
    found, _ = json.JSONDecoder().raw_decode(text)
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["gradient_clipping"] == 0.25
    assert found["train_batch_size"] == 4
    print_command(run_yaml.load(None, [*BASE, "layout.engine=native"]), RunDir("/runs/x"))
    assert "DeepSpeed's" not in capsys.readouterr().out
