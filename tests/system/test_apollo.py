"""Preset apollo from run.yaml to the cards: stopped on the way, and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from motet.core import format
from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.models.family.virtual_depth import virtual_depth
from tests.system.runs import losses, motet, motet_here, replaced, write_yaml

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("apollo")]

EDIT = (
    ("n_layers: 2, n_heads: 2", "n_layers: 4, n_heads: 2"),
    (
        "training:",
        "family:\n  kind: progressive\n  options:\n    preset: apollo\n    stages:\n"
        "    - {name: one, depth: 0.25, steps: 5}\n    - {name: two, depth: 0.5, steps: 4}\n"
        "    - {}\ntraining:",
    ),
    ("steps: 24", "steps: 12"),
    ("warmup_steps: 4", "warmup_steps: 1"),
    ("sequence_length: 320", "sequence_length: 64"),
)
STOPS = (
    "from motet.launcher.rank.hooks import Hook\n\n\nclass Stops(Hook):\n"
    "    def after_step(self, context):\n"
    "        if context.step == 7:\n            context.ask_to_stop('enough')\n"
)


def write(folder: Path, corpus: Path) -> Path:
    (folder / "stop.py").write_text(STOPS)

    def edited(text: str) -> str:
        return replaced(text, EDIT).partition("experiments:")[0]

    return write_yaml(folder, corpus, "r", edited)


def test_a_stop_changes_no_bit_two_ranks_train_as_one_and_cards_count_what_ran(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> None:
    found = {}
    for kind, asked in (
        ("one", ["layout.processes=1"]),
        ("resumed", ["layout.processes=1", "training.hooks=[stop.py:Stops]"]),
        ("fsdp", []),
    ):
        folder = tmp_path_factory.mktemp(kind)
        done = motet("train", str(write(folder, corpus)), *asked)
        assert done.returncode == 0, done.stdout + done.stderr
        found[kind] = RunDir(folder / "runs/r")
        if kind == "resumed":
            done = motet("resume", str(found[kind].root), "training.hooks=[]")
            assert done.returncode == 0, done.stdout + done.stderr
    expected, plain = losses(found["one"].root), read_model(found["one"], 12)[1]
    assert losses(found["resumed"].root) == expected
    assert losses(found["fsdp"].root) == pytest.approx(expected, abs=1e-4)
    for name, value in plain.items():
        assert torch.equal(value, read_model(found["resumed"], 12)[1][name]), name
    run = found["resumed"]
    manifest = json.loads(run.manifest.read_text())
    one = manifest["members"][0]
    assert len({virtual_depth(3, step, 1, 4) for step in range(5)}) > 1
    assert manifest["stages"][0]["virtual_flops_per_token"] > one["flops_per_token"]
    done = motet_here("export", str(run.root), "--member", "one")
    assert done.returncode == 0, done.stderr
    (card,) = run.members.glob("*/README.md")
    spent = 8 * 64 * 5 * manifest["stages"][0]["virtual_flops_per_token"]
    assert f"| FLOPs of its own training | {format.power_of_ten(spent)} |" in card.read_text()
    refused = motet_here("train", str(run.root.parents[1] / "r.yaml"), "layout.pp=2", "--dry-run")
    assert refused.returncode == 2
    assert "layers that run several times are not equally many" in refused.stderr
