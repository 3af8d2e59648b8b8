"""A family whose last stage is nested, from run.yaml to the report: killed in the middle of it, on
two ranks, and planned.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from motet.experiments.scoring.store import probe_path, read_probe
from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.models.decoder import Decoder
from motet.models.family.base import members_of
from tests.system.runs import losses, motet, motet_here, replaced, rows, who_trained, write_yaml

pytestmark = pytest.mark.xdist_group("nested_stage")  # its runs are made once

FAMILY = """family:
  kind: progressive
  options:
    divergence: 4
    stages:
    - {name: small, depth: 0.5, steps: 6}
    - operator: stack
      nested:
        members: {half: {d_ffn: 0.5}, flat: {n_layers: 2, d_ffn: 0.5}}
        sampler: sandwich
        loss: distill
        distill_from_step: 4
        draws: 2
        order_at_step: 2
        order_sequences: 6
        mask_update: true
training:"""
STOP = (
    "from motet.launcher.rank.hooks import Hook\n\n\nclass StopsAt11(Hook):\n"
    "    def after_step(self, context):\n"
    "        if context.step == 11:\n            context.ask_to_stop('enough')\n"
)
STEPS, START, SEQUENCES = 16, 6, 4


def write(folder: Path, corpus: Path) -> Path:
    (folder / "stop.py").write_text(STOP)
    layers = ("n_layers: 2, n_heads: 2", "n_layers: 4, n_heads: 2")
    changed = (
        ("training:", FAMILY),
        layers,
        ("sequences: 8", "sequences: 4"),
        ("24", "16"),
        ("micro_sequences: 2", "micro_sequences: 1"),
    )

    def edit(text: str) -> str:
        text = replaced(text, changed)
        kept = ("canaries", "facts", "name: aa")
        return "\n".join(line for line in text.splitlines() if not any(k in line for k in kept))

    return write_yaml(folder, corpus, "r", edit)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """The same run on one rank; stopped in the nested stage and resumed; on two with FSDP2."""
    found = {}
    for kind, asked in (
        ("one", ["layout.processes=1"]),
        ("resumed", ["layout.processes=1", "training.hooks=[stop.py:StopsAt11]"]),
        ("fsdp", []),
    ):
        folder = tmp_path_factory.mktemp(kind)
        yaml = write(folder, corpus)
        done = motet("train", str(yaml), *asked)
        assert done.returncode == 0, done.stdout + done.stderr
        run = folder / "runs/r"
        if kind == "resumed":
            assert "stopped" in done.stdout
            done = motet("resume", str(run), "training.hooks=[]")
            assert done.returncode == 0, done.stdout + done.stderr
        found[kind] = run
    return found


def test_a_stop_in_the_nested_stage_changes_no_bit_and_two_ranks_train_as_one(
    runs: dict[str, Path],
) -> None:
    expected, plain = losses(runs["one"]), read_model(RunDir(runs["one"]), STEPS)[1]
    assert losses(runs["resumed"]) == expected
    assert losses(runs["fsdp"]) == pytest.approx(expected, abs=1e-4)
    for name, value in plain.items():
        assert torch.equal(value, read_model(RunDir(runs["resumed"]), STEPS)[1][name]), name
        other = read_model(RunDir(runs["fsdp"]), STEPS)[1][name]
        torch.testing.assert_close(value, other, atol=1e-4, rtol=0)


def test_slices_train_from_the_last_stage_on_and_the_audit_draws_them_again(
    runs: dict[str, Path],
) -> None:
    for run in runs.values():
        trained = who_trained(run)
        assert sorted(trained) == list(range(SEQUENCES * STEPS))
        for slot, names in trained.items():
            assert names == (("small",) if slot < SEQUENCES * START else (None, "half", "flat"))
        done = motet_here("experiments", "audit", str(run), "--replay")
        assert done.returncode == 0, done.stdout
        (ordered,) = (row for row in rows(run, "event") if row["event"] == "ordered")
        assert (ordered["step"], ordered["sequences"]) == (START + 2, 8)
        steps = {row["step"]: row for row in rows(run, "step")}
        assert steps[START]["member"] == "small"
        assert set(steps[START + 1]["losses"]) == {"whole", "half", "flat"}


def test_every_member_is_measured_exported_and_reported(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run = runs["resumed"]
    for step, names in ((START, {"small"}), (STEPS, {None, "half", "flat"})):
        for name in (None, "small", "half", "flat"):
            scores = read_probe(probe_path(RunDir(run).probes, step), name)[1]
            assert bool(scores) == (name in names), (step, name)
    output = tmp_path / "hf"
    done = motet_here("export", str(run), "--all", "--output", str(output))
    assert done.returncode == 0, done.stderr
    members = {one.name: one for one in members_of(json.loads((run / "manifest.json").read_text()))}
    tokens = torch.arange(40)[None]
    for name in ("small", "half", "flat", "whole"):
        config, state = read_model(RunDir(run), START if name == "small" else STEPS)
        decoder = Decoder(config)
        decoder.load_state_dict(state)
        inside = None if name in ("small", "whole") else members[name]
        exported = transformers.AutoModelForCausalLM.from_pretrained(output / name)
        with torch.no_grad():
            expected = decoder(tokens, member=inside)
            torch.testing.assert_close(exported(tokens).logits, expected, atol=1e-5, rtol=0)
        card = (output / name / "README.md").read_text()
        assert "small (" in card
        assert ("part of the parent" in card) == (name in ("half", "flat"))
        read = SEQUENCES * 320 * (START if name == "small" else STEPS - START)
        assert f"| tokens it trained on | {read:,} |" in card
    report(run)


def report(run: Path) -> None:
    """What report.json says: losses, the lineage, its cost, and neighbours in every experiment."""
    in_the_run = [row["pairs"] for row in rows(run, "event") if "pairs" in row]
    done = motet_here("family", "divergence", str(run), "--sequences", "4", "--json")
    assert done.returncode == 0, done.stderr
    afterwards = json.loads(done.stdout)["pairs"]
    assert [afterwards] == [
        [
            {**row, "kl": pytest.approx(row["kl"]), "interval": pytest.approx(row["interval"])}
            for row in found
        ]
        for found in in_the_run
    ]
    pairs = [(row["before"], row["after"]) for row in json.loads(done.stdout)["pairs"]]
    assert pairs == [("small", "whole"), ("flat", "half"), ("half", "whole")]
    assert motet_here("report", str(run)).returncode == 0
    found = json.loads((run / "report.json").read_text())
    family = found["family"]
    assert {row["member"] for row in family["members"]} == {"small", "half", "flat", "whole"}
    assert all(row["loss"] is not None for row in family["members"])
    first, last = family["lineage"]
    assert (first["tokens"], last["tokens"]) == (
        SEQUENCES * 320 * START,
        SEQUENCES * 320 * (STEPS - START),
    )
    passes = {one["member"]: one["flops"] for one in last["members"]}
    each = {row["member"]: row["flops_per_token"] for row in family["members"]}
    assert passes == pytest.approx({name: last["tokens"] * each[name] for name in passes})
    assert family["cost"]["flops"] == pytest.approx(
        first["tokens"] * each["small"] + sum(passes.values())
    )
    compared = [(row["before"], row["after"]) for row in family["neighbours"]]
    assert list(dict.fromkeys(compared)) == pairs


def test_its_price_is_told_before_it_trains(tmp_path: Path, corpus: Path) -> None:
    yaml = write(tmp_path, corpus)
    # Shares as many as a rank has micro-batches, so that each layout of the plan has whole ones.
    yaml.write_text(yaml.read_text().replace("        draws: 2\n", ""))
    done = motet_here("family", "show", str(yaml), "--json")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout)["stages"][-1]
    assert {one["member"]: one["passes"] for one in last["members"]} == {
        "flat": 1.0,
        "half": 1.0,
        "whole": pytest.approx(1.0),
    }
    assert last["flops"] == pytest.approx(sum(one["flops"] for one in last["members"]))
    done = motet_here("plan", str(yaml), "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)["family"]
    first, last = planned["stages"]
    assert planned["time_s"] == pytest.approx(first["time_s"] + last["time_s"])
    assert last["time_s"] > first["time_s"]
    assert [one["member"] for one in last["members"]][-1] == "whole"
    for asked, why in (
        ("layout.pp=2", "order_at_step"),
        ("layout.engine=accelerate", "layout.engine=accelerate"),
    ):
        refused = motet_here("train", str(yaml), asked, "--dry-run")
        assert refused.returncode == 2
        assert why in refused.stderr
