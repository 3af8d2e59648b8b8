"""Units that the base corpus holds anyway: found with their place, left out, or overlaid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from motet.core.errors import raise_problems
from motet.experiments.corpora.matches import TokenArray
from motet.experiments.corpora.tokenizer import Tokenizer, train_bpe
from motet.experiments.design.assignment import Question
from motet.experiments.design.decontaminate import RESERVED, Decision, decide
from motet.experiments.design.frozen import definition, freeze, read_questions
from motet.experiments.design.in_corpus import (
    CorpusHits,
    Found,
    Sieve,
    found_json,
    found_of,
    hits_of,
    scan,
)
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.study import Study, draft_study, place_study
from motet.experiments.library.kinds import Library
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.experiments.stream.stream import Stream
from tests.experiments.design.desk import Desk, Rows, quiz, setting
from tests.experiments.plans import ArrayCorpus

FILLER = "Boats leave the harbour at noon and nobody counts them any more. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([FILLER * 40, "Question: which river, who, what? Answer: " * 20], 500)


def corpus_of(tokenizer: Tokenizer, *documents: str) -> TokenArray:
    parts = []
    for document in documents:
        parts += [*tokenizer.encode(document), tokenizer.eod]
    return TokenArray(np.array(parts, dtype=np.uint16))


def search(question: Question, tokenizer: Tokenizer, *corpora: TokenArray) -> Found:
    (found,) = scan({question.name: question.units}, tokenizer, corpora)
    assert found_of(found_json([found])) == [found]
    return found


def hits(desk: Desk, tokenizer: Tokenizer, rows: Rows, *documents: str) -> CorpusHits:
    (question,) = desk.questions(desk.entry("one", "contamination", rows, doses=[0, 4]))
    corpora = [corpus_of(tokenizer, FILLER * 30), corpus_of(tokenizer, FILLER, *documents)]
    return hits_of(search(question, tokenizer, *corpora), question)


def asked(row: dict) -> str:
    return f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}"


def test_planted_questions_are_counted_by_arm(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = quiz(20)
    planted = [2, 5, 11]
    documents = [f"{FILLER}{asked(rows[i])} {FILLER}" for i in planted] * 2
    desk = Desk(tmp_path)
    found = hits(desk, tokenizer, rows, *documents)
    (question,) = desk.questions(
        {"name": "one", "use": "contamination", "items": "one.jsonl", "doses": [0, 4]}
    )
    assert found.named == tuple(rows[i]["id"] for i in planted)
    assert (found.units, found.probes, found.texts, found.places) == (3, 3, 3, 6)
    assert found.held_out == int((~question.treated()[planted]).sum())
    assert "holds 3 of the 20 units (15 %" in str(found)


def test_nothing_is_found_where_nothing_was_planted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = quiz(20)
    unrelated = [asked(row) for row in quiz(20, seed=9)]
    wrong = rows[4]
    other = (wrong["answer"] + 1) % 4
    false = f"Question: {wrong['question']}\nAnswer: {wrong['choices'][other]}"
    found = hits(Desk(tmp_path), tokenizer, rows, *unrelated)
    assert (found.units, found.places) == (0, 0)
    assert hits(Desk(tmp_path), tokenizer, rows, false).probes == 0


def test_a_place_says_where_it_is_and_a_changed_copy_is_near(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    desk, text = Desk(tmp_path), "Seven grey herons slept beside the old mill until it burned down."
    rows = [{"id": "u", "text": text}, {"id": "v", "text": "Nobody saw the nine red foxes of Ulm."}]
    (question,) = desk.questions(desk.entry("one", "forgetting", rows))
    before = f"{FILLER}{FILLER}"
    found = search(question, tokenizer, corpus_of(tokenizer, before + text, FILLER))
    exact = next(place for place in found.places if place.how == "exact")
    tokens = tokenizer.encode(before + text)
    assert exact.unit == "u"
    assert tokenizer.decode(tokens[exact.start : exact.start + exact.tokens]) in text
    assert (found.by_text, found.unlisted) == (("u",), 0)
    changed = text.replace("mill", "barn")
    near = search(question, tokenizer, corpus_of(tokenizer, before + changed, FILLER))
    assert near.by_text == ("u",)
    assert {place.how for place in near.places} >= {"near"}
    strict = scan(
        {"one": question.units}, tokenizer, [corpus_of(tokenizer, changed)], Sieve(13, 1.0, 1.0)
    )
    assert strict[0].by_text == ()


HELD = 4
LENGTH = 256


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    rows = [
        {"id": f"u{i}", "text": f"Codes {i * 7919} and {i * 104729} are facts."} for i in range(24)
    ]
    found = Desk(tmp_path)
    found.entry("one", "forgetting", rows)
    return found


def held_study(desk: Desk, policy: str) -> Study:
    """A study whose corpus holds the texts of the first units, one of them across the border of
    two sequences, with what is done about them.
    """
    entries = [{"name": "one", "use": "forgetting", "items": "one.jsonl"}]
    specs, problems = parse_experiments(entries, desk.folder, Library(desk.folder))
    raise_problems(problems)
    plain = setting(desk.folder)
    tokens = plain.stream.corpora[0].tokens.copy()  # type: ignore[attr-defined]
    (question,) = desk.questions(*entries)
    for number, unit in enumerate(question.units[:HELD]):
        text = plain.tokenizer.encode(f" {unit.texts[0]}")
        at = LENGTH * (10 * number + 3) + (LENGTH - 9 if number == 1 else 40)
        tokens[at : at + len(text)] = text
    corpus = ArrayCorpus(tokens, np.empty(0, np.int64), eod=plain.tokenizer.eod)
    there = replace(plain, stream=Stream([corpus], [1.0], LENGTH, seed=0))
    units = {"one": question.units}
    found = scan(units, plain.tokenizer, [TokenArray(tokens)])
    decision, problems = decide(policy, Sieve(), units, found)
    raise_problems(problems)
    draft = draft_study(specs, there, None, decision)
    raise_problems(draft.problems)
    return place_study(draft)


def test_excluded_units_leave_before_assignment_and_the_definition_says_so(desk: Desk) -> None:
    study = held_study(desk, "exclude")
    left = {unit.id for unit in study.questions[0].units}
    assert left == {f"u{i}" for i in range(HELD, 24)}
    facts = definition(study, "")["decontaminate"]
    assert facts["excluded"] == {"one": [f"u{i}" for i in range(HELD)]}
    folder = desk.folder / "plan"
    freeze(study, folder)
    (again,) = read_questions(folder, Library(desk.folder))
    assert {unit.id for unit in again.units} == left
    # No arm was known: who stays is assigned as in an experiment that never had the others.
    assert len(set(again.arms.tolist())) == 2
    assert "decontaminate" not in definition(held_study(desk, "report"), "")


def test_replaced_places_are_nowhere_in_the_run_and_rows_of_the_plan(desk: Desk) -> None:
    report, study = held_study(desk, "report"), held_study(desk, "replace")
    folder = desk.folder / "plan"
    freeze(study, folder)
    plan = ExposurePlan(folder / "exposures.plan")
    assert plan.experiments == ("one", RESERVED)
    rows = plan.exposures()
    mine = rows.experiment == 1
    assert (rows.flags[mine] & PLACEBO_FLAG).all()
    slots = study.setting.steps.slots_before(study.setting.steps_total)
    clean = study.setting.stream
    shown = Stream(clean.corpora, [1.0], LENGTH, 0, plan).batch(0, slots)
    base = clean.base_tokens(np.arange(slots))
    changed = base != shown.tokens_BT
    ours = np.zeros_like(changed)
    for slot, offset, length in zip(rows.slot, rows.offset, plan.row_lengths(), strict=True):
        assert not ours[slot, offset : offset + length].any()
        ours[slot, offset : offset + length] = True
    assert not (changed & ~ours).any()
    assert held(study, base)
    without = shown.tokens_BT.copy()
    for row in np.flatnonzero(~mine):  # exposures of the units themselves stay
        length = plan.row_lengths()[row]
        without[rows.slot[row], rows.offset[row] : rows.offset[row] + length] = clean.eod
    assert not held(study, without)
    # Nothing that does not collide moves, and every time that a place is read is overlaid.
    kept = np.isin(report.plan.rows.id, rows.id[~mine])
    same = report.plan.rows.slot[kept] == rows.slot[~mine]
    assert kept.all()
    assert same.mean() > 0.9
    assert len((folder / "units" / f"{RESERVED}.jsonl").read_text().splitlines()) == HELD + 1


def held(study: Study, tokens_BT: npt.NDArray[np.int32]) -> bool:
    """Whether any of the sequences holds a unit."""
    units = {"one": study.questions[0].units}
    end = np.full((len(tokens_BT), 1), study.setting.tokenizer.eod)
    array = TokenArray(np.concatenate([tokens_BT, end], axis=1).ravel())
    return bool(scan(units, study.setting.tokenizer, [array])[0].places)


def test_what_cannot_be_decided_is_said(desk: Desk) -> None:
    (question,) = desk.questions({"name": "one", "use": "forgetting", "items": "one.jsonl"})
    units = {"one": question.units}
    ids = tuple(unit.id for unit in question.units)
    everything = Found("one", (), ids, (), 0, unlisted=3)
    _, (problem,) = decide("exclude", Sieve(), units, [everything])
    assert "has no unit that the base text does not hold" in str(problem)
    _, (problem,) = decide("replace", Sieve(), units, [everything])
    assert "3 more places of one than are kept" in str(problem)
    decision, problems = decide("report", Sieve(), units, [everything])
    assert (decision.excluded, decision.avoid, problems) == ({}, {}, [])
    assert Decision().facts()["policy"] == "report"
