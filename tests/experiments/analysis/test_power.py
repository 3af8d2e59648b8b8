"""Smallest detectable effects: simulated with the run's own assignment and test, before training
and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.power import NormalIndPower, TTestIndPower

from motet.experiments.analysis import kept
from motet.experiments.analysis.detectable import Detectable, detectable, intra_cluster
from motet.experiments.analysis.estimates import Comparison, estimate
from motet.experiments.analysis.marginals import Marginal, latent_correlation
from motet.experiments.analysis.power import Assumed, clearly_found, power, power_at_largest
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.simulation import Studies
from motet.experiments.analysis.verdict import judge
from motet.experiments.design.assignment import assign, make_design
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.spec import Arm
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.types import OutcomeSpec, Unit

Label = Callable[[int], str]


def power_of(
    entry: dict[str, Any], alpha: float = 0.05, assumed: Assumed | None = None
) -> dict[str, Any]:
    return power(*assigned(entry), alpha, assumed, simulations=600)


def assigned(entry: dict[str, Any]) -> tuple[Experiment, Repeater]:
    """An experiment, and how its assignment is repeated."""
    specs, problems = parse_experiments([entry], Path(), Library(Path()))
    assert not problems, problems
    experiment = LIBRARY[specs[0].use](specs[0])
    design = make_design(experiment.units(), specs[0].arms)
    return experiment, Repeater(design, assign(design, 1), 2, 2000)


def comparison_of(
    units: int,
    arms: int = 2,
    cluster: Label | None = None,
    block: Label | None = None,
    draws: int = 999,
) -> Comparison:
    """Any dose against none among invented units."""
    made = [
        Unit(
            f"u{number}",
            ("text",),
            (),
            cluster=cluster(number) if cluster else "",
            block=block(number) if block else "",
        )
        for number in range(units)
    ]
    design = make_design(made, [Arm(f"arm{number}", number) for number in range(arms)])
    repeater = Repeater(design, assign(design, 3), 5, draws)
    found = repeater.groups(np.minimum(np.arange(arms), 1.0))
    assert found is not None
    return found


def unequal(number: int) -> str:
    """Clusters of 1 to 12: 1, 2, 3, ... units."""
    return f"c{int((math.sqrt(8 * (number % 78) + 1) - 1) / 2) + 12 * (number // 78)}"


DESIGNS: dict[str, dict[str, Any]] = {
    "plain": {"units": 40},
    "as few as can spare a covariate": {"units": 7},
    "one too few to spare it": {"units": 6},
    "pairs as blocks in 5 arms": {"units": 40, "arms": 5, "block": lambda n: f"b{n // 2}"},
    "16 units in 5 arms": {"units": 16, "arms": 5},
    "clusters of 1 to 12 in blocks": {
        "units": 78,
        "arms": 3,
        "cluster": unequal,
        "block": lambda n: f"b{len(unequal(n)) % 2}",
    },
}


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("adjusted", [False, True])
def test_many_simulated_outcomes_are_tested_as_the_analysis_tests_one(
    name: str, adjusted: bool
) -> None:
    comparison = comparison_of(**DESIGNS[name], draws=199)
    units = DESIGNS[name]["units"]
    covariate = np.random.default_rng(1).normal(size=units) if adjusted else None
    correlation = 0.3 if adjusted else None
    studies = Studies(comparison, 0.05, 0.5, correlation, 7, covariate, simulations=20)
    p = studies.p(Marginal(), 0.8)
    for row, outcome in enumerate(studies.outcomes(Marginal(), 0.8)):
        values = np.full(units, np.nan)
        values[studies.comparison.units] = outcome
        assert p[row] == pytest.approx(estimate(values, covariate, comparison).p), row


@pytest.mark.parametrize(("units", "alpha"), [(64, 0.05), (200, 0.01)])
def test_without_blocks_and_clusters_power_is_that_of_the_t_test(units: int, alpha: float) -> None:
    studies = Studies(comparison_of(units, draws=1000), alpha)
    size, _ = studies.smallest(Marginal())
    textbook = TTestIndPower().solve_power(None, units / 2, alpha, 0.8)
    assert size == pytest.approx(textbook, rel=0.08)


@pytest.mark.parametrize(("units", "points"), [(400, 13.9)])
def test_detectable_accuracy_agrees_with_the_published_figures(units: int, points: float) -> None:
    studies = Studies(comparison_of(units, draws=200), 0.05, simulations=400)
    size, _ = studies.smallest(Marginal(share=0.5))
    assert size is not None
    assert 100 * size == pytest.approx(points, rel=0.1)
    h = NormalIndPower().solve_power(None, units / 2, 0.05, 0.8)
    assert size == pytest.approx(math.sin(math.asin(math.sqrt(0.5)) + h / 2) ** 2 - 0.5, rel=0.1)


def test_unlike_clusters_and_arms_cost_power_that_counting_clusters_does_not_see() -> None:
    for name in ("pairs as blocks in 5 arms", "clusters of 1 to 12 in blocks"):
        comparison = comparison_of(**DESIGNS[name])
        treated = comparison.score[comparison.arms] > 0
        counts = [len(np.unique(comparison.clusters[side])) for side in (treated, ~treated)]
        counted = TTestIndPower().solve_power(None, counts[1], 0.05, 0.8, counts[0] / counts[1])
        size, _ = Studies(comparison, 0.05).smallest(Marginal())
        assert size is not None
        assert size > 1.15 * counted, name


@pytest.mark.parametrize(
    "name", ["pairs as blocks in 5 arms", "16 units in 5 arms", "clusters of 1 to 12 in blocks"]
)
def test_the_effect_that_is_printed_before_training_is_found_in_four_of_five_studies(
    name: str,
) -> None:
    """Counting clusters printed 80 % for effects that 42, 62 and 56 % of studies find."""
    comparison = comparison_of(**DESIGNS[name], draws=2000)
    size, _ = Studies(comparison, 0.05, icc=0.5, key=1, draws=200).smallest(Marginal())
    assert size is not None
    few = replace(comparison, draws=comparison.draws[:400])
    treated, clusters = comparison.score[comparison.arms], comparison.clusters
    rng = np.random.default_rng(6)
    hits = []
    for _ in range(300):
        alike = rng.normal(size=clusters.max() + 1)[clusters]
        y = math.sqrt(0.5) * (alike + rng.normal(size=len(clusters))) + size * treated
        hits.append(estimate(y, None, few).p <= 0.05)
    assert np.mean(hits) == pytest.approx(0.8, abs=0.06)  # 2.6 standard errors


def test_a_design_that_can_find_nothing_says_so() -> None:
    alone = comparison_of(12, block=lambda n: f"b{n}")
    few = comparison_of(6)
    assert Studies(few, 0.05).smallest(Marginal()) == (None, 0.0)
    size, at_largest = Studies(alone, 0.05).smallest(Marginal())
    assert size is None
    assert at_largest == 0.0
    high = Studies(comparison_of(40), 0.05).smallest(Marginal(share=0.97))
    assert high[0] is None
    assert high[1] < 0.1


def test_power_speaks_the_unit_of_the_outcome_and_stays_in_its_range() -> None:
    two = {
        "name": "x",
        "use": "contamination",
        "doses": [0, 4],
        "generate": {"count": 400, "seed": 0},
    }
    answer = power_of(two)
    assert answer["unit"] == "accuracy"
    assert 0.115 < answer["smallest_detectable"] < 0.145
    assert "control group at 25 %" in answer["assumption"]
    assert power_of(two, 0.01)["smallest_detectable"] > answer["smallest_detectable"]
    bits = power_of({"name": "x", "use": "memorization"})
    assert 0.9 < bits["smallest_detectable"] < 1.5
    assert bits["smallest_detectable"] == pytest.approx(bits["standardized"] * 1.295, abs=0.01)
    few = power_of({"name": "x", "use": "memorization", "generate": {"count": 8, "seed": 0}}, 0.01)
    assert few["possible"] is False
    assert few["smallest_detectable"] is None
    assert "no possible effect is found in 80 % of runs" in few["assumption"]
    assert power_of({"name": "x", "use": "knowledge"})["smallest_detectable"] is None


def test_the_stated_assumptions_move_the_figure() -> None:
    known = Assumed(baseline_correlation=0.9)
    entry = {"name": "x", "use": "forgetting"}
    plain, adjusted = power_of(entry), power_of(entry, assumed=known)
    ratio = adjusted["standardized"] / plain["standardized"]
    assert ratio == pytest.approx(math.sqrt(1 - 0.9**2), rel=0.12)
    assert "correlation with the value before exposure 0.9" in adjusted["assumption"]
    comparison = comparison_of(60, cluster=lambda n: f"c{n // 5}")
    alike, apart = (Studies(comparison, 0.05, icc).smallest(Marginal())[0] for icc in (1.0, 0.0))
    assert alike is not None
    assert apart is not None
    assert alike > 1.5 * apart


def test_shares_agree_less_than_what_lies_behind_them() -> None:
    rng = np.random.default_rng(0)
    latent = latent_correlation(0.4, 0.25)
    both = rng.multivariate_normal([0, 0], [[1, latent], [latent, 1]], size=200_000) > 0.6745
    assert np.corrcoef(both.T)[0, 1] == pytest.approx(0.4, abs=0.01)
    assert latent_correlation(1.0, 0.25) == 1.0
    clusters = np.repeat(np.arange(300), 4)
    alike = rng.normal(size=300)[clusters] + rng.normal(size=1200)
    assert intra_cluster(alike, clusters) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("name", ["plain", "pairs as blocks in 5 arms"])
def test_what_is_said_to_be_found_in_four_of_five_runs_is(name: str) -> None:
    comparison = comparison_of(**DESIGNS[name], draws=200)
    units = DESIGNS[name]["units"]
    outcome = OutcomeSpec("x", "x", "sd", "more")
    treated = comparison.score[comparison.arms]
    rng = np.random.default_rng(4)
    found = []
    for key in range(40):
        values = 3.0 * rng.normal(size=units)
        first = estimate(values, None, comparison)
        size = detectable(outcome, values, None, comparison, first, 0.05, key, 400).size
        assert size is not None
        again = 3.0 * rng.normal(size=(10, units)) + size * treated
        found += [estimate(one, None, comparison).p <= 0.05 for one in again]
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)


def test_a_detectable_share_stays_below_100_percent_or_there_is_none() -> None:
    outcome = OutcomeSpec("x", "x", "share", "more", binary=True, chance=0.25)
    comparison = comparison_of(40)
    for control in (0.25, 0.9, 1.0):
        values = (np.arange(40) % 20 < 20 * control).astype(np.float64)
        found = estimate(values, None, comparison)
        told = detectable(outcome, values, None, comparison, found, 0.05, 1, 400)
        if control == 0.25:
            assert told.size is not None
            assert 0.3 < told.size < 0.75
        else:
            assert told == Detectable(None)


def few_controls(ones: int) -> Detectable:
    """What is detectable with 8 controls of 48, so many of whose answers are right."""
    comparison = comparison_of(48, draws=1999)
    controls = np.flatnonzero(comparison.arms == 0)[8:]
    arms = comparison.arms.copy()
    arms[controls] = 1
    rng = np.random.default_rng(0)
    draws = np.array([rng.permutation(arms) for _ in range(1999)]).astype(np.int8)
    uneven = replace(comparison, arms=arms, draws=draws)
    values = np.tile([1.0, 0.0], 24)
    values[arms == 0] = np.arange(8) < ones
    outcome = OutcomeSpec("x", "x", "share", "more", binary=True)
    found = estimate(values, None, uneven)
    return detectable(outcome, values, None, uneven, found, 0.05, 1, 600)


def test_where_power_depends_on_a_share_that_is_hardly_known_its_range_is_told() -> None:
    told = few_controls(1)
    assert told.size is not None
    assert told.power is not None
    least, most = told.power
    assert least < 0.72 < 0.85 < most
    primary = {
        "name": "x", "label": "accuracy", "unit": "accuracy", "contrast": "a vs b", "effect": 0.1,
        "low": -0.1, "high": 0.4, "confidence": 0.95, "p": 0.3, "p_corrected": 0.3,
        "smallest_detectable": told.size, "detectable_power": told.power, "assumption": "",
    }  # fmt: skip
    said = judge(primary, 0.05, None, "", 1)["sentence"]
    often = f"{100 * least:.0f} to {100 * most:.0f} % of such runs"
    assert f"would have been found in {often}, depending on the control group's mean" in said
    found = judge(primary | {"p_corrected": 0.01}, 0.05, None, "", 1)["sentence"]
    assert f"percentage points, which {often} would have found" in found


def test_where_only_some_shares_leave_room_the_largest_effect_is_told_with_its_range() -> None:
    told = few_controls(4)
    assert told.size is None
    assert told.power is not None
    assert told.power[0] < 0.8 <= told.power[1]
    primary = {
        "name": "x", "label": "accuracy", "unit": "accuracy", "contrast": "a vs b", "effect": 0.1,
        "low": -0.1, "high": 0.4, "confidence": 0.95, "p": 0.3, "p_corrected": 0.3,
        "smallest_detectable": None, "detectable_power": told.power, "assumption": "",
    }  # fmt: skip
    said = judge(primary, 0.05, None, "", 1)["sentence"]
    assert "The largest effect that is possible would have been found in" in said
    none = judge(primary | {"detectable_power": None}, 0.05, None, "", 1)["sentence"]
    assert "No effect that is possible would have been found in 4 of 5 such runs" in none


def test_every_part_of_the_studies_has_repeated_assignments_of_its_own() -> None:
    comparison = comparison_of(20, draws=1000)
    studies = Studies(comparison, 0.05, simulations=60)
    assert len(studies.arms_DC) == len({arms.tobytes() for arms in studies.arms_DC}) == 5
    p = studies.p(Marginal(), 0.8)
    for part in studies.parts:
        own = replace(comparison, draws=comparison.draws[200 * part.draws : 200 * part.draws + 200])
        for row in range(part.rows.start, part.rows.stop):
            values = studies.outcomes(Marginal(), 0.8)[row][np.argsort(studies.comparison.units)]
            assert p[row] == pytest.approx(estimate(values, None, own).p)


def test_a_statistic_of_exactly_zero_has_p_one() -> None:
    """Among 0 and 1 equally many right in both groups is common, and 0 only but for rounding."""
    comparison = comparison_of(24, block=lambda n: f"b{n % 2}")
    studies = Studies(comparison, 0.05, simulations=200)
    marginal = Marginal(share=0.4)
    p = studies.p(marginal, 0.0)
    treated = studies.comparison.arms == 1
    outcomes, block = studies.outcomes(marginal, 0.0), studies.comparison.blocks
    apart = sum(
        outcomes[:, treated & (block == b)].mean(axis=1)
        - outcomes[:, ~treated & (block == b)].mean(axis=1)
        for b in (0, 1)
    )
    assert (np.abs(apart) < 1e-12).sum() > 10
    assert set(p[np.abs(apart) < 1e-12].tolist()) == {1.0}


def test_what_was_simulated_of_the_same_scores_is_not_simulated_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome, comparison = OutcomeSpec("x", "x", "sd", "more"), comparison_of(40, draws=400)
    values = np.random.default_rng(0).normal(size=40)
    found = estimate(values, None, comparison)
    first = kept.known_detectable(outcome, values, None, comparison, found, 0.05, 1)
    calls: list[object] = []
    monkeypatch.setattr(kept, "detectable", lambda *_: calls.append(1) or Detectable(None))
    assert kept.known_detectable(outcome, values, None, comparison, found, 0.05, 1) == first
    assert calls == []
    kept.known_detectable(outcome, values + 1e-9, None, comparison, found, 0.05, 1)
    kept.known_detectable(outcome, values, None, comparison, found, 0.04, 1)
    assert len(calls) == 2, "other scores and another level are other figures"


def test_a_found_effect_below_what_would_be_found_is_called_overestimated() -> None:
    outcome = {
        "name": "x", "label": "accuracy", "unit": "accuracy", "contrast": "a vs b", "effect": 0.42,
        "low": 0.1, "high": 0.7, "confidence": 0.95, "p": 0.01, "p_corrected": 0.01,
        "smallest_detectable": 0.55, "assumption": "",
    }  # fmt: skip
    said = judge(outcome, 0.05, None, "", 1)
    assert said["kind"] == "found"
    assert "Likely overestimated: it is smaller than 55.0 percentage points" in said["sentence"]
    assert "overestimated" not in judge(outcome | {"effect": 0.6}, 0.05, None, "", 1)["sentence"]


def test_an_outcome_without_room_is_saturated_and_neither_found_nor_negligible() -> None:
    bits = OutcomeSpec("x", "exposure", "bits", "more", low=0.0, high=6.0)
    share = OutcomeSpec("x", "accuracy", "accuracy", "more", binary=True)
    assert bits.room(5.2) == pytest.approx(0.8)
    assert bits.room(1.3) is None
    assert share.room(0.95) == pytest.approx(0.05)
    assert OutcomeSpec("x", "x", "nats", "more").room(-0.1) is None
    outcome = {
        "name": "x", "label": "exposure", "unit": "bits", "contrast": "a vs b", "effect": 0.09,
        "low": 0.0, "high": 0.25, "confidence": 0.95, "p": 0.04, "p_corrected": 0.04,
        "smallest_detectable": None, "assumption": "",
    }  # fmt: skip
    said = judge(outcome, 0.05, 0.5, "", 1, room=bits.room(5.2))
    assert said["kind"] == "saturated"
    assert "had only 0.8" in said["sentence"]
    fell = outcome | {"effect": -2.0, "low": -3.0, "high": -1.0}
    assert judge(fell, 0.05, None, "", 1, room=0.8)["kind"] == "found"


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("doses", [[0, 4], [0, 1, 4, 16]])
@pytest.mark.parametrize("choices", [2, 4])
@pytest.mark.parametrize("units", [24, 40, 64, 160])
def test_what_is_called_clear_without_simulation_is_found_in_nearly_every_simulated_run(
    units: int, choices: int, doses: list[int], alpha: float
) -> None:
    entry = {
        "name": "q",
        "use": "contamination",
        "generate": {"count": units},
        "doses": doses,
        "options": {"choices": choices},
    }
    experiment, repeater = assigned(entry)
    if clearly_found(experiment, repeater, alpha, Assumed()):
        assert power_at_largest(experiment, repeater, alpha, None, 200) >= 0.98


def test_a_clear_design_is_called_clear_and_a_weak_or_small_one_is_not() -> None:
    def clear(count: int, choices: int, alpha: float) -> bool:
        entry = {"name": "q", "use": "contamination", "generate": {"count": count}}
        entry |= {"doses": [0, 4], "options": {"choices": choices}}
        return clearly_found(*assigned(entry), alpha, Assumed())

    assert clear(64, 4, 0.05 / 200)
    assert not clear(20, 4, 0.05)
    assert not clear(40, 2, 0.05 / 200)


@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_units_that_are_all_alike_tell_no_smallest_detectable_effect(effect: float) -> None:
    comparison = comparison_of(40)
    outcome = OutcomeSpec("x", "share of right answers", "accuracy", "more", low=0.0, high=1.0)
    values = effect * comparison.score[comparison.arms]
    found = estimate(values, None, comparison, 0.05)
    assert detectable(outcome, values, None, comparison, found, 0.05, 1, 100).size is None
