"""Intervals of shares: inside what is possible, never against their own effect or p-value."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from motet.experiments.analysis.coverage import coverage_note, known_coverage
from motet.experiments.analysis.estimates import ArmEffect, Comparison, Estimate, estimate
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.shares import BlockShares, share_interval, within, within_range
from motet.experiments.analysis.verdict import interval_text
from motet.experiments.design.assignment import Design, assign

F64 = npt.NDArray[np.float64]
SCORE = np.array([0.0, 1.0])


def compare(blocks: list[int], weights: tuple[int, int] = (1, 1), seed: int = 0) -> Comparison:
    n = len(blocks)
    design = Design(np.arange(n), np.array(blocks), np.arange(n).astype(np.uint64), weights)
    return Repeater(design, assign(design, seed), seed + 1, 499).whole(SCORE)


def answer(y: F64, comparison: Comparison) -> Estimate:
    return share_interval(estimate(y, None, comparison), y, comparison, 0.05)


def test_blocks_that_differ_are_not_taken_for_an_effect() -> None:
    """Pooled, 3 of 4 treated blocks' units against 1 of 4 looked like +38 to +87 points, p = 1."""
    comparison = compare([0] * 20 + [1] * 20)
    treated = np.r_[np.tile([1, 1, 1, 1, 0], 4), np.tile([0, 0, 0, 0, 1], 4)]
    comparison = Comparison(
        comparison.units, SCORE, treated, comparison.draws, comparison.blocks, comparison.clusters
    )
    found = answer(np.repeat([1.0, 0.0], 20), comparison)
    assert (found.effect, found.p) == (0.0, 1.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high
    assert "over blocks" in found.note


def test_no_interval_contradicts_its_effect_its_p_or_what_is_possible() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for seed in range(150):
        n = int(rng.integers(4, 40))
        weights = (1, int(rng.integers(1, 5)))
        comparison = compare(rng.integers(0, rng.integers(1, 4), size=n).tolist(), weights, seed)
        share = rng.choice([0.0, 0.05, 0.5, 0.95, 1.0], size=2)
        y = (rng.random(n) < share[comparison.arms]).astype(np.float64)
        found = answer(y, comparison)
        kinds.add((found.low is None, found.note[:20]))
        if found.low is None or found.high is None:
            continue
        assert found.effect is not None
        assert -1 <= found.low <= found.effect <= found.high <= 1
        assert (found.low <= 0 <= found.high) == (found.p > 0.05), found
    assert len(kinds) >= 4


def test_an_interval_that_the_test_would_contradict_is_not_given() -> None:
    """Three against three, wholly apart: p is .1 at best, and Newcombe's interval excludes 0."""
    comparison = compare([0] * 6)
    found = answer(comparison.arms.astype(np.float64), comparison)
    assert found.effect == pytest.approx(1.0)
    assert found.p > 0.05
    assert found.low is None
    assert "does not reject" in found.note


def test_with_one_block_newcombes_interval_is_the_published_one() -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep

    comparison = compare([0] * 48, (1, 2))
    y = (np.random.default_rng(1).random(48) < 0.7).astype(np.float64)
    strata = BlockShares.of(y, comparison)
    assert strata is not None
    groups = [y[comparison.arms == arm] for arm in (1, 0)]
    counts = [number for group in groups for number in (group.sum(), len(group))]
    expected = confint_proportions_2indep(*counts, method="newcomb")
    assert strata.newcombe(0.05) == pytest.approx(expected)


def test_what_is_possible_holds_the_mean_effect_whatever_was_not_seen() -> None:
    rng = np.random.default_rng(2)
    for seed in range(50):
        comparison = compare([0] * 12, (1, 3), seed)
        outcomes = rng.integers(0, 2, size=(2, 12)).astype(np.float64)
        y = np.where(comparison.arms == 1, outcomes[1], outcomes[0])
        strata = BlockShares.of(y, comparison)
        assert strata is not None
        low, high = strata.possible()
        assert low - 1e-12 <= (outcomes[1] - outcomes[0]).mean() <= high + 1e-12


def test_slopes_and_arms_of_shares_stay_within_one() -> None:
    arm = ArmEffect(1, 0.9, -0.2, 1.7, 0.1)
    found = Estimate(0.3, -0.2, 0.9, 0.1, 9, 9, 0, 0.1, None, False, arms=(arm,))
    slope = within(found, 1 / 2.0)
    assert (slope.low, slope.high) == (-0.2, 0.5)
    assert (slope.arms[0].low, slope.arms[0].high) == (-0.2, 0.9)
    assert within(found, 1.0).arms[0].high == 1.0
    assert within(found, math.inf) == found


@pytest.mark.parametrize("blocks", [[0] * 12, [0, 1] * 6])
def test_intervals_of_bits_stay_where_bits_can_go(blocks: list[int]) -> None:
    """12 units of 0 to 3 bits: what the other half would have had is 0 to 3 bits as well."""
    rng = np.random.default_rng(3)
    shorter = 0
    for seed in range(20):
        comparison = compare(blocks, (1, 2), seed)
        outcomes = rng.choice([0.0, 1.0, 3.0], size=(2, 12))
        y = np.where(comparison.arms == 1, outcomes[1], outcomes[0])
        free = estimate(y, None, comparison)
        held = within_range(free, y, comparison, (0.0, 3.0))
        if free.low is None or free.high is None or free.effect is None:
            assert held == free
            continue
        assert held.low is not None
        assert held.high is not None
        assert free.low <= held.low <= held.effect <= held.high <= free.high
        assert held.low >= -3.0
        assert held.high <= 3.0
        shorter += held != free
        # The ends stay where a class is wrong about its range, or does not tell it.
        assert within_range(free, y, comparison, (0.0, 2.0)) == free or y.max() <= 2.0
        assert within_range(free, y, comparison, (0.0, None)) == free
    assert shorter > 5


def test_an_interval_that_is_known_to_miss_says_so_with_its_figure() -> None:
    many = compare([0] * 80, (1, 4))
    near_one = np.ones(80)
    near_one[np.flatnonzero(many.arms == 0)[:2]] = 0.0
    near_one[np.flatnonzero(many.arms == 1)[:1]] = 0.0
    found = answer(near_one, many)
    assert known_coverage(found, near_one, many, binary=True) == 0.86
    half = np.arange(80) % 2 * 1.0
    assert known_coverage(answer(half, many), half, many, binary=True) is None
    for n, figure in ((20, 0.91), (40, 0.93), (60, None)):
        few_treated = compare([0] * n, (4, 1))
        y = np.random.default_rng(0).normal(size=n)
        found = estimate(y, None, few_treated)
        assert known_coverage(found, y, few_treated, binary=False) == figure
    assert "85 %" in coverage_note(0.85)
    told = {"low": -0.1, "high": 0.2, "unit": "accuracy", "confidence": 0.95}
    assert "85 %" in interval_text(told | {"coverage_note": coverage_note(0.85)})
    assert "simulated" not in interval_text(told)


@pytest.mark.parametrize(("wrong", "figure"), [(1, 0.79), (4, None)])
def test_only_clusters_of_which_hardly_any_differ_are_known_to_miss(
    wrong: int, figure: float | None
) -> None:
    """8 against 32 clusters: 95 % held where shares are .5 to .8, and 79 % where they are near 1."""
    cluster = np.repeat(np.arange(40), 2)
    keys = np.arange(40).astype(np.uint64)
    design = Design(cluster, np.zeros(40, np.int64), keys, (1, 4))
    arms = assign(design, 0)
    comparison = Repeater(design, arms, 1, 499).whole(SCORE)
    y = np.ones(80)
    for arm in (0, 1):
        members = np.unique(cluster[arms == arm])
        y[np.isin(cluster, members[: wrong * (1 + 3 * arm)])] = 0.0
    assert known_coverage(answer(y, comparison), y, comparison, binary=True) == figure


@pytest.mark.parametrize(
    ("size", "wrong", "figure"), [(6, 1, None), (8, 1, 0.92), (20, 1, 0.81), (8, 3, None)]
)
def test_clusters_split_evenly_are_known_to_miss_where_hardly_any_differ(
    size: int, wrong: int, figure: float | None
) -> None:
    cluster = np.repeat(np.arange(2 * size), 2)
    keys = np.arange(2 * size).astype(np.uint64)
    design = Design(cluster, np.zeros(2 * size, np.int64), keys, (1, 1))
    arms = assign(design, 0)
    comparison = Repeater(design, arms, 1, 499).whole(SCORE)
    others = [np.unique(cluster[arms == arm])[:number] for arm, number in ((0, wrong), (1, 3))]
    y = 1.0 - np.isin(cluster, np.concatenate(others))
    assert known_coverage(answer(y, comparison), y, comparison, binary=True) == figure
