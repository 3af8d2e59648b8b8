"""`motet plan`: what is printed, written and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from motet.launcher import config
from motet.launcher.cli import main

RUN = """
name: planned
model: {preset: 1b, vocabulary_size: 32768}
data: {sequence_length: 2048, corpora: [{path: nowhere}]}
batch: {sequences: 64}
training: {tokens: 100000000}
"""
CLUSTER = """
groups:
  - {name: hall, device: h100, nodes: 1, devices_per_node: 4}
  - {name: attic, device: a100-40, nodes: 1, devices_per_node: 4}
links:
  - {between: [hall, attic], gbit_s: 100, latency_us: 50, kind: ethernet}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    run, cluster = tmp_path / "run.yaml", tmp_path / "cluster.yaml"
    run.write_text(RUN)
    cluster.write_text(CLUSTER)
    return str(run), str(cluster)


def test_the_layout_that_is_written_is_one_that_a_run_takes(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    written, page = tmp_path / "layout.yaml", tmp_path / "plan.html"
    words = ["plan", run, "--cluster", cluster, "--json", "--write", str(written)]
    assert main([*words, "--html", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    best = told["layouts"][0]
    assert best["interval_s"][0] < best["step_time_s"] < best["interval_s"][1]
    assert sum(best["parts_s"].values()) == pytest.approx(best["step_time_s"], rel=1e-6)
    assert best["memory_gib"] <= best["capacity_gib"]
    assert "<svg" in page.read_text()
    text = RUN + written.read_text()
    settings = config.load(
        None, text=text, base=tmp_path, world=lambda s: s.layout_for(8).world_size
    )
    layout = settings.layout_for(settings.layout.processes)
    assert layout.tp == best["settings"]["tp"]
    assert layout.micro_sequences == best["settings"]["micro_sequences"]


def test_why_tells_the_phases_and_a_table_tells_the_rest(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = files
    assert main(["plan", run, "--cluster", cluster, "--why", "tp=4,pp=2"]) == 0
    assert "longer than the fastest" in capsys.readouterr().out
    assert main(["plan", run, "--cluster", cluster, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "MFU %" in out
    assert "one-minute run" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--why", "tpp=4"], "did you mean 'tp'?"),
        (["--top", "0"], "--top: 0 is not at least 1"),
        (["--pick", "2"], "--write FILE"),
        (["--budget", "much"], "10000gpu-hours"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml"),
        (
            [
                "model.preset=7b",
                "layout.engine=native",
                "layout.cp=1",
                "layout.pp=1",
                "layout.tp=1",
                "layout.dp_shard=1",
            ],
            "What would fit",
        ),
    ],
)
def test_nonsense_gets_one_message_and_exit_code_2(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    run, cluster = files
    here = [] if "--cluster" in words else ["--cluster", cluster]
    assert main(["plan", run, *here, *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("motet:") == 1


def test_planning_loads_no_torch(files: tuple[str, str]) -> None:
    run, cluster = files
    code = (
        "import sys; from motet.launcher.cli import main; "
        f"main(['plan', {run!r}, '--cluster', {cluster!r}, '--top', '1']); sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode
        == 0
    )
