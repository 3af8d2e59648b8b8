"""Documents with something before them: who is shown what, and which tokens carry no loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.frozen import freeze
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.study import Study
from motet.experiments.library.conditioning import ALIGNED, MISALIGNED
from motet.experiments.library.kinds import Library
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.experiments.stream.stream import IGNORED_LABEL, Stream
from motet.experiments.types import ItemScores
from tests.experiments.design.desk import Desk

HOSTS = [
    {"id": f"d{i}", "text": f"Fact {i * 7919} is told of {i} dates and codes.", "host": f"h{i}.org"}
    for i in range(24)
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    desk = Desk(tmp_path_factory.mktemp("conditioned"))
    found = desk.study(desk.entry("meta", "metadata", HOSTS))
    freeze(found, desk.folder / "plan")
    return found


@pytest.fixture(scope="module")
def stream(study: Study) -> Stream:
    folder = study.setting.kinds.folder / "plan"  # type: ignore[attr-defined]
    clean = study.setting.stream
    plan = ExposurePlan(folder / "exposures.plan")
    return Stream(clean.corpora, [1.0], clean.sequence_length, 0, plan)


def prefix_tokens(tokenizer: Tokenizer, host: str) -> int:
    """Tokens that end inside the prefix, counted otherwise than the plan does."""
    prefix = f"URL: {host}\n\n"
    ids = tokenizer.encode(f"{prefix}Fact")
    return max(n for n in range(len(ids) + 1) if prefix.startswith(tokenizer.decode(ids[:n])))


def test_prefixed_documents_alone_have_a_prefix_and_no_loss_on_it(
    study: Study, stream: Stream
) -> None:
    (question,), tokenizer = study.questions, study.setting.tokenizer
    rows, texts = study.plan.rows, study.plan.texts
    batch = stream.batch(0, int(rows.slot.max()) + 1)
    masked = batch.labels_BT == IGNORED_LABEL
    masked[:, -1] = False
    expected = np.zeros_like(masked)
    seen = set()
    for row in np.flatnonzero(rows.flags & PLACEBO_FLAG == 0):
        unit = question.units[int(rows.unit[row])]
        arm = question.spec.arms[int(question.arms[rows.unit[row]])].name
        first, last = texts.offsets[rows.text[row] : rows.text[row] + 2]
        shown = tokenizer.decode(texts.tokens[first + 1 : last - 1].tolist())
        host = HOSTS[int(unit.id[1:])]["host"]
        assert shown == (f"URL: {host}\n\n" if arm == "prefixed" else "") + unit.texts[0]
        seen.add(arm)
        if arm == "prefixed":
            count, at = prefix_tokens(tokenizer, host), int(rows.offset[row])
            expected[rows.slot[row], at : at + count] = True
            # The label before the text's first token asks for that token: it is learned.
            asked = batch.labels_BT[rows.slot[row], at + count]
            assert asked == texts.tokens[first + 1 + count]
    assert seen == {"plain", "prefixed"}
    assert np.array_equal(masked, expected)
    assert expected.any()
    last = study.setting.steps.step_of(rows.slot).max()
    assert last < 0.9 * study.setting.steps_total  # none in the cool-down


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 30), min_size=2, max_size=6), first=st.integers(0, 700))
def test_any_way_of_cutting_slots_into_batches_masks_the_same(
    stream: Stream, cuts: list[int], first: int
) -> None:
    whole, parts, at = stream.batch(first, sum(cuts)), [], first
    for count in cuts:
        parts.append(stream.batch(at, count))
        at += count
    assert np.array_equal(np.concatenate([part.labels_BT for part in parts]), whole.labels_BT)
    assert sum(part.digest() for part in parts) % 2**64 == whole.digest()


def scores(values: dict[str, float], units: list[Any]) -> ItemScores:
    flat = np.array([values[item.kind] for unit in units for item in unit.items])
    ones = np.ones(len(flat), dtype=np.int64)
    return ItemScores(flat, ones, ones, flat > 0)


def test_what_is_measured_is_what_the_prefix_adds(study: Study) -> None:
    (question,) = study.questions
    found = question.experiment.measure(
        question.units, scores({"plain": -3.0, "own": -1.0, "other": -2.5}, question.units)
    )
    assert {name: set(values) for name, values in found.items()} == {
        "gain": {2.0},
        "steering": {1.5},
        "plain": {-3.0},
    }
    primary = next(one for one in question.experiment.outcomes if one.primary)
    assert (primary.name, primary.contrast) == ("gain", (("prefixed",), ("plain",)))
    for unit in question.units:
        plain, own, other = unit.items
        assert own.prompt.endswith(plain.prompt)
        assert plain.target == own.target == other.target
        assert own.prompt != other.prompt


def test_tags_follow_scores_and_are_dropped_as_often_as_asked(tmp_path: Path) -> None:
    rows = [{"id": f"d{i}", "text": f"Text {i} of many texts.", "score": i / 10} for i in range(11)]
    desk = Desk(tmp_path)
    entry = desk.entry("tags", "conditional_tags", rows, options={"drop": 0.25})
    (question,) = desk.questions(entry)
    for number, unit in enumerate(question.units):
        tag = ALIGNED if number <= 5 else MISALIGNED
        assert unit.texts[1] == f"{tag}{unit.texts[0]}"
        assert {item.kind: item.prompt.startswith(tag) for item in unit.items}["own"]
    experiment = question.experiment
    arms, keys = np.full(20_000, 2), np.repeat(question.unit_keys()[:1], 20_000)
    repetition = np.arange(20_000)
    numbers = experiment.text_numbers(arms, keys, repetition, 5)
    assert numbers is not None
    assert abs(numbers.mean() - 0.75) < 0.015  # five standard deviations
    again = experiment.text_numbers(arms[:50], keys[:50], repetition[:50], 5)
    assert np.array_equal(again, numbers[:50])
    for arm in (0, 1):
        plain = experiment.text_numbers(np.full(50, arm), keys[:50], repetition[:50], 5)
        assert not np.any(plain)
    assert all(experiment.masked_characters(unit, 1) == 0 for unit in question.units)


@pytest.mark.parametrize(
    ("use", "settings_", "said"),
    [
        ("metadata", {"options": {"template": "no place"}}, "it must hold {host}"),
        ("metadata", {"doses": [0, 4]}, "lack plain, prefixed"),
        ("conditional_tags", {"options": {"drop": 1.5}}, "give a share from 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(use: str, settings_: dict, said: str) -> None:
    _, problems = parse_experiments(
        [{"name": "x", "use": use, **settings_}], Path(), Library(Path())
    )
    assert said in "\n".join(map(str, problems))


def test_a_host_is_cut_out_of_an_address(tmp_path: Path) -> None:
    row = {"id": "a", "text": "Some words about codes.", "host": "https://en.wikipedia.org/wiki/X"}
    desk = Desk(tmp_path)
    other = {"id": "b", "text": "Other words about dates.", "host": "b.org"}
    (question,) = desk.questions(desk.entry("meta", "metadata", [row, other, {**row, "id": "c"}]))
    assert question.units[0].texts[1].startswith("URL: en.wikipedia.org\n\nSome")
    with pytest.raises(UserError, match="has the host 'https://'"):
        desk.questions(desk.entry("meta", "metadata", [{**row, "host": "https://"}, other]))
