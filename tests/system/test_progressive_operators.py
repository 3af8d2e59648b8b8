"""Operators that need more than the model before: learned maps, and a model to blend with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import load

from motet.launcher.commands.export import read_model
from motet.launcher.rank.safe_reader import SafeReader
from motet.launcher.runs.rundir import RunDir
from motet.models.decoder import Decoder
from motet.models.divergence import divergence
from motet.models.growth.growth import grown
from motet.models.growth.registry import operator
from tests.system.runs import losses, motet, motet_here, rows, who_trained, write_yaml

pytestmark = pytest.mark.xdist_group("progressive_operators")  # its run is made once

FAMILY = """family:
  kind: progressive
  options:
    stages:
    - {name: tiny, depth: 0.5, width: 0.5, steps: 5}
    - {name: first, depth: 1, steps: 5, operator: {name: ligo, noise: 0.0, steps: 4, sequences: 3}}
    - {name: small, depth: 0.5, steps: 5, operator: coalesce}
    - {name: large, depth: 1, steps: 5, operator: {name: mango, steps: 4, lr: 0.01}}
    - {name: cut, model: {d_ffn: 32}, steps: 5, operator: {name: prune, sequences: 16}, distill: {},
       lr: 1.0e-4}
    - {name: half, depth: 0.5, width: 0.5, steps: 5, operator: coalesce}
    - {operator: decoalesce, blend: 0.5}
training:"""
ENDS = {"tiny": 5, "first": 10, "small": 15, "large": 20, "cut": 25, "half": 30}
SETTINGS = [
    "checkpoint.keep=30",
    "layout.processes=1",
    "training.schedule.warmup_steps=2",
    "training.steps=35",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("operators")
    layers = ("n_layers: 2, n_heads: 2", "n_layers: 4, n_heads: 2")
    yaml = write_yaml(
        folder, corpus, "r", lambda text: text.replace("training:", FAMILY, 1).replace(*layers)
    )
    done = motet("train", str(yaml), *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/r"


def test_a_run_grows_by_learned_maps_and_comes_back_from_a_small_model(trained: Path) -> None:
    grew = [row for row in rows(trained, "event") if row["event"] == "grown"]
    assert [(row["source"], row["member"], row["operator"]) for row in grew] == [
        ("tiny", "first", "ligo"),
        ("first", "small", "coalesce"),
        ("small", "large", "mango"),
        ("large", "cut", "prune, then taught by large"),
        ("cut", "half", "coalesce"),
        ("half", "whole", "decoalesce (0.5, the rest large)"),
    ]
    assert not any(row["exact"] for row in grew)
    learned = [row for row in rows(trained, "event") if row["event"] == "learned_growth"]
    assert [(row["step"], row["steps"]) for row in learned] == [(5, 4), (15, 4)]
    # The stream runs on: nothing is read twice for the sake of the maps.
    assert sorted(who_trained(trained)) == list(range(8 * 35))
    done = motet_here("experiments", "audit", str(trained), "--replay")
    assert done.returncode == 0, done.stdout
    assert motet_here("verify", str(trained)).returncode == 0


def grown_weights(run: RunDir, step: int, like: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The weights of what was made of the model of a step."""
    found: dict[str, Any] = {f"model.{name}": torch.empty_like(x) for name, x in like.items()}
    load(found, checkpoint_id=run.checkpoint(step, grown=True), no_dist=True)
    return {name.removeprefix("model."): value for name, value in found.items()}


def test_maps_moved_from_where_they_began(trained: Path) -> None:
    """Without noise they begin as copies of channels and layers, whatever the seed."""
    run = RunDir(trained)
    tiny, state = read_model(run, 5)
    first, like = read_model(run, 10)
    began = grown(operator("ligo", noise=0.0).growth(tiny, first), state)
    for name, value in grown_weights(run, 5, like).items():
        assert not torch.equal(value, began[name]), name
        torch.testing.assert_close(value, began[name], atol=0.05, rtol=0)


