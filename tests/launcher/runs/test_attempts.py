"""Who claims an attempt, how attempts ended, and which of them make a crash loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from motet.core.files import atomic_write, write_json
from motet.launcher.runs import attempts
from motet.launcher.runs.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r")
    run.create()
    return run


def ended(run: RunDir, number: int, reason: str, start: int = 0, **facts: Any) -> None:
    made = {"attempt": number, "start_step": start, "reason": reason, "ended": 1.0, **facts}
    write_json(run.attempt(number) / "attempt.json", made)


def test_the_first_ranks_take_the_attempt_of_the_launcher_and_a_restart_makes_the_next(
    run: RunDir,
) -> None:
    launch = run.next_attempt()
    assert attempts.claim(run, launch, 2) == 1
    assert attempts.facts_of(run.attempt(1))["reason"] == "running"
    assert attempts.claim(run, launch, 2) == 2
    assert attempts.facts_of(run.attempt(1))["reason"] == "crashed"


def test_an_attempt_that_was_left_running_by_an_earlier_launch_was_lost_with_its_machine(
    run: RunDir,
) -> None:
    attempts.claim(run, run.next_attempt(), 2)
    attempts.claim(run, run.next_attempt(), 2)
    assert attempts.facts_of(run.attempt(1))["reason"] == "lost"


def test_a_stop_before_training_is_no_crash(run: RunDir) -> None:
    launch = run.next_attempt()
    attempts.claim(run, launch, 2)
    atomic_write(run.attempt(launch) / "stop", "")
    attempts.settle(run, launch)
    assert attempts.facts_of(run.attempt(1))["reason"] == "stopped"


def test_ranks_that_crash_on_one_that_gave_up_end_a_refused_attempt(run: RunDir) -> None:
    """A full disk of one node: its rank leaves the reason, and rank 0 only sees that it is gone."""
    ended(run, 1, "crashed")
    atomic_write(run.attempt(1) / "error.txt", "No space left on device\n")
    attempts.settle(run, 1)
    assert attempts.facts_of(run.attempt(1))["reason"] == "refused"


def test_the_culprit_of_a_crash_is_written_down(run: RunDir) -> None:
    launch = run.next_attempt()
    attempts.claim(run, launch, 1)
    atomic_write(run.attempt(1) / "crash-1.txt", "Traceback\nValueError: no such thing\n")
    attempts.settle(run, launch)
    told = attempts.facts_of(run.attempt(1))["culprit"]
    assert told == "rank 1 failed: ValueError: no such thing (crash-1.txt)"


def test_two_crashes_that_began_at_one_step_are_a_loop(run: RunDir) -> None:
    ended(run, 1, "crashed")
    assert attempts.crash_loop(run) is None
    ended(run, 2, "crashed", culprit="rank 1 failed: RuntimeError: poison (crash-1.txt)")
    told = attempts.crash_loop(run)
    assert told is not None
    assert "attempts 1 and 2 both started from step 0" in told
    assert "RuntimeError: poison" in told


def test_progress_between_two_crashes_is_no_loop(run: RunDir) -> None:
    ended(run, 1, "crashed", 0)
    ended(run, 2, "crashed", 0)
    run.checkpoint(6).mkdir()
    assert attempts.crash_loop(run) is None, "the second left a checkpoint"
    ended(run, 3, "crashed", 6)
    assert attempts.crash_loop(run) is None


@pytest.mark.parametrize("reason", ["stopped", "lost", "running", "finished"])
def test_an_attempt_that_was_stopped_or_lost_does_not_count_as_a_crash(
    run: RunDir, reason: str
) -> None:
    ended(run, 1, "crashed")
    ended(run, 2, reason)
    assert attempts.crash_loop(run) is None


def test_a_person_who_resumes_begins_to_count_anew(run: RunDir) -> None:
    ended(run, 1, "crashed")
    ended(run, 2, "crashed")
    run.attempt(3).mkdir()
    assert attempts.crash_loop(run, before=3)
    assert attempts.crash_loop(run, since=3, before=3) is None


def test_a_refusal_counts_for_its_own_launch_only(run: RunDir) -> None:
    atomic_write(run.attempt(1) / "error.txt", "no\n")
    run.attempt(2).mkdir()
    assert attempts.refusal(run, 1) == run.attempt(1) / "error.txt"
    assert attempts.refusal(run, 2) is None


def test_ranks_that_were_started_by_hand_take_the_newest_folder_unless_it_was_taken(
    run: RunDir,
) -> None:
    assert attempts.launch_attempt(run, None) == 1
    run.attempt(4).mkdir()
    assert attempts.launch_attempt(run, None) == 4
    attempts.claim(run, 4, 1)
    assert attempts.launch_attempt(run, None) == 5
    assert attempts.launch_attempt(run, "2") == 2
