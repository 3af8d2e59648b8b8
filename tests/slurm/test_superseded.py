"""A start of a job whose node Slurm could not hear, and took for lost: the job has begun anew
elsewhere, and the old start must give way.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

import pytest

from motet.core.errors import UserError
from motet.core.jobs import CurrentJob, JobExit
from motet.launcher.jobs import batch, node
from motet.launcher.launch.agent import run_agent
from motet.launcher.launch.holding import only_one
from motet.launcher.rank import attempt as rank_main
from motet.launcher.runs.attempts import facts_of
from motet.launcher.runs.rundir import RunDir
from tests.slurm.test_batch import JOB, attempt
from tests.slurm.test_batch import run as run

OLD = {"SLURM_JOB_ID": "12", "MOTET_ATTEMPT": "1"}


@pytest.fixture
def begun_anew(run: RunDir) -> RunDir:
    """The run of job 12, which has begun a second time."""
    batch.begin(run, JOB)
    attempt(run, 1, reason="running", start_step=0)
    batch.begin(run, CurrentJob("12", 1))
    attempt(run, 2, reason="running", start_step=0)
    return run


def test_only_an_older_start_of_the_same_job_is_superseded(begun_anew: RunDir) -> None:
    assert batch.superseded(begun_anew, JOB, batch.own_attempt(OLD))
    assert not batch.superseded(begun_anew, JOB, 2)
    assert not batch.superseded(begun_anew, CurrentJob("13"), 1)
    assert not batch.superseded(begun_anew, JOB, batch.own_attempt({}))


@pytest.mark.parametrize("asked", ["", "killed", "time"])
def test_the_end_of_an_old_start_neither_requeues_the_job_nor_touches_the_new_attempt(
    begun_anew: RunDir, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    for name, value in OLD.items():
        monkeypatch.setenv(name, value)
    assert batch.main(["end", str(begun_anew.root), "1", asked]) == JobExit.FINE
    assert facts_of(begun_anew.attempt(1))["reason"] == "lost"
    assert facts_of(begun_anew.attempt(2))["reason"] == "running"


def test_ranks_of_an_old_start_end_though_they_wait_for_a_lost_one(begun_anew: RunDir) -> None:
    forever = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    code = run_agent(
        forever,
        os.environ,
        begun_anew,
        1,
        first_node=False,
        superseded=lambda: batch.superseded(begun_anew, JOB, 1),
    )
    assert code != 0
    assert time.monotonic() - began < 20


def test_a_new_start_waits_until_the_old_one_has_let_go(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = contextlib.ExitStack()
    old.enter_context(only_one(run))
    timer = threading.Timer(0.5, old.close)
    timer.start()
    with contextlib.ExitStack() as stack:
        assert node._hold(run, stack) >= 0
        monkeypatch.setattr(node, "HOLD_WAIT_S", 0.1)
        with contextlib.ExitStack() as other, pytest.raises(UserError, match="already"):
            node._hold(run, other)
    timer.join()


@pytest.mark.parametrize(("reason", "kept"), [("stopped", "stopped"), ("crashed", "lost")])
def test_ranks_that_were_taken_for_lost_while_they_saved_say_so_themselves(
    begun_anew: RunDir, reason: str, kept: str
) -> None:
    assert facts_of(begun_anew.attempt(1))["reason"] == "lost"
    rank_main._amend(begun_anew, 1, end_step=7, reason=reason)
    facts = facts_of(begun_anew.attempt(1))
    assert facts["reason"] == kept
    assert facts.get("end_step") == (7 if kept == reason else None)
