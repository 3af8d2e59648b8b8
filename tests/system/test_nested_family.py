"""A nested family from run.yaml to the report: interrupted, gone on with on other ranks, exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from motet.experiments.stream.ledger import read_records
from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.models.decoder import Decoder
from motet.models.family.base import members_of
from tests.system.runs import motet, write_yaml

pytestmark = pytest.mark.xdist_group("nested_family")  # its runs are made once

FAMILY = """family:
  kind: nested
  options:
    members: {small: {d_model: 0.5, d_ffn: 0.5, n_layers: 1}, thin: {d_ffn: 0.5}}
    groups: 1
    sampler: sandwich
    loss: distill
    distill_from_step: 6
    draws: 2
training:"""
STOP = (
    "from motet.launcher.rank.hooks import Hook\n\n\nclass StopsAt9(Hook):\n"
    "    def after_step(self, context):\n"
    "        if context.step == 9:\n            context.ask_to_stop('enough')\n"
)
STEPS = 24


def write(folder: Path, corpus: Path) -> Path:
    (folder / "stop.py").write_text(STOP)
    return write_yaml(folder, corpus, "r", lambda text: text.replace("training:", FAMILY, 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """The same run: undisturbed; stopped and resumed; stopped and resumed on one rank of two."""
    found = {}
    for kind, overrides in (("plain", None), ("resumed", ()), ("fewer", ("layout.processes=1",))):
        folder = tmp_path_factory.mktemp(kind)
        yaml, hooks = write(folder, corpus), "[]" if overrides is None else "[stop.py:StopsAt9]"
        steps = f"training.steps={STEPS}"
        done = motet("train", str(yaml), steps, f"training.hooks={hooks}")
        assert done.returncode == 0, done.stderr
        run = folder / "runs/r"
        if overrides is not None:
            assert "stopped" in done.stdout
            done = motet("resume", str(run), "training.hooks=[]", *overrides)
            assert done.returncode == 0, done.stderr
        found[kind] = run
    return found


def who_trained(run: Path) -> dict[int, tuple[str | None, ...]]:
    """Return who trained on each slot."""
    found: dict[int, tuple[str | None, ...]] = {}
    for path in run.glob("ledger/segment-*/rank-*.bin"):
        for record in read_records(path):
            for slot in range(record.first_slot, record.first_slot + record.count):
                assert slot not in found
                found[slot] = record.members_at(slot)
    return found


def test_a_stop_changes_nothing_and_other_ranks_keep_who_trains_on_what(
    runs: dict[str, Path],
) -> None:
    weights = {kind: read_model(RunDir(run), STEPS)[1] for kind, run in runs.items()}
    for name, value in weights["plain"].items():
        assert torch.equal(value, weights["resumed"][name]), name
        torch.testing.assert_close(value, weights["fewer"][name], atol=1e-4, rtol=0)
    plain = who_trained(runs["plain"])
    assert plain == who_trained(runs["resumed"]) == who_trained(runs["fewer"])
    assert set(plain) == set(range(8 * STEPS))
    assert set(plain.values()) == {(None, "thin", "small")}
    for run in runs.values():
        assert motet("experiments", "audit", str(run)).returncode == 0


def test_steps_cost_what_their_passes_cost(runs: dict[str, Path]) -> None:
    manifest = json.loads((runs["plain"] / "manifest.json").read_text())
    names = {member["name"]: member for member in manifest["members"]}
    assert names["small"]["parameters"] < names["thin"]["parameters"] < manifest["parameters"]
    rows = [json.loads(line) for line in (runs["plain"] / "metrics.jsonl").open()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(set(row["losses"]) == {"whole", "thin", "small"} for row in steps)


def test_every_member_is_exported_as_the_model_that_it_is(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run = runs["plain"]
    config, state = read_model(RunDir(run), STEPS)
    whole = Decoder(config)
    whole.load_state_dict(state)
    tokens = torch.arange(40)[None]
    for member in members_of(json.loads((run / "manifest.json").read_text())):
        folder = tmp_path / member.name
        done = motet("export", str(run), "--member", member.name, "--output", str(folder))
        assert done.returncode == 0, done.stderr
        exported = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            expected = whole(tokens, member=member)
            torch.testing.assert_close(exported(tokens).logits, expected, atol=1e-5, rtol=1e-5)
            assert exported.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 43)


def test_the_report_and_family_show_tell_of_every_member(runs: dict[str, Path]) -> None:
    run = runs["plain"]
    assert motet("report", str(run)).returncode == 0
    page = (run / "report.html").read_text()
    assert "small" in page
    assert "thin" in page
    shown = motet("family", "show", str(run.parent.parent / "r.yaml"), "--json")
    facts = json.loads(shown.stdout)
    assert [member["name"] for member in facts["members"]] == ["small", "thin", "whole"]
    shares = [member["share_of_passes"] for member in facts["members"]]
    np.testing.assert_allclose(shares, 1 / 3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["family.options.draws=3"],
            "3 shares of a step of 8 sequences are no whole micro-batches",
        ),
        (["layout.tp=2", "model.n_kv_heads=2"], "layout.tp=2 cuts a group of member 'small'"),
        (["layout.pp=2"], "layout.pp=2"),
        (["family.options.members=[9b]"], "9b: no slice of"),
        (["family.options.distill_from_step=999"], "distill_from_step=999: the run has"),
    ],
)
def test_a_family_that_cannot_train_is_refused_before_anything_starts(
    tmp_path: Path, corpus: Path, overrides: list[str], said: str
) -> None:
    yaml = write(tmp_path, corpus)
    for command in (["train", str(yaml)], ["family", "show", str(yaml)]):
        done = motet(*command, *overrides)
        assert done.returncode == 2, done.stdout + done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()
