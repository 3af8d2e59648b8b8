"""What one experiment's texts tell of another's units: found, named, refused unless declared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from motet.core.errors import Problem, UserError
from motet.experiments.design import in_common, overlap
from motet.experiments.design.frozen import spec_of
from motet.experiments.design.overlap import find_leaks, find_overlaps
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.shares import shown_text
from motet.experiments.design.study import with_controls
from motet.experiments.design.wording import Told
from motet.experiments.library import generate
from motet.experiments.library.kinds import Library
from tests.experiments.design.desk import Desk, Rows, quiz

KINDS = (
    "memorization",
    "contamination",
    "knowledge",
    "forgetting",
    "positive_control",
    "placebo",
)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def told(rows: Rows) -> Rows:
    """The facts of a quiz as sentences of no template of its own."""
    found = []
    for row in rows:
        names = re.findall(r"\b[A-Z]\w+\b", row["question"])[1:]
        answer = row["choices"][row["answer"]]
        text = f"Ask anyone near {' or '.join(names)} and you will hear of {answer} again."
        found.append({"id": row["id"], "text": text})
    return found


def capitals(count: int = 20) -> tuple[Rows, Rows]:
    """Questions for capitals, and the same facts in other words."""
    names = generate.Names("capitals")
    pairs = [(names.word(i, "land"), names.word(i, "town")) for i in range(count)]
    asked = [
        {
            "id": f"c{i}",
            "question": f"What is the capital of {land}?",
            "choices": [town, *(pairs[(i + j) % count][1] for j in (1, 2))],
            "answer": 0,
        }
        for i, (land, town) in enumerate(pairs)
    ]
    told = [
        {"id": f"d{i}", "text": f"{town} has been the seat of {land}'s government since the war."}
        for i, (land, town) in enumerate(pairs)
    ]
    return asked, told


def two_lands(count: int = 20) -> tuple[Rows, Rows]:
    """Questions for many facts of two lands, and the same facts without the lands' names."""
    names = generate.Names("lands")
    words = [names.word(i, "answer") for i in range(count)]
    kinds = ("river", "peak", "port", "lake", "poet", "king", "cape", "road", "tower", "moor")
    asked = [
        {
            "id": f"q{i}",
            "question": f"What is the first {kinds[i // 2]} of {('Velmora', 'Krana')[i % 2]}?",
            "choices": [word, f"none {i}"],
            "answer": 0,
        }
        for i, word in enumerate(words)
    ]
    told = [
        {"id": f"d{i}", "text": f"Among the {kinds[i // 2]}s we admired {word} most."}
        for i, word in enumerate(words)
    ]
    return asked, told


def lower(rows: Rows) -> Rows:
    return json.loads(json.dumps(rows).lower())


def documents(count: int, seed: int, text: int = 0) -> Rows:
    path = ("documents", seed)
    return [{"id": d.id, "text": d.texts[text]} for d in generate.documents(path, count, 8)]


def facts(count: int, seed: int) -> Rows:
    return [
        {
            "id": d.id,
            "text": d.texts[0],
            "semantic": [{"prompt": p, "target": t.strip()} for p, t in d.semantic],
        }
        for d in generate.documents(("documents", seed), count, 8)
    ]


def canaries(count: int) -> Rows:
    return generate.canaries(("overlap",), count, "The access code of {holder} is", 9)


def typed(rows: Rows) -> Rows:
    return [
        {"id": row["id"], "text": f"Somebody typed {row['secret']} into machine {i} of the hall."}
        for i, row in enumerate(rows)
    ]


def of_units(found: Sequence[overlap.Overlap], name: str) -> set[int]:
    return {unit for one in found if one.told == name for unit in one.units}