def test_the_last_model_is_what_came_back_and_the_latest_of_its_sizes(trained: Path) -> None:
    run = RunDir(trained)
    (_, large), (half, small) = (read_model(run, ENDS[name]) for name in ("large", "half"))
    back = operator("decoalesce").growth(half, read_model(run, 35)[0])
    plain, found = grown(back, small), grown_weights(run, 30, large)
    for name, value in found.items():
        torch.testing.assert_close(value, (plain[name] + large[name]) / 2)
    assert any(not torch.equal(plain[name], large[name]) for name in found)


def test_what_is_pruned_is_what_matters_least(trained: Path) -> None:
    """Rows that stay are rows of the model before, in an order that is measured."""
    run = RunDir(trained)
    (_, large), (_, cut) = (read_model(run, ENDS[name]) for name in ("large", "cut"))
    found, moved = grown_weights(run, 20, cut), 0
    for layer in range(4):
        name = f"blocks.{layer}.feed_forward.gate_proj.weight"
        places = [int((large[name] == row).all(1).nonzero()) for row in found[name]]
        assert len(set(places)) == 32
        moved += places != list(range(32))
    assert moved == 4
    torch.testing.assert_close(found["embedding.weight"], large["embedding.weight"])


def test_what_follows_a_frozen_model_comes_nearer_to_it_and_pays_for_its_passes(
    trained: Path,
) -> None:
    """A model that is taught has no loss on labels in its gradient, and one is reported all the
    same; the frozen one is in no checkpoint but its own. The stage's rate is small: updates of AdamW
    are as large where almost nothing is left to learn, and lead away from the teacher.
    """
    run = RunDir(trained)
    _, cut = read_model(run, ENDS["cut"])
    held = SafeReader(run.checkpoint(ENDS["cut"])).read_metadata().state_dict_metadata
    assert {name for name in held if name.startswith("model.")} == {f"model.{name}" for name in cut}
    assert not any("teacher" in name for name in held)
    (large_config, large), (cut_config, _) = (read_model(run, ENDS[n]) for n in ("large", "cut"))
    pruned = grown_weights(run, ENDS["large"], cut)
    tokens = torch.randint(
        0, cut_config.vocabulary_size, (4, 64), generator=torch.Generator().manual_seed(0)
    )
    logits = {}
    for name, config, state in (
        ("large", large_config, large),
        ("pruned", cut_config, pruned),
        ("taught", cut_config, cut),
    ):
        decoder = Decoder(config)
        decoder.load_state_dict(state)
        with torch.no_grad():
            logits[name] = decoder(tokens).flatten(0, 1)
    apart = {n: float(divergence(logits["large"], logits[n]).mean()) for n in ("pruned", "taught")}
    assert 0 < apart["taught"] < apart["pruned"]
    assert motet_here("report", str(trained)).returncode == 0
    lineage = json.loads((trained / "report.json").read_text())["family"]["lineage"]
    rows_of = {row["member"]: row for row in lineage}
    spent = rows_of["cut"]["lineage_flops"] - rows_of["large"]["lineage_flops"]
    each = rows_of["cut"]["flops_per_token"] + rows_of["large"]["flops_per_token"] / 3
    assert spent == pytest.approx(rows_of["cut"]["tokens"] * each)


@pytest.mark.parametrize("kept", [5, pytest.param(24, id="within a stage that follows")])
def test_a_growth_that_is_made_again_is_the_same(trained: Path, tmp_path: Path, kept: int) -> None:
    """As after a kill before each new model was on disk: maps are learned again, to the bit, and a
    frozen teacher is read again.
    """
    run = RunDir(tmp_path / "r")
    shutil.copytree(trained, run.root, symlinks=True)
    for step in run.checkpoint_steps():
        if step > kept:
            shutil.rmtree(run.checkpoint(step))
    for step in run.grown_steps():
        if step > kept or kept == 5:
            shutil.rmtree(run.checkpoint(step, grown=True))
    run.done.unlink()
    done = motet("resume", str(run.root))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run.root) == losses(trained)
    plain = read_model(RunDir(trained), 35)[1]
    for name, value in read_model(run, 35)[1].items():
        assert torch.equal(value, plain[name]), name
