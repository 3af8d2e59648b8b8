"""A family that a user brings goes from run.yaml through training, resume, probes, export and
report; the step loop knows nothing of it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from motet.experiments.scoring.store import read_probe
from motet.experiments.stream.ledger import read_records
from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.models.decoder import Decoder
from tests.families import SOURCE
from tests.system.runs import motet, motet_here, write_yaml

pytestmark = pytest.mark.xdist_group("family")  # one run for all
FAMILY = "family: {kind: my_family.py:FirstLayers, options: {layers: [1]}}\ntraining:"


def write(
    folder: Path, corpus: Path, name: str, family: str = FAMILY, source: str = SOURCE
) -> Path:
    (folder / "my_family.py").write_text(source)
    return write_yaml(folder, corpus, name, lambda text: text.replace("training:", family))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of a family that was interrupted in the middle."""
    folder = tmp_path_factory.mktemp("family")
    yaml = write(folder, corpus, "r")
    done = motet("train", str(yaml), "training.steps=24")
    assert done.returncode == 0, done.stderr
    return folder / "runs/r"


def test_the_manifest_and_every_checkpoint_name_the_members(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (member,) = manifest["members"]
    assert member["name"] == "first-1"
    assert member["model"] == {**manifest["model"], "n_layers": 1}
    assert member["parameters"] < manifest["parameters"]
    assert member["flops_per_token"] < manifest["flops_per_token"]
    facts = json.loads((run / "checkpoints/step-00000024/manifest.json").read_text())
    assert facts["members"] == manifest["members"]
    assert list(facts["judge"]["members"]) == ["first-1"]
    assert len(facts["judge"]["members"]["first-1"]) == len(facts["judge"]["losses"]) == 24


def test_the_ledger_says_who_trained_on_each_exposure(run: Path) -> None:
    turns = [(None,), ("first-1",)]
    files = sorted(run.glob("ledger/segment-*/rank-*.bin"))
    assert len(files) == 2
    for rank, path in enumerate(files):
        records = list(read_records(path))
        # Both ranks work on each share of a step, so its slots lie apart.
        assert len(records) == 2 * 24
        for record in records:
            share, place = divmod(record.first_slot % 8, 4)
            assert (place, record.count) == (2 * rank, 2)
            assert record.members == (turns[(record.step + share) % 2],)
            assert record.members_at(record.first_slot) == record.members[0]


def test_the_audit_draws_again_who_trained_and_finds_a_ledger_that_says_otherwise(
    run: Path,
) -> None:
    sound = motet_here("experiments", "audit", str(run), "--replay")
    assert sound.returncode == 0, sound.stdout
    assert "drew again who trained in 96 records" in sound.stdout
    path = sorted(run.glob("ledger/segment-*/rank-*.bin"))[1]
    kept, records = path.read_bytes(), list(read_records(path))
    other = (None,) if records[7].members == (("first-1",),) else ("first-1",)
    records[7] = replace(records[7], members=(other,))
    try:
        path.write_bytes(b"".join(record.encode() for record in records))
        shown = motet_here("experiments", "audit", str(run))
        assert shown.returncode == 1
        assert "1 records name other members than the family draws" in shown.stdout
    finally:
        path.write_bytes(kept)


def test_rows_show_the_loss_of_each_member_and_probes_measure_each(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(set(row["losses"]) == {"whole", "first-1"} for row in steps)
    probes = [row for row in rows if row["kind"] == "probe"]
    assert all(set(row["members"]["first-1"]) == set(row["experiments"]) for row in probes)
    path = max(run.glob("probes/step-*.npz"))
    facts, whole = read_probe(path)
    same, member = read_probe(path, member="first-1")
    assert facts == same
    assert whole.keys() == member.keys()
    assert any(not np.array_equal(whole[name].logprob, member[name].logprob) for name in whole)


def test_a_member_is_exported_as_the_plain_model_that_it_is(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    done = motet_here("export", str(run), "--member", "first-1", "--output", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert exported.config.num_hidden_layers == 1
    config, state = read_model(RunDir(run), 24)
    whole = Decoder(config)
    whole.load_state_dict(state)
    from motet.models.family.base import members_of

    (member,) = members_of(json.loads((run / "manifest.json").read_text()))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = whole(tokens, member=member)
        torch.testing.assert_close(exported(tokens).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(whole(tokens), expected, atol=1e-3)
    unknown = motet_here("export", str(run), "--member", "last-1")
    assert unknown.returncode == 2
    assert "there are first-1" in unknown.stderr


def test_a_layout_that_cannot_train_members_is_refused_before_anything_starts(
    run: Path, tmp_path: Path, corpus: Path
) -> None:
    before = sorted(path.name for path in (run / "attempts").iterdir())
    again = motet_here("resume", str(run), "training.steps=26", "layout.pp=2")
    yaml = write(tmp_path, corpus, "r")
    slurm = ("slurm.time=00:10:00", "slurm.cpus_per_node=2", "layout.pp=2")
    new = motet_here("train", str(yaml), "layout.pp=2")
    submitted = motet_here("submit", str(yaml), *slurm, "--dry-run")
    for done in (again, new, submitted):
        assert done.returncode == 2, done.stdout
        assert "family.options." in done.stderr or "family.kind" in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (run / "attempts").iterdir()) == before
    assert not (tmp_path / "runs" / "r").exists()


def test_benchmarks_are_run_on_a_member(run: Path) -> None:
    asked = ("eval", str(run), "--tasks", "arc_easy", "--dry-run")
    whole, member = motet_here(*asked), motet_here(*asked, "--member", "first-1")
    assert f"pretrained={run}/members/step-00000024," in whole.stdout
    assert f"pretrained={run}/members/step-00000024@first-1," in member.stdout
    assert f"--output_path {run}/eval/step-00000024@first-1" in member.stdout
    unknown = motet_here(*asked, "--member", "last-1")
    assert unknown.returncode == 2
    assert "there are first-1" in unknown.stderr


def test_a_family_that_stops_in_the_middle_goes_on_as_one_that_did_not(
    run: Path, tmp_path: Path, corpus: Path
) -> None:
    yaml = write(tmp_path, corpus, "r")
    yaml.write_text(yaml.read_text() + "\n")
    stop = (
        "\nfrom motet.launcher.rank.hooks import Hook\n\n\nclass StopsAt7(Hook):\n"
        "    def after_step(self, context):\n"
        "        if context.step == 7:\n            context.ask_to_stop('enough')\n"
    )
    (tmp_path / "stop.py").write_text(stop)
    first = motet("train", str(yaml), "training.hooks=[stop.py:StopsAt7]")
    assert "stopped" in first.stdout, first.stderr
    other = tmp_path / "runs/r"
    again = motet("resume", str(other), "training.hooks=[]", "layout.processes=1")
    assert again.returncode == 0, again.stderr
    for name in ("step-00000024.npz",):
        for member in (None, "first-1"):
            found, expected = (read_probe(r / "probes" / name, member)[1] for r in (other, run))
            for experiment, scores in expected.items():
                np.testing.assert_allclose(
                    found[experiment].logprob, scores.logprob, rtol=1e-3, atol=1e-3
                )


def test_the_report_shows_the_member(run: Path) -> None:
    done = motet_here("report", str(run))
    assert done.returncode == 0, done.stderr
    assert "first-1" in (run / "report.html").read_text()
    compliance = json.loads((run / "report.json").read_text())["compliance"]
    assert compliance["ledger_ok"]
    for row in compliance["per_experiment"]:
        shown = {arm["arm"]: arm for arm in row["doses"] if arm["consumed"]}
        assert shown
        for arm in shown.values():
            whole, first = arm["members"]
            assert whole["own"] + whole["part"] == first["own"] + first["within"] == arm["consumed"]
            assert (whole["own"], whole["within"]) == (first["within"], 0)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        (
            "{kind: my_family.py:FirstLayers, options: {layers: [1]}}",
            ["layout.pp=2"],
            "layout.pp=2",
        ),
        ("{kind: my_family.py:FirstLayers, options: {layers: [9]}}", [], "not a rising choice"),
        ("{kind: my_family.py:FirstLayers, options: {}}", [], "KeyError: 'layers'"),
        ("{kind: nested}", [], "members: is not set; write name"),
        ("{kind: other.py:FirstLayers}", [], "there is no file"),
    ],
)
def test_a_family_that_cannot_be_is_refused_before_the_run_exists(
    tmp_path: Path, corpus: Path, family: str, overrides: list[str], message: str
) -> None:
    yaml = write(tmp_path, corpus, "r", f"family: {family}\ntraining:")
    done = motet_here("train", str(yaml), *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "family.options." in done.stderr or "family.kind" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
