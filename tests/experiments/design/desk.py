"""A folder with files of items, and the questions and studies that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import raise_problems
from motet.experiments.corpora.tokenizer import train_bpe
from motet.experiments.design.assignment import Question, ask
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.requests import Setting
from motet.experiments.design.study import Study, build_study
from motet.experiments.library import generate
from motet.experiments.library.kinds import Library
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.stream import Stream
from tests.experiments.plans import ArrayCorpus

Rows = list[dict[str, Any]]
STEPS_TOTAL = 60


class Desk:
    """Where a test writes its items."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entry(self, name: str, use: str, rows: Rows, **settings: Any) -> dict[str, Any]:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"name": name, "use": use, "items": path.name, **settings}

    def questions(self, *entries: dict[str, Any], seed: int = 0) -> list[Question]:
        library = Library(self.folder)
        specs, problems = parse_experiments(list(entries), self.folder, library)
        raise_problems(problems)
        return [ask(spec, seed, library) for spec in specs]

    def study(self, *entries: dict[str, Any], seed: int = 0, steps: int = STEPS_TOTAL) -> Study:
        specs, problems = parse_experiments(list(entries), self.folder, Library(self.folder))
        raise_problems(problems)
        return build_study(specs, setting(self.folder, seed, steps))


def setting(folder: Path, seed: int = 0, steps: int = STEPS_TOTAL) -> Setting:
    """Steps of 16 sequences of 256 tokens that mean nothing."""
    tokenizer = train_bpe(["some text about canaries and codes, facts and dates " * 40], 400)
    tokens = np.random.default_rng(0).integers(1, 380, 100_000).astype(np.uint16)
    tokens[::61] = tokenizer.eod
    corpus = ArrayCorpus(tokens, np.arange(0, 100_000, 61) + 1, eod=tokenizer.eod)
    stream = Stream([corpus], [1.0], 256, seed=0)
    facts = {"corpora": []}
    kinds = Library(folder)
    return Setting(seed, Steps.of(16), steps, tokenizer, stream, 1000, facts, kinds)


def quiz(count: int = 20, seed: int = 1) -> Rows:
    """Invented questions."""
    return generate.questions(("overlap", seed), count, 4)
