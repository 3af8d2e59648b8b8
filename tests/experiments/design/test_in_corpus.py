"""Units that the base corpus holds anyway."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motet.experiments.corpora.occurrences import TokenArray
from motet.experiments.corpora.tokenizer import Tokenizer, train_bpe
from motet.experiments.design.in_corpus import CorpusHits, hits_in, hits_json, hits_of
from tests.experiments.design.desk import Desk, Rows, quiz

FILLER = "Boats leave the harbour at noon and nobody counts them any more. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([FILLER * 40, "Question: which river, who, what? Answer: " * 20], 500)


def corpus_of(tokenizer: Tokenizer, *documents: str) -> TokenArray:
    parts = []
    for document in documents:
        parts += [*tokenizer.encode(document), tokenizer.eod]
    return TokenArray(np.array(parts, dtype=np.uint16))


def hits(desk: Desk, tokenizer: Tokenizer, rows: Rows, *documents: str) -> CorpusHits:
    questions = desk.questions(desk.entry("one", "contamination", rows, doses=[0, 4]))
    corpora = [corpus_of(tokenizer, FILLER * 30), corpus_of(tokenizer, FILLER, *documents)]
    (found,) = hits_in(questions, tokenizer, corpora)
    assert hits_of(hits_json([found])) == [found]
    return found


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
