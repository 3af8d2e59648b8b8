"""`motet status` and `motet cancel` on the records of a real Slurm."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from motet.core.files import write_json
from motet.launcher.commands import cancel
from motet.launcher.follow.overview import View, look
from motet.launcher.follow.stopping import actions
from motet.launcher.jobs.schedulers import Schedulers
from motet.launcher.jobs.slurm_scheduler import SlurmScheduler
from motet.launcher.runs.rundir import RunDir
from motet.slurm.testbed.bed import Testbed
from tests.launcher.followed import OneScheduler, add_attempt, add_jobs, make_run
from tests.slurm.bed_fixture import submit, wait_until

pytestmark = pytest.mark.xdist_group("testbed")
WAIT_S = 30.0
TRAINER = """\
cat > trainer.sh <<'END'
trap 'touch "$1/saved"; exit 0' USR1
touch "$1/began"
while true; do sleep 0.2; done
END
srun bash trainer.sh RUN
"""


@pytest.fixture
def bed(healed: Testbed) -> Schedulers:
    return OneScheduler(SlurmScheduler({**os.environ, **healed.environment()}))


def view_of(run: RunDir, bed: Schedulers) -> View:
    (view,), records = look([run], bed, time.time())
    assert records.problem == ""
    return view


def test_a_chain_is_followed_from_the_queue_to_its_cancelling(
    healed: Testbed, bed: Schedulers, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs", "r")
    text = f"cd {tmp_path}\n{TRAINER.replace('RUN', str(run.root))}"
    first = submit(healed, tmp_path, text, "--time=5")
    second = submit(healed, tmp_path, text, "--time=5", f"--dependency=afterany:{first}")
    add_jobs(run, first, second)
    wait_until((run.root / "began").exists, WAIT_S, "the job begins")
    assert view_of(run, bed).state.name == "starting"
    number = add_attempt(run)
    write_json(
        run.attempt(number) / "attempt.json",
        {
            "attempt": 1,
            "reason": "running",
            "segment": 1,
            "started": time.time() + 1,
            "ended": None,
        },
    )
    view, records = cancel._look(run, bed)
    assert view.state.name == "running"
    assert view.state.job is not None
    assert view.state.job.nodes.startswith("n")
    assert records.queue["slurm", second].reason == "Dependency"
    todo = actions(view, records, False, time.time())
    assert [(action.kind, action.jobs) for action in todo[1:]] == [
        ("end", (second,)),
        ("save", (first,)),
    ]
    cancel.carry_out(todo, view.facts, bed)
    wait_until((run.root / "saved").exists, WAIT_S, "the job saves")
    cancel.wait(run, bed, WAIT_S, say=False)
    assert not view_of(run, bed).state.active


def test_a_preempted_job_is_pending_with_its_reason_in_words(
    healed: Testbed, bed: Schedulers, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs", "r")
    rank = "trap 'scontrol requeue $SLURM_JOB_ID' TERM; while true; do sleep 0.1; done"
    whole = ("--nodes=4", "--exclusive")
    low = submit(healed, tmp_path, f'srun bash -c "{rank}"', "--partition=low", *whole)
    add_jobs(run, low)
    wait_until(lambda: view_of(run, bed).state.name == "starting", WAIT_S, "it starts")
    submit(healed, tmp_path, "sleep 60", "--partition=high", *whole)
    wait_until(lambda: view_of(run, bed).state.name == "pending", WAIT_S, "it is requeued")
    state = view_of(run, bed).state
    assert state.why.endswith(")")
    assert " " in state.why
    assert state.job is not None
    assert state.job.restarts == 1


def test_a_controller_that_is_down_costs_no_more_than_a_line(
    healed: Testbed, bed: Schedulers, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs", "r")
    add_attempt(run, "stopped")
    add_jobs(run, "1")
    healed.stop_controller()
    try:
        started_s = time.monotonic()
        (view,), records = look([run], bed, time.time())
        assert time.monotonic() - started_s < 20
        assert records.problem
        assert view.state.name == "stopped"
    finally:
        healed.restart_controller()
