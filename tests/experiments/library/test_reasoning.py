"""Problems modulo 23: text and solution agree, practice and tests are apart, chance is 1 in 23."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.arithmetic import HELD_OUT_WORDING, WORDINGS, InventedWorld
from motet.experiments.library.kinds import Library
from motet.experiments.library.reasoning import CHANCE, Reasoning, parsed
from motet.experiments.types import Generated, ItemScores, Unit

QUANTITY = r"([a-z]+ of [A-Z][a-z]+)"
# What the sentences say, written down apart from the code that makes them.
SAYS: list[tuple[str, Any]] = [
    (rf"There are (\d+) {QUANTITY}", lambda v, k, q: (q, int(k))),
    (rf"There are (\d+) more {QUANTITY} than {QUANTITY}", lambda v, k, q, a: (q, int(k) + v[a])),
    (
        rf"There are (\d+) times as many {QUANTITY} as {QUANTITY}",
        lambda v, k, q, a: (q, int(k) * v[a]),
    ),
    (
        rf"There are as many {QUANTITY} as {QUANTITY} and {QUANTITY} together",
        lambda v, q, a, b: (q, v[a] + v[b]),
    ),
    (
        rf"There are as many {QUANTITY} as {QUANTITY} less {QUANTITY}",
        lambda v, q, a, b: (q, v[a] - v[b]),
    ),
    (rf"The number of {QUANTITY} is (\d+)", lambda v, q, k: (q, int(k))),
    (
        rf"The number of {QUANTITY} is (\d+) more than that of {QUANTITY}",
        lambda v, q, k, a: (q, int(k) + v[a]),
    ),
    (
        rf"The number of {QUANTITY} is (\d+) times that of {QUANTITY}",
        lambda v, q, k, a: (q, int(k) * v[a]),
    ),
    (
        rf"The number of {QUANTITY} is that of {QUANTITY} plus that of {QUANTITY}",
        lambda v, q, a, b: (q, v[a] + v[b]),
    ),
    (
        rf"The number of {QUANTITY} is that of {QUANTITY} minus that of {QUANTITY}",
        lambda v, q, a, b: (q, v[a] - v[b]),
    ),
    (rf"Somebody counted (\d+) {QUANTITY}", lambda v, k, q: (q, int(k))),
    (rf"Add (\d+) to {QUANTITY} to get {QUANTITY}", lambda v, k, a, q: (q, int(k) + v[a])),
    (rf"Take (\d+) times {QUANTITY} to get {QUANTITY}", lambda v, k, a, q: (q, int(k) * v[a])),
    (rf"Add {QUANTITY} to {QUANTITY} to get {QUANTITY}", lambda v, b, a, q: (q, v[a] + v[b])),
    (rf"Take {QUANTITY} from {QUANTITY} to get {QUANTITY}", lambda v, b, a, q: (q, v[a] - v[b])),
]


def read(problem: str) -> tuple[int, int]:
    """Solve a problem from its text alone: (answer, operations that the question needs)."""
    *sentences, question, _ = re.split(r"(?<=[.?]) ", problem)
    values: dict[str, int] = {}
    needs: dict[str, tuple[str, ...]] = {}
    left = [sentence.rstrip(".") for sentence in sentences]
    while left:
        before = len(left)
        for sentence in list(left):
            ((match, says),) = [
                (m, says) for pattern, says in SAYS if (m := re.fullmatch(pattern, sentence))
            ]
            try:
                name, value = says(values, *match.groups())
            except KeyError:
                continue
            values[name] = value % 23
            needs[name] = tuple(
                g for g in match.groups() if g in values and g != name and not g.isdigit()
            )
            left.remove(sentence)
        assert len(left) < before, f"goes in a circle: {left}"
    (asked,) = re.findall(QUANTITY, question)
    needed, queue = set(), [asked]
    while queue:
        if (one := queue.pop()) not in needed:
            needed.add(one)
            queue += needs[one]
    return values[asked], sum(bool(needs[one]) for one in needed)


def reasoning(folder: Path = Path(), **settings: Any) -> Reasoning:
    entry = {"name": "sums", "use": "reasoning", **settings}
    specs, problems = parse_experiments([entry], folder, Library(folder))
    assert not problems, problems
    made = Library(folder).kind("reasoning", "use")(specs[0])
    assert isinstance(made, Reasoning)
    return made


@settings(max_examples=60, deadline=None)
@given(
    level=st.integers(1, 14),
    seed=st.integers(0, 10**6),
    spare=st.integers(0, 5),
    practised=st.booleans(),
)
def test_the_text_alone_gives_the_answer_of_the_solution(
    level: int, seed: int, spare: int, practised: bool
) -> None:
    world = InventedWorld(["Brako", "Tolva", "Sulm"])
    problem = next(world.problems(level, spare, practised, seed))
    for wording in (*WORDINGS, HELD_OUT_WORDING):
        answer, operations = read(problem.problem(wording))
        assert answer == problem.answer == parsed(problem.solution())
        assert operations == level == problem.level
    steps = re.findall(r"= (-?\d+)(?: ([+*-]) (\d+) = (-?\d+))?(?: = (\d+))?\.", problem.solution())
    assert sum(bool(sign) for _, sign, *_ in steps) == level
    for one, sign, other, result, reduced in steps:
        if sign:
            found = {"+": int.__add__, "*": int.__mul__, "-": int.__sub__}[sign](
                int(one), int(other)
            )
            assert found == int(result)
            assert found % 23 == int(reduced or result)


def test_answers_are_spread_so_that_a_guess_is_right_once_in_23() -> None:
    world = InventedWorld(["Brako", "Tolva", "Sulm"])
    for level in (1, 4):
        answers = [one.answer for one in islice(world.problems(level, 0, True, level), 2300)]
        counts = Counter(answers)
        assert set(counts) == set(range(23))
        assert max(counts.values()) < 100 + 5 * 10, "five standard deviations"
    primary = next(
        outcome for outcome in reasoning(options={"tests": 1}).outcomes if outcome.primary
    )
    assert primary.binary
    assert primary.chance == CHANCE == 1 / 23


def test_no_problem_stands_twice_and_no_template_of_a_test_is_practised() -> None:
    world = InventedWorld(["Brako", "Tolva", "Sulm"])
    practised = list(islice(world.problems(2, 1, True, 0, "practice"), 300))
    tests = list(islice(world.problems(2, 1, False, 0, "test"), 100))
    keys = [one.key for one in (*practised, *tests)]
    assert len(set(keys)) == len(keys)
    assert not {one.template for one in practised} & {one.template for one in tests}


def test_units_share_no_text_and_follow_from_seed_and_number() -> None:
    few = reasoning(generate={"count": 9, "seed": 3}).units()
    many = reasoning(generate={"count": 12, "seed": 3}).units()
    other = reasoning(generate={"count": 9, "seed": 4}).units()
    assert few == many[:9]
    texts = [text for unit in (*many, *other) for text in unit.texts]
    assert len(set(texts)) == len(texts) == 21 * 64
    prompts = {item.prompt for unit in many for item in unit.items}
    assert len(prompts) == 12 * 5
    assert not any(text.startswith(prompt) for text in texts for prompt in prompts)
    levels = [int(str(unit.attributes["level"]).split()[0]) for unit in many]
    assert levels[:4] == [1, 2, 3, 1]
    assert len({unit.block for unit in many}) == 3
    for unit, own in zip(many, levels, strict=True):
        for text in unit.texts:
            problem, _, solution = text.partition(" Solution:")
            assert read(problem + " Solution:") == (parsed(solution), own)
        held = {item.kind for item in unit.items}
        assert held == {"new", "reworded", "longer-5"}
        for item in unit.items:
            answer, level = read(item.prompt)
            assert answer == parsed(item.target)
            assert level == (5 if item.kind == "longer-5" else own)
            assert 0 < item.max_tokens <= 160


def scores_of(units: list[Unit], write: Any) -> ItemScores:
    items = [item for unit in units for item in unit.items]
    texts = tuple(write(item) for item in items)
    ones = np.ones(len(items), dtype=np.int64)
    nothing = (np.empty(0, dtype=np.int64),) * len(items)
    return ItemScores(-1.0 * ones, ones, ones, ones > 1, Generated(texts, nothing, ones > 0))


def test_what_was_written_is_judged_by_its_first_answer() -> None:
    experiment = reasoning(generate={"count": 6, "seed": 0})
    units = experiment.units()
    right = experiment.measure(units, scores_of(units, lambda item: item.target))
    assert {name for name in right if name.startswith("accuracy")} == {
        "accuracy", "accuracy_reworded", *(f"accuracy_{level}" for level in (1, 2, 3, 5)),
    }  # fmt: skip
    assert set(right) == {outcome.name for outcome in experiment.outcomes}
    for name in ("accuracy", "accuracy_reworded", "accuracy_5"):
        assert right[name].tolist() == [1.0] * 6
    assert np.array_equal(right["accuracy_2"], [np.nan, 1, np.nan] * 2, equal_nan=True)
    nothing = experiment.measure(units, scores_of(units, lambda item: "Answer: none"))
    assert nothing["accuracy"].tolist() == [0.0] * 6
    wrong = experiment.measure(
        units,
        scores_of(units, lambda item: f" Answer: {(parsed(item.target) or 0) + 1}" + item.target),
    )
    assert wrong["accuracy"].tolist() == [0.0] * 6, "a second answer does not count"
    bare = scores_of(units, lambda item: "")
    assert experiment.measure(units, bare)["accuracy"].tolist() == [0.0] * 6


def test_settings_and_rows_that_cannot_be_are_named(tmp_path: Path) -> None:
    entry = {
        "name": "x",
        "use": "reasoning",
        "options": {"levels": [1, 20], "held_out_levels": [1]},
    }
    _, problems = parse_experiments([entry], tmp_path, Library(tmp_path))
    told = " ".join(map(str, problems))
    assert "experiments.x.options.levels: is [1, 20]; it must be different numbers" in told
    assert "has [1], which worlds practise" in told
    test = {"question": "How many?", "solution": "They are 3."}
    row = {"id": "a", "level": 1, "practice": ["One. Answer: 1"], "tests": [test]}
    (tmp_path / "items.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"items\.jsonl:1: .*has a solution without 'Answer: n'"):
        reasoning(tmp_path, items="items.jsonl").units()
