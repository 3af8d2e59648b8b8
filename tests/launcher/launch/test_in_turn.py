"""A run on one machine is launched again where its next stage has other ranks, and only there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.core.files import write_json
from motet.launcher.config.sections import LayoutSettings, RunSettings
from motet.launcher.launch import in_turn
from motet.launcher.launch.agent import CRASHED, FINISHED_OR_STOPPED, OTHER_RANKS, outcome
from motet.launcher.runs.rundir import RunDir


def launches(
    monkeypatch: pytest.MonkeyPatch, run: RunDir, ranks: list[int], codes: list[int]
) -> tuple[int, list[tuple[int, int, int]]]:
    """Exit code, and (attempt, ranks, stage) of every launch."""
    done: list[tuple[int, int, int]] = []

    def beginning(settings: RunSettings, run: RunDir) -> Any:
        layout = LayoutSettings(processes=ranks[len(done)])
        return SimpleNamespace(layout=layout), len(done)

    def start(attempt: int, *, own: RunSettings, stage: int | None) -> int:
        assert stage is not None
        done.append((attempt, own.layout.processes, stage))
        return codes[len(done) - 1]

    monkeypatch.setattr(in_turn, "beginning", beginning)
    return in_turn.in_turn(RunSettings(), run, start), done


def test_a_stage_of_other_ranks_is_launched_from_an_attempt_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    codes = [OTHER_RANKS, OTHER_RANKS, FINISHED_OR_STOPPED]
    code, done = launches(monkeypatch, RunDir(tmp_path), [1, 4, 2], codes)
    assert code == FINISHED_OR_STOPPED
    assert done == [(1, 1, 0), (2, 4, 1), (3, 2, 2)]


@pytest.mark.parametrize("code", [FINISHED_OR_STOPPED, CRASHED, 2])
def test_no_other_end_is_gone_on_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    assert launches(monkeypatch, RunDir(tmp_path), [1, 2], [code]) == (code, [(1, 1, 0)])


def test_ranks_that_would_end_again_are_not_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="motet resume"):
        launches(monkeypatch, RunDir(tmp_path), [1, 1], [OTHER_RANKS, 0])


@pytest.mark.parametrize(
    ("reason", "code", "found"),
    [("handed_over", 0, OTHER_RANKS), ("handed_over", 1, OTHER_RANKS), ("finished", 1, 0)],
)
def test_how_ranks_ended_says_what_comes_next(
    tmp_path: Path, reason: str, code: int, found: int
) -> None:
    run = RunDir(tmp_path)
    run.attempt(1).mkdir(parents=True)
    write_json(run.attempt(1) / "attempt.json", {"attempt": 1, "reason": reason})
    assert outcome(run, 1, code) == found
