"""Learning rates, signals and the guard of bad steps."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.launcher.config.sections import BadStepSettings, ScheduleSettings
from motet.launcher.rank import signals
from motet.launcher.rank.stop import STOP_SIGNALS, SpikeGuard, StopRequest
from motet.launcher.runs.lr_schedule import learning_rate
from motet.models.family.base import TrainingStage


@given(
    kind=st.sampled_from(["cosine", "wsd", "linear", "constant"]),
    steps=st.integers(20, 500),
    warmup=st.integers(0, 10),
    final=st.floats(0, 1),
)
def test_a_schedule_rises_to_its_peak_and_ends_at_its_floor(
    kind: str, steps: int, warmup: int, final: float
) -> None:
    schedule = ScheduleSettings(kind=kind, warmup_steps=warmup, final_lr_fraction=final)
    rates = [learning_rate(schedule, step, steps, 2.0) for step in range(steps)]
    assert max(rates) == pytest.approx(2.0)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warmup:]))
    assert rates[-1] == pytest.approx(2.0 if kind == "constant" else 2.0 * final)
    assert learning_rate(schedule, steps + 50, steps, 2.0) == pytest.approx(rates[-1])


def test_wsd_is_flat_until_its_decay_and_cosine_is_half_way_in_the_middle() -> None:
    wsd = ScheduleSettings(kind="wsd", warmup_steps=10, final_lr_fraction=0.0, decay_fraction=0.25)
    assert {learning_rate(wsd, step, 101, 1.0) for step in range(10, 75)} == {1.0}
    assert learning_rate(wsd, 88, 101, 1.0) == pytest.approx(0.48)
    cosine = ScheduleSettings(kind="cosine", warmup_steps=0, final_lr_fraction=0.0)
    assert learning_rate(cosine, 50, 101, 1.0) == pytest.approx(0.5)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_a_second_interrupt_is_not_held_back(
    number: signal.Signals,
) -> None:
    stop = StopRequest().listen()
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
    assert stop.reason == number.name
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("handlers")
def test_a_closed_terminal_stops_a_run_unless_it_was_told_to_ignore_that() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest().listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested(), "nohup"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reason == "SIGHUP"


def test_the_judge_refuses_what_is_not_finite() -> None:
    guard = SpikeGuard(BadStepSettings())
    assert guard(2.0, 1.0)
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        assert not guard(loss, norm)
        assert "not finite" in guard.why
    assert list(guard.losses) == [2.0]


def test_the_judge_refuses_a_spike_only_once_it_knows_the_window() -> None:
    guard = SpikeGuard(BadStepSettings(spike_sigma=6.0, window=16))
    assert guard(100.0, 1.0), "nothing is known yet"
    guard = SpikeGuard(BadStepSettings(spike_sigma=6.0, window=16))
    for step in range(16):
        assert guard(2.0 + 0.01 * (step % 3), 1.0)
    assert not guard(3.0, 1.0)
    assert "standard deviations" in guard.why
    assert guard(2.03, 1.0)
    lenient = SpikeGuard(BadStepSettings(spike_sigma=0.0, window=16))
    for _ in range(16):
        assert lenient(2.0, 1.0)
    assert lenient(50.0, 1.0)


def test_a_restored_judge_decides_as_the_one_that_went_on() -> None:
    settings = BadStepSettings(window=8, most=3)
    guard = SpikeGuard(settings)
    for step in range(8):
        guard(2.0 + 0.01 * step, 1.0)
    guard.too_many(5)
    other = SpikeGuard(settings)
    other.restore(guard.state())
    assert other.state() == guard.state()
    assert [guard(loss, 1.0) for loss in (2.1, 9.0)] == [other(loss, 1.0) for loss in (2.1, 9.0)]


def test_many_bad_steps_in_one_window_are_too_many() -> None:
    guard = SpikeGuard(BadStepSettings(window=10, most=3))
    assert [guard.too_many(step) for step in (1, 20, 25, 28, 60)] == [
        False,
        False,
        False,
        True,
        False,
    ]


def test_a_member_that_trains_seldom_at_a_higher_loss_is_no_spike() -> None:
    """5 % of the steps, 1 nat more; without windows of its own, 70 of 100 updates were refused."""
    guard = SpikeGuard(BadStepSettings())
    refused = {None: 0, "half": 0}
    noise = np.random.default_rng(0).normal(0.0, 0.05, 4000)
    for step in range(4000):
        member = "half" if step % 20 == 0 else None
        loss = 2.0 + float(noise[step]) + (1.0 if member else 0.0)
        refused[member] += not guard(loss, 1.0, {member: loss})
    assert refused == {None: 0, "half": 0}
    assert not guard(9.0, 1.0, {"half": 9.0}), "a real spike of the member is still one"
    assert "member half" in guard.why
    other = SpikeGuard(BadStepSettings())
    other.restore(guard.state())
    assert other.state() == guard.state()


def test_the_state_of_a_guard_without_members_is_as_it_always_was() -> None:
    guard = SpikeGuard(BadStepSettings())
    guard(2.0, 1.0)
    assert guard.state() == {"losses": [2.0], "bad_steps": []}
    guard.restore({"losses": [1.0], "bad_steps": [3]})
    assert guard.state() == {"losses": [1.0], "bad_steps": [3]}


def test_each_stage_of_a_run_has_the_schedule_for_itself() -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_steps=10)
    stage = TrainingStage(start_step=300, steps=100, lr_scale=0.5, warmup_steps=4)
    first, peak, last = (learning_rate(schedule, s, 1000, 1.0, stage) for s in (300, 304, 399))
    assert (first, peak) == (0.125, 0.5)
    assert last == pytest.approx(0.05)
    whole = [learning_rate(schedule, s, 1000, 1.0, TrainingStage(0, 1000)) for s in range(1000)]
    assert whole == [learning_rate(schedule, s, 1000, 1.0) for s in range(1000)]


@pytest.mark.parametrize(
    ("parents", "missed"),
    [([1, 1, 1, 1], True), ([1, 7, 7, 7], False), ([1, 1, 1, 7], False), ([7], False)],
)
def test_a_parent_that_is_dying_is_not_taken_for_one_that_lost_a_rank(
    parents: list[int], missed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed, it may still be the parent when its children are another's already."""
    monkeypatch.setattr(signals, "LOOK_S", 0.0)
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    lifeline = signals.Lifeline(tmp_path, ranks=2)
    seen = iter(parents)
    monkeypatch.setattr(signals.os, "getppid", lambda: next(seen))
    monkeypatch.setattr(signals, "ranks_of", lambda pid: [])
    assert lifeline._misses_a_rank() == missed