@pytest.mark.parametrize(
    ("one", "other", "how"),
    [
        (("contamination", quiz()), ("contamination", quiz()), "equal"),
        (("contamination", quiz()), ("forgetting", told(quiz())), "facts"),
        (("contamination", capitals()[0]), ("forgetting", capitals()[1]), "facts"),
        (
            ("contamination", lower(capitals()[0])),
            ("forgetting", lower(capitals()[1])),
            "facts",
        ),
        (("contamination", capitals()[0]), ("forgetting", lower(capitals()[1])), "facts"),
        (("contamination", two_lands()[0]), ("forgetting", two_lands()[1]), "facts"),
        (("knowledge", facts(20, 2)), ("forgetting", documents(20, 2, 0)), "equal"),
        (("knowledge", facts(20, 2)), ("forgetting", documents(20, 2, 7)), "facts"),
        (("memorization", canaries(20)), ("forgetting", typed(canaries(20))), "probe"),
    ],
    ids=[
        "one quiz twice",
        "a quiz reworded",
        "capitals reworded",
        "in lower case",
        "only retold in lower case",
        "answers without the names that they are asked for",
        "documents twice",
        "documents reworded",
        "secrets without their prompts",
    ],
)
def test_every_unit_that_another_experiment_tells_of_is_found(
    desk: Desk, one: tuple[str, Rows], other: tuple[str, Rows], how: str
) -> None:
    more = {"doses": [0, 4]} if one[0] == "knowledge" else {}
    found = find_overlaps(
        desk.questions(desk.entry("one", *one, **more), desk.entry("two", *other))
    )
    assert of_units(found, "one") == set(range(20))
    ways = [telling.how for each in found if each.told == "one" for telling in each.links]
    assert ways.count(how) > len(ways) / 2


def test_another_template_or_a_longer_text_hides_no_copy(desk: Desk) -> None:
    rows = quiz()
    longer = [
        {**row, "text": f"From a letter of old. {row['text']} More"} for row in documents(20, 3)
    ]
    entries = [
        desk.entry("one", "contamination", rows),
        desk.entry("two", "contamination", rows, options={"template": "Q. {question} Solution:"}),
        desk.entry("three", "forgetting", documents(20, 3)),
        desk.entry("four", "forgetting", longer),
    ]
    found = find_overlaps(desk.questions(*entries))
    assert of_units(found, "one") == of_units(found, "two") == set(range(20))
    assert of_units(found, "three") == of_units(found, "four") == set(range(20))


def test_one_planted_text_among_many_is_found(desk: Desk) -> None:
    planted = [*documents(30, 4), {"id": "leak", "text": documents(10, 2, 5)[3]["text"]}]
    entries = [
        desk.entry("one", "knowledge", facts(10, 2), doses=[0, 4]),
        desk.entry("two", "forgetting", planted),
    ]
    (one, *_) = find_overlaps(desk.questions(*entries))
    assert [(t.unit, t.teller) for t in one.links] == [(3, 30)]


@pytest.mark.parametrize("count", [12, 64])
def test_invented_items_of_all_kinds_raise_no_alarm(desk: Desk, count: int) -> None:
    entries = [
        {"name": f"{kind.replace('_', '-')}-{i}", "use": kind, "generate": {"count": count}}
        for kind in KINDS
        for i in range(2)
    ]
    assert find_overlaps(desk.questions(*entries)) == []


