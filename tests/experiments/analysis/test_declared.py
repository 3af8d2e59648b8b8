"""Tests that are declared instead of the contrast: the slope over doses, and all arms at once."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.arm_studies import ArmStudies
from motet.experiments.analysis.declared import unit_effect
from motet.experiments.analysis.detectable import detectable
from motet.experiments.analysis.estimates import Comparison, estimate
from motet.experiments.analysis.marginals import Marginal
from motet.experiments.analysis.measured import smallest_p
from motet.experiments.analysis.omnibus import omnibus
from motet.experiments.analysis.power import power
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.wald import (
    ClusterSums,
    DrawnGroups,
    fit_by_cluster,
    statistics,
)
from motet.experiments.design.assignment import Design, Question, assign, make_design
from motet.experiments.design.declared import cluster_problems
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.spec import Arm
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.types import F64, I64, OutcomeSpec, Unit
from tests.experiments.analysis.test_analysis import CONTROLS, QUESTIONS, measured
from tests.experiments.analysis.test_negative import sorted_by_difficulty

FIVE = tuple(Arm(f"dose-{dose}", dose) for dose in (0, 1, 4, 16, 64))
GROUPS = np.arange(5.0)
CANARIES = QUESTIONS[0]


def design_of(sizes: list[int], n_blocks: int, arms: tuple[Arm, ...] = FIVE) -> Design:
    """Clusters of the given sizes, dealt to the blocks in turn."""
    units = [
        Unit(f"u{c:03d}-{i}", ("x",), (), cluster=f"c{c:03d}", block=f"b{c % n_blocks}")
        for c, size in enumerate(sizes)
        for i in range(size)
    ]
    return make_design(units, arms)


def repeated(design: Design, arms: I64, draws: int = 499, key: int = 1) -> Comparison:
    return Repeater(design, arms, key, draws).whole(GROUPS[: len(design.weights)])


def wald(y: F64, x: F64 | None, design: Design, arms: I64) -> tuple[F64, F64, float]:
    """(effects, standard errors, W) by statsmodels: least squares with clustered errors."""
    import statsmodels.api as sm

    blocks = design.block_of_cluster[design.cluster_of_unit]
    columns = [arms == k for k in range(1, 5)] + [blocks == b for b in range(blocks.max() + 1)]
    matrix = np.column_stack(columns + ([] if x is None else [x])).astype(float)
    clustered = {"groups": design.cluster_of_unit, "use_correction": False}
    fit = sm.OLS(y, matrix).fit(cov_type="cluster", cov_kwds=clustered)
    chosen = np.eye(matrix.shape[1])[:4]
    found = fit.wald_test(chosen, use_f=False, scalar=True)
    return fit.params[:4], fit.bse[:4], float(np.squeeze(found.statistic))


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize(
    ("sizes", "blocks"), [([1] * 60, 1), ([1, 2, 5] * 20, 3), ([1, 2, 3] * 20, 20)]
)
def test_w_and_effects_are_those_of_least_squares_with_clusters_and_blocks(
    sizes: list[int], blocks: int, adjusted: bool
) -> None:
    rng = np.random.default_rng(3)
    design = design_of(sizes, blocks)
    n = len(design.cluster_of_unit)
    x = rng.normal(size=n) if adjusted else None
    y = rng.normal(size=n) + rng.normal(size=design.n_clusters)[design.cluster_of_unit]
    y = y if x is None else y + x
    arms = assign(design, 2)
    comparison = repeated(design, arms, draws=30)
    found = omnibus(y, x, comparison)
    effects, errors, statistic = wald(y, x, design, arms)
    assert [one.effect for one in found.arms] == pytest.approx(effects)
    assert found.adjusted == adjusted
    # The same reach in units of every arm's standard error, whatever the arm.
    reach = [(one.high - one.effect) for one in found.arms if one.high is not None]
    assert np.ptp(np.array(reach) / errors) == pytest.approx(0, abs=1e-9)
    drawn = [wald(y, x, design, row.astype(np.int64))[2] for row in comparison.draws]
    assert found.p == pytest.approx((1 + sum(w >= statistic for w in drawn)) / 31)


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_sums_per_block_and_arm_give_what_every_cluster_for_itself_gives(
    blocks: int, adjusted: bool
) -> None:
    rng = np.random.default_rng(blocks)
    design = design_of([1, 2, 5] * 15, blocks)
    block = design.block_of_cluster[design.cluster_of_unit]
    y, q = rng.normal(size=(2, len(block)))
    for values in (y, q):
        for one in range(blocks):
            values[block == one] -= values[block == one].mean()
    q /= np.linalg.norm(q)
    y -= q * (q @ y)
    starts = np.flatnonzero(np.diff(design.cluster_of_unit, prepend=-1))
    sums = ClusterSums.of(y, q if adjusted else None, block, starts)
    comparison = repeated(design, assign(design, 1), draws=50)
    draws = DrawnGroups(comparison.draws, starts, GROUPS.astype(np.int8), 4)
    wald_D, largest_D = statistics(sums, draws)
    fit, _ = fit_by_cluster(sums, draws.groups(slice(None)), 4)
    assert wald_D == pytest.approx(fit.wald(), rel=1e-9)
    assert largest_D == pytest.approx(fit.squared_t().max(axis=1), rel=1e-9)


def test_with_one_arm_it_is_the_contrast() -> None:
    rng = np.random.default_rng(0)
    design = design_of([1, 2, 3] * 12, 2, FIVE[:2])
    arms = assign(design, 1)
    y = rng.normal(size=72) + 0.5 * arms
    one = omnibus(y, None, repeated(design, arms))
    other = estimate(y, None, repeated(design, arms))
    assert one.p == other.p
    assert one.arms[0].effect == pytest.approx(other.effect)
    assert one.arms[0].p == other.p
    assert one.smallest_detectable == pytest.approx(other.smallest_detectable, rel=1e-4)


def test_p_is_that_of_full_enumeration_on_a_tiny_design() -> None:
    rng = np.random.default_rng(5)
    design, y = design_of([1] * 9, 1, FIVE[:3]), rng.normal(size=9)
    arms = assign(design, 1)
    everyone = np.arange(9)
    every = np.array(sorted(set(itertools.permutations(sorted(arms.tolist())))), dtype=np.int8)
    comparison = Comparison(everyone, GROUPS[:3], arms, every, 0 * everyone, everyone)

    def statistic(row: I64) -> float:
        groups = [y[row == k] for k in range(3)]
        means, variances = (
            np.array([f(g) for g in groups]) for f in (np.mean, lambda g: g.var() / 3)
        )
        weights = 1 / variances
        middle = (weights * means).sum() / weights.sum()
        return float((weights * (means - middle) ** 2).sum())  # Welch's, which W is in one block

    values = np.array([statistic(row) for row in every])
    exact = np.mean(values >= statistic(arms) * (1 - 1e-9))
    found = omnibus(y, None, comparison)
    assert found.p == pytest.approx((1 + exact * len(every)) / (1 + len(every)))
    repeater = Repeater(design, arms, 0, 10_000)
    assert smallest_p(repeater, GROUPS[:3], names_only=True) == pytest.approx(6 / len(every))
    assert found.smallest_p == pytest.approx(7 / (1 + len(every)))


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ([1, 1, 2, 3, 8] * 8, 2),
        pytest.param([1] * 40, 1, marks=pytest.mark.long),
        pytest.param([1] * 60, 6, marks=pytest.mark.long),
    ],
)
def test_one_null_study_in_twenty_is_rejected(sizes: list[int], blocks: int) -> None:
    # 250 studies; fewer than 3 or more than 25 have a probability below .001 at 5 %.
    rng = np.random.default_rng(7)
    design = design_of(sizes, blocks)
    null = Repeater(design, assign(design, 0), 5, 99).whole(GROUPS)
    n, rejected, covered = len(design.cluster_of_unit), 0, 0
    for seed in range(250):
        y = rng.standard_t(4, size=design.n_clusters)[design.cluster_of_unit] + rng.normal(size=n)
        arms = assign(design, 1000 + seed)
        found = omnibus(y, None, Comparison(null.units, GROUPS, arms, *frozen(null)))
        rejected += found.p <= 0.05
        covered += all(abs(one.effect) <= (one.high or math.inf) - one.effect for one in found.arms)
    assert 3 <= rejected <= 25
    assert covered >= 250 - 30


def frozen(null: Comparison) -> tuple[Any, ...]:
    """The rest of a comparison: only which arms are the actual ones changes from study to study."""
    return null.draws, null.blocks, null.clusters


def test_effects_that_change_sign_are_found_by_the_omnibus_test_and_not_by_the_contrast() -> None:
    rng = np.random.default_rng(11)
    arms3 = FIVE[:3]
    design = design_of([1] * 60, 1, arms3)
    null = Repeater(design, assign(design, 0), 5, 99).whole(GROUPS[:3])
    found = {"omnibus": 0, "contrast": 0}
    for seed in range(100):
        arms = assign(design, 100 + seed)
        y = rng.normal(size=60) + np.array([0.0, -2.0, 2.0])[arms]
        comparison = Comparison(null.units, GROUPS[:3], arms, *frozen(null))
        plain = Comparison(null.units, np.array([0.0, 1, 1]), arms, *frozen(null))
        found["omnibus"] += omnibus(y, None, comparison).p <= 0.05
        found["contrast"] += estimate(y, None, plain).p <= 0.05
    assert found["omnibus"] >= 99
    assert found["contrast"] <= 5


@pytest.mark.long
def test_the_smallest_detectable_effect_of_one_arm_is_found_in_four_of_five_studies() -> None:
    rng = np.random.default_rng(13)
    design = design_of([1] * 100, 1)
    null = Repeater(design, assign(design, 0), 5, 199).whole(GROUPS)
    sizes: list[float] = []
    for seed in range(40):
        comparison = Comparison(null.units, GROUPS, assign(design, seed), *frozen(null))
        size = omnibus(rng.normal(size=100), None, comparison).smallest_detectable
        assert size is not None
        sizes.append(size)
    found = 0
    for seed in range(250):
        arms = assign(design, 500 + seed)
        y = rng.normal(size=100) + float(np.median(sizes)) * (arms == 1)
        found += omnibus(y, None, Comparison(null.units, GROUPS, arms, *frozen(null))).p <= 0.05
    assert found / 250 == pytest.approx(0.8, abs=0.08)


def test_arms_without_spread_or_without_values_are_told_and_do_not_crash() -> None:
    design = design_of([1] * 30, 1)
    arms = assign(design, 1)
    comparison = repeated(design, arms, draws=999)
    apart = omnibus(arms.astype(float), None, comparison)
    assert apart.p <= 0.002
    assert "one value only" in apart.note
    assert all(one.low is None for one in apart.arms)
    alike = omnibus(np.ones(30), None, comparison)
    assert (alike.p, alike.answered) == (1.0, True)
    gone = omnibus(np.where(arms == 2, np.nan, np.arange(30.0)), None, comparison)
    assert (gone.p, gone.answered) == (1.0, False)
    assert gone.n_dropped == 6
    single = omnibus(np.random.default_rng(0).normal(size=7), None, repeated(*_seven()))
    assert 0 < single.p <= 1


def _seven() -> tuple[Design, I64]:
    design = design_of([1] * 7, 1)
    return design, assign(design, 1)


@pytest.mark.parametrize(("sizes", "blocks"), [([1] * 40, 1), ([1, 2, 5] * 15, 3)])
def test_simulated_studies_are_judged_by_the_same_test(sizes: list[int], blocks: int) -> None:
    design = design_of(sizes, blocks)
    comparison = repeated(design, assign(design, 1), draws=200)
    studies = ArmStudies(comparison, np.array([0.0, 0, 1, 0, 0]), 0.05, icc=0.5, key=3)
    simulated = studies.p(Marginal(), 1.0)
    outcomes = studies.outcomes(Marginal(), 1.0)
    for number in range(3):
        y = np.empty(len(comparison.units))
        y[studies.comparison.units] = outcomes[number]
        assert omnibus(y, None, comparison).p == simulated[number]


def test_elimination_gives_w_also_where_an_arm_has_one_value_only() -> None:
    """Shares near 1 in 20 units: arms without a wrong answer have no spread, and W is infinite."""
    design = design_of([1] * 20, 2)
    comparison = repeated(design, assign(design, 1), draws=60)
    studies = ArmStudies(comparison, np.array([0.0, 0, 1, 0, 0]), 0.05, key=3, simulations=20)
    outcomes = studies.outcomes(Marginal(share=0.85), 0.0)
    found = studies.p(Marginal(share=0.85), 0.0)
    kinds = set()
    for number, row in enumerate(outcomes):
        y = np.empty(20)
        y[studies.comparison.units] = row
        one = omnibus(y, None, comparison)
        kinds.add(one.note[:9])
        assert one.p == found[number]
    assert len(kinds) > 1


def test_after_training_an_omnibus_test_is_simulated_as_well() -> None:
    design = design_of([1] * 60, 1)
    comparison = repeated(design, assign(design, 1), draws=200)
    outcome = OutcomeSpec("x", "x", "sd", "more")
    treated, sizes, hits = comparison.arms == 1, [], []
    rng = np.random.default_rng(5)
    for key in range(6):
        y = rng.normal(size=60)
        found = omnibus(y, None, comparison)
        alone = np.array([0.0, 1, 0, 0, 0])
        told = detectable(outcome, y, None, comparison, found, 0.05, key, 200, alone)
        assert told.power is None
        assert told.size is not None
        sizes.append(told.size)
        again = rng.normal(size=(12, 60)) + told.size * treated
        hits += [omnibus(one, None, comparison).p <= 0.05 for one in again]
    assert np.mean(hits) == pytest.approx(0.8, abs=0.12)
    assert np.median(sizes) == pytest.approx(math.sqrt(12.0 * (1 / 12 + 1 / 48)), rel=0.2)


def test_power_is_that_of_one_arm_alone_for_a_test_of_all_arms() -> None:
    m = measured({**CANARIES, "test": "omnibus"})
    repeater = Repeater(m.design, m.arms, 1, 999)
    found = power(m.experiment, repeater)
    assert found["possible"]
    assert "an effect of one arm alone" in found["assumption"]
    # Normal outcomes in large samples: noncentrality 10.9 (3 degrees of freedom, 80 %), 16 units of
    # 64. Canary exposure is skewed, and 16 units are few.
    assert found["standardized"] == pytest.approx(math.sqrt(10.9 * (1 / 16 + 1 / 48)), rel=0.2)


# --- through the whole analysis ----------------------------------------------------------------


def entry_of(entry: dict[str, Any], gain: Any = lambda dose: 0.0) -> dict[str, Any]:
    found = analyze([measured(entry, gain)], 0, 999)["experiments"][0]
    json.dumps(found, allow_nan=False)
    return dict(found)


def up_and_down(dose: float) -> float:
    return {0: 0.0, 1: -8.0, 4: 8.0, 16: 0.0}[int(dose)]


def test_a_declared_omnibus_test_answers_arm_by_arm() -> None:
    entry = {**CANARIES, "test": "omnibus"}
    found = entry_of(entry, up_and_down)
    primary = found["primary"]
    assert primary["test"] == "omnibus"
    assert primary["effect"] is None
    assert primary["contrast"] == "3 arms vs dose 0, all at once"
    assert primary["p_corrected"] == primary["p"] <= 0.01
    assert found["verdict"]["kind"] == "found"
    sentence = found["verdict"]["sentence"]
    assert "differs between the arms (3 arms vs dose 0, all at once; p" in sentence
    assert "dose-4" in sentence
    assert "higher" in sentence
    control, one, four, many = primary["per_arm"]
    assert control["effect"] is None
    assert four["low"] > 0
    assert one["effect"] < 0 < four["effect"]
    assert many["low"] < 0 < many["high"]
    assert all(outcome["test"] == "omnibus" for outcome in found["secondary"])
    pairs = entry_of(CANARIES, up_and_down)["primary"]["per_arm"]
    assert "test" not in entry_of(CANARIES)["primary"]
    width = [row["high"] - row["low"] for row in (four, pairs[2])]
    assert width[0] > width[1]  # it holds for three arms at once


def test_a_declared_trend_is_per_doubling() -> None:
    found = entry_of({**CANARIES, "test": "trend"}, lambda dose: 2.5 * math.log2(1 + dose))
    primary = found["primary"]
    assert (primary["effect"], primary["p"]) == (
        primary["trend"]["slope_per_doubling"],
        primary["trend"]["p"],
    )
    assert "rises by" in found["verdict"]["sentence"]
    assert (
        "bits per doubling of 1 + dose (slope over the doses 0, 1, 4, 16;"
        in (found["verdict"]["sentence"])
    )
    nothing = entry_of({**CANARIES, "test": "trend"})["verdict"]
    assert nothing["kind"] == "not_found"
    assert "per doubling of 1 + dose would have been found" in nothing["sentence"]


def test_a_margin_holds_for_every_arm_of_an_omnibus_test() -> None:
    wide = entry_of({**CANARIES, "test": "omnibus", "margin": 5.0})
    assert wide["verdict"]["kind"] == "negligible"
    assert "the interval of every arm lies within" in wide["verdict"]["sentence"]
    ends = [row["high"] for row in wide["primary"]["per_arm"] if row["high"] is not None]
    least = min(ends) if min(ends) > 0 else 0.01
    some = entry_of({**CANARIES, "test": "omnibus", "margin": least + 1e-6})
    assert some["verdict"]["kind"] == "not_found"
    assert "in one arm alone would have been found" in some["verdict"]["sentence"]


@pytest.mark.parametrize("test", ["trend", "omnibus"])
def test_the_negative_control_is_the_declared_test(test: str) -> None:
    m = measured({**CANARIES, "test": test}, lambda dose: 2.5 * math.log2(1 + dose))
    assert analyze([m], 0, 1999, details=False)["experiments"][0]["negative_control"]["ok"]
    bad = analyze([sorted_by_difficulty(m)], 0, 1999, details=False)["experiments"][0]
    assert bad["negative_control"]["ok"] is False
    assert bad["verdict"]["kind"] == "invalid"
    assert "already differed before anything was shown" in bad["verdict"]["sentence"]


def test_the_alternative_of_each_test_is_one_effect() -> None:
    for test, expected in (
        ("contrast", [0, 1, 1, 1]),
        ("trend", [0, 1, math.log2(5), math.log2(17)]),
        ("omnibus", [0, 1, 0, 0]),
    ):
        m = measured({**CANARIES, "test": test})
        primary = next(outcome for outcome in m.experiment.outcomes if outcome.primary)
        assert unit_effect(m.experiment, primary) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("entry", "needle"),
    [
        ({**CANARIES, "test": "omnibuss"}, "omnibus"),
        ({**CANARIES, "test": "omnibus", "doses": [0, 4]}, "one arm with a dose"),
        ({**CANARIES, "test": "trend", "doses": [0, 4]}, "two different doses above 0"),
        ({**CANARIES, "test": "trend", "dose_in": "tokens"}, "use dose_in: exposures"),
        ({**CONTROLS[0], "test": "omnibus"}, "a control is judged by its contrast"),
    ],
)
def test_a_test_that_makes_no_sense_is_refused_with_what_would(
    entry: dict[str, Any], needle: str
) -> None:
    _, problems = parse_experiments([entry], Path(), Library(Path()))
    assert any(needle in problem.message and ".test" in problem.setting for problem in problems)


def test_an_arm_of_one_cluster_is_refused_for_a_test_of_all_arms_at_once() -> None:
    m = measured({**CANARIES, "test": "omnibus", "generate": {"count": 7, "seed": 0}})
    (problem,) = cluster_problems(Question(m.experiment, m.units, m.design, m.arms, None))
    assert problem.setting == "experiments.canaries.test"
    assert "(1)" in problem.message
    assert "give more units, or fewer arms" in problem.message
    many = measured({**CANARIES, "test": "omnibus"})
    assert not cluster_problems(Question(many.experiment, many.units, many.design, many.arms, None))


def test_a_definition_without_a_declared_test_reads_as_before() -> None:
    for entry, declared in ((CANARIES, False), ({**CANARIES, "test": "omnibus"}, True)):
        specs, problems = parse_experiments([entry], Path(), Library(Path()))
        assert not problems
        assert ("test" in specs[0].to_json()) is declared
        assert LIBRARY[specs[0].use](specs[0]).spec.test == ("omnibus" if declared else None)
