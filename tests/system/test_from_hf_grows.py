"""A family whose first member is a Hugging Face folder: it begins as that model, and grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, initialize
from motet.models.hf import from_hf, to_hf
from tests.system.runs import motet, motet_here, replaced, rows, write_yaml

FOLDER = ModelConfig(1024, 32, 2, 2, 1, 64, head_dim=16, qk_norm="head", init_std=0.1)
EDIT = (
    (
        "model: {preset: 1m, d_model: 32, n_layers: 2, n_heads: 2, n_kv_heads: 1, d_ffn: 64, "
        "head_dim: 16}",
        "model: {from_hf: hf, n_layers: 4}",
    ),
    (
        "training:",
        "family:\n  kind: progressive\n  options:\n    stages:\n"
        "    - {name: begun, depth: 0.5, steps: 2}\n    - {operator: identity}\n"
        "training:\n  hooks: [first.py:Keeps]",
    ),
    ("steps: 24", "steps: 4"),
    ("warmup_steps: 4", "warmup_steps: 1"),
    ("sequence_length: 320", "sequence_length: 64"),
)
KEEPS = (
    "from pathlib import Path\n\nimport torch\n\nfrom motet.launcher.rank.hooks import Hook\n\n\n"
    "class Keeps(Hook):\n    def before_step(self, context):\n"
    "        if context.step == 0:\n"
    "            torch.save(context.weights(), Path({folder!r}) / 'first.pt')\n"
)


@pytest.fixture
def yaml(tmp_path: Path, corpus: Path) -> Path:
    decoder = Decoder(FOLDER)
    initialize(decoder, seed=1)
    to_hf(decoder.state_dict(), FOLDER, None, tmp_path / "hf")
    (tmp_path / "first.py").write_text(KEEPS.format(folder=str(tmp_path)))

    def edited(text: str) -> str:
        return replaced(text, EDIT).partition("experiments:")[0]

    return write_yaml(tmp_path, corpus, "r", edited)


def test_a_run_begins_as_the_folders_model_and_grows(tmp_path: Path, yaml: Path) -> None:
    transformers = pytest.importorskip("transformers")
    done = motet("train", str(yaml), "layout.processes=1")
    assert done.returncode == 0, done.stdout + done.stderr
    first = torch.load(tmp_path / "first.pt")
    config, stored = from_hf(tmp_path / "hf")
    assert all(torch.equal(value, stored[name]) for name, value in first.items())
    begun = Decoder(config)
    begun.load_state_dict(first)
    tokens = torch.arange(40)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(begun(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    run = tmp_path / "runs/r"
    (grown,) = (row for row in rows(run, "event") if row["event"] == "grown")
    assert (grown["step"], grown["source"], grown["member"]) == (2, "begun", "whole")
    assert grown["largest"] <= 1e-5
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["members"][0]["model"]["qk_norm"] == "head"
    assert read_model(RunDir(run), 4)[0].n_layers == 4


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ([], ""),
        (["model.n_layers=6"], "is what the first stage begins with, and begun has n_layers=3 ins"),
        (["model.qk_norm=none"], "begun has qk_norm=none instead of head"),
        (["model.d_model=64"], "begun has d_model=64 instead of 32"),
    ],
)
def test_a_first_stage_that_is_not_the_folders_model_is_one_error(
    yaml: Path, asked: list[str], why: str
) -> None:
    done = motet_here("train", str(yaml), *asked, "training.hooks=[]", "--dry-run")
    assert done.returncode == (2 if why else 0), done.stderr
    assert why in done.stderr


def test_a_folder_whose_architecture_cannot_grow_is_refused_by_the_feature(
    tmp_path: Path, yaml: Path
) -> None:
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": True}
    path.write_text(json.dumps({**config, **llama}))
    done = motet_here("train", str(yaml), "training.hooks=[]", "--dry-run")
    assert done.returncode == 2
    assert "cannot grow: mlp_bias=True is of a kind whose weights no operator" in done.stderr
