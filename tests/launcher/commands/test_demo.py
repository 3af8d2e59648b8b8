from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.core.files import atomic_write, write_json
from motet.launcher import cli
from motet.launcher.commands import demo
from motet.launcher.commands.data import prepare as preparing
from motet.launcher.config import run_yaml
from motet.launcher.runs.families import new_members
from motet.launcher.runs.rundir import RunDir
from motet.models import counts
from motet.models.config import preset


@given(st.integers(1, 10_000), st.integers(1, 2))
def test_the_demo_is_an_ordinary_run_of_any_length(steps: int, processes: int) -> None:
    settings = run_yaml.load(None, [], text=demo.demo_yaml(steps, processes), base=Path("/d"))
    assert settings.steps == steps
    assert settings.layout.processes == processes
    assert settings.data.corpora[0].path == "/d/corpora/stdlib"


def test_the_demo_asks_four_different_questions_with_controls_on_two_sharded_processes() -> None:
    settings = run_yaml.load(None, [], text=demo.demo_yaml())
    assert {entry["use"] for entry in settings.experiments.list} == {
        "memorization",
        "contamination",
        "knowledge",
        "forgetting",
    }
    assert settings.experiments.controls
    assert all("generate" in entry for entry in settings.experiments.list)
    assert settings.layout.processes == 2
    layout = settings.layout_for(2)
    assert (layout.dp_shard, layout.dp_replicate, layout.world_size) == (2, 1, 2)
    assert settings.checkpoint.every_steps < settings.steps


def test_the_demo_of_a_family_asks_how_memorization_grows_with_size() -> None:
    text = demo.demo_yaml(200, family="nested")
    settings = run_yaml.load(None, [], text=text, base=Path("/d"))
    assert settings.family.kind == "nested"
    assert settings.name != run_yaml.load(None, [], text=demo.demo_yaml(200)).name
    (asked,) = settings.experiments.list
    assert (asked["use"], asked["size_slope"]) == ("memorization", True)
    whole = preset(settings.model.preset, 2048, **settings.model.overrides())
    members = new_members(settings, whole)["members"]
    sizes = [*(member["parameters"] for member in members), counts.parameters(whole)]
    assert all(4 < large / small < 16 for small, large in pairwise(sizes[::2]))
    assert {member["name"] for member in members} == {"quarter", "half"}


def test_the_demo_of_a_family_that_grows_has_three_sizes_that_cost_what_they_would_alone() -> None:
    for steps in (8, 100, demo.PROGRESSIVE_STEPS):
        text = demo.demo_yaml(steps, family="progressive")
        settings = run_yaml.load(None, [], text=text, base=Path("/d"))
        whole = preset(settings.model.preset, 2048, **settings.model.overrides())
        facts = new_members(settings, whole)
        assert [stage["name"] for stage in facts["stages"]] == ["quarter", "half", "whole"]
        assert [stage["operator"] for stage in facts["stages"]] == ["", "hypercloning", "stack"]
        assert facts["stages"][-1]["start_step"] < steps


def test_a_dry_run_prints_the_run_yaml_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--dry-run", "--folder", str(tmp_path), "--steps", "12"]) == 0
    assert capsys.readouterr().out == demo.demo_yaml(12)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A demo whose training and reporting are noted down."""
    from motet.launcher.commands import report
    from motet.launcher.launch import local

    world = SimpleNamespace(
        folder=tmp_path, prepared=[], trained=[], reported=[], code=0, finish=True
    )

    def prepare(inputs: list[str], output: Path, vocabulary_size: int) -> None:
        world.prepared.append((inputs, output, vocabulary_size))
        write_json(output / "corpus.json", {})

    def train(settings: Any, rundir: RunDir, *, yaml_text: str, resume: bool) -> int:
        rundir.create()
        atomic_write(rundir.resolved_yaml, run_yaml.to_yaml(settings))
        if world.finish:
            atomic_write(rundir.done, "")
        world.trained.append(resume)
        return int(world.code)

    monkeypatch.setattr(preparing, "prepare_text", prepare)
    monkeypatch.setattr(local, "train", train)
    monkeypatch.setattr(report, "build", lambda rundir: world.reported.append(rundir.root))
    return world


def start(world: SimpleNamespace, *arguments: str) -> int:
    return cli.main(["demo", "--folder", str(world.folder), *arguments])


def test_the_demo_prepares_trains_and_reports(world: SimpleNamespace) -> None:
    assert start(world) == 0
    corpus = world.folder / "corpora" / "stdlib"
    assert world.prepared == [(["stdlib:"], corpus, demo.VOCABULARY_SIZE)]
    assert world.trained == [False]
    assert world.reported == [world.folder / "runs" / "demo"]


def test_a_finished_demo_is_only_reported_again(world: SimpleNamespace) -> None:
    assert start(world) == start(world) == 0
    assert len(world.prepared) == 1
    assert world.trained == [False]
    assert len(world.reported) == 2


def test_a_stopped_demo_goes_on(world: SimpleNamespace) -> None:
    world.finish = False
    assert start(world) == 0
    assert world.reported == []
    world.finish = True
    assert start(world) == 0
    assert world.trained == [False, True]
    assert len(world.reported) == 1


def test_a_failed_demo_reports_nothing(world: SimpleNamespace) -> None:
    world.code, world.finish = 1, False
    assert start(world) == 1
    assert world.reported == []


def test_another_demo_needs_another_name(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    start(world)
    assert start(world, "--steps", "7") == 2
    assert "training.steps: 300 there, 7 here" in capsys.readouterr().err.replace(
        str(demo.DEMO_STEPS), "300"
    )
    assert start(world, "--steps", "7", "name=short") == 0
    assert world.reported[-1] == world.folder / "runs" / "short"


def test_the_standard_library_is_there_to_be_read(tmp_path: Path) -> None:
    from motet.experiments.corpora.prepare import (
        PrepareRequest,
        prepare_request_problems,
        stdlib_sources,
    )

    assert len(stdlib_sources()) > 100
    assert not prepare_request_problems(PrepareRequest([demo.CORPUS_INPUT], tmp_path / "c"))
