"""A run whose rates and logits follow the width: it trains, grows, goes on and is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint, read_manifest
from motet.models.decoder import Decoder
from tests.system.runs import losses, motet, motet_here, rows, write_yaml

pytestmark = pytest.mark.xdist_group("width_multipliers")  # its run is made once

FAMILY = """family:
  kind: progressive
  options:
    width_multipliers: mup
    stages:
    - {name: small, width: 0.5, steps: 6}
    - {operator: {name: hypercloning, noise: 0.1}, warmup_steps: 2}
training:"""
STEPS, GROWS = 12, 6


def write(folder: Path, corpus: Path) -> Path:
    def edit(text: str) -> str:
        sizes = ("n_kv_heads: 1,", "n_kv_heads: 2, tied_embeddings: true,")
        text = text[: text.index("experiments:")].replace(*sizes)
        text = text.replace("steps: 24", f"steps: {STEPS}")
        return text.replace("training:", FAMILY, 1)

    return write_yaml(folder, corpus, "r", edit)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("mup")
    done = motet("train", str(write(folder, corpus)), "layout.processes=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/r"


def test_multipliers_stand_in_manifests_and_the_wider_model_computes_the_same(
    trained: Path,
) -> None:
    run = RunDir(trained)
    manifest = read_manifest(run)
    small, whole = (stage["width_multipliers"] for stage in manifest["stages"])
    assert (small["output"], small["learning_rate"]) == (1.0, {})
    assert whole["output"] == manifest["model"]["output_multiplier"] == 0.5
    assert whole["learning_rate"]["attention.q_proj.weight"] == [0.5]
    for step, grown, facts in ((GROWS, False, small), (GROWS, True, whole), (STEPS, False, whole)):
        stage = read_checkpoint(run, step, grown=grown)["stage"]
        assert stage["width_multipliers"] == facts
        assert stage["model"]["output_multiplier"] == facts["output"]
    (grew,) = (row for row in rows(trained, "event") if row["event"] == "grown")
    assert grew["exact"]
    assert grew["largest"] < 1e-5
    steps = {row["step"]: row["lr"] for row in rows(trained, "step")}
    assert steps[GROWS + 2] == pytest.approx(max(steps.values()))  # one peak for both widths
    shown = motet_here("family", "show", str(trained.parent.parent / "r.yaml"))
    assert "0.5 to 1" in shown.stdout
    done = motet_here("experiments", "audit", str(trained), "--replay")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_member_is_exported_without_a_multiplier(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    done = motet_here("export", str(trained), "--all", "--output", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    tokens = torch.arange(40)[None]
    for name, step in (("small", GROWS), ("whole", STEPS)):
        config, state = read_model(RunDir(trained), step)
        decoder = Decoder(config)
        decoder.load_state_dict(state)
        text = json.loads((tmp_path / "hf" / name / "config.json").read_text())
        assert text["model_type"] == "llama"
        assert not [key for key in text if "multiplier" in key or key == "logits_scaling"]
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / name)
        with torch.no_grad():
            torch.testing.assert_close(exported(tokens).logits, decoder(tokens), atol=1e-5, rtol=0)
        card = (tmp_path / "hf" / name / "README.md").read_text()
        assert ("logits x 0.5 (muP), folded" in card) == (name == "whole")


@pytest.mark.long
def test_a_run_that_goes_on_ends_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    """From the model that had just grown."""
    run = tmp_path / "r"
    shutil.copytree(trained, run, symlinks=True)
    shutil.rmtree(RunDir(run).checkpoint(STEPS))
    RunDir(run).done.unlink()
    done = motet("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(trained)
    plain = read_model(RunDir(trained), STEPS)[1]
    for name, value in read_model(RunDir(run), STEPS)[1].items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.long
def test_two_ranks_train_and_grow_as_one_process(
    trained: Path, tmp_path: Path, corpus: Path
) -> None:
    """With FSDP2; other layouts are shown of the engine."""
    done = motet("train", str(write(tmp_path, corpus)))
    assert done.returncode == 0, done.stdout + done.stderr
    run, plain = tmp_path / "runs/r", read_model(RunDir(trained), STEPS)[1]
    assert losses(run) == pytest.approx(losses(trained), abs=1e-4)
    for name, value in read_model(RunDir(run), STEPS)[1].items():
        torch.testing.assert_close(value, plain[name], atol=1e-4, rtol=0)


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, corpus: Path) -> None:
    yaml = write(tmp_path, corpus)
    options = "family.options"
    for asked, why in (
        ([f"{options}.width_multipliers=mu"], "'mu' is not mup, or left out"),
        ([f"{options}.stages.0.width=1", f"{options}.stages.0.depth=0.5",
          f"{options}.stages.1.operator=stack"], "all stages are as wide as the first"),
        ([f"{options}.stages.1.nested={{members: {{half: {{d_ffn: 0.5}}}}}}"],
         "slices of a nested stage share weights"),
    ):  # fmt: skip
        for command in ("train", "plan"):
            done = motet_here(command, str(yaml), *asked)
            assert done.returncode == 2, done.stdout
            assert why in done.stderr
            assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()
    done = motet_here("train", str(yaml), "layout.engine=accelerate")
    assert "layout.engine=accelerate: a model that grows" in done.stderr