@pytest.mark.parametrize("most", [in_common.MOST_PAIRS, 0])
def test_one_pass_over_all_texts_leaves_out_no_pair_that_tells_of_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    asked, retold = capitals()
    sides = [
        *("contamination", quiz()), *("contamination", quiz()), *("forgetting", told(quiz())),
        *("contamination", asked), *("forgetting", retold), *("forgetting", lower(retold)),
        *("knowledge", facts(20, 2)), *("forgetting", documents(20, 2, 7)),
        *("memorization", canaries(20)), *("forgetting", typed(canaries(20))),
        *("forgetting", documents(30, 9)), *("contamination", quiz(25, 8)),
        *("contamination", two_lands()[0]), *("forgetting", two_lands()[1]),
    ]  # fmt: skip
    entries = [
        desk.entry(f"e{n}", use, rows, **({"doses": [0, 4]} if use == "knowledge" else {}))  # type: ignore[arg-type]
        for n, (use, rows) in enumerate(zip(sides[::2], sides[1::2], strict=True))
    ]
    entries += [{"name": f"i{n}", "use": "contamination", "generate": {"count": 30}} for n in "abc"]
    questions = desk.questions(*entries)
    told_of = [Told(question) for question in questions]
    expected = {
        (a.question.name, b.question.name): links
        for a in told_of
        for b in told_of
        if a is not b and (links := overlap.links_between(a, b))
    }
    assert len(expected) >= 12
    monkeypatch.setattr(in_common, "MOST_PAIRS", most)
    found = {(one.told, one.teller): list(one.links) for one in find_overlaps(questions)}
    assert found == expected


def test_names_that_two_experiments_invented_alike_by_chance_raise_no_alarm(desk: Desk) -> None:
    rows = quiz(30)
    entries: Rows = [{"name": "a", "use": "contamination", "generate": {"count": 30, "seed": 1}}]
    entries += [desk.entry("b", "contamination", rows)]
    mine, theirs = desk.questions(*entries)
    retold = f"They say so. {told(rows)[3]['text']}"
    mine.units[5] = replace(mine.units[5], texts=(retold,))
    assert {one.told: one.units for one in find_overlaps([mine, theirs])} == {"a": [5], "b": [3]}
    spec = replace(theirs.spec, items=None, generate={"count": 30, "seed": 2})
    theirs.experiment.spec = spec
    assert find_overlaps([mine, theirs]) == []


def test_forms_that_two_files_have_in_common_raise_no_alarm(desk: Desk) -> None:
    form = "The following is a multiple choice question. Please choose the single best answer. "
    for count in (12, 40):
        files = [
            [{**row, "question": form + row["question"]} for row in quiz(count, seed)]
            for seed in (5, 6)
        ]
        entries = [
            desk.entry(name, "contamination", f) for name, f in zip("ab", files, strict=True)
        ]
        assert find_overlaps(desk.questions(*entries)) == []


def test_minhash_finds_what_the_exact_join_finds(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        desk.entry("a", "forgetting", documents(30, 3)),
        desk.entry("b", "forgetting", documents(30, 3)),
    ]
    questions = desk.questions(*entries)
    exact = find_overlaps(questions)
    monkeypatch.setattr(overlap, "MOST_PAIRS", 0)
    monkeypatch.setattr(overlap, "_equal", lambda told, teller: iter(()))
    assert [each.units for each in find_overlaps(questions)] == [each.units for each in exact]


def test_a_probe_in_a_text_of_another_cluster_is_found(desk: Desk) -> None:
    rows = quiz(20)
    rows[7]["question"] = f"{told(rows)[3]['text']} {rows[7]['question']}"
    (leak,) = find_leaks(desk.questions(desk.entry("one", "contamination", rows)))
    assert {(t.unit, t.teller) for t in leak.links} == {(3, 7)}
    assert find_leaks(desk.questions(desk.entry("two", "contamination", quiz(40)))) == []


def test_a_shared_quiz_is_refused_with_counts_and_what_would_work(desk: Desk) -> None:
    rows = quiz()
    one = desk.entry("quiz", "contamination", rows, doses=[0, 4])
    two = desk.entry("again", "contamination", rows, doses=[0, 4])
    with pytest.raises(UserError) as error:
        desk.study(one, two)
    text = str(error.value)
    assert "experiments.again.shares_units_with" in text
    assert "again tells of 20 of the 20 units of quiz" in text
    assert re.search(r"so that \d+ of its 10 held-out units would be shown \d+ times", text)
    assert "shares_units_with: [quiz]" in text


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ([0, 1, 1, 1], "so that 1 of its 2 held-out units would be shown once"),
        ([3, 2, 0, 1], "so that 2 of its 2 held-out units would be shown 5 times"),
        ([0, 0, 0, 2], "so that 1 of its treated units would be shown 2 times beyond their dose"),
        ([0, 0, 0, 0], "which no exposure shows as the arms were drawn, but another seed may"),
    ],
)
def test_a_refusal_tells_what_would_be_shown_and_never_of_nothing(
    shown: list[int], said: str
) -> None:
    held_out = np.array([True, True, False, False])
    assert shown_text(held_out, np.array(shown)).startswith(said)


