"""A family that grows, from run.yaml to the report: on one rank, on two, and killed on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.experiments.scoring.store import probe_path, read_probe
from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.models.decoder import Decoder
from tests.system.runs import losses, motet, motet_here, rows, who_trained, write_yaml

pytestmark = pytest.mark.xdist_group("progressive_family")  # its runs are made once

FAMILY = """family:
  kind: progressive
  options:
    stages:
    - {name: tiny, depth: 0.5, width: 0.5, steps: 8}
    - {name: small, depth: 0.5, steps: 7, operator: {name: hypercloning, noise: 0.1}, lr: 0.002,
       rewarm_steps: 5}
    - {operator: stack, warmup_steps: 2}
training:"""
STAGES = "family.options.stages"
STEPS, ENDS = 24, {"tiny": 8, "small": 15, "whole": 24}
KILLS = '''
import os
import signal
from pathlib import Path

from motet.launcher.rank import growing
from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.rank.hooks import Hook
from motet.launcher.runs.metrics import MetricsWriter

DIED, TENSORS = Path({folder!r}), {tensors!r}
passed = len(list(DIED.iterdir()))


def point(number):
    """Die here, once."""
    if number == passed:
        (DIED / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, number, condition=lambda *args, **options: True):
    real = getattr(owner, name)

    def called(*args, **options):
        if condition(*args, **options):
            point(number)
        return real(*args, **options)

    setattr(owner, name, called)


def states(growth, old, real=growing.grown_states):
    for number, one in enumerate(real(growth, old)):
        if number in TENSORS:
            point(1 + TENSORS.index(number))
        yield one


grown = lambda self, aside, final: final.name.endswith(".grown")
before(growing, "_scores", 0)
growing.grown_states = states
last = 1 + len(TENSORS)
before(growing, "refuse_change", last)
before(Checkpoints, "_rename", last + 1, grown)
before(MetricsWriter, "log", last + 2, lambda *a, event=None, **k: event == "grown")


class Dies(Hook):
    """Its file kills the run at every point of its first transition, one for each attempt."""
'''
TENSORS = (5,)
"""Of the new model: before which of them a run dies while it grows."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """The same run on one rank, on two with FSDP2, as a pipeline of two stages, and in three
    layouts: a rank, then a pipeline of two, then FSDP2.
    """
    found = {}
    for kind, asked in (
        ("one", ["layout.processes=1"]),
        ("fsdp", []),
        ("pipeline", ["layout.pp=2"]),
        ("stages", [f"{STAGES}.0.layout={{processes: 1}}", f"{STAGES}.1.layout={{pp: 2}}"]),
    ):
        folder = tmp_path_factory.mktemp(kind)
        yaml = write(folder, corpus)
        done = motet("train", str(yaml), *asked)
        assert done.returncode == 0, done.stdout + done.stderr
        found[kind] = folder / "runs/r"
    return found


def write(folder: Path, corpus: Path, tensors: tuple[int, ...] = TENSORS) -> Path:
    (folder / "died").mkdir()
    (folder / "kills.py").write_text(KILLS.format(folder=str(folder / "died"), tensors=tensors))
    layers = ("n_layers: 2, n_heads: 2", "n_layers: 4, n_heads: 2")
    return write_yaml(
        folder, corpus, "r", lambda text: text.replace("training:", FAMILY, 1).replace(*layers)
    )


def test_two_ranks_and_a_pipeline_and_layouts_that_change_grow_as_one_process(
    runs: dict[str, Path],
) -> None:
    expected, plain = losses(runs["one"]), read_model(RunDir(runs["one"]), STEPS)[1]
    for run in runs.values():
        assert losses(run) == pytest.approx(expected, abs=1e-4)
        for name, value in read_model(RunDir(run), STEPS)[1].items():
            torch.testing.assert_close(value, plain[name], atol=1e-4, rtol=0)


def test_data_runs_on_through_all_stages_and_the_audit_says_who_trained(
    runs: dict[str, Path],
) -> None:
    for run in runs.values():
        trained = who_trained(run)
        assert sorted(trained) == list(range(8 * STEPS))
        for slot, names in trained.items():
            step = slot // 8
            assert names == (("tiny" if step < 8 else "small" if step < 15 else None),)
        done = motet_here("experiments", "audit", str(run), "--replay")
        assert done.returncode == 0, done.stdout
        assert "tiny on 64, small on 56, the whole model on 72" in done.stdout


def test_growth_is_told_and_held_to_what_its_operator_states(runs: dict[str, Path]) -> None:
    for run in runs.values():
        found = [row for row in rows(run, "event") if row["event"] == "grown"]
        assert [(row["step"], row["source"], row["member"]) for row in found] == [
            (8, "tiny", "small"),
            (15, "small", "whole"),
        ]
        exact, stacked = found
        assert exact["exact"]
        assert exact["largest"] <= 1e-5
        assert not stacked["exact"]
        assert stacked["loss_after"] - stacked["loss_before"] < 2.0
        lr = {row["step"]: row["lr"] for row in rows(run, "step")}
        # Four steps of warm-up, again in the second stage, and two in the third.
        assert [lr[s] / lr[step] for step, s in ((1, 4), (9, 12), (16, 17))] == pytest.approx(
            [4, 4, 2]
        )
        assert lr[12] == 0.002


def test_members_are_measured_before_they_grow_and_by_nobody_else(runs: dict[str, Path]) -> None:
    run = RunDir(runs["one"])
    for name, end in ENDS.items():
        own = None if name == "whole" else name
        _, scores = read_probe(probe_path(run.probes, end), own)
        assert set(scores) == {"canaries", "facts", "aa", "strong"}
        for other in {None, "tiny", "small"} - {own}:
            assert read_probe(probe_path(run.probes, end), other)[1] == {}
    losses_of = [row["losses"] for row in rows(runs["one"], "evaluation") if "latency_ms" in row]
    assert [list(losses) for losses in losses_of] == [["tiny"], ["small"], ["whole"]]


@pytest.mark.parametrize(
    "tensors",
    [TENSORS, pytest.param(tuple(range(16)), id="twenty points", marks=pytest.mark.long)],
)
def test_a_run_killed_at_every_point_of_a_transition_ends_with_the_same_bits(
    runs: dict[str, Path], tmp_path: Path, corpus: Path, tensors: tuple[int, ...]
) -> None:
    yaml, run = write(tmp_path, corpus, tensors), tmp_path / "runs/r"
    settings = ["layout.processes=1", "training.max_restarts=0", "training.hooks=[kills.py:Dies]"]
    done = motet("train", str(yaml), *settings)
    for number in range(len(tensors) + 4):
        assert done.returncode != 0, done.stdout
        assert len(list((tmp_path / "died").iterdir())) == number + 1
        assert RunDir(run).checkpoint_steps()[-1] == 8
        # The new model is there from the moment on in which its folder has its name.
        there = number == len(tensors) + 3
        assert RunDir(run).grown_steps() == ([8] if there else [])
        done = motet("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(runs["one"])
    plain = read_model(RunDir(runs["one"]), STEPS)[1]
    for name, value in read_model(RunDir(run), STEPS)[1].items():
        assert torch.equal(value, plain[name]), name
    assert who_trained(run) == who_trained(runs["one"])
    assert motet_here("experiments", "audit", str(run), "--replay").returncode == 0
    assert motet_here("verify", str(run)).returncode == 0
    for step in (8, 15):
        ours, theirs = (
            read_probe(probe_path(RunDir(one).probes, step), {8: "tiny", 15: "small"}[step])[1]
            for one in (run, runs["one"])
        )
        for name, scores in ours.items():
            np.testing.assert_array_equal(scores.logprob, theirs[name].logprob)


def test_a_model_that_grew_from_damage_is_made_again(runs: dict[str, Path], tmp_path: Path) -> None:
    """What lies on disk of a new model is altered: it is set aside, and grows again."""
    run = tmp_path / "r"
    shutil.copytree(runs["one"], run, symlinks=True)
    for step in (18, 24):
        shutil.rmtree(RunDir(run).checkpoint(step))
    RunDir(run).done.unlink()
    (broken,) = RunDir(run).checkpoint(15, grown=True).glob("*.distcp")
    broken.write_bytes(broken.read_bytes()[:-1])
    done = motet("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows(run, "event") if row["event"] == "damaged_checkpoint"] == [
        15
    ]
    plain = read_model(RunDir(runs["one"]), STEPS)[1]
    for name, value in read_model(RunDir(run), STEPS)[1].items():
        assert torch.equal(value, plain[name]), name


def test_every_member_is_exported_as_it_was_before_it_grew(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    run, output = runs["fsdp"], tmp_path / "hf"
    done = motet_here("export", str(run), "--all", "--output", str(output))
    assert done.returncode == 0, done.stderr
    tokens = torch.arange(40)[None]
    for name, step in ENDS.items():
        assert read_checkpoint(RunDir(run), step)["stage"]["name"] == name
        config, state = read_model(RunDir(run), step)
        decoder = Decoder(config)
        decoder.load_state_dict(state)
        exported = transformers.AutoModelForCausalLM.from_pretrained(output / name)
        with torch.no_grad():
            torch.testing.assert_close(exported(tokens).logits, decoder(tokens), atol=1e-5, rtol=0)
    card = (output / "small" / "README.md").read_text()
    assert "tiny (" in card
    assert "→ hypercloning → small (" in card
    assert "| tokens of its lineage | 38,400 |" in card
    assert "from step 15 of" in card
    assert "whole (" not in card
    for option in ("--params=5k", "--spec={n_layers: 1}"):
        assert "none is a slice" in motet_here("export", str(run), option).stderr
    missing = motet_here("export", str(run), "--member", "whole", "--step", "8")
    assert "no checkpoint up to step 8 has it; there are tiny" in missing.stderr


def report_of(run: Path) -> dict[str, Any]:
    done = motet_here("report", str(run))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def test_the_report_has_every_member_with_its_lineage_and_what_was_saved(
    runs: dict[str, Path],
) -> None:
    report = report_of(runs["one"])
    family = report["family"]
    assert [row["member"] for row in family["lineage"]] == ["tiny", "small", "whole"]
    assert [row["lineage_tokens"] for row in family["lineage"]] == [
        step * 8 * 320 for step in ENDS.values()
    ]
    assert all(row["loss"] is not None for row in family["members"])
    spent = sum(row["tokens"] * row["flops_per_token"] for row in family["lineage"])
    assert family["cost"]["flops"] == pytest.approx(spent)
    assert 0 < family["cost"]["saved_at_equal_cost"] < 1
    entry = report["answers"]["experiments"][0]
    assert {other["member"] for other in entry["members"]} == {"tiny", "small"}
    # Each as it was at the end of its stage, by the exposures until then.
    planned = {
        one["member"]: sum(arm["planned_exposures"] for arm in one["arms"])
        for one in entry["members"]
        if "arms" in one
    }
    if planned:
        assert planned["tiny"] <= planned["small"] <= entry_planned(entry)
    pairs = [(row["before"], row["after"]) for row in family["neighbours"]]
    assert list(dict.fromkeys(pairs)) == [("tiny", "small"), ("small", "whole")]
    assert all(
        row["both"] + row["lost"] + row["gained"] <= row["units"] for row in family["neighbours"]
    )
    page = (runs["one"] / "report.html").read_text()
    assert "Do neighbours answer alike?" in page
    assert "each model was made of the one before" in page


def entry_planned(entry: dict[str, Any]) -> int:
    return int(sum(arm["planned_exposures"] for arm in entry["arms"]))


def test_a_family_that_cannot_grow_is_refused_before_anything_starts(
    tmp_path: Path, corpus: Path
) -> None:
    yaml = write(tmp_path, corpus)
    shallow = [f"family.options.stages.{number}.depth=0.25" for number in (0, 1)]
    for asked, why in (
        (["layout.engine=accelerate"], "layout.engine=accelerate: a model that grows"),
        (["layout.pp=2", *shallow], "stage tiny: layout.pp"),
        (["family.options.stages.1.operator=stak"], "did you mean 'stack'"),
        (["training.steps=15"], "nothing is left for the last stage"),
    ):
        done = motet_here("train", str(yaml), *asked)
        assert done.returncode == 2, done.stdout
        assert why in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()
