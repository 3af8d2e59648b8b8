from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.launcher import cli
from motet.launcher.config import run_yaml
from motet.launcher.config.checks import device_problems, layout_problems
from motet.launcher.planning.layout_drawing import runs
from motet.launcher.planning.layout_facts import crossing
from motet.models.config import preset
from motet.parallel.layout.layout import Layout

GOLDEN = Path(__file__).parents[2] / "golden"
RUN_YAML = """\
name: drawn
data: {sequence_length: 512, corpora: [{path: nowhere}]}
training: {steps: 200}
model: {preset: 60m, vocabulary_size: 32000}
batch: {sequences: 32}
layout: {processes: 8, micro_sequences: 2}
"""
DRAWN = {
    "layout_dense.txt": ["layout.tp=2", "layout.pp=2"],
    "layout_experts.txt": [
        "--nodes=2",
        "model.n_experts=8",
        "model.n_dense_layers=1",
        "layout.dp_replicate=2",
        "layout.shares=[3, 1]",
        "layout.tp=2",
        "layout.pp=2",
        "layout.ep=4",
        "layout.virtual_stages=2",
        "layout.schedule=zbv_zero_bubble",
        "batch.ramp=[{step: 50, sequences: 64}]",
    ],
}
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Show]:
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["layout", "show", "run.yaml", *arguments])
        return code, *capsys.readouterr()

    yield call
    os.umask(before)


@pytest.mark.parametrize("golden", DRAWN)
def test_a_layout_is_drawn_as_in_the_golden_text(show: Show, golden: str) -> None:
    code, out, err = show(*DRAWN[golden])
    assert (code, err) == (0, "")
    assert out == (GOLDEN / golden).read_text(encoding="utf-8")


def test_the_page_about_layouts_shows_what_is_printed(show: Show) -> None:
    page = (GOLDEN.parents[1] / "docs" / "layouts.md").read_text(encoding="utf-8")
    assert show(*DRAWN["layout_dense.txt"])[1] in page
    told = show("layout.tp=3", "layout.dp_shard=2", "batch.sequences=30")[2]
    assert told.count("\n") == 5
    assert told in page


@pytest.mark.parametrize("golden", DRAWN)
def test_a_drawing_fits_into_a_hundred_columns_and_needs_no_colour(golden: str) -> None:
    text = (GOLDEN / golden).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text


def test_the_drawing_of_a_large_cluster_is_cut_to_the_width(show: Show) -> None:
    code, out, _ = show(
        "--nodes=512", "layout.dp_replicate=16", "layout.pp=8", "batch.sequences=8192"
    )
    assert code == 0
    assert out.startswith(
        "drawn: 4,096 ranks (512 nodes x 8 processes) = pp 8 x dp_replicate 16 x dp_shard 32"
    )
    assert "…   replica 15 shard 31" in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_tells_every_rank_stage_and_pass(show: Show) -> None:
    code, out, _ = show(
        "--json", "layout.pp=2", "layout.dp_shard=4", "layout.placement=[7,6,5,4,3,2,1,0]"
    )
    told: dict[str, Any] = json.loads(out)
    assert code == 0
    assert [rank["process"] for rank in told["ranks"]] == list(range(7, -1, -1))
    assert told["ranks"][5] == {
        "rank": 5, "process": 2, "node": 0, "pp": 1, "dp_replicate": 0, "dp_shard": 1, "cp": 0, "tp": 0, "reads": 1,
    }  # fmt: skip
    assert [stage["layers"] for stage in told["stages"]] == [list(range(8)), list(range(8, 12))]
    assert sum(stage["share_of_compute"] for stage in told["stages"]) == pytest.approx(1)
    assert told["batch"][0]["micro_batches"] == [4]
    assert len(told["pipeline"]["timeline"]) == 2 * 2 * 4
    assert told["pipeline"]["bubble"] > 0.2


def test_every_mistake_of_a_layout_is_told_in_one_message(show: Show) -> None:
    code, out, err = show("layout.tp=3", "layout.ep=2", "batch.sequences=30", "layout.zero_stage=3")
    assert (code, out) == (2, "")
    assert "6 problems" in err
    for piece in (
        "layout.processes: 8 ranks (layout.processes x nodes) are not a multiple of",
        "layout.tp: 3 does not divide model.n_heads=10",
        "layout.ep: 2 needs experts",
        "data.sequence_length: 512 is not a multiple of 3 (layout.tp 3); nearest: 510 and 513",
        "batch.sequences: 30 is not a multiple of 4 (layout.micro_sequences 2 x 2 for dp_shard 2)",
        "layout.zero_stage: is read by layout.engine=deepspeed only",
    ):
        assert piece in err
    assert show("--nodes=0")[0] == 2


