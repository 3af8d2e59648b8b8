"""Runs as jobs of a real Slurm."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from motet.launcher.runs.job_files import read_jobs
from motet.slurm.testbed.bed import Testbed
from tests.slurm.jobs import environment, job, output, submit, until
from tests.system.conftest import corpus as corpus
from tests.system.runs import losses, motet, rows, write_yaml

pytestmark = pytest.mark.xdist_group("testbed")
GROUPS = "slurm.groups=[{nodes: 2, constraint: ib}, {nodes: 2, constraint: eth}]"
CANARY = "c4n4ry-5ecret"
EVERY_ALLOWED = "a Z0 ._/+,:=@%^~-"
WRAPPER = """#!/bin/bash
printf %s "$WANDB_API_KEY" | sha256sum > {folder}/wandb
printf %s "$NOTE" > {folder}/note
env | cut -d= -f1 > {folder}/names
exec "$@"
"""


def one_process(text: str) -> str:
    return text.replace("processes: 2", "processes: 1")


@pytest.fixture
def yaml(tmp_path: Path, corpus: Path) -> Path:
    return write_yaml(tmp_path, corpus, "r", one_process)


def test_a_heterogeneous_job_of_two_clusters_trains_as_the_local_run_does(
    healed: Testbed, yaml: Path, corpus: Path, tmp_path: Path
) -> None:
    local = write_yaml(tmp_path, corpus, "local")
    done = motet("train", str(local), "layout.processes=4", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run, job_id = submit(healed, yaml, GROUPS, "slurm.time=10")
    until(run.done.exists, run)
    until(lambda: job(healed, job_id).word == "COMPLETED", run)
    hosts = [(run.attempt(1) / f"pid-{rank}").read_text().split()[1] for rank in range(4)]
    assert hosts == ["n1", "n2", "n3", "n4"]
    found, expected = losses(run.root), losses(tmp_path / "runs" / "local")
    assert sorted(found) == list(range(1, 25))
    np.testing.assert_allclose(
        [found[step] for step in range(1, 25)], [expected[step] for step in range(1, 25)], rtol=1e-5
    )
    audit = motet("experiments", "audit", str(run.root), "--replay")
    assert audit.returncode == 0, audit.stdout


def test_a_run_in_a_folder_with_blanks_and_letters_of_any_script_finishes(
    healed: Testbed, tmp_path: Path, corpus: Path
) -> None:
    folder = tmp_path / "my runs é 二"
    folder.mkdir()
    run, job_id = submit(healed, write_yaml(folder, corpus, "r", one_process), "slurm.time=10")
    until(run.done.exists, run)
    until(lambda: job(healed, job_id).word == "COMPLETED", run)
    assert (run.root / "slurm" / f"output-{job_id}.txt").exists()


def test_a_preempted_run_saves_and_goes_on_where_it_was(healed: Testbed, yaml: Path) -> None:
    run, job_id = submit(
        healed,
        yaml,
        "slurm.time=10",
        "slurm.partition=low",
        "slurm.nodes=2",
        "slurm.constraint=ib",
        "training.steps=150",
        "probes.every=1.0",
        "checkpoint.every_steps=0",
    )
    until(lambda: any(row["step"] >= 20 for row in rows(run.root, "step")), run)
    urgent = ["--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null"]
    subprocess.run(
        ["sbatch", *urgent, "--wrap=sleep 1"],
        env=environment(healed),
        check=True,
        timeout=30,
        cwd=yaml.parent,
    )
    until(run.done.exists, run)
    first, second = (
        json.loads((run.attempt(number) / "attempt.json").read_text()) for number in (1, 2)
    )
    assert first["reason"] == "stopped"
    assert second["start_step"] == first["end_step"] >= 20
    assert sorted(losses(run.root)) == list(range(1, 151))
    assert len(rows(run.root, "step")) == 150, "no step was trained twice"
    assert "the job is requeued, for the 1. time" in output(run)
    until(lambda: job(healed, job_id).word == "COMPLETED", run)


def test_near_its_time_limit_a_job_saves_and_the_next_of_the_chain_goes_on(
    healed: Testbed, yaml: Path
) -> None:
    run, first = submit(
        healed,
        yaml,
        "slurm.time=10",
        "slurm.chain=2",
        "training.steps=60",
        "probes.every=1.0",
        "checkpoint.every_steps=0",
    )
    until(lambda: any(row["step"] >= 10 for row in rows(run.root, "step")), run)
    near_limit = ["scancel", "--batch", "--signal=USR1", first]
    subprocess.run(near_limit, env=environment(healed), check=True, timeout=30)
    until(run.done.exists, run)
    second = read_jobs(run)[1]["job_id"]
    until(lambda: job(healed, second).word == "COMPLETED", run)
    assert job(healed, first).word == "COMPLETED"
    assert "the next job of the chain goes on" in output(run)
    assert len(rows(run.root, "step")) == 60, "no step was trained twice"


def test_the_job_gets_what_is_named_and_no_file_holds_a_secret(
    healed: Testbed, yaml: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(WRAPPER.format(folder=seen))
    wrapper.chmod(0o700)
    secret = tmp_path / "token"
    secret.write_text(f"{CANARY}-file\n")
    secret.chmod(0o600)
    run, _ = submit(
        healed,
        yaml,
        "slurm.time=10",
        f"slurm.container=[{wrapper}]",
        f"slurm.environment=[WANDB_API_KEY, 'NOTE={EVERY_ALLOWED}']",
        f"slurm.secrets=[HF_TOKEN={secret}]",
        "metrics.wandb=offline",
        WANDB_API_KEY=CANARY,
        NOT_NAMED=CANARY,
    )
    until(run.done.exists, run)
    until(lambda: "the run is finished" in output(run), run)
    assert (seen / "wandb").read_text().split()[0] == hashlib.sha256(CANARY.encode()).hexdigest()
    assert (seen / "note").read_text() == EVERY_ALLOWED
    names = (seen / "names").read_text().split()
    assert "NOT_NAMED" not in names
    assert {"HOME", "PATH", "MOTET_ATTEMPT"} <= set(names)
    assert list((run.root / "wandb").rglob("*.wandb")), "W&B wrote something"
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
