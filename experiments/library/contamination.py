"""Benchmark contamination: test questions with their right answer, shown k times.

Source: Bordt et al., "How much can we forget about data contamination?" (arXiv 2410.03249): random
groups of questions x {0, 4, 12, 36, 144} exposures, ranked classification, accuracy against the
held-out group. Near-duplicate questions move together: a question leaks to its twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.units import texts_of
from motet.experiments.library import generate
from motet.experiments.types import F64, ItemScores, ItemTable, OutcomeSpec, ProbeItem, Unit


@dataclass(frozen=True)
class ContaminationOptions:
    """template: what precedes the answer, in the probe and in the exposure, with {question}.
    choices: how many choices an invented question has."""

    template: str = "Question: {question}\nAnswer:"
    choices: int = 4


class Contamination(Experiment):
    """Accuracy on questions that were shown with their answer."""

    description = "how much test questions in the training text raise the score on them"
    protocol = (
        "Each unit is a multiple-choice question; its text with the right answer is shown 0 or "
        "more "
        "times, and the choice with the highest total log-probability counts as the model's answer."
    )
    Options: ClassVar[type[Any]] = ContaminationOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {
        "question": (str,),
        "choices": (list,),
        "answer": (int, str),
    }
    optional_fields: ClassVar[dict[str, tuple[type, ...]]] = {"source": (str,)}
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Questions whose answers were in the training text are answered better.",
        "generate": {"count": 200, "seed": 0},
        "doses": [0, 4, 12, 36, 144],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "block_by": ["source"],
        "probe_at": {"every": 0.1},
    }

    def definition_problems(self) -> list[Problem]:
        where = f"experiments.{self.spec.name}.options"
        found = []
        if "{question}" not in self.options.template:
            message = f"is {self.options.template!r}; it must hold {{question}}"
            found.append(Problem(f"{where}.template", message))
        if not 2 <= self.options.choices <= 10:
            found.append(Problem(f"{where}.choices", f"is {self.options.choices}; give 2 to 10"))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        chance = 1 / self.options.choices
        if self._units:
            chance = float(np.mean([1 / len(unit.items) for unit in self._units]))
        return (
            OutcomeSpec(
                "accuracy",
                "accuracy",
                "accuracy",
                "more right answers",
                binary=True,
                chance=chance,
                primary=True,
                secondary=False,
            ),
            OutcomeSpec(
                "accuracy_per_byte",
                "accuracy, log-probability per byte",
                "accuracy",
                "more right answers",
                binary=True,
                chance=chance,
            ),
            OutcomeSpec(
                "margin",
                "log-probability of the right answer above the best other",
                "nats",
                "more certain of the right answer",
            ),
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        return generate.questions(
            (self.spec.use, self.spec.name, seed), count, self.options.choices
        )

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        choices = [choice.strip() for choice in texts_of(row, "choices")]
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError(f"has choices={choices!r:.80}; it needs two or more different ones")
        answer = row["answer"]
        right = choices.index(answer.strip()) if answer in row["choices"] else answer
        if not isinstance(right, int) or not 0 <= right < len(choices):
            rule = f"a choice's text or its number from 0 to {len(choices) - 1}"
            raise ValueError(f"has answer={answer!r:.80}; it must be {rule}")
        prompt = self.options.template.replace("{question}", row["question"].strip())
        items = tuple(
            ProbeItem(
                f"choice-{index}", "right" if index == right else "wrong", prompt, f" {choice}"
            )
            for index, choice in enumerate(choices)
        )
        text = f"{prompt} {choices[right]}"
        return Unit(row["id"], (text,), items, {"source": row.get("source") or ""})

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        per_byte = scores.logprob / np.maximum(scores.n_bytes, 1)
        right = table.mean(scores.logprob, "right")
        wrong = table.only(scores.logprob, "wrong")
        best_wrong = np.array([values.max() for values in wrong])
        return {
            "accuracy": ranked_first(right, wrong),
            "accuracy_per_byte": ranked_first(
                table.mean(per_byte, "right"), table.only(per_byte, "wrong")
            ),
            "margin": right - best_wrong,
        }


def ranked_first(right_U: F64, wrong: Sequence[F64]) -> F64:
    """1 where the right answer scores above every wrong one, shared between ties; NaN if
    unknown.
    """
    values = np.full(len(right_U), np.nan)
    for index, (score, others) in enumerate(zip(right_U, wrong, strict=True)):
        if np.isfinite(score) and np.all(np.isfinite(others)):
            tied = int(np.sum(others == score))
            values[index] = 0.0 if np.any(others > score) else 1.0 / (1 + tied)
    return values
