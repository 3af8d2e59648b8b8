"""Step, loss and speed from the last rows of a metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.launcher.follow.pace import pace_of, read_pace
from tests.launcher.followed import NOW, TOKENS_PER_STEP, make_run, step_rows, write_rows


def test_time_left_counts_the_probes_and_checkpoints_between_steps() -> None:
    rows = step_rows(range(1, 11), step_s=2.0) + step_rows(range(11, 21), end=NOW + 60, step_s=2.0)
    pace = pace_of(rows)
    elapsed_s = NOW + 60 - (NOW - 18)
    assert pace.step == 20
    assert pace.tokens_per_s == TOKENS_PER_STEP  # training alone
    assert pace.wall_tokens_per_s == pytest.approx(19 * TOKENS_PER_STEP / elapsed_s)
    left_s = pace.seconds_left(100 * TOKENS_PER_STEP)
    assert left_s == pytest.approx(80 * elapsed_s / 19)


def test_one_slow_step_does_not_change_the_tokens_per_second() -> None:
    rows = step_rows(range(1, 31))
    rows[-1]["tokens_per_s"] = 1.0
    assert pace_of(rows).tokens_per_s == TOKENS_PER_STEP


def test_steps_after_the_start_of_a_later_attempt_are_void() -> None:
    rows = [
        *step_rows(range(1, 31), end=NOW - 1000, loss=5.0),
        {"kind": "attempt", "step": 20, "start_step": 20, "time": NOW - 100},
    ]
    pace = pace_of(rows)
    assert (pace.step, pace.tokens) == (20, 20 * TOKENS_PER_STEP)
    again = pace_of(rows + step_rows([21, 22], step_s=4.0, loss=2.0))
    assert (again.step, again.loss) == (22, 2.0)
    assert again.step_s == pytest.approx(4.0)  # not over the gap between the attempts


def test_no_rows_tell_nothing() -> None:
    pace = pace_of([])
    assert pace.step is None
    assert pace.seconds_left(100) is None


def test_torn_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    write_rows(run, step_rows(range(1, 6)))
    write_rows(run, [], torn='[1]\n{"kind": "step"}\nnull\n{"kind":"step","step":7,"ti')
    assert read_pace(run.metrics, moving=True).step == 5


def test_a_step_is_found_behind_many_large_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    write_rows(run, step_rows(range(1, 6)))
    large = {"kind": "probe", "step": 5, "time": NOW, "experiments": "x" * 50_000}
    write_rows(run, [large] * 4)
    assert read_pace(run.metrics, moving=False).step == 5


def test_a_missing_file_tells_nothing(tmp_path: Path) -> None:
    assert read_pace(tmp_path / "metrics.jsonl", moving=True).step is None
