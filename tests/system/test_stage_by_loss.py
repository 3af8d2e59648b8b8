"""A stage that the loss ends, from run.yaml to the report: on two ranks, and killed on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from tests.system.runs import losses, motet, motet_here, rows, who_trained, write_yaml

pytestmark = pytest.mark.xdist_group("stage_by_loss")  # its runs are made once

STEP = 8 * 320
FAMILY = f"""family:
  kind: progressive
  options:
    stages:
    - name: small
      depth: 0.5
      width: 0.5
      until: {{loss_fall: 0.9, least_tokens: {16 * STEP}, most_tokens: {30 * STEP}}}
    - {{name: middle, depth: 0.5, steps: 3, warmup_steps: 1, operator: {{name: hypercloning, noise: 0.1}}}}
    - {{operator: stack, warmup_steps: 2}}
training:"""
STEPS = 36
KILLS = '''
import os
import signal
from pathlib import Path

from motet.launcher.rank import growing
from motet.launcher.rank.hooks import Hook

DIED = Path({folder!r})


def once(name):
    if not (DIED / name).exists():
        (DIED / name).touch()
        os.kill(os.getpid(), signal.SIGKILL)


real = growing._scores


def scores(*args):
    once("grows")
    return real(*args)


growing._scores = scores


class Dies(Hook):
    """Kills the run within the stage that its loss ends, and when that has ended."""

    def after_step(self, context):
        if context.step == 14:
            once("trains")
'''


def edited(text: str) -> str:
    text = text.replace("training:", FAMILY, 1).replace("steps: 24", f"steps: {STEPS}")
    text = text.replace("every_steps: 6", "every_steps: 6, keep: 30")
    return text.replace("n_layers: 2, n_heads: 2", "n_layers: 4, n_heads: 2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """One process to its end, one that is killed twice, and two ranks."""
    found = {}
    asked = ["layout.processes=1"]
    for kind, settings in (
        ("one", asked),
        ("killed", [*asked, "training.max_restarts=0", "training.hooks=[kills.py:Dies]"]),
        ("two", []),
    ):
        folder = tmp_path_factory.mktemp(kind)
        (folder / "kills.py").write_text(KILLS.format(folder=str(folder)))
        yaml = write_yaml(folder, corpus, "r", edited)
        done = motet("train", str(yaml), *settings)
        for _ in range(2 * (kind == "killed")):
            assert done.returncode != 0, done.stdout
            done = motet("resume", str(folder / "runs/r"))
        assert done.returncode == 0, done.stdout + done.stderr
        found[kind] = folder / "runs/r"
    return found


def ended(run: Path) -> dict[str, Any]:
    (row,) = [row for row in rows(run, "event") if row["event"] == "stage_ended"]
    return row


def told(run: Path) -> dict[str, Any]:
    return {key: value for key, value in ended(run).items() if key not in ("time", "crc32")}


def test_a_stage_ends_by_its_loss_and_the_next_has_its_own_length(runs: dict[str, Path]) -> None:
    for run in runs.values():
        found = ended(run)
        assert (found["member"], found["by"], found["tokens"]) == ("small", "loss", 16 * STEP)
        assert found["fall"] + 2 * found["error"] < found["threshold"] == 0.9
        assert found["blocks"] == 8
        lr = {row["step"]: row["lr"] for row in rows(run, "step")}
        assert lr[4] == lr[10] == lr[16]  # held, where the end is not known
        assert lr[36] < 0.2 * lr[22]  # the last stage has the whole schedule
    for kind in ("one", "two"):  # the other one trained some steps twice
        trained = who_trained(runs[kind])
        assert sorted(trained) == list(range(8 * STEPS))
        who = [trained[8 * step] for step in (0, 15, 16, 18, 19, 35)]
        assert who == [("small",)] * 2 + [("middle",)] * 2 + [(None,)] * 2


def test_a_run_that_is_killed_decides_what_it_would_have(runs: dict[str, Path]) -> None:
    assert told(runs["killed"]) == told(runs["one"])
    assert losses(runs["killed"]) == losses(runs["one"])
    one, killed = (read_model(RunDir(runs[kind]), STEPS)[1] for kind in ("one", "killed"))
    for name, value in killed.items():
        assert torch.equal(value, one[name]), name
    starts = read_checkpoint(RunDir(runs["killed"]), STEPS)["stage"]["starts"]
    assert starts == [0, 16, 19]
    trend = read_checkpoint(RunDir(runs["killed"]), 12)["stage"]["trend"]
    assert (trend["number"], len(trend["blocks"])) == (0, 12)


def test_two_ranks_decide_as_one_process(runs: dict[str, Path]) -> None:
    assert losses(runs["two"]) == pytest.approx(losses(runs["one"]), abs=1e-4)
    assert ended(runs["two"])["fall"] == pytest.approx(ended(runs["one"])["fall"], abs=1e-3)


def test_audit_report_and_exports_know_where_stages_really_began(runs: dict[str, Path]) -> None:
    run = runs["killed"]
    done = motet_here("experiments", "audit", str(run), "--replay")
    assert done.returncode == 0, done.stdout
    assert "small on 128, middle on 24, the whole model on 136" in done.stdout
    done = motet_here("family", "divergence", str(run), "--json")
    assert done.returncode == 0, done.stderr
    pairs = json.loads(done.stdout)["pairs"]
    assert [(row["larger"], row["smaller"], row["steps"]) for row in pairs] == [
        ("middle", "small", [16, 19]),
        ("whole", "middle", [19, 36]),
    ]
    assert all(0 < row["interval"][0] < row["kl"] < row["interval"][1] for row in pairs)
    assert motet_here("report", str(run)).returncode == 0
    family = json.loads((run / "report.json").read_text())["family"]
    assert [row["start_step"] for row in family["lineage"]] == [0, 16, 19]
    assert [row["tokens"] for row in family["lineage"]] == [16 * STEP, 3 * STEP, 17 * STEP]
    assert family["lineage"][0]["ended"]["by"] == "loss"
    assert family["divergence"]["pairs"] == [{**row, "outdated": False} for row in pairs]
    page = (run / "report.html").read_text()
    assert "Stage small ended at step 16, because its loss fell by" in page
    assert "KL(larger || smaller)" in page
    assert motet_here("verify", str(run)).returncode == 0


def test_what_it_costs_is_told_as_a_range(runs: dict[str, Path]) -> None:
    done = motet_here("family", "show", str(runs["one"].parents[1] / "r.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [row["steps"] for row in facts["stages"]] == [30, 3, 3]
    assert [row["steps"] for row in facts["earliest"]["stages"]] == [16, 3, 17]
    assert facts["earliest"]["flops"] > facts["flops"]