def test_either_entry_may_declare_it(desk: Desk) -> None:
    rows = quiz()
    for share in (
        {"quiz": {"shares_units_with": ["again"]}},
        {"again": {"shares_units_with": "quiz"}},
    ):
        entries = [
            desk.entry(name, "contamination", rows, doses=[0, 4], **share.get(name, {}))
            for name in ("quiz", "again")
        ]
        made = desk.study(*entries)
        specs = {question.name: question.spec for question in made.questions}
        (said,) = share
        other = {"quiz": "again", "again": "quiz"}[said]
        assert specs[said].to_json()["shares_units_with"] == [other]
        assert "shares_units_with" not in specs[other].to_json()
        assert spec_of(specs[said].to_json()).shares_units_with == (other,)


def test_no_declaration_helps_a_control(desk: Desk) -> None:
    held = canaries(30)
    entries = with_controls(
        [desk.entry("leak", "memorization", held), {"name": "more", "use": "memorization"}]
    )
    for use in ("placebo", "positive_control"):
        taken = desk.entry("control", use, held)
        others = [entry for entry in entries if entry["use"] != use]
        with pytest.raises(UserError, match="nothing of a control may be shown"):
            desk.study(*others, taken)


def test_a_declaration_names_other_questions_of_the_run(desk: Desk) -> None:
    entries = [
        {"name": "one", "use": "memorization", "shares_units_with": ["tow", "one", "aa-placebo"]},
        {"name": "two", "use": "memorization", "shares_units_with": [3]},
        {"name": "pc", "use": "positive_control", "shares_units_with": ["one"]},
    ]
    _, problems = parse_experiments(with_controls(entries), desk.folder, Library(desk.folder))
    told = {str(problem) for problem in problems}
    assert told == {
        "experiments.one.shares_units_with: has 'tow', which is no experiment (did you mean 'two'?)",
        "experiments.one.shares_units_with: has 'one', the experiment itself",
        "experiments.one.shares_units_with: has 'aa-placebo', a control; it must share nothing",
        "experiments.two.shares_units_with: is [3]; it must be a list of names of other experiments",
        "experiments.pc.shares_units_with: is set, but a control shares its units with nothing; "
        "remove it",
    }
    assert all(isinstance(problem, Problem) for problem in problems)


def test_texts_that_are_never_shown_tell_nothing(desk: Desk) -> None:
    """A paraphrase is shown by an arm that cycles only."""
    shown = facts(10, 8)
    hidden = [
        {**row, "paraphrases": [other["text"]]}
        for row, other in zip(facts(10, 9), shown, strict=True)
    ]
    for variants, units in (("same", set()), ("cycle", set(range(10)))):
        arms = [{"name": "no", "dose": 0}, {"name": "yes", "dose": 4, "variants": variants}]
        entries = [
            desk.entry("one", "knowledge", shown, doses=[0, 4]),
            desk.entry("two", "knowledge", hidden, arms=arms),
        ]
        assert of_units(find_overlaps(desk.questions(*entries)), "one") == units


def test_spec_without_a_share_reads_as_before(desk: Desk) -> None:
    (question,) = desk.questions({"name": "one", "use": "memorization"})
    assert "shares_units_with" not in question.spec.to_json()
    assert replace(question.spec, shares_units_with=("two",)).to_json()["shares_units_with"]
