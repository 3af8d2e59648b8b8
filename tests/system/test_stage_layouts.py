"""A family whose stages have layouts and ranks of their own: killed at their seams, in every
parallelism, and changed when the run goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.launcher.commands.export import read_model
from motet.launcher.runs.rundir import RunDir
from tests.system.runs import losses, motet, motet_here, rows, who_trained
from tests.system.test_progressive import KILLS, STAGES, STEPS, write

pytestmark = pytest.mark.xdist_group("stage_layouts")  # its runs are made once

FEWER = [f"{STAGES}.0.layout={{processes: 1}}", f"{STAGES}.1.layout={{pp: 2}}"]
BEFORE = """
from motet.launcher.rank.job import TrainingJob

kept = lambda self, aside, final: final.name == "step-00000008"
leaves = lambda self, moment, step, **facts: facts.get("reason") == "handed_over"
before(Checkpoints, "_rename", -2, kept)
before(TrainingJob, "at", -1, leaves)
"""
"""Where a run is killed before its next stage's ranks start: as its last checkpoint gets its name,
and as the ranks end.
"""
SAVED = "checkpoint.async=false"
"""A checkpoint is there when ranks end, wherever that is."""
MINE = 'number == passed and os.environ["RANK"] == "0"'


def kills(folder: Path, tensors: tuple[int, ...]) -> None:
    """Write a hook that kills the first rank at every point between two stages, in their order."""
    text = KILLS.format(folder=str(folder / "died"), tensors=tensors)
    text = text.replace("    if number == passed:", f"    number += 2\n    if {MINE}:")
    (folder / "kills.py").write_text(text.replace("\nclass Dies", f"{BEFORE}\n\nclass Dies"))


def same_as(run: Path, other: Path) -> None:
    """Hold a run to another one, bit for bit, and to its plan."""
    assert losses(run) == losses(other)
    expected = read_model(RunDir(other), STEPS)[1]
    for name, value in read_model(RunDir(run), STEPS)[1].items():
        assert torch.equal(value, expected[name]), name
    done = motet_here("experiments", "audit", str(run), "--replay")
    assert done.returncode == 0, done.stdout
    assert motet_here("verify", str(run)).returncode == 0


def reasons(run: Path) -> list[tuple[str, int]]:
    """How each attempt ended, and its ranks."""
    folders = sorted((run / "attempts").iterdir(), key=lambda path: int(path.name))
    found = [json.loads((folder / "attempt.json").read_text()) for folder in folders]
    return [(one["reason"], one["world_size"]) for one in found]


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """One rank, then two as a pipeline, then two with FSDP2."""
    folder = tmp_path_factory.mktemp("fewer")
    done = motet("train", str(write(folder, corpus)), *FEWER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a stage is over; other processes go on from the checkpoint after step 8" in done.stdout
    assert reasons(folder / "runs/r") == [("handed_over", 1), ("finished", 2)]
    return folder / "runs/r"


@pytest.mark.long
def test_a_run_killed_at_every_point_between_stages_of_other_ranks_ends_with_the_same_bits(
    fewer: Path, tmp_path: Path, corpus: Path
) -> None:
    tensors = tuple(range(14))
    yaml, run = write(tmp_path, corpus), tmp_path / "runs/r"
    kills(tmp_path, tensors)
    settings = ["training.max_restarts=0", "training.hooks=[kills.py:Dies]", SAVED]
    done = motet("train", str(yaml), *FEWER, *settings)
    for number in range(2 + len(tensors) + 4):
        assert done.returncode != 0, done.stdout
        assert len(list((tmp_path / "died").iterdir())) == number + 1, done.stdout
        assert RunDir(run).checkpoint_steps()[-1] == (8 if number else 6)
        there = number == 2 + len(tensors) + 3
        assert RunDir(run).grown_steps() == ([8] if there else [])
        done = motet("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    same_as(run, fewer)


@pytest.mark.long
def test_ranks_that_are_started_anew_past_the_end_of_their_stage_leave_it_to_others(
    fewer: Path, tmp_path: Path, corpus: Path
) -> None:
    """torchrun starts them again after a crash, as many as before; it is no failure of the run."""
    yaml, run = write(tmp_path, corpus), tmp_path / "runs/r"
    kills(tmp_path, ())
    (tmp_path / "died" / "0").touch()  # not at the first point, nor behind the second
    text = (tmp_path / "kills.py").read_text()
    (tmp_path / "kills.py").write_text(text.replace("== passed", "== passed == 1"))
    hooks = "training.hooks=[kills.py:Dies]"
    done = motet("train", str(yaml), *FEWER, hooks, "training.max_restarts=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert reasons(run) == [("crashed", 1), ("handed_over", 1), ("finished", 2)]
    same_as(run, fewer)


@pytest.mark.long
def test_a_stage_whose_last_checkpoint_is_damaged_is_trained_again_by_its_own_ranks(
    fewer: Path, tmp_path: Path, corpus: Path
) -> None:
    yaml, run = write(tmp_path, corpus), tmp_path / "runs/r"
    kills(tmp_path, ())
    (tmp_path / "died" / "0").touch()
    settings = ["training.max_restarts=0", "training.hooks=[kills.py:Dies]", SAVED]
    done = motet("train", str(yaml), *FEWER, *settings)
    assert done.returncode != 0, done.stdout
    assert RunDir(run).checkpoint_steps() == [6, 8]
    (broken,) = RunDir(run).checkpoint(8).glob("*.distcp")
    broken.write_bytes(broken.read_bytes()[:-1])
    for left in range(2, 6):  # no point behind is one to die at
        (tmp_path / "died" / str(left)).touch()
    done = motet("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    # Two ranks find that step 8 cannot be read, and that step 6 is one rank's.
    ends = [("crashed", 1), ("handed_over", 2), ("handed_over", 1), ("finished", 2)]
    assert reasons(run) == ends
    same_as(run, fewer)


@pytest.mark.long
def test_every_parallelism_hands_over_to_every_other(
    fewer: Path, tmp_path: Path, corpus: Path
) -> None:
    """In place, on two ranks: replicas, tensors, sequences, and a layout that another attempt has
    otherwise.
    """
    more = ["model.n_kv_heads=4", "model.d_model=64", "model.n_heads=4"]
    plain = training(tmp_path / "plain", corpus, "layout.processes=1", *more)
    asked = [
        ["layout.tp=2", f"{STAGES}.0.layout={{tp: 1, dp_replicate: 2}}"],
        ["layout.cp=2", f"{STAGES}.0.layout={{cp: 1, tp: 2}}", f"{STAGES}.1.layout.cp=1"],
        [f"{STAGES}.0.layout={{cp: 2}}", f"{STAGES}.1.layout={{processes: 1}}"],
    ]
    for number, layouts in enumerate(asked):
        run = training(tmp_path / str(number), corpus, *layouts, *more)
        assert losses(run) == pytest.approx(losses(plain), abs=1e-4)
        expected = read_model(RunDir(plain), STEPS)[1]
        for name, value in read_model(RunDir(run), STEPS)[1].items():
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)
        grown = [row for row in rows(run, "event") if row["event"] == "grown"]
        assert [row["step"] for row in grown] == [8, 15]
        assert grown[0]["largest"] <= 1e-5
        assert sorted(who_trained(run)) == list(range(8 * STEPS))
        assert motet_here("experiments", "audit", str(run), "--replay").returncode == 0


def training(folder: Path, corpus: Path, *asked: str) -> Path:
    folder.mkdir()
    done = motet("train", str(write(folder, corpus)), *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/r"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"tp": 4}, "family.options.stages[0].layout.processes: stage tiny: 2 ranks"),
        ({"engine": "deepspeed"}, "stages[0].layout.engine: is the same for all stages"),
        ({"processes": 2, "dp_replicates": 2}, "did you mean 'dp_replicate'"),
    ],
)
def test_a_stage_whose_layout_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, corpus: Path, asked: dict[str, Any], why: str
) -> None:
    yaml = write(tmp_path, corpus)
    for command in (["train"], ["train", "--dry-run"], ["submit", "--dry-run"]):
        done = motet_here(*command, str(yaml), f"{STAGES}.0.layout={json.dumps(asked)}")
        assert done.returncode == 2, done.stdout
        assert why in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_job_that_would_need_other_ranks_between_stages_is_refused(
    tmp_path: Path, corpus: Path
) -> None:
    done = motet_here("submit", str(write(tmp_path, corpus)), "--dry-run", *FEWER)
    assert done.returncode == 2, done.stdout
    assert "stages[0].layout.processes: is 1, and the run's 2: in a job" in done.stderr
