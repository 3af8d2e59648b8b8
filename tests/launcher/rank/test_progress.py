"""The progress of a run, on a terminal and in a log file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from motet.launcher.rank.progress import TrainingProgress


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=80), out


def test_without_a_terminal_there_is_one_line_per_interval_and_one_at_the_end() -> None:
    console, out = plain()
    clock = Clock()
    with TrainingProgress(100, console=console, interval_s=10.0, clock=clock) as progress:
        for step in range(1, 101):
            clock.now_s += 1.0
            progress.update(step, loss=2.0, tokens_per_s=12_300)
    lines = out.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "step 1/100  loss 2  12.3k tokens/s"
    assert lines[1] == "step 11/100  loss 2  12.3k tokens/s  1:29 left"
    assert lines[-1].startswith("step 100/100")


def test_time_left_follows_this_attempt_not_the_steps_of_earlier_ones() -> None:
    clock = Clock()
    progress = TrainingProgress(100, start_step=50, console=plain()[0], clock=clock)
    assert progress.seconds_left() is None
    for step in (51, 52, 53):
        clock.now_s += 2.0
        progress.update(step, loss=1.0, tokens_per_s=1.0)
    assert progress.seconds_left() == pytest.approx(2.0 * 47)


@pytest.mark.parametrize("first_s", [0.0, 1.0, 18.7, 600.0])
def test_time_left_is_right_from_the_third_step_however_long_the_first_took(
    first_s: float,
) -> None:
    clock = Clock()
    progress = TrainingProgress(100, console=plain()[0], clock=clock)
    clock.now_s = first_s
    for step in (1, 2, 3):
        progress.update(step, loss=1.0, tokens_per_s=1.0)
        assert (progress.seconds_left() is None) == (step < 3)
        clock.now_s += 0.9
    assert progress.seconds_left() == pytest.approx(0.9 * 97)


def test_probes_between_steps_count_in_the_time_left() -> None:
    clock = Clock()
    progress = TrainingProgress(1000, console=plain()[0], clock=clock)
    for step in range(1, 502):
        clock.now_s += 1.0 + (step % 100 == 0) * 50.0
        progress.update(step, loss=1.0, tokens_per_s=1.0)
    assert progress.seconds_left() == pytest.approx(1.5 * 499)


def test_a_rollback_restarts_the_estimate() -> None:
    clock = Clock()
    progress = TrainingProgress(100, console=plain()[0], clock=clock)
    clock.now_s = 10.0
    progress.update(10, loss=1.0, tokens_per_s=1.0)
    progress.update(5, loss=1.0, tokens_per_s=1.0)
    assert progress.seconds_left() is None


def test_other_ranks_say_nothing() -> None:
    console, out = plain()
    with TrainingProgress(1, rank=1, console=console) as progress, progress.phase("probing"):
        progress.update(1, loss=1.0, tokens_per_s=1.0)
        progress.print("hello")
    assert out.getvalue() == ""


def test_a_terminal_shows_step_loss_rate_and_phase() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with TrainingProgress(10, console=console) as progress:
        progress.update(3, loss=2.345678, tokens_per_s=4.5e6)
        with progress.phase("probing"):
            progress._bar.refresh()  # type: ignore[union-attr]
    text = out.getvalue()
    assert "3/10" in text
    assert "loss 2.346" in text
    assert "4.5M tokens/s" in text
    assert "probing" in text


def test_what_a_terminal_shows_is_kept_as_plain_lines(tmp_path: Path) -> None:
    clock = Clock()
    log = tmp_path / "logs" / "rank-0.log"
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with TrainingProgress(20, console=console, interval_s=10.0, clock=clock, log=log) as progress:
        for step in range(1, 21):
            clock.now_s += 1.0
            progress.update(step, loss=2.0, tokens_per_s=950)
        progress.print("saved")
        assert log.read_text().splitlines() == [  # while it trains, not only at the end
            "step 1/20  loss 2  950 tokens/s",
            "step 11/20  loss 2  950 tokens/s  0:09 left",
            "step 20/20  loss 2  950 tokens/s  0:00 left",
            "saved",
        ]
    progress.print("after the end")
    assert len(log.read_text().splitlines()) == 4


def test_without_a_terminal_and_on_other_ranks_no_file_is_made(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    with TrainingProgress(1, console=plain()[0], log=log) as progress:
        progress.update(1, loss=1.0, tokens_per_s=1.0)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    with TrainingProgress(1, rank=1, console=terminal, log=log) as progress:
        progress.update(1, loss=1.0, tokens_per_s=1.0)
    assert not log.exists()


def test_square_brackets_in_a_message_are_text() -> None:
    console, out = plain()
    TrainingProgress(1, console=console).print("[red]x[/red] [/]")
    assert out.getvalue() == "[red]x[/red] [/]\n"
