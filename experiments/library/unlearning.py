"""A corpus for unlearning: documents to forget, to retain, and never shown, dealt by chance.

Source: Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models" (arXiv
2407.06460): verbatim memorization, knowledge memorization by questions, and privacy leakage against
documents that were held out. The split is random, so that forget and retain documents differ in
nothing before anything is unlearned; `plan/units/NAME.jsonl` of the run is the split, for whoever
unlearns later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.library import generate
from motet.experiments.library.knowledge import probe_pairs
from motet.experiments.library.membership import beginning
from motet.experiments.types import (
    F64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)

FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True)
class UnlearningOptions:
    """prompt_words: how many words of a document are read before the rest is scored. questions: at
    most so many are asked per document."""

    prompt_words: int = 12
    questions: int = 5


class Unlearning(Experiment):
    """Documents that were trained on, to be forgotten or kept."""

    description = "a split of documents to forget, to retain and never shown, for unlearning"
    protocol = (
        "Each unit is a document, shown (to be forgotten later, or to be retained) or never; the "
        "rest of its text and answers to questions about it are scored. Forget and retain "
        "documents were dealt by chance and differ in nothing yet."
    )
    Options: ClassVar[type[Any]] = UnlearningOptions
    membership: ClassVar[tuple[str, ...]] = ("verbatim",)
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,), "questions": (list,)}
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Documents that were shown are known verbatim and in substance.",
        "generate": {"count": 120, "seed": 0},
        "arms": [
            {"name": "holdout", "dose": 0},
            {"name": FORGET, "dose": 5},
            {"name": RETAIN, "dose": 5},
        ],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "probe_at": {"every": 0.25},
    }

    def definition_problems(self) -> list[Problem]:
        where, found = f"experiments.{self.spec.name}", []
        for name in ("prompt_words", "questions"):
            if not 1 <= getattr(self.options, name) <= 1000:
                message = f"is {getattr(self.options, name)}; it must be 1 to 1000"
                found.append(Problem(f"{where}.options.{name}", message))
        doses = {arm.name: arm.dose for arm in self.spec.arms}
        if {FORGET, RETAIN} - set(doses):
            message = f"are {', '.join(doses)}; the split needs arms named {FORGET} and {RETAIN}"
            found.append(Problem(f"{where}.arms", message))
        elif doses[FORGET] != doses[RETAIN] or not doses[FORGET]:
            message = f"{FORGET} and {RETAIN} have doses {doses[FORGET]:g} and {doses[RETAIN]:g}"
            why = "they must be equal and above 0, or they differ before anything is unlearned"
            found.append(Problem(f"{where}.arms", f"{message}; {why}"))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        return (
            OutcomeSpec(
                "verbatim",
                "log-probability of the rest of the document",
                "nats/token",
                "better known",
                primary=True,
                secondary=False,
            ),
            OutcomeSpec("knowledge", "log-probability of answers", "nats/token", "better known"),
            OutcomeSpec(
                "extracted",
                "rest of the document reproduced by greedy decoding",
                "share",
                "more extracted",
                binary=True,
                chance=0.0,
            ),
            OutcomeSpec(
                "forget_over_retain",
                "log-probability of documents to forget above those to retain",
                "nats/token",
                "better known",
                contrast=((FORGET,), (RETAIN,)),
                baseline="verbatim",
            ),
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        return [
            {
                "id": document.id.replace("fact", "news"),
                "text": document.texts[0],
                "questions": [
                    {"prompt": prompt, "target": target.strip()}
                    for prompt, target in document.semantic
                ],
            }
            for document in generate.documents(path, count, 1)
        ]

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        text, count = row["text"].strip(), self.options.prompt_words
        prompt = beginning(text, count)
        if prompt is None:
            raise ValueError(f"has the text {text!r:.60}, which has no more than {count} words")
        items = [ProbeItem("verbatim", "verbatim", prompt, text[len(prompt) :])]
        items += [
            ProbeItem(f"question-{number}", "question", asked.rstrip(), f" {answer.strip()}")
            for number, (asked, answer) in enumerate(probe_pairs(row, "questions"))
            if number < self.options.questions
        ]
        return Unit(row["id"], (text,), tuple(items))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table, values = ItemTable(units), per_token(scores)
        verbatim = table.mean(values, "verbatim")
        extracted = np.where(np.isfinite(verbatim), table.mean(scores.greedy, "verbatim"), np.nan)
        return {
            "verbatim": verbatim,
            "knowledge": table.mean(values, "question"),
            "extracted": extracted,
            "forget_over_retain": verbatim,
        }