def test_a_backward_pass_that_is_taken_apart_is_not_compiled(show: Show) -> None:
    pipeline = ["layout.pp=2", "layout.virtual_stages=2", "layout.schedule=zbv_zero_bubble"]
    assert show(*pipeline)[0] == 0
    code, _, err = show(*pipeline, "training.compile=true")
    assert code == 2
    assert "layout.schedule: zbv_zero_bubble takes the backward pass apart" in err


def test_settings_that_moved_are_told_where_they_are_now(show: Show) -> None:
    _, _, err = show("batch.micro_sequences=2", "training.recompute=full", "layout.shard=false")
    assert "batch.micro_sequences: is no setting; write layout.micro_sequences" in err
    assert "training.recompute: is no setting; write layout.recompute" in err
    assert "layout.shard: is no setting; write layout.dp_replicate" in err


def test_settings_of_another_program_are_kept_as_written(tmp_path: Path) -> None:
    text = RUN_YAML.replace(
        "layout: {",
        "layout: {engine: deepspeed, deepspeed: {comms_logger: {on: true, list: [1, 2.5e-3, a]}}, ",
    )
    settings = run_yaml.load(None, ["layout.deepspeed.comms_logger.y=no"], text=text)
    assert settings.layout.deepspeed == {
        "comms_logger": {"on": True, "list": [1, 0.0025, "a"], "y": "no"}
    }
    again = run_yaml.load(None, [], text=run_yaml.to_yaml(settings))
    assert again.layout == settings.layout
    with pytest.raises(UserError, match=r"layout\.deepspeed: is a mapping"):
        run_yaml.load(None, ["layout.deepspeed=3"], text=text)


def test_a_layout_is_checked_against_the_nodes_that_are_told() -> None:
    overrides = ["layout.tp=2", "layout.pp=4", "layout.dp_shard=2"]
    with pytest.raises(UserError, match="dp_shard=1 fits"):
        run_yaml.load(None, overrides, text=RUN_YAML)
    settings = run_yaml.load(None, overrides, text=RUN_YAML, nodes=2)
    assert layout_problems(settings, 16) == []
    assert settings.layout_for(16).world_size == 16


def test_a_vocabulary_that_only_the_corpus_tells_is_checked_when_it_is_known() -> None:
    text = RUN_YAML.replace(", vocabulary_size: 32000", "")
    settings = run_yaml.load(
        None,
        ["layout.processes=5", "layout.tp=5", "data.sequence_length=500", "model.d_ffn=1730"],
        text=text,
    )
    assert layout_problems(settings, 5) == []
    (problem,) = layout_problems(settings, 5, preset("60m", 32_064, n_kv_heads=10, d_ffn=1730))
    assert str(problem).startswith("layout.tp: 5 does not divide model.vocabulary_size=32,064")


@pytest.mark.parametrize(
    ("device", "processes", "gpus", "told"),
    [
        ("cpu", 8, 0, None),
        ("auto", 8, 0, None),
        ("auto", 4, 4, None),
        ("cuda", 1, 0, "layout.device: cuda, but torch sees no CUDA device here; use auto or cpu"),
        ("auto", 4, 2, "layout.processes: 4 processes need a GPU each, and there are 2 here"),
        ("cuda", 4, 2, "at most 2, or layout.device=cpu"),
    ],
)
def test_a_device_that_is_not_here_is_told_before_anything_starts(
    device: str, processes: int, gpus: int, told: str | None
) -> None:
    found = device_problems(device, processes, gpus)
    assert [told in str(problem) for problem in found] == ([True] if told else [])


def test_groups_that_cross_nodes_are_found_from_the_placement() -> None:
    plain = Layout(dp_shard=2, tp=2)
    assert crossing(plain, 2) == {"dp_shard": True, "tp": False}
    assert crossing(Layout(dp_shard=2, tp=2, placement=(0, 2, 1, 3)), 2) == {
        "dp_shard": False,
        "tp": True,
    }
    assert crossing(Layout(dp_shard=2, tp=2, ep=4), 2) == {
        "dp_shard": True,
        "tp": False,
        "ep": True,
    }


def test_runs_of_numbers_are_shortened() -> None:
    assert runs([0, 1, 2, 3, 7, 9, 10]) == "0–3 7 9 10"


def test_showing_a_layout_does_not_wait_for_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    code = (
        "import sys; from motet.launcher import cli; code = cli.main(['layout', 'show', "
        "'run.yaml', 'layout.pp=2']); "
        "assert not {'torch', 'scipy'} & set(sys.modules); sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
