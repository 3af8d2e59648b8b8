from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from motet.core.files import atomic_write, read_json, write_json
from motet.core.jobs import CurrentJob, JobExit
from motet.launcher.jobs import batch
from motet.launcher.jobs.batch import Ending, verdict
from motet.launcher.runs.rundir import RunDir
from motet.slurm.job import current_job

FINE, FAILED, REQUEUE, HOLD = JobExit.FINE, JobExit.FAILED, JobExit.REQUEUE, JobExit.HOLD
JOB = CurrentJob("12")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 40 steps that was submitted as job 12."""
    run = RunDir(tmp_path / "r")
    run.create()
    settings = "training: {steps: 40, schedule: {warmup_steps: 1}}\nslurm: {max_requeues: 3}"
    run.resolved_yaml.write_text(f"name: r\ndata: {{corpora: [{{path: /c}}]}}\n{settings}\n")
    write_json(run.manifest, {})
    write_json(run.job_command, {"since_attempt": 1})
    write_json(run.jobs_json, [{"job_id": "12"}])
    return run


def save(run: RunDir, step: int) -> None:
    run.checkpoint(step).mkdir(parents=True)


def attempt(run: RunDir, number: int, **facts: Any) -> None:
    write_json(run.attempt(number) / "attempt.json", {"attempt": number, **facts})


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        (Ending(finished=True, code=1), FINE, "finished"),
        (Ending(refusal="no such corpus", code=2), FAILED, "no such corpus"),
        (Ending(cancelled=True), FINE, "cancelled"),
        (Ending(), REQUEUE, "requeued, for the 1. time"),
        (Ending(code=143, progressed=False), REQUEUE, "stopped"),
        (Ending(code=138, asked="time"), REQUEUE, "stopped"),
        (Ending(code=138, progressed=False, asked="time"), FAILED, "raise slurm.time"),
        (Ending(progressed=False, asked="time", followed=True), FAILED, "raise slurm.time"),
        (Ending(asked="killed"), HOLD, "Slurm is ending this job"),
        (Ending(asked="killed", cancelled=True), FINE, "cancelled"),
        (Ending(asked="time", followed=True), FINE, "next job of the chain"),
        (Ending(followed=True), REQUEUE, "requeued"),
        (Ending(code=1), REQUEUE, "after a checkpoint"),
        (Ending(code=1, progressed=False), FAILED, "no checkpoint since the job began"),
        (Ending(code=137, progressed=False, asked="time"), FAILED, "no checkpoint"),
        (Ending(requeue="site"), HOLD, "waiting for the site"),
        (Ending(requeue="site", code=1), FAILED, "requeue=site"),
        (Ending(requeue="site", asked="time"), FINE, "requeue=site"),
        (Ending(requeue="never"), FINE, "requeue=never"),
        (Ending(requeue="never", code=1), FAILED, "requeue=never"),
        (Ending(restarts=20), FAILED, "slurm.max_requeues=20"),
        (Ending(restarts=20, finished=True), FINE, "finished"),
    ],
)
def test_what_becomes_of_a_job_follows_from_how_its_step_ended(
    ending: Ending, code: int, words: str
) -> None:
    found, why = verdict(ending)
    assert found == code
    assert words in why


def test_a_job_claims_an_attempt_and_notes_where_the_run_stood(run: RunDir) -> None:
    save(run, 10)
    code, number, message = batch.begin(run, JOB)
    assert (code, number) == (FINE, 1)
    assert "goes on from step 10" in message
    begun = read_json(run.job_begun)
    assert begun == {"job_id": "12", "restarts": 0, "attempt": 1, "step": 10}
    assert batch.begin(run, CurrentJob("12", 2))[1] == 2
    assert json.loads(run.job_begun.read_text())["restarts"] == 2


def test_a_requeued_job_of_a_finished_or_cancelled_run_ends_at_once(run: RunDir) -> None:
    atomic_write(run.done, "40\n")
    assert batch.begin(run, JOB)[:2] == (FINE, 0)
    atomic_write(run.done, "39\n")  # the run was made longer
    assert batch.begin(run, JOB)[:2] == (FINE, 1)
    run.cancelled.touch()
    assert batch.begin(run, JOB)[:2] == (FINE, 0)


def test_requeues_are_bounded(run: RunDir) -> None:
    assert batch.begin(run, CurrentJob("12", 3))[0] == FINE
    assert batch.begin(run, CurrentJob("13"))[0] == FINE, "another job starts anew"
    found = [batch.begin(run, CurrentJob("13")) for _ in range(4)]  # Slurm does not count
    assert [code for code, _, _ in found] == [FINE, FINE, FINE, FAILED]
    assert "slurm.max_requeues=3" in found[-1][2]


def test_two_crashes_from_one_step_are_a_loop_until_a_person_submits_again(run: RunDir) -> None:
    for number in (1, 2):
        attempt(run, number, reason="crashed", start_step=0, culprit="rank 1 failed: boom")
    code, number, message = batch.begin(run, JOB)
    assert (code, number) == (FAILED, 0)
    assert "boom" in message
    write_json(run.job_command, {"since_attempt": 3})
    assert batch.begin(run, JOB)[:2] == (FINE, 3)


def test_attempts_that_were_lost_with_their_node_are_no_crash_loop(run: RunDir) -> None:
    for number in (1, 2):
        attempt(run, number, reason="running", start_step=0)
    assert batch.begin(run, JOB)[:2] == (FINE, 3)
    facts = json.loads((run.attempt(1) / "attempt.json").read_text())
    assert facts["reason"] == "lost"


def test_the_end_reads_progress_refusal_and_chain_from_the_folder(run: RunDir) -> None:
    write_json(run.jobs_json, [{"job_id": "12"}, {"job_id": "13"}])
    batch.begin(run, JOB)
    first = batch.ending_of(run, 1, "", JOB, 1)
    assert first == Ending(code=1, progressed=False, most_restarts=3, followed=True)
    save(run, 5)
    atomic_write(run.attempt(1) / "error.txt", "bad run\n")
    second = batch.ending_of(run, 1, "time", CurrentJob("13"), 1)
    assert second == Ending(code=1, asked="time", most_restarts=3, refusal="bad run")


def test_an_error_of_an_earlier_job_is_not_this_ones(run: RunDir) -> None:
    atomic_write(run.attempt(1) / "error.txt", "bad run\n")
    assert batch.begin(run, JOB)[1] == 2
    assert batch.ending_of(run, 0, "", JOB, 2).refusal == ""


@pytest.mark.parametrize(
    ("environment", "job_id"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ({"SLURM_JOB_ID": "12", "SLURM_HET_JOB_ID": "12"}, "12"),
    ],
)
def test_a_job_knows_its_id(environment: dict[str, str], job_id: str) -> None:
    assert current_job(environment) == CurrentJob(job_id)


@pytest.mark.parametrize(("asked", "reason"), [("killed", "lost"), ("", "crashed")])
def test_ranks_that_fail_while_slurm_ends_their_job_are_no_crash(
    run: RunDir, asked: str, reason: str
) -> None:
    batch.begin(run, JOB)
    attempt(run, 1, reason="crashed", start_step=0)
    batch.main(["end", str(run.root), "1", asked])
    assert json.loads((run.attempt(1) / "attempt.json").read_text())["reason"] == reason


def test_main_prints_the_attempt_alone_and_says_the_rest_aside(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert batch.main(["begin", str(run.root)]) == FINE
    out, err = capsys.readouterr()
    assert out == "1\n"
    assert "job 12, attempt 1" in err
    assert batch.main(["end", str(run.root), "0", ""]) == REQUEUE
    shutil.rmtree(run.root)
    assert batch.main(["begin", str(run.root)]) == FAILED
    assert "does not exist" in capsys.readouterr().err
