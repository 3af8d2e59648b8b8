"""Everything that goes wrong on a cluster, on a real one: a run that is hit in the middle ends by
itself as if nothing had happened.

Every run here has two ranks, as has the undisturbed local run that its losses must equal bit by bit
(those of the array have one).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.launcher.runs.rundir import RunDir
from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import job_field, slurm
from tests.slurm.fault_runs import (
    HELPER,
    INTERVAL,
    RANK,
    SLOW_S,
    TORCHRUN,
    FaultRun,
    assert_as_undisturbed,
    bring_limit_near,
    preempt,
    steps_lost,
    write_run,
)
from tests.system.conftest import corpus as corpus
from tests.system.runs import motet

pytestmark = pytest.mark.xdist_group("testbed")
TWO_CLUSTERS = "slurm.groups=[{nodes: 1, constraint: ib}, {nodes: 1, constraint: eth}]"
CANARY = "c4n4ry-5ecret"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of two processes here, that nothing happened to."""
    yaml = write_run(tmp_path_factory.mktemp("undisturbed"), corpus, "r", processes=2)
    done = motet("train", str(yaml), cwd=yaml.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.parent / "runs" / "r"


def reasons(one: FaultRun) -> list[str]:
    """How the attempts ended."""
    return [str(found["reason"]) for found in one.attempts()]


def assert_hidden(run: RunDir, people: list[str]) -> None:
    """No file of the run and no process's arguments hold the secret."""
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert people
    assert [command for command in people if CANARY in command] == []


def test_a_preempted_heterogeneous_job_loses_no_step_and_tells_no_secret(
    healed: Testbed,
    corpus: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = tmp_path / "token"
    token.write_text(f"{CANARY}-file\n")
    token.chmod(0o600)
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-variable")
    named = ["slurm.environment=[WANDB_API_KEY]", f"slurm.secrets=[HF_TOKEN={token}]"]
    yaml = write_run(tmp_path, corpus, "r")
    one = FaultRun.submitted(healed, yaml, TWO_CLUSTERS, *named)
    one.until_step(12)
    people = [who.command for who in healed.inhabitants()]
    preempt(healed, tmp_path)
    one.until(lambda: one.trains_again(1), "it trains again")
    one.finish()
    assert reasons(one) == ["stopped", "finished"]
    assert one.steps_lost(2) == 0
    assert_as_undisturbed(one.run, undisturbed)
    assert_hidden(one.run, people)


def test_time_limit_requeue_and_a_restart_of_the_controller_lose_no_step(
    healed: Testbed, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    yaml = write_run(tmp_path, corpus, "r")
    one = FaultRun.submitted(healed, yaml, "slurm.nodes=2", "slurm.signal_s=30", pace_s=1.5)
    one.until_step(3)
    bring_limit_near(healed, one.job_id)
    one.until(lambda: job_field(healed, one.job_id, "Restarts") == "1", "it requeues itself")
    slurm(healed, "scontrol", "update", f"jobid={one.job_id}", "TimeLimit=10")
    one.pace(SLOW_S)
    one.until(lambda: one.trains_again(1), "it trains again")
    slurm(healed, "scontrol", "requeue", one.job_id)
    one.until(lambda: one.trains_again(2), "it trains once more")
    before = one.step()
    healed.restart_controller()
    one.until_step(before + 2)
    one.finish()
    assert reasons(one) == ["stopped", "stopped", "finished"]
    assert [one.steps_lost(attempt) for attempt in (2, 3)] == [0, 0]
    assert_as_undisturbed(one.run, undisturbed)


@pytest.mark.long  # Slurm holds a requeued job back for two minutes
def test_a_signal_to_the_batch_step_alone_saves_and_requeues_within_a_minute(
    healed: Testbed, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """It saved, and then the nodes waited a quarter of an hour for an end that nobody meant."""
    one = FaultRun.submitted(healed, write_run(tmp_path, corpus, "r"), "slurm.nodes=2")
    one.until_step(12)
    slurm(healed, "scancel", "--batch", "--signal=TERM", one.job_id)
    one.until(lambda: one.trains_again(1), "it trains again")
    one.finish()
    assert reasons(one) == ["stopped", "finished"]
    assert one.steps_lost(2) == 0
    (output,) = (one.run.root / "slurm").glob("output-*.txt")
    assert "only this script was told to end: the job is requeued" in output.read_text()
    assert_as_undisturbed(one.run, undisturbed)


@pytest.mark.long  # two minutes, nearly all of them waiting
def test_a_node_whose_cable_is_cut_costs_one_interval_at_most_and_cannot_hold_up_the_run(
    healed: Testbed, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    yaml = write_run(tmp_path, corpus, "r")
    one = FaultRun.submitted(healed, yaml, "slurm.nodes=2")
    one.until_step(15)
    head = one.people(HELPER)[0].host
    healed.cut(head)  # its ranks live on, and hold the run
    one.until(lambda: one.trains_again(1), "it trains again, elsewhere")
    assert head not in {who.host for who in one.people(RANK)}
    healed.mend(head)  # what is left of the old start there must not disturb the new one
    one.finish()
    assert reasons(one)[0] == "lost"
    assert reasons(one)[-1] == "finished"
    assert one.steps_lost(2) <= INTERVAL
    assert all(one.steps_lost(number) == 0 for number in range(3, len(one.attempts()) + 1))
    assert_as_undisturbed(one.run, undisturbed)
    left = {who.name for who in healed.heal()}
    assert left <= {"slurmstepd"}, "Slurm's own tries for a minute to tell how the old start ended"


@pytest.mark.long  # a minute and a half; a requeue alone is above
def test_an_array_of_three_seeds_ends_though_one_of_them_is_requeued(
    healed: Testbed, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    yaml = write_run(tmp_path, corpus, "r")
    done = FaultRun.submit(healed, yaml, "slurm.array=[3,4,5]")
    runs = [FaultRun(healed, tmp_path / "runs" / f"r-seed{n}", f"{done}_{n}") for n in (3, 4, 5)]
    for one in runs:
        one.until_step(12)
    slurm(healed, "scontrol", "requeue", runs[0].job_id)
    runs[0].until(lambda: runs[0].trains_again(1), "it trains again")
    runs[0].finish(*runs[1:])
    assert [reasons(one) for one in runs] == [["stopped", "finished"], ["finished"], ["finished"]]
    assert runs[0].steps_lost(2) == 0
    assert_as_undisturbed(runs[0].run, undisturbed, rtol=1e-6)  # of the same seed, on two ranks
    assert [steps_lost(one.run) for one in runs[1:]] == [0, 0]


@pytest.mark.long  # the next job of a chain: test_jobs
def test_a_chain_goes_on_where_the_time_limit_of_its_first_job_ended_it(
    healed: Testbed, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    yaml = write_run(tmp_path, corpus, "r")
    settings = ("slurm.nodes=2", "slurm.signal_s=30", "slurm.chain=3")
    one = FaultRun.submitted(healed, yaml, *settings, pace_s=1.5)
    one.until_step(3)
    bring_limit_near(healed, one.job_id)
    one.until(lambda: one.trains_again(1), "the second job trains")
    one.finish()
    assert reasons(one) == ["stopped", "finished"]
    assert one.steps_lost(2) == 0
    assert len(list(one.run.job_files.glob("output-*"))) == 3
    assert_as_undisturbed(one.run, undisturbed)


def test_kills_of_a_rank_of_torchrun_and_of_the_node_helper_are_survived(
    healed: Testbed, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    yaml = write_run(tmp_path, corpus, "r")
    one = FaultRun.submitted(healed, yaml, "slurm.nodes=2")
    for known, (words, node) in enumerate([(RANK, 1), (TORCHRUN, 0), (HELPER, 1)], start=1):
        one.until_step(one.step() + 3)
        one.kill(words, node)
        one.until(lambda known=known: one.trains_again(known), f"{words} is replaced")  # type: ignore[misc]
    one.finish()
    first, *_, last = one.attempts()
    assert (first["reason"], last["reason"]) == ("crashed", "finished")
    assert "rank 1 (" in first["culprit"]
    assert all(one.steps_lost(attempt) <= INTERVAL for attempt in (2, 3, 4))
    assert_as_undisturbed(one.run, undisturbed)
