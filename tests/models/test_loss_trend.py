"""The slope of a training loss, and stages that it ends."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.launcher.config.sections import ScheduleSettings
from motet.launcher.runs.lr_schedule import learning_rate
from motet.models.family.loss_trend import LossTrend
from tests.models.test_progressive import LENGTH, SEQUENCES, STACK, family, told

STEP = SEQUENCES * LENGTH
UNTIL = {"loss_fall": 0.1, "least_tokens": 32 * STEP, "most_tokens": 200 * STEP}
OPEN = {"name": "small", "depth": 0.5, "until": UNTIL}
MIDDLE = {"name": "middle", "depth": 0.5, "steps": 50, "operator": "hypercloning"}


def followed(losses: Any, block_steps: int = 1) -> LossTrend:
    trend = LossTrend(block_steps)
    for step, loss in enumerate(losses):
        trend.add((step + 1) * STEP, loss)
    return trend


def test_the_slope_of_a_power_law_is_that_of_the_formula() -> None:
    """L = E + A D^-a has -dL / d ln D = a A D^-a, which the line meets inside its window."""
    scale, power, steps = 20.0, 0.3, 4000
    found = followed(2.0 + scale * ((s + 1) * STEP) ** -power for s in range(steps)).slope()
    assert found is not None
    ends = [power * scale * (share * steps * STEP) ** -power for share in (1.0, 0.5)]
    assert ends[0] < found.fall < ends[1]
    assert found.error < 0.01 * found.fall
    assert 8 <= found.blocks <= 64


def test_the_line_is_that_of_least_squares() -> None:
    rng = random.Random(1)
    losses = [4 - 0.2 * math.log(step + 1) + rng.gauss(0, 0.1) for step in range(40)]
    found = followed(losses).slope()
    half = np.arange(21, 41)
    (slope, _), covariance = np.polyfit(np.log(half * STEP), losses[20:], 1, cov=True)
    assert found is not None
    assert found.fall == pytest.approx(-slope)
    assert found.error == pytest.approx(covariance[0, 0] ** 0.5)


def test_noise_ends_no_stage_and_a_flat_loss_does() -> None:
    """A fall that chance hides counts as no small one."""
    rng = random.Random(0)
    noisy = followed(3 + rng.gauss(0, 1) for _ in range(32)).slope()
    flat = followed(3 + 1e-3 * rng.gauss(0, 1) for _ in range(32)).slope()
    assert noisy is not None
    assert flat is not None
    assert not noisy.below(0.1)
    assert flat.below(0.1)


@given(st.integers(1, 700), st.integers(1, 3), st.integers(0, 40))
def test_a_trend_goes_on_from_what_a_checkpoint_keeps(steps: int, block: int, more: int) -> None:
    losses = [3 + math.sin(step) for step in range(steps + more)]
    losses[steps // 2] = math.nan  # left out, and still a step of its block
    whole = followed(losses, block)
    kept = json.loads(json.dumps(followed(losses[:steps], block).state()))
    again = LossTrend.restored(kept)
    for step in range(steps, steps + more):
        again.add((step + 1) * STEP, losses[step])
    assert again.state() == whole.state()
    assert again.slope() == whole.slope()
    assert len(whole.blocks) < 64


def test_where_stages_begin_is_known_once_the_loss_has_ended_those_before() -> None:
    found = family({**OPEN, "width": 0.5}, MIDDLE, STACK)
    assert found.problems(400) == []
    assert (found.planned, found.shortest()) == ((0, 200, 250), (0, 32, 82))
    assert (found.starts, found.ends()) == ((0,), ())
    assert found.is_open(150)
    assert (found.stop_of(0), found.stop_of(1), found.stop_of(2)) == (200, 250, 400)
    found.end_stage(60)
    assert (found.starts, found.ends()) == ((0, 60, 110), (60, 110))
    assert not found.is_open(59)
    members = found.members()
    assert [found.member_at(step) for step in (59, 60, 109, 110)] == [
        *members[:1],
        *[members[1]] * 2,
        None,
    ]
    assert found.stop_of(2) == 400
    again = family({**OPEN, "width": 0.5}, MIDDLE, STACK)
    again.settle(found.starts)
    assert [again.member_at(step) for step in range(0, 400, 7)] == [
        found.member_at(step) for step in range(0, 400, 7)
    ]


def test_a_stage_after_one_that_its_loss_ended_may_be_ended_by_its_own() -> None:
    until = {**UNTIL, "most_tokens": 180 * STEP}
    middle = {"name": "middle", "width": 0.5, "operator": "interpolate", "until": until}
    found = family(OPEN, middle, STACK)
    found.end_stage(40)
    assert found.starts == (0, 40)
    assert found.stop_of(1) == 220
    found.end_stage(100)
    assert found.starts == (0, 40, 100)


def test_a_stage_whose_end_is_not_known_keeps_its_learning_rate() -> None:
    """No decay that would end somewhere on its way down; the next stage has all of the schedule."""
    found = family(OPEN, STACK)
    schedule = ScheduleSettings(kind="cosine", warmup_steps=10)

    def rate(step: int) -> float:
        return learning_rate(schedule, step, 400, 1e-3, found.stage(step))

    assert [rate(step) for step in (4, 9, 20, 199)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    found.end_stage(100)
    assert [rate(step) for step in (99, 109)] == pytest.approx([1e-3, 1e-3])
    assert rate(399) == pytest.approx(1e-3 * schedule.final_lr_fraction)
    assert rate(250) < 9e-4


def test_manifests_say_what_may_end_a_stage() -> None:
    first, last = family(OPEN, STACK).stage_facts()
    assert first["until"] == UNTIL
    assert (last["start_step"], "until" in last) == (200, False)


@pytest.mark.parametrize(
    ("until", "why"),
    [
        (3, "until: 3"),
        ({**UNTIL, "loss_fall": 0}, "until.loss_fall: 0 is not a number above 0"),
        ({**UNTIL, "least": 3}, "until.least: is no part of it"),
        ({"loss_fall": 0.1, "least_tokens": "1k"}, "until.most_tokens: is not set"),
        ({**UNTIL, "most_tokens": "1k"}, "no more than least_tokens"),
        ({**UNTIL, "least_tokens": STEP}, "until.least_tokens: they are 1 steps of stage small"),
        ({**UNTIL, "most_tokens": 400 * STEP}, "nothing is left for the last stage"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(until: Any, why: str) -> None:
    assert why in told({**OPEN, "until": until}, STACK)


def test_one_length_is_enough() -> None:
    assert "steps says how long the stage is already" in told({**OPEN, "steps": 30}, STACK)
    preset = told({**OPEN}, {}, preset="yano2025")
    assert "preset yano2025 says how long each stage is" in preset
