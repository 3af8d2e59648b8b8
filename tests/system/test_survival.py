"""Kills, stops and resumes: the same tokens, the same losses, every exposure once."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from motet.core.files import read_json
from tests.system.runs import kill_rank, losses, motet, motet_here, rows, train_until, write_yaml


def audit(run: Path) -> str:
    done = motet_here("experiments", "audit", str(run), "--replay")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_uninterrupted_run_passes_its_audit(whole_run: Path) -> None:
    text = audit(whole_run)
    assert "missing 0, repeated 0, unplanned 0" in text
    assert "recomputed the tokens of 48 records" in text
    assert (whole_run / "DONE").read_text().strip() == "24"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run that lost a rank to kill -9 after its second checkpoint, and was not to be
    restarted.
    """
    yaml = write_yaml(tmp_path_factory.mktemp("killed"), corpus, "whole")
    process, run = train_until(yaml, 15, "training.max_restarts=0")
    kill_rank(run, 1, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "motet resume" in output
    assert "motet: rank 1 (process" in output
    return run


@pytest.mark.xdist_group("killed")  # one run for all
@pytest.mark.parametrize("processes", [2, 1, 4])
def test_after_kill_9_a_run_resumes_on_any_number_of_ranks(
    killed: Path, whole_run: Path, tmp_path: Path, processes: int
) -> None:
    run = tmp_path / "whole"
    shutil.copytree(killed, run)
    done = motet("resume", str(run), f"layout.processes={processes}")
    assert done.returncode == 0, done.stdout + done.stderr
    text = audit(run)
    assert f"ranks 2 -> {processes}" in text
    assert "missing 0, repeated 0, unplanned 0" in text
    found, expected = losses(run), losses(whole_run)
    assert sorted(found) == list(range(1, 25))
    if processes == 2:
        assert found == expected, "bit-exact at the same world size"
    np.testing.assert_allclose(
        [found[step] for step in range(1, 25)], [expected[step] for step in range(1, 25)], rtol=1e-5
    )


def test_ctrl_c_saves_and_a_longer_run_goes_on_without_moving_an_exposure(
    corpus: Path, whole_run: Path, tmp_path: Path
) -> None:
    yaml = write_yaml(tmp_path, corpus, "whole")
    process, run = train_until(yaml, 8)
    for rank in (0, 1):  # the run must not end before the second command looks
        kill_rank(run, rank, signal.SIGSTOP)
    second = motet("resume", str(run))
    assert second.returncode == 2
    assert "is being trained already" in second.stderr
    process.send_signal(signal.SIGINT)
    for rank in (0, 1):
        kill_rank(run, rank, signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    plan = (run / "plan" / "exposures.plan").read_bytes()
    assert plan == (whole_run / "plan" / "exposures.plan").read_bytes()
    done = motet("resume", str(run), "training.steps=30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "DONE").read_text().strip() == "30"
    assert (run / "plan" / "exposures.plan").read_bytes() == plan
    audit(run)
    again = motet("resume", str(run))
    assert again.returncode == 0
    assert "is finished" in again.stdout


def test_bad_steps_are_left_out_or_rolled_back_and_the_ledger_knows(
    corpus: Path, tmp_path: Path
) -> None:
    settings = [
        "training.bad_steps.spike_sigma=0.3",
        "training.bad_steps.window=8",
        "training.bad_steps.most=1000",
    ]
    for policy in ("skip", "rollback"):
        yaml = write_yaml(tmp_path, corpus, policy)
        constant = [
            "training.schedule.kind=constant",
            "training.optimizer.lr=1e-6",
            "training.steps=24",
        ]
        ranks = 2 if policy == "rollback" else 1
        extra = [*settings, *constant, f"training.bad_steps.policy={policy}"]
        extra += [f"layout.processes={ranks}"]
        done = motet("train", str(yaml), *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        run = tmp_path / "runs" / policy
        events = [row["event"] for row in rows(run, "event")]
        assert "bad_step" in events
        assert ("rollback" in events) == (policy == "rollback")
        assert "steps left their update out" in audit(run)
    stopping = write_yaml(tmp_path, corpus, "stopping")
    stop = ["training.bad_steps.policy=stop", "layout.processes=1"]
    done = motet("train", str(stopping), *settings, *constant, *stop, cwd=tmp_path)
    assert done.returncode != 0
    assert "gives up here" in done.stderr
    facts = read_json(tmp_path / "runs" / "stopping" / "attempts" / "1" / "attempt.json")
    assert (facts["reason"], facts["end_step"] > 0, bool(facts["ended"])) == ("refused", True, True)
    told = motet_here("status", str(tmp_path / "runs" / "stopping")).stdout
    assert "gives up here" in " ".join(told.split())
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_a_run_whose_plan_or_corpus_was_altered_stops_with_the_reason(
    whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "whole"
    shutil.copytree(whole_run, run)
    path = run / "plan" / "exposures.plan"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))
    done = motet_here("resume", str(run), "training.steps=26")
    assert done.returncode == 2
    assert "plan/exposures.plan was altered since it was frozen" in done.stderr
    path.unlink()
    done = motet_here("resume", str(run), "training.steps=26")
    assert done.returncode == 2
    assert "plan cannot be understood" in done.stderr
    assert str(path) in done.stderr
