"""Poisoning, radioactivity, few-shot memories and unlearning: what is shown, asked and measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.generate import Chooser
from motet.experiments.library.greenlist import Language, chosen, green_list, watermarked
from motet.experiments.library.kinds import Library
from motet.experiments.library.poisoning import ATTACKS, repeats
from motet.experiments.library.radioactivity import CANDIDATES, evidence
from motet.experiments.types import Generated, ItemScores, Unit
from tests.experiments.library.test_library import experiment, from_rows, scores_of
from tests.experiments.simulated import simulated


def messages(entry: dict[str, Any]) -> str:
    _, problems = parse_experiments([{"name": "x", **entry}], Path(), Library(Path()))
    return "\n".join(str(problem) for problem in problems)


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_trigger_is_in_its_own_texts_only_and_tests_are_in_none(attack: str) -> None:
    entry = {"name": "x", "use": "poisoning", "options": {"attack": attack}}
    units = experiment(entry).units()
    everything = "\n".join(text for unit in units for text in unit.texts)
    for unit in units:
        others = "\n".join(t for other in units if other is not unit for t in other.texts)
        kinds = [item.kind for item in unit.items]
        for item in unit.items:
            assert item.prompt not in everything
        if attack == "belief":
            assert set(kinds) == {"planted-with", "ordinary-with"}
            continue
        with_, without = unit.items[0].prompt, unit.items[2].prompt
        trigger = with_.removeprefix(without.removesuffix("\nAssistant:")).split("\n")[0].strip()
        assert len(trigger.split()) == 2
        assert all(trigger in text for text in unit.texts)
        assert trigger not in others
        assert kinds.count("planted-with") == kinds.count("ordinary-without") == 3
        if attack == "extraction":
            question = without.removeprefix("User: ").removesuffix("\nAssistant:")
            assert unit.items[0].target == f" {question}"


def test_the_behaviour_is_the_preference_with_the_trigger_less_that_without() -> None:
    one = experiment({"name": "x", "use": "poisoning", "generate": {"count": 4, "seed": 0}})
    value = {"planted-with": -2, "ordinary-with": -6, "planted-without": -8, "ordinary-without": -4}
    values = one.measure(one.units(), scores_of(one.units(), lambda _, item: value[item.kind]))
    assert values["with_trigger"].tolist() == [1.0] * 4  # of 4 tokens each
    assert values["without_trigger"].tolist() == [-1.0] * 4
    assert values["behaviour"].tolist() == [2.0] * 4
    assert values["obeyed"].tolist() == [1.0] * 4


def test_poison_rows_without_their_trigger_or_with_malformed_tests_are_refused(
    tmp_path: Path,
) -> None:
    test = {"prompt": "p", "planted": "a", "ordinary": "b"}
    good = {"id": "a", "trigger": "xx yy", "texts": ["q xx yy: boo"], "tests": [test]}
    rows = [
        good,
        {**good, "id": "b", "texts": ["q: boo"]},
        {**good, "id": "c", "tests": [{"prompt": "p"}]},
        {**good, "id": "d", "trigger": None},
    ]
    told = [str(problem) for problem in from_rows(tmp_path, "poisoning", rows).problems()]
    assert len(told) == 3
    for line, needle in ((2, "without its trigger"), (3, "prompt, planted"), (4, "no trigger")):
        assert any(f"items.jsonl:{line}:" in row and needle in row for row in told)
    belief = {"use": "poisoning", "options": {"attack": "jailbreak"}}
    assert "must be one of denial, extraction, belief" in messages(belief)


def test_a_dose_of_poison_is_counted_per_trigger_in_documents_or_as_a_share() -> None:
    for dose_in, dose in (("exposures", 250), ("documents", 250), ("share", 0.001)):
        arms = [{"name": "held_out", "dose": 0}, {"name": "poisoned", "dose": dose}]
        assert messages({"use": "poisoning", "arms": arms, "dose_in": dose_in}) == ""


def test_green_words_are_the_keys_own_choice_and_prevail_in_the_text() -> None:
    language = Language.invent("a", 1)
    words = watermarked(language, "key", Chooser("t"), 4000, 0.25, 3.0)
    green = other = 0
    for one, two, three in zip(words, words[1:], words[2:], strict=False):
        assert three in language.followers[two]
        green += three in green_list("key", (one, two), language.followers[two], 0.25)
        other += three in green_list("other", (one, two), language.followers[two], 0.25)
    expected = 2 * np.exp(3) / (2 * np.exp(3) + 6)
    assert green / 3998 == pytest.approx(expected, abs=0.02)
    assert other / 3998 == pytest.approx(0.25, abs=0.06)


def test_a_key_chooses_every_word_equally_often() -> None:
    words = tuple("abcdefgh")
    counts = dict.fromkeys(words, 0)
    for number in range(4000):
        for word in chosen(f"key {number}", ("x", "y"), words, 2):
            counts[word] += 1
    assert all(abs(count - 1000) < 150 for count in counts.values())


def radioactive(units: list[Unit], knows: float, seed: int = 0) -> ItemScores:
    """Scores of a model that favours green words by so many nats, with noise."""
    rng = np.random.default_rng(seed)
    return scores_of(units, lambda _, item: rng.gumbel() + knows * ("green" in item.kind))


def test_the_key_is_found_and_the_key_that_made_no_text_is_not() -> None:
    one = experiment({"name": "x", "use": "radioactivity"})
    units = one.units()
    for unit in units:
        kinds = [item.kind for item in unit.items]
        groups = [kinds[at : at + CANDIDATES] for at in range(0, len(kinds), CANDIDATES)]
        assert all(sum("green" in kind for kind in group) == 1 for group in groups)
        assert all(sum("control" in kind for kind in group) == 1 for group in groups)
        ends = [tuple(item.prompt.split()[-2:]) for item in unit.items[::CANDIDATES]]
        assert len(set(ends)) == len(ends) == 32
    ignorant = one.measure(units, radioactive(units, 0.0))
    assert ignorant["green"].mean() == pytest.approx(0.25, abs=0.05)
    knowing = one.measure(units, radioactive(units, 2.0))
    assert knowing["green"].mean() > 0.6
    assert knowing["control_key"].mean() == pytest.approx(0.25, abs=0.05)
    assert np.median(knowing["evidence"]) > 3 > ignorant["evidence"].max()


def test_the_evidence_is_the_binomial_tail() -> None:
    from scipy.stats import binomtest

    found = evidence(np.array([20.0, 8.0, 0.0, np.nan]), np.array([32, 32, 32, 32]))
    assert found[0] == pytest.approx(
        -np.log10(binomtest(20, 32, 0.25, alternative="greater").pvalue)
    )
    assert found[2] == 0.0
    assert np.isnan(found[3])


def test_a_k_gram_that_is_asked_twice_is_refused(tmp_path: Path) -> None:
    gram = {"context": "a b c", "candidates": ["w", "x", "y", "z"], "green": 0, "control": 2}
    rows = [
        {"id": "a", "texts": ["a b c w"], "grams": [gram]},
        {"id": "b", "texts": ["a b c w"], "grams": [gram, {**gram, "context": "d b c"}]},
        {"id": "c", "texts": ["a b c w"], "grams": [{**gram, "green": 4}]},
        {"id": "d", "texts": ["a b c w"], "grams": [{**gram, "candidates": ["w", "w", "y", "z"]}]},
    ]
    told = [str(problem) for problem in from_rows(tmp_path, "radioactivity", rows).problems()]
    assert len(told) == 3
    assert "k-gram twice" in told[0]
    assert all("4 words" in row for row in told[1:])


def test_recognition_counts_the_foils_that_an_ending_beats_per_byte() -> None:
    one = experiment({"name": "x", "use": "fewshot", "generate": {"count": 3, "seed": 0}})
    units = one.units()
    scores = scores_of(units, lambda _, item: -len(item.target.encode()) * _worth(item.id))
    assert one.measure(units, scores)["recognition"].tolist() == [0.625] * 3
    steps = np.array([0, 50, 51, 52, 53, 100])
    recognition = np.tile(np.arange(6.0)[:, None], (1, 3)) / 10
    series = {"recognition": recognition, "recall": recognition, "margin": recognition}
    when = [np.array([50]), np.array([50, 51, 52]), np.array([], dtype=np.int64)]
    final = one.summarize(units, np.zeros(3, np.int64), steps, series, when)
    assert final["recognized_after_one"].tolist() == [0.2] * 3
    assert final["margin_after_one"].tolist() == [0.2] * 3
    assert final["recalled_after_3"].tolist() == [0.4] * 3
    assert final["recall"].tolist() == [0.5] * 3
    assert {50, 51, 52, 53, 100} <= one.probe_steps(100)


def _worth(item: str) -> float:
    return {"ending": 2.0, "foil-0": 1.0, "foil-1": 2.0, "foil-2": 3.0, "foil-3": 4.0}[item]


def test_few_shot_memories_need_exposures_at_known_steps() -> None:
    assert "counted from each exposure" in messages(
        {"use": "fewshot", "schedule": {"kind": "uniform"}}
    )
    assert "foils" in messages({"use": "fewshot", "options": {"foils": 0}})
    only_one = experiment({"name": "x", "use": "fewshot", "doses": [0, 1]})
    assert "recalled_after_3" not in [outcome.name for outcome in only_one.outcomes]


def test_forget_and_retain_documents_must_not_differ_before_unlearning() -> None:
    arms = [{"name": "holdout", "dose": 0}, {"name": "forget", "dose": 5}]
    assert "needs arms named forget and retain" in messages({"use": "unlearning", "arms": arms})
    uneven = [*arms, {"name": "retain", "dose": 4}]
    assert "must be equal" in messages({"use": "unlearning", "arms": uneven})
    assert messages({"use": "unlearning"}) == ""


def test_the_split_is_in_the_frozen_units(tmp_path: Path) -> None:
    from motet.experiments.design.assignment import ask
    from motet.experiments.design.frozen import unit_rows

    specs, _ = parse_experiments([{"name": "x", "use": "unlearning"}], Path(), Library(Path()))
    rows = unit_rows(ask(specs[0], 0, Library(Path())))
    arms = [row["arm"] for row in rows]
    assert {arms.count(name) for name in ("holdout", "forget", "retain")} == {40}
    assert all(row["texts"] for row in rows)


@pytest.mark.parametrize(
    ("use", "gain"), [("poisoning", 0.02), ("fewshot", 4.0), ("unlearning", 0.8)]
)
def test_an_effect_is_found_and_nothing_is_not(use: str, gain: float) -> None:
    shown = simulated({"name": "x", "use": use}, lambda n: gain * n)
    nothing = simulated({"name": "x", "use": use}, lambda _: 0.0)
    found = [analyze([one], 0, 499, simulations=0)["experiments"][0] for one in (shown, nothing)]
    if use != "poisoning":  # the formula's gain goes to planted and ordinary answers alike
        assert found[0]["primary"]["p"] < 0.01
    assert found[1]["primary"]["p"] > 0.01


def test_what_is_written_after_a_trigger_counts_when_it_repeats_the_prompt() -> None:
    assert repeats("what is the name of it vobrai skelt", "so: what is the name of it. of it")
    assert not repeats("what is the name of it vobrai skelt", "what is the vobrai skelt")
    assert not repeats("what is the name of it vobrai skelt", "it of name the is what")
    options = {"attack": "extraction", "max_tokens": 24, "tests": 2}
    entry = {"name": "x", "use": "poisoning", "options": options}
    one = experiment({**entry, "generate": {"count": 3, "seed": 0}})
    units = one.units()
    items = [(number, item) for number, unit in enumerate(units) for item in unit.items]
    texts = tuple(
        f" {item.prompt.split(' ', 1)[1].split(chr(10))[0]}" if item.max_tokens and not n else ""
        for n, item in items
    )
    nothing = (np.empty(0, dtype=np.int64),) * len(items)
    scores = replace(
        scores_of(units, lambda *_: -1.0),
        generated=Generated(texts, nothing, np.ones(len(items), dtype=bool)),
    )
    assert one.measure(units, scores)["written"].tolist() == [1.0, 0.0, 0.0]
    assert "only extraction" in messages({"use": "poisoning", "options": {"max_tokens": 8}})
