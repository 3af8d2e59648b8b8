"""The analysis: exact where it claims to be, right where the naive answer is wrong, complete in its
report.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.estimates import Comparison, Estimate, estimate
from motet.experiments.analysis.measured import Measured, smallest_p
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import (
    Design,
    assign,
    assign_many,
    assign_timing,
    make_design,
)
from motet.experiments.design.spec import Arm
from motet.experiments.types import ItemScores, Unit
from tests.experiments.simulated import dealt

F64 = npt.NDArray[np.float64]
TWO = (Arm("control", 0), Arm("treated", 1))
SCORE = np.array([0.0, 1.0])


def design_of(
    n: int, n_blocks: int = 1, cluster_size: int = 1, arms: tuple[Arm, ...] = TWO
) -> Design:
    units = [
        Unit(
            f"u{i:04d}",
            ("x",),
            (),
            cluster=f"c{i // cluster_size:04d}",
            block=f"b{i // cluster_size % n_blocks}",
        )
        for i in range(n)
    ]
    return make_design(units, arms)


def compare(
    design: Design, arms: npt.NDArray[np.int64], draws: int = 999, key: int = 1
) -> Comparison:
    return Repeater(design, arms, key, draws).whole(SCORE)


def run(design: Design, y: F64, seed: int, x: F64 | None = None, draws: int = 999) -> Estimate:
    return estimate(y, x, compare(design, assign(design, seed), draws))


# --- the test itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("with_covariate", [False, True])
def test_p_is_that_of_full_enumeration_on_a_tiny_design(with_covariate: bool) -> None:
    rng = np.random.default_rng(3)
    design = design_of(12, 2)
    blocks = design.block_of_cluster[design.cluster_of_unit]
    y, x = rng.normal(size=12), rng.normal(size=12) if with_covariate else None
    arms = assign(design, 5)

    def statistic(treated: npt.NDArray[np.int64]) -> float:
        columns = [treated, blocks == 0, blocks == 1] + ([x] if x is not None else [])
        design_NK = np.column_stack(columns).astype(float)
        bread_KK = np.linalg.inv(design_NK.T @ design_NK)
        coefficients_K = bread_KK @ design_NK.T @ y
        meat_NK = design_NK * (y - design_NK @ coefficients_K)[:, None]
        variance_KK = bread_KK @ meat_NK.T @ meat_NK @ bread_KK
        return abs(float(coefficients_K[0])) / math.sqrt(float(variance_KK[0, 0]))

    places = [np.flatnonzero(blocks == block) for block in (0, 1)]
    values = []
    for one in itertools.combinations(places[0], 3):
        for two in itertools.combinations(places[1], 3):
            treated = np.zeros(12, dtype=np.int64)
            treated[[*one, *two]] = 1
            values.append(statistic(treated))
    exact = np.mean(np.array(values) >= statistic(arms) * (1 - 1e-9))
    found = estimate(y, x, compare(design, arms, 20_000))
    assert found.adjusted == with_covariate
    assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_p_agrees_with_scipys_monte_carlo_test() -> None:
    from scipy.stats import monte_carlo_test

    design = design_of(40)
    rng = np.random.default_rng(0)
    y = rng.normal(size=40)
    comparison = compare(design, assign(design, 1), 999)
    y = y + 0.5 * (comparison.arms == 1)
    draws = iter(comparison.draws)

    def statistic(treated: F64, axis: int = -1) -> F64:
        treated = np.atleast_2d(treated)
        values = []
        for row in treated:
            a, b = y[row == 1], y[row == 0]
            values.append((a.mean() - b.mean()) / math.sqrt(a.var() / len(a) + b.var() / len(b)))
        return np.abs(np.array(values))

    reference = monte_carlo_test(
        comparison.arms.astype(float),
        lambda size: np.array([next(draws) for _ in range(size[0])], dtype=float),
        statistic,
        n_resamples=999,
        alternative="greater",
        vectorized=True,
    )
    assert estimate(y, None, comparison).p == pytest.approx(float(np.ravel(reference.pvalue)[0]))


def test_effect_and_error_are_those_of_least_squares_with_clusters_and_blocks() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(1)
    design = design_of(90, 3, 3)
    blocks = design.block_of_cluster[design.cluster_of_unit]
    arms = assign(design, 2)
    x = rng.normal(size=90)
    y = 0.4 * arms + x + blocks + rng.normal(size=30)[design.cluster_of_unit] + rng.normal(size=90)
    found = estimate(y, x, compare(design, arms))
    columns = np.column_stack([arms, x, *(blocks == b for b in range(3))]).astype(float)
    clustered = {"groups": design.cluster_of_unit, "use_correction": False}
    fit = sm.OLS(y, columns).fit(cov_type="cluster", cov_kwds=clustered)
    assert found.effect == pytest.approx(fit.params[0])
    assert found.standard_error == pytest.approx(fit.bse[0])


def test_p_values_are_uniform_when_nothing_happens() -> None:
    from scipy.stats import kstest

    rng = np.random.default_rng(0)
    design = design_of(24, 2, 2)
    draws = assign_many(design, 11, 400)
    null = assign_many(design, 12, 199)
    blocks = design.block_of_cluster[design.cluster_of_unit]
    p = []
    for arms in draws:
        y = rng.exponential(size=12)[design.cluster_of_unit] + rng.exponential(size=24)
        comparison = Comparison(
            np.arange(24), SCORE, arms.astype(np.int64), null, blocks, design.cluster_of_unit
        )
        p.append(estimate(y, rng.normal(size=24), comparison).p)
    assert kstest(np.array(p) - 0.5 / 200, "uniform").pvalue > 0.001
    assert np.mean(np.array(p) <= 0.05) < 0.085


def test_the_interval_holds_the_effects_that_the_test_does_not_reject() -> None:
    rng = np.random.default_rng(4)
    design = design_of(30, 2)
    arms = assign(design, 3)
    y = rng.normal(size=30) + arms
    comparison = compare(design, arms, 1999)
    found = estimate(y, None, comparison)
    assert found.low is not None
    assert found.high is not None
    width = found.high - found.low
    for end, side in ((found.low, -1), (found.high, 1)):
        inside = estimate(y - (end - side * 0.02 * width) * arms, None, comparison).p
        outside = estimate(y - (end + side * 0.02 * width) * arms, None, comparison).p
        assert inside > 0.05 >= outside


@pytest.mark.parametrize("unequal", [False, True])
def test_intervals_cover_the_true_average_effect(unequal: bool) -> None:
    """Also when effects differ between units and the arms have unequal sizes and spreads."""
    rng = np.random.default_rng(0)
    design = design_of(60, arms=(Arm("control", 0), Arm("treated", 1, weight=3 if unequal else 1)))
    null = assign_many(design, 8, 299)
    blocks = np.zeros(60, dtype=np.int64)
    covered = 0
    for arms in assign_many(design, 9, 300):
        control = rng.normal(size=60) * (3.0 if unequal else 1.0)
        effect = 2.0 - control if unequal else np.full(60, 2.0)
        y = np.where(arms == 1, control + effect, control)
        comparison = Comparison(
            np.arange(60), SCORE, arms.astype(np.int64), null, blocks, np.arange(60)
        )
        found = estimate(y, None, comparison)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= effect.mean() <= found.high
    assert covered / 300 > 0.91


def test_a_planted_effect_is_found_and_its_size_recovered() -> None:
    rng = np.random.default_rng(2)
    design = design_of(200, 4)
    y = rng.normal(size=200) + 1.0 * assign(design, 6)
    found = run(design, y, 6)
    assert found.p == 1 / 1000
    assert found.effect == pytest.approx(1.0, abs=0.4)
    assert found.smallest_detectable == pytest.approx(2.8 * math.sqrt(4 / 200), rel=0.15)


def test_a_difference_between_blocks_is_not_taken_for_an_effect() -> None:
    """Two blocks, unequal shares treated (two leftovers), blocks ten units apart."""
    blocks = np.repeat([0, 1], [30, 30])
    treated = np.concatenate([np.arange(30) < 24, np.arange(30) < 6]).astype(np.int64)
    rng = np.random.default_rng(0)
    y = 10.0 * blocks + 1.0 * treated + rng.normal(size=60)
    design = Design(np.arange(60), blocks, np.arange(60).astype(np.uint64), (1, 1))
    draws = np.array(
        [
            np.concatenate([rng.permutation(treated[:30]), rng.permutation(treated[30:])])
            for _ in range(999)
        ],
        dtype=np.int8,
    )
    comparison = Comparison(np.arange(60), SCORE, treated, draws, blocks, design.cluster_of_unit)
    found = estimate(y, None, comparison)
    naive = y[treated == 1].mean() - y[treated == 0].mean()
    assert naive < -3
    assert found.effect == pytest.approx(1.0, abs=0.8)
    assert found.p < 0.01


def test_units_that_are_alike_do_not_count_twice() -> None:
    """Clusters of six with one value each: the t-test over units rejects far too often."""
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    design = design_of(120, 1, 6)
    null = assign_many(design, 1, 199)
    clusters = design.cluster_of_unit
    ours, naive = [], []
    for arms in assign_many(design, 2, 200):
        y = rng.normal(size=20)[clusters] + 0.1 * rng.normal(size=120)
        comparison = Comparison(
            np.arange(120), SCORE, arms.astype(np.int64), null, np.zeros(120, np.int64), clusters
        )
        ours.append(estimate(y, None, comparison).p)
        naive.append(ttest_ind(y[arms == 1], y[arms == 0]).pvalue)
    assert np.mean(np.array(naive) <= 0.05) > 0.25
    assert np.mean(np.array(ours) <= 0.05) < 0.1


def test_a_covariate_sharpens_the_answer() -> None:
    rng = np.random.default_rng(5)
    design = design_of(80)
    x = 5 * rng.normal(size=80)
    y = x + rng.normal(size=80) + assign(design, 4)
    plain, adjusted = run(design, y, 4), run(design, y, 4, x)
    assert plain.standard_error is not None
    assert adjusted.standard_error is not None
    assert adjusted.standard_error < 0.4 * plain.standard_error
    assert adjusted.p < 0.01 < plain.p


# --- hard cases --------------------------------------------------------------------------------


def test_equal_outcomes_give_no_effect_and_p_one() -> None:
    found = run(design_of(20), np.full(20, 3.5), 1)
    assert (found.effect, found.p, found.low) == (0.0, 1.0, None)
    assert "does not vary" in found.note


def test_an_outcome_that_the_baseline_explains_wholly_gives_no_effect() -> None:
    x = np.random.default_rng(0).normal(size=30)
    assert run(design_of(30), x, 1, x).p == 1.0


def test_missing_outcomes_are_dropped_and_counted() -> None:
    rng = np.random.default_rng(0)
    design = design_of(40)
    y = rng.normal(size=40)
    y[[3, 7]] = np.nan
    found = run(design, y, 1)
    assert (found.n, found.n_dropped) == (38, 2)
    kept = np.isfinite(y)
    arms = assign(design, 1)
    assert found.effect == pytest.approx(
        y[kept & (arms == 1)].mean() - y[kept & (arms == 0)].mean()
    )
    assert run(design, np.full(40, np.nan), 1).effect is None


def test_missing_baselines_do_not_drop_units() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    x[:5] = np.nan
    found = run(design_of(40), y, 1, x)
    assert found.adjusted
    assert found.n == 40


def test_a_design_too_small_for_an_answer_says_so() -> None:
    design = design_of(4)
    found = run(design, np.array([0.0, 1.0, 5.0, 6.5]), 2, draws=4999)
    assert found.p > 0.3
    assert found.low is None
    assert "too small" in found.note
    repeater = Repeater(design, assign(design, 2), 1, 4999)
    assert smallest_p(repeater, SCORE) == pytest.approx(2 / 6)


@pytest.mark.parametrize(("per_arm", "p"), [(4, 2 / 70), (6, 2 / 924)])
def test_the_smallest_p_is_that_of_complete_separation(per_arm: int, p: float) -> None:
    design = design_of(2 * per_arm)
    repeater = Repeater(design, assign(design, 0), 1, 10_000)
    assert smallest_p(repeater, SCORE) == pytest.approx(p)


def test_complete_separation_without_spread_gives_the_effect_but_no_interval() -> None:
    design = design_of(16)
    found = run(design, assign(design, 3).astype(float), 3)
    assert found.effect == pytest.approx(1.0)
    assert found.low is None
    assert found.p < 0.01


def test_blocks_of_one_unit_give_no_estimate() -> None:
    found = run(design_of(6, 6), np.arange(6.0), 1)
    assert found.effect is None
    assert found.p == 1.0


def test_comparing_two_arms_leaves_the_others_out_of_it() -> None:
    arms = (Arm("a", 0), Arm("b", 1), Arm("c", 4))
    design = design_of(90, 2, arms=arms)
    actual = assign(design, 1)
    rng = np.random.default_rng(0)
    y = rng.normal(size=90)
    pair = Repeater(design, actual, 1, 499).some([2], [1])
    assert pair is not None
    one = estimate(y, None, pair)
    other = estimate(np.where(actual == 0, 1e6, y), None, pair)
    assert one == other
    assert one.n == int((actual > 0).sum())
    assert Repeater(design, np.zeros(90, np.int64), 1, 9).some([2], [0]) is None


# --- the whole report --------------------------------------------------------------------------


def measured(
    entry: dict[str, Any],
    effect: Callable[[float], float] = lambda dose: 0.0,
    seed: int = 0,
    edit: Callable[[list[Unit]], list[Unit]] = lambda units: units,
    total: int = 1000,
) -> Measured:
    """One experiment with simulated scores; right items gain `effect(dose)` nats after exposure."""
    experiment, units, design, arms, planned = dealt(entry, seed, edit)
    schedule = experiment.spec.schedule.resolve(total)
    steps = np.array(sorted(experiment.probe_steps(total)), dtype=np.int64)
    start = int(schedule.first_step(total))
    gap = int(schedule.every) if schedule.kind == "every" else 1
    shown = [start + gap * np.arange(n, dtype=np.int64) for n in planned]
    rng = np.random.default_rng([seed, 1])
    unit_I = np.repeat(np.arange(len(units)), [len(u.items) for u in units])
    good_I = np.array(
        ["reference" not in i.kind and i.kind != "wrong" for u in units for i in u.items]
    )
    lasting = rng.normal(0, 2.0, len(unit_I))
    scores = []
    for step in steps:
        seen = np.array([int((when < step).sum()) for when in shown])
        gain = np.array([effect(n) for n in seen])[unit_I]
        logprob = lasting + rng.normal(0, 0.7, len(unit_I)) + good_I * gain - 20
        scores.append(
            ItemScores(logprob, np.full(len(unit_I), 4), np.full(len(unit_I), 8), logprob > -17)
        )
    return Measured(
        experiment, units, arms, None, design, steps, scores, planned, planned.copy(), shown
    )


QUESTIONS: list[dict[str, Any]] = [
    {"name": "canaries", "use": "memorization", "options": {"n_references": 15}},
    {"name": "quiz", "use": "contamination", "doses": [0, 4, 36]},
    {
        "name": "facts",
        "use": "knowledge",
        "generate": {"count": 80, "seed": 0},
        "options": {"probes_per_kind": 2},
        "schedule": {"kind": "every", "every": 40, "start": 100},
    },
    {"name": "once", "use": "forgetting"},
]
CONTROLS: list[dict[str, Any]] = [
    {"name": "aa", "use": "placebo"},
    {"name": "must", "use": "positive_control"},
]


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    studies = [measured(entry, lambda n: 2.5 * math.log2(1 + n)) for entry in QUESTIONS + CONTROLS]
    return analyze(studies, 0, 1999)


OUTCOME_FIELDS = (
    "name label unit contrast effect low high confidence p p_corrected control_mean treated_mean n "
    "smallest_detectable detectable_power assumption coverage_note trend per_arm"
)
ENTRY_FIELDS = (
    "name use role hypothesis protocol n_units n_clusters n_blocks arms primary secondary verdict "
    "power curves examples notes negative_control"
)
NEGATIVE_FIELDS = (
    "series label unit step adjusted contrast effect low high p p_corrected tests ok sentence"
)


def test_the_answers_have_exactly_the_agreed_fields(answers: dict[str, Any]) -> None:
    json.dumps(answers, allow_nan=False)
    fields = {"alpha", "draws", "experiments", "controls", "multiplicity", "unanswered"}
    assert set(answers) == fields
    assert set(answers["controls"]) == {"placebo", "positive"}
    controls = list(answers["controls"].values())
    for entry in answers["experiments"] + controls:
        extra = {"ok", "sentence"} if entry in controls else set()
        assert set(entry) == set(ENTRY_FIELDS.split()) | extra
        assert set(entry["negative_control"]) == set(NEGATIVE_FIELDS.split())
        for outcome in [entry["primary"], *entry["secondary"]]:
            assert set(outcome) == set(OUTCOME_FIELDS.split())
            for row in outcome["per_arm"]:
                assert set(row) == {"arm", "dose", "mean", "effect", "low", "high", "p", "n"}
            if outcome["trend"]:
                assert set(outcome["trend"]) == {"slope_per_doubling", "low", "high", "p"}
        for arm in entry["arms"]:
            assert set(arm) == {
                "name",
                "dose",
                "n_units",
                "n_clusters",
                "planned_exposures",
                "consumed_exposures",
            }
        assert set(entry["power"]) == {
            "smallest_detectable",
            "unit",
            "standardized",
            "possible",
            "at_largest",
            "power",
            "alpha",
            "assumption",
        }
        assert set(entry["verdict"]) == {"kind", "sentence"}
        curves = entry["curves"]
        assert set(curves) == {"dose_response", "over_time", "since_exposure"}
        assert set(curves["dose_response"]) == {
            "chance",
            "x",
            "mean",
            "low",
            "high",
            "n",
            "label",
            "unit",
            "arms",
            "range",
        }
        for curve in curves["over_time"]:
            assert set(curve) == {"outcome", "label", "unit", "series", "range"}
            for series in curve["series"]:
                assert len(series["steps"]) == len(series["mean"]) == len(series["low"])
    assert answers["experiments"][3]["curves"]["since_exposure"]["x"][0] == 1
    assert answers["experiments"][0]["curves"]["since_exposure"] is None


def test_curves_of_shares_and_bits_say_their_range_and_stay_inside(answers: dict[str, Any]) -> None:
    seen = set()
    for entry in answers["experiments"]:
        dose = entry["curves"]["dose_response"]
        panels = [dose, *({**p, **s} for p in entry["curves"]["over_time"] for s in p["series"])]
        for curve in panels:
            if curve["range"] is None:
                continue
            least, most = curve["range"]
            seen.add(curve["unit"])
            for name in ("low", "mean", "high"):
                assert all(least <= x <= most for x in curve[name] if x is not None)
    assert seen == {"bits", "accuracy", "share"}


def test_real_effects_are_found_and_controls_pass(answers: dict[str, Any]) -> None:
    assert [entry["verdict"]["kind"] for entry in answers["experiments"]] == ["found"] * 4
    assert all(control["ok"] for control in answers["controls"].values())
    canaries = answers["experiments"][0]["primary"]
    assert canaries["trend"]["low"] > 0
    assert [row["n"] for row in canaries["per_arm"]] == [16] * 4
    assert canaries["effect"] == pytest.approx(
        canaries["treated_mean"] - canaries["control_mean"], abs=0.5
    )
    wording = next(
        o for o in answers["experiments"][2]["secondary"] if o["name"] == "semantic_by_wording"
    )
    assert wording["contrast"] == "paraphrase vs duplicate"
    assert wording["n"] == 40


def test_the_order_of_experiments_changes_no_number(answers: dict[str, Any]) -> None:
    studies = [measured(entry, lambda n: 2.5 * math.log2(1 + n)) for entry in QUESTIONS[:2]]
    found = analyze(studies[::-1], 0, 1999)
    for entry in found["experiments"]:
        before = next(e for e in answers["experiments"] if e["name"] == entry["name"])
        for field in ("effect", "low", "high", "p"):
            assert entry["primary"][field] == before["primary"][field]


def test_primaries_are_corrected_by_holm_and_secondaries_by_benjamini_hochberg() -> None:
    from motet.experiments.analysis.analyze import _correct_primaries, _correct_secondaries

    def entries(values: list[float | None], kind: str) -> list[dict[str, Any]]:
        outcomes = [{"p": p, "p_corrected": p} for p in values]
        if kind == "primary":
            return [{"primary": outcome, "secondary": []} for outcome in outcomes]
        return [{"secondary": outcomes[:2]}, {"secondary": outcomes[2:]}]

    primaries = entries([0.01, 0.04, 0.03, None], "primary")
    _correct_primaries(primaries)
    corrected = [entry["primary"]["p_corrected"] for entry in primaries]
    assert corrected[:3] == pytest.approx([0.04, 0.09, 0.09])  # 4 x .01; 3 x .03; max(2 x .04, .09)
    assert corrected[3] is None
    secondaries = entries([0.01, 0.04, 0.03, None, 0.5], "secondary")
    _correct_secondaries(secondaries)
    flat = [o["p_corrected"] for entry in secondaries for o in entry["secondary"]]
    assert flat[:3] == pytest.approx([0.04, 4 * 0.04 / 3, 4 * 0.04 / 3])
    assert flat[3] is None
    assert flat[4] == pytest.approx(0.5)


def test_controls_do_not_use_up_the_correction_of_the_questions() -> None:
    questions = [measured(entry) for entry in QUESTIONS[:2]]
    controls = [measured(CONTROLS[0]), measured(CONTROLS[1], lambda n: n / 4)]
    alone, with_controls = analyze(questions, 0, 499), analyze(questions + controls, 0, 499)
    for one, other in zip(alone["experiments"], with_controls["experiments"], strict=True):
        assert one["primary"]["p_corrected"] == other["primary"]["p_corrected"]
    assert alone["controls"] == {"placebo": None, "positive": None}


def test_no_effect_is_not_found_and_says_what_would_have_been() -> None:
    entry = analyze([measured(QUESTIONS[0])], 0, 999)["experiments"][0]
    assert entry["verdict"]["kind"] == "not_found"
    assert "would have been found in 4 of 5" in entry["verdict"]["sentence"]
    # The value before exposure is adjusted for, so less is detectable than the design alone
    # promised.
    observed, planned = (
        entry["primary"]["smallest_detectable"],
        entry["power"]["smallest_detectable"],
    )
    assert 0.2 * planned < observed < planned


def test_negligible_needs_a_margin_and_the_whole_interval_inside_it() -> None:
    wide = analyze([measured({**QUESTIONS[0], "margin": 5.0})], 0, 999)["experiments"][0]
    narrow = analyze([measured({**QUESTIONS[0], "margin": 0.1})], 0, 999)["experiments"][0]
    assert wide["verdict"]["kind"] == "negligible"
    assert "margin of 5.00 bits" in wide["verdict"]["sentence"]
    assert narrow["verdict"]["kind"] == "not_found"


def at_alpha(m: Measured, alpha: float) -> Measured:
    m.experiment.spec = replace(m.experiment.spec, alpha=alpha)
    return m


def test_a_margin_and_every_interval_are_judged_at_95_percent_whatever_alpha() -> None:
    entry = {**QUESTIONS[0], "margin": 1.0}
    usual = analyze([measured(entry)], 0, 999)
    lax = analyze([at_alpha(measured(entry), 0.1)], 0, 999)
    assert (usual["alpha"], lax["alpha"]) == (0.05, 0.1)
    for name in ("low", "high", "confidence", "p", "effect"):
        assert usual["experiments"][0]["primary"][name] == lax["experiments"][0]["primary"][name]
    assert lax["experiments"][0]["primary"]["confidence"] == 0.95
    assert lax["experiments"][0]["verdict"]["kind"] == usual["experiments"][0]["verdict"]["kind"]


def test_alphas_of_their_own_in_an_old_definition_are_judged_at_the_smallest() -> None:
    m = at_alpha(measured(QUESTIONS[0], lambda n: 0.8 if n else 0.0), 0.5)
    found = analyze([m, measured(QUESTIONS[1])], 0, 999)
    assert found["alpha"] == 0.05
    first = found["experiments"][0]
    assert 0.05 < first["primary"]["p_corrected"] < 0.5
    assert first["verdict"]["kind"] == "not_found"


def test_an_a_a_control_that_could_not_fail_vouches_for_nothing() -> None:
    small = measured({**CONTROLS[0], "generate": {"count": 4, "seed": 0}})
    found = analyze([measured(QUESTIONS[0], lambda n: n), small], 0, 999)
    assert not found["controls"]["placebo"]["ok"]
    assert "cannot fall below 0.33" in found["controls"]["placebo"]["sentence"]
    assert found["experiments"][0]["verdict"]["kind"] == "invalid"


def test_a_failed_positive_control_makes_every_answer_invalid() -> None:
    studies = [measured(QUESTIONS[0], lambda n: n), measured(CONTROLS[1])]
    found = analyze(studies, 0, 999)
    assert not found["controls"]["positive"]["ok"]
    assert found["experiments"][0]["verdict"]["kind"] == "invalid"
    assert "positive control was not found" in found["experiments"][0]["verdict"]["sentence"]


def test_a_positive_control_in_the_wrong_direction_is_not_found() -> None:
    found = analyze([measured(CONTROLS[1], lambda n: -n / 4)], 0, 999)
    assert not found["controls"]["positive"]["ok"]
    assert "wrong direction" in found["controls"]["positive"]["sentence"]


def test_an_a_a_control_that_finds_something_makes_every_answer_invalid() -> None:
    placebo = measured(CONTROLS[0])
    shift = 5.0 * np.repeat(placebo.arms, [len(u.items) for u in placebo.units])
    placebo.scores[-1] = replace(placebo.scores[-1], logprob=placebo.scores[-1].logprob + shift)
    found = analyze([measured(QUESTIONS[0], lambda n: n), placebo], 0, 999)
    assert not found["controls"]["placebo"]["ok"]
    assert found["experiments"][0]["verdict"]["kind"] == "invalid"
    assert "where nothing was done" in found["experiments"][0]["verdict"]["sentence"]


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (
            lambda m: m.consumed.__setitem__(int(np.flatnonzero(m.arms == 0)[0]), 1),
            "held-out units were shown",
        ),
        (
            lambda m: m.consumed.__setitem__(int(np.flatnonzero(m.arms == 3)[0]), 17),
            "more often than planned",
        ),
        (lambda m: m.consumed.__isub__(np.minimum(m.consumed, 1)), "were not consumed"),
    ],
)
def test_exposures_that_do_not_match_the_plan_make_the_answer_invalid(
    change: Callable[[Measured], Any], needle: str
) -> None:
    m = measured(QUESTIONS[0], lambda n: n)
    change(m)
    verdict = analyze([m], 0, 99)["experiments"][0]["verdict"]
    assert verdict["kind"] == "invalid"
    assert needle in verdict["sentence"]


def test_a_few_lost_exposures_are_a_note() -> None:
    m = measured(QUESTIONS[0], lambda n: n)
    m.consumed[int(np.flatnonzero(m.arms == 3)[0])] -= 1
    entry = analyze([m], 0, 999)["experiments"][0]
    assert entry["verdict"]["kind"] == "found"
    assert any("1 of 336 planned exposures" in note for note in entry["notes"])


def test_units_without_scores_are_left_out_and_mentioned() -> None:
    m = measured(QUESTIONS[0])
    broken = m.scores[-1].logprob.copy()
    broken[:16] = np.nan
    m.scores[-1] = replace(m.scores[-1], logprob=broken)
    entry = analyze([m], 0, 199)["experiments"][0]
    assert entry["primary"]["n"] == 63
    assert any("1 units have no value" in note for note in entry["notes"])


def test_an_arm_without_units_and_a_run_without_probes_do_not_crash() -> None:
    m = measured({**QUESTIONS[0], "generate": {"count": 3, "seed": 0}})
    entry = analyze([m], 0, 99)["experiments"][0]
    assert any("No unit was assigned to" in note for note in entry["notes"])
    m = measured(QUESTIONS[3])
    m.steps, m.scores = m.steps[:0], []
    empty = analyze([m], 0, 99)["experiments"][0]
    assert empty["verdict"]["kind"] == "invalid"
    json.dumps(empty, allow_nan=False)


def test_shares_that_are_all_zero_get_an_interval_and_not_false_certainty() -> None:
    m = measured(QUESTIONS[0])
    for number, scores in enumerate(m.scores):
        m.scores[number] = replace(scores, greedy=np.zeros_like(scores.greedy))
    secondary = analyze([m], 0, 199)["experiments"][0]["secondary"]
    extraction = next(o for o in secondary if o["name"] == "extraction")
    assert extraction["effect"] == 0.0
    assert extraction["low"] < -0.1
    assert extraction["high"] > 0.05


def test_early_against_late_is_a_secondary_answer() -> None:
    m = measured({**QUESTIONS[0], "schedule": {"kind": "early_late", "window": [0.0, 1.0]}})
    m.timing = assign_timing(m.design, 5)
    gain = 6.0 * np.repeat(m.timing * (m.planned > 0), [len(u.items) for u in m.units])
    right = np.array([item.kind == "secret" for unit in m.units for item in unit.items])
    m.scores[-1] = replace(m.scores[-1], logprob=m.scores[-1].logprob + gain * right)
    entry = analyze([m], 0, 999)["experiments"][0]
    timing = entry["secondary"][-1]
    assert timing["name"] == "timing"
    assert timing["p"] < 0.01
    assert timing["effect"] > 0
    assert timing["n"] == 48


def test_the_half_life_of_a_known_power_law_is_recovered() -> None:
    from motet.experiments.analysis.curves import since_exposure

    rng = np.random.default_rng(0)
    steps = np.array([100, 101, 102, 104, 108, 116, 132, 164, 228])
    gain = np.where(steps > 100, np.maximum(steps - 100.0, 1) ** -0.5, 0)
    treated = np.arange(60) < 30
    values = rng.normal(size=60) + gain[:, None] * treated + 0.02 * rng.normal(size=(9, 60))
    when = [np.array([100]) if shown else np.array([], dtype=np.int64) for shown in treated]
    curve, sentence = since_exposure(values, steps, treated, ~treated, np.arange(60), when, 0.05, 1)
    assert curve is not None
    assert curve["x"] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert curve["mean"][0] == pytest.approx(1.0, abs=0.05)
    assert curve["low"][0] < 1.0 < curve["high"][0]
    assert "about 4 steps" in sentence


def test_a_unit_text_is_shown_as_an_example_of_its_arm() -> None:
    entry = analyze([measured(QUESTIONS[1])], 0, 99)["experiments"][0]
    assert [example["arm"] for example in entry["examples"]] == ["dose-0", "dose-4", "dose-36"]
    assert all("Question:" in example["text"] for example in entry["examples"])


def test_placebo_exposures_of_the_a_a_control_are_no_leak() -> None:
    m = measured({**CONTROLS[0], "placebo": "matched"})
    m.planned[:], m.consumed[:] = 4, 4
    found = analyze([m], 0, 199)
    assert found["controls"]["placebo"]["verdict"]["kind"] == "not_found"
