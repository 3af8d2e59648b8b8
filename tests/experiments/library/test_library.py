"""The built-in experiments: items, outcomes, and the invented units."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.design.clusters import near_duplicate_clusters
from motet.experiments.design.experiment import Experiment, resolve_probes
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.contamination import ranked_first
from motet.experiments.library.generate import Chooser, resample_secret, secret_space
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.library.knowledge import effectivity, retainability, without_outliers
from motet.experiments.library.memorization import extrapolated_exposure, sampled_exposure
from motet.experiments.types import ItemScores, Unit

INVENTING = sorted(use for use, kind in LIBRARY.items() if not kind.needs_items)


def experiment(entry: dict[str, Any], base: Path = Path()) -> Experiment:
    specs, problems = parse_experiments([entry], base, Library(base))
    assert not problems, problems
    return LIBRARY[specs[0].use](specs[0])


def from_rows(tmp_path: Path, use: str, rows: list[Any], **settings: Any) -> Experiment:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    return experiment({"name": "x", "use": use, "items": "items.jsonl", **settings}, tmp_path)


def scores_of(units: list[Unit], value: Any) -> ItemScores:
    """Item scores from a function of (unit, item)."""
    pairs = [(unit, item) for unit in units for item in unit.items]
    logprob = np.array([value(unit, item) for unit, item in pairs], dtype=np.float64)
    n_bytes = np.array([len(item.target.encode()) for _, item in pairs])
    return ItemScores(logprob, np.full(len(pairs), 4), n_bytes, logprob > -1)


@pytest.mark.parametrize("use", INVENTING)
def test_invented_units_are_unique_unlike_each_other_and_stable(use: str) -> None:
    few = experiment({"name": "x", "use": use, "generate": {"count": 40, "seed": 3}}).units()
    many = experiment({"name": "x", "use": use, "generate": {"count": 300, "seed": 3}}).units()
    other = experiment({"name": "x", "use": use, "generate": {"count": 40, "seed": 4}}).units()
    assert [u.texts for u in few] == [u.texts for u in many[:40]]
    assert not {u.texts[0] for u in few} & {u.texts[0] for u in other}
    assert len({u.texts[0] for u in many}) == len({u.id for u in many}) == 300
    assert len({u.cluster for u in many}) == 300
    for unit in many:
        assert len({item.id for item in unit.items}) == len(unit.items)
        assert all(item.target.startswith(" ") and item.target.strip() for item in unit.items)
        assert all(item.prompt == item.prompt.rstrip() for item in unit.items)


def test_two_experiments_of_one_kind_never_share_an_invented_item() -> None:
    uses = ("memorization", "placebo", "positive_control")
    texts = [
        unit.texts[0]
        for name, use in [*((f"a-{use}", use) for use in uses), ("b", "memorization")]
        for unit in experiment({"name": name, "use": use}).units()
    ]
    assert len(set(texts)) == len(texts)
    assert len(set(near_duplicate_clusters(texts).tolist())) == len(texts)


def test_bad_rows_are_all_reported_with_file_and_line(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "q?", "choices": ["x", "y"], "answer": 0},
        "{not json",
        {"id": "b", "question": "q?", "choices": ["x", "x"], "answer": 0},
        {"id": "c", "question": "q?", "choices": ["x", "y"], "answer": 2},
        {"id": "d", "quesion": "q?", "choices": ["x", "y"], "answer": 0},
        {"id": "a", "question": "q2?", "choices": ["x", "y"], "answer": "y"},
        {"id": "e", "question": "", "choices": ["x", "y"], "answer": "y"},
    ]
    contamination = from_rows(tmp_path, "contamination", rows)
    with pytest.raises(UserError) as caught:
        contamination.units()
    text = str(caught.value)
    for line, needle in [
        (2, "not JSON"),
        (3, "different"),
        (4, "0 to 1"),
        (5, "did you mean 'quesion'"),
        (6, "repeats the id 'a'"),
        (7, "empty question"),
    ]:
        assert any(f"items.jsonl:{line}:" in row and needle in row for row in text.splitlines()), (
            needle
        )
    assert len(contamination.problems()) == 6


def test_an_attribute_to_block_by_must_exist(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prefix": f"p{i} is", "difficulty": i} for i in range(20)]
    good = from_rows(tmp_path, "memorization", rows, block_by=["difficulty"])
    assert [len({u.block for u in good.units()})] == [2]
    bad = from_rows(tmp_path, "memorization", rows, block_by=["dificulty"])
    assert "did you mean 'difficulty'" in str(bad.problems()[0])


def test_a_secret_is_scored_where_the_text_puts_it(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prefix": "My code is", "secret": "AB12-34", "suffix": "!"},
        {"id": "b", "prefix": "My pin is "},
    ]
    units = from_rows(tmp_path, "memorization", rows, cluster_by="none").units()
    assert units[0].texts == ("My code is AB12-34!",)
    for unit in units:
        assert unit.texts[0].startswith(unit.items[0].prompt + unit.items[0].target)
        targets = [item.target for item in unit.items]
        assert len(set(targets)) == 64
    assert all(len(item.target) == 8 and item.target[5] == "-" for item in units[0].items)
    with pytest.raises(UserError, match="one of only 100"):
        from_rows(
            tmp_path, "memorization", [{"id": "a", "prefix": "p", "secret": "12"}, rows[1]]
        ).units()


def test_a_reference_has_the_pattern_of_the_secret() -> None:
    drawn = resample_secret(Chooser("x"), "aZ9 -é")
    assert drawn[0].islower()
    assert drawn[1].isupper()
    assert drawn[2].isdigit()
    assert drawn[3:] == " -é"
    assert secret_space("aZ9 -") == 26 * 26 * 10


def test_exposure_is_the_rank_in_bits() -> None:
    references = np.arange(-63.0, 0.0)
    assert sampled_exposure(1.0, references) == 6.0
    assert sampled_exposure(-100.0, references) == 0.0
    assert sampled_exposure(-1.5, references) == 5.0
    assert math.isnan(sampled_exposure(math.nan, references))
    assert sampled_exposure(0.0, np.zeros(63)) == pytest.approx(6 - math.log2(32.5))


def test_extrapolated_exposure_agrees_with_the_true_tail_and_is_capped() -> None:
    from scipy.stats import norm, skewnorm

    rng = np.random.default_rng(0)
    surprise = skewnorm.rvs(4, size=(1, 200_000), random_state=rng)
    for z in (0.5, 0.0, -0.3):
        bits = extrapolated_exposure(np.array([-z]), -surprise, np.array([30.0]))
        assert bits[0] == pytest.approx(-np.log2(skewnorm.cdf(z, 4)), abs=0.15)
    normal = rng.normal(size=(1, 200_000))
    bits = extrapolated_exposure(np.array([4.0]), -normal, np.array([30.0]))
    assert bits[0] == pytest.approx(-np.log2(norm.cdf(-4.0)), abs=0.5)
    assert extrapolated_exposure(np.array([99.0]), -normal, np.array([29.9]))[0] == 29.9
    assert extrapolated_exposure(np.array([0.0]), np.zeros((1, 63)), np.array([30.0]))[0] < 1


def test_exposure_without_effect_has_the_stated_mean_and_spread() -> None:
    memorization = experiment({"name": "x", "use": "memorization", "options": {"n_references": 15}})
    units = memorization.units()
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            memorization.measure(units, scores_of(units, lambda *_: rng.normal()))["exposure"]
            for _ in range(50)
        ]
    )
    primary = next(o for o in memorization.outcomes if o.primary)
    assert primary.null_sd is not None
    assert values.std() == pytest.approx(primary.null_sd, rel=0.05)


def test_the_right_choice_must_beat_all_others_and_shares_a_tie() -> None:
    right = np.array([1.0, 1.0, 1.0, np.nan, 1.0])
    wrong = [np.array(v) for v in ([0.0, 0.5], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [np.nan, 0.0])]
    assert ranked_first(right, wrong)[:3].tolist() == [1.0, 0.0, 0.5]
    assert np.isnan(ranked_first(right, wrong)[3:]).all()


def test_contamination_shows_the_right_answer_and_scores_every_choice(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "2+2?", "choices": ["3", "four"], "answer": "four", "source": "s"},
        {"id": "b", "question": "1+1?", "choices": ["2", "three", "one"], "answer": 0},
    ]
    contamination = from_rows(tmp_path, "contamination", rows)
    units = contamination.units()
    assert units[0].texts == ("Question: 2+2?\nAnswer: four",)
    assert [item.kind for item in units[0].items] == ["wrong", "right"]
    assert [unit.block for unit in units] == ["source=s", "source="]
    values = contamination.measure(
        units, scores_of(units, lambda u, item: {"right": -3.0, "wrong": -4.0}[item.kind])
    )
    assert values["accuracy"].tolist() == [1.0, 1.0]
    assert values["margin"].tolist() == [1.0, 1.0]
    assert values["accuracy_per_byte"].tolist() == [1.0, 0.0]
    assert contamination.outcomes[0].chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_distractors_have_the_type_and_about_the_length_of_the_answer() -> None:
    units = experiment(
        {"name": "x", "use": "contamination", "generate": {"count": 400, "seed": 0}}
    ).units()
    right_first = np.mean([u.items[0].kind == "right" for u in units])
    assert 0.15 < right_first < 0.35
    longest = []
    for unit in units:
        targets = [item.target.strip() for item in unit.items]
        assert len(set(targets)) == 4
        assert len({target.isdigit() for target in targets}) == 1
        assert len({len(target.split()) for target in targets}) == 1
        right = next(len(i.target) for i in unit.items if i.kind == "right")
        longest.append(right == max(len(target) for target in targets) + 1)
    assert np.mean(longest) < 0.5


def test_facts_are_told_in_ten_ways_and_asked_in_words_that_no_text_uses() -> None:
    for unit in experiment({"name": "x", "use": "knowledge"}).units():
        assert len(set(unit.texts)) == 10
        everything = "\n".join(unit.texts)
        for item in unit.items:
            assert item.target.strip() in everything
            if item.kind == "memorization":
                assert item.prompt + item.target in unit.texts[0]
            else:
                assert item.prompt not in everything
    assert len(set(near_duplicate_clusters(list(unit.texts), 0.8).tolist())) == 10


def test_a_cycling_arm_needs_paraphrases(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "text": f"{i} was here.", "semantic": [{"prompt": "who", "target": str(i)}]}
        for i in range(4)
    ]
    assert "paraphrases" in str(from_rows(tmp_path, "knowledge", rows).problems()[0])
    assert from_rows(tmp_path, "knowledge", rows, doses=[0, 1]).problems() == []
    rows[2]["semantic"] = ["who"]  # type: ignore[list-item]
    problem = str(from_rows(tmp_path, "knowledge", rows, doses=[0, 1]).problems()[0])
    assert "items.jsonl:3" in problem
    assert "prompt" in problem


def test_retainability_is_what_is_left_of_the_peak() -> None:
    steps = np.array([0, 10, 20, 30])
    tracks = np.array(
        [[0, 4, 3, 2], [0, 2, 2, 1], [0, 0.01, 0, -3], [0, 9, 9, 9], [1, np.nan, np.nan, np.nan]]
    ).T
    when = [np.array([5])] * 3 + [np.array([], dtype=np.int64), np.array([5])]
    kept = retainability(steps, tracks, when)
    assert kept[:2].tolist() == [0.5, 0.5]
    assert np.isnan(kept[2:]).all()
    assert np.isnan(retainability(steps, tracks, [np.array([35])] * 5)).all()


def test_outliers_are_removed_by_the_interquartile_rule() -> None:
    values = np.array([1.0, 1.1, 0.9, 1.05, 0.95, 9.0])
    assert np.isnan(without_outliers(values)).tolist() == [False] * 5 + [True]
    assert without_outliers(values[:3]).tolist() == values[:3].tolist()


def test_effectivity_is_the_mean_jump_at_injections() -> None:
    steps = np.array([0, 10, 11, 20, 21, 30])
    track = np.array([[0.0, 0.0, 2.0, 1.0, 2.0, 1.5]]).T
    assert effectivity(steps, track, np.array([10, 20])).tolist() == [1.5]
    assert np.isnan(effectivity(steps, track, np.array([], dtype=np.int64))).all()


def test_forgetting_compares_right_after_with_just_before(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"word{i} a b c d e f g h {i}"} for i in range(3)]
    forgetting = from_rows(tmp_path, "forgetting", rows)
    units = forgetting.units()
    assert all(u.items[0].prompt + u.items[0].target == u.texts[0] for u in units)
    assert {0, 100, 101, 200} <= forgetting.probe_steps(200)
    steps = np.array([0, 100, 101, 150, 200])
    series = {"logprob": np.array([[0, 0, 0], [1, 1, 1], [3, 2, 1], [2, 2, 1], [1.5, 1, 1.0]])}
    when = [np.array([100]), np.array([], dtype=np.int64), np.array([100])]
    final = forgetting.summarize(units, np.array([1, 0, 1]), steps, series, when)
    assert final["gain"].tolist() == [2, 1, 0]
    assert final["remaining"].tolist() == [0.5, 0, 0]
    early = forgetting.summarize(
        units, np.array([1, 0, 1]), steps[:1], {"logprob": series["logprob"][:1]}, [when[1]] * 3
    )
    assert np.isnan(early["gain"]).all()


@pytest.mark.parametrize("use", INVENTING)
@pytest.mark.parametrize("total", [1, 7, 1000])
def test_probes_always_include_the_start_and_the_end_and_stay_inside(use: str, total: int) -> None:
    steps = experiment({"name": "x", "use": use}).probe_steps(total)
    assert {0, total} <= steps
    assert min(steps) >= 0
    assert max(steps) <= total


def test_a_log_grid_spreads_over_the_steps_since_exposure() -> None:
    steps = sorted(resolve_probes({"log_grid": 8}, 100, 1100))
    assert steps[0] == 101
    assert steps[-1] == 1100
    gaps = [b - a for a, b in pairwise(steps)]
    assert gaps == sorted(gaps)
    assert resolve_probes({"every": 0.25, "steps": [3], "fractions": [0.5]}, 0, 100) == {
        0,
        3,
        25,
        50,
        75,
        100,
    }


def test_missing_scores_make_missing_outcomes_and_no_crash() -> None:
    for use in INVENTING:
        one = experiment({"name": "x", "use": use, "generate": {"count": 6, "seed": 0}})
        units = one.units()
        values = one.measure(units, scores_of(units, lambda *_: math.nan))
        assert all(np.isnan(v).all() for name, v in values.items()), use


def test_the_class_in_the_documentation_works() -> None:
    import re

    root = Path(__file__).parents[3]
    code = re.findall(r"```python\n(.*?)```", (root / "docs" / "experiments.md").read_text(), re.S)[
        0
    ]
    assert (root / "examples" / "slogans.py").read_text().endswith(code)
    entry = {"name": "x", "use": "slogans.py:Slogans", "generate": {"count": 9, "seed": 1}}
    library = Library(root / "examples")
    specs, problems = parse_experiments([entry], root, library)
    assert problems == []
    slogans = library.kind(specs[0].use, "use")(specs[0])
    units = slogans.units()
    assert len(units) == 9
    assert (
        slogans.measure(units, scores_of(units, lambda *_: -2.0))["logprob"].tolist() == [-0.5] * 9
    )


def test_the_rows_in_the_documentation_are_accepted(tmp_path: Path) -> None:
    import re

    text = (Path(__file__).parents[3] / "docs" / "experiments.md").read_text()
    rows = re.findall(r'\*\*(\w+)\*\* — `(\{"id".*?\})`[;.]', text, re.S)
    assert [use for use, _ in rows] == ["memorization", "contamination", "knowledge", "forgetting"]
    for use, row in rows:
        first = json.loads(row.replace("[...]", "[]").replace("the beginning of text", "aa"))
        if use == "forgetting":
            first["text"] = "aa bb cc"
        one = from_rows(tmp_path, use, [first, {**first, "id": "other"}], doses=[0, 1])
        assert one.problems() == [], use
