"""Canaries with suffixes and membership: ranks are AUC, and intervals of AUC and TPR hold."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.separation import (
    area,
    area_interval,
    recognized,
    separation,
    threshold_interval,
)
from motet.experiments.library import lexicon
from motet.experiments.library.canaries import difference
from motet.experiments.library.generate import Chooser
from motet.experiments.library.membership import beginning, share_below, since_reference
from tests.experiments.library.test_library import experiment, from_rows, scores_of
from tests.experiments.simulated import simulated


def test_the_effect_on_ranks_is_the_area_under_the_curve_less_a_half() -> None:
    rng = np.random.default_rng(0)
    for n_shown, n_held_out in ((5, 9), (40, 40), (3, 200)):
        values = np.concatenate([rng.normal(1, 1, n_shown), rng.normal(0, 1, n_held_out)])
        values = np.round(values, 1)  # ties
        rank = share_below(values, ["all"] * len(values))
        effect = rank[:n_shown].mean() - rank[n_shown:].mean()
        assert effect == pytest.approx(area(values[:n_shown], values[n_shown:]) - 0.5)


def test_ranks_are_taken_within_groups_and_pass_over_what_is_missing() -> None:
    values = np.array([5.0, 1.0, 2.0, np.nan, 9.0])
    found = share_below(values, ["a", "a", "b", "b", "b"])
    assert found[[0, 1, 2, 4]].tolist() == [0.75, 0.25, 0.25, 0.75]
    assert math.isnan(found[3])


def test_the_area_has_the_textbook_value_and_an_interval_that_does_not_collapse() -> None:
    assert area(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    low, high = area_interval(1.0, 10, 10)
    assert high == 1.0
    assert 0.6 < low < 0.9
    assert area_interval(0.0, 10, 10)[0] == 0.0
    assert area_interval(0.5, 8, 8)[0] < 0.5 < area_interval(0.5, 8, 8)[1]


def test_intervals_of_area_and_recognition_hold_the_truth_as_often_as_they_say() -> None:
    from scipy.stats import norm

    rng, held, known = np.random.default_rng(1), np.zeros(2), 300
    true_area = float(norm.cdf(1 / math.sqrt(2)))
    true_share = float(norm.sf(norm.ppf(0.9) - 1))
    for _ in range(known):
        shown, out = rng.normal(1, 1, 40), rng.normal(0, 1, 60)
        found = separation(shown, out)
        one = found["recognized"][0]
        held += [
            found["low"] <= true_area <= found["high"],
            one["low"] <= true_share <= one["high"],
        ]
    assert np.all(held / known > 0.93), held / known


def test_too_few_non_members_leave_one_percent_of_false_alarms_unknown() -> None:
    rng = np.random.default_rng(2)
    one = recognized(rng.normal(9, 1, 50), rng.normal(0, 1, 50), 0.01, 50, 50)
    assert one["share"] == 1.0
    assert one["low"] == 0.0
    assert one["high"] == 1.0
    assert threshold_interval(np.arange(50.0), 50, 0.01)[1] == math.inf
    many = recognized(rng.normal(9, 1, 500), rng.normal(0, 1, 5000), 0.01, 500, 5000)
    assert many["low"] > 0.98


def test_a_condition_that_is_betrayed_more_than_plain_text_has_the_difference_of_both_areas() -> (
    None
):
    rng = np.random.default_rng(3)
    kind = np.repeat(["rare", "plain", "model"], [40, 80, 30])
    shown = np.tile([True, False], 75)
    values = share_below(rng.normal(0, 1, 150) + shown * (kind == "rare"), kind.tolist())
    both = difference(values, kind == "rare", kind == "plain")
    assert np.isnan(both[kind == "model"]).all()
    effects = [
        values[shown & (kind == k)].mean() - values[~shown & (kind == k)].mean()
        for k in ("rare", "plain")
    ]
    weights, total = {"rare": 40, "plain": 80}, 0.0
    for k, n in weights.items():  # least squares with a constant per block of half-treated units
        mine = kind == k
        total += n / 120 * (both[shown & mine].mean() - both[~shown & mine].mean())
    assert total == pytest.approx(effects[0] - effects[1])


def test_the_value_before_training_is_the_reference() -> None:
    steps = np.array([0, 50, 100])
    values = np.array([[1.0, 2.0], [2.0, 2.0], [5.0, 4.0]])
    assert since_reference(steps, values, 0).tolist() == [4.0, 2.0]
    assert since_reference(steps, values, 60).tolist() == [3.0, 2.0]
    assert np.isnan(since_reference(steps[1:], values[1:], 10)).all()


def test_invented_canaries_have_every_condition_equally_often_and_its_suffix() -> None:
    units = experiment({"name": "x", "use": "canaries"}).units()
    conditions = [str(unit.attributes["condition"]) for unit in units]
    assert {conditions.count(one) for one in set(conditions)} == {40}
    assert len({unit.block for unit in units}) == 10
    for unit, condition in zip(units, conditions, strict=True):
        kind, _, length = condition.partition(":")
        words = unit.items[0].target.split()
        assert unit.texts == (unit.items[0].prompt + unit.items[0].target,)
        if kind != "plain":
            assert len(words) == int(length)
        if kind == "rare":
            assert set(words) <= set(lexicon.RARE)
        if kind == "model":
            assert all(after in lexicon.followers()[word] for word, after in pairwise(words))


def test_words_are_different_and_every_word_of_the_chain_has_a_follower() -> None:
    assert len(set(lexicon.COMMON)) == len(lexicon.COMMON) > 300
    after = lexicon.followers()
    assert {word for words in after.values() for word in words} <= set(after)
    assert lexicon.chained_words(Chooser("a"), 9) == lexicon.chained_words(Chooser("a"), 9)


@pytest.mark.parametrize("conditions", ["", "rare", "rare:0", "plain plain", "model:8 other:1"])
def test_conditions_that_mean_nothing_are_refused(conditions: str) -> None:
    from pathlib import Path

    from motet.experiments.design.parser import parse_experiments
    from motet.experiments.library.kinds import Library

    entry = {"name": "x", "use": "canaries", "options": {"conditions": conditions}}
    _, problems = parse_experiments([entry], Path(), Library(Path()))
    assert [str(p).partition(": ")[0] for p in problems] == ["experiments.x.options.conditions"]
    assert "plain, rare:8" in str(problems[0])


def test_rows_of_ones_own_need_a_document_that_is_longer_than_its_prompt(tmp_path: Any) -> None:
    rows = [{"id": "a", "text": "one two three four"}, {"id": "b", "text": "a b c d e f"}]
    problems = from_rows(tmp_path, "membership", rows).problems()
    assert len(problems) == 1
    assert "no more than 4 words" in str(problems[0])
    assert beginning("a b c", 2) == "a b"
    assert beginning("a b", 2) is None


def test_membership_scores_divide_by_what_they_say() -> None:
    one = experiment({"name": "x", "use": "membership", "generate": {"count": 8, "seed": 0}})
    units = one.units()
    values = one.measure(units, scores_of(units, lambda *_: -8.0))
    assert values["logprob"].tolist() == [-2.0] * 8
    assert np.all(values["zlib"] < 0)
    assert np.isnan(values["lowest"]).all()


@pytest.mark.parametrize("use", ["canaries", "membership"])
def test_the_report_says_how_well_shown_units_are_told_from_held_out_ones(use: str) -> None:
    found = simulated({"name": "x", "use": use, "doses": [0, 8]}, lambda n: 0.8 * n)
    entry = analyze([found], 0, 199, simulations=0)["experiments"][0]
    rows = entry["separation"]
    assert {row["arm"] for row in rows} == {"dose-8"}
    groups = {row["group"] for row in rows}
    assert len(groups) == (10 if use == "canaries" else 1)
    assert all(row["low"] <= row["auc"] <= row["high"] for row in rows)
    if use == "membership":
        by_rank = entry["primary"]["treated_mean"] - entry["primary"]["control_mean"]
        auc = next(row["auc"] for row in rows if row["outcome"] == "logprob")
        assert auc == pytest.approx(by_rank + 0.5)
    assert any("AUC" in note and "false alarms" in note for note in entry["notes"])
