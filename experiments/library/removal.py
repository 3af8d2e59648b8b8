"""Verbatim memorization by removal: what a model knows of a passage that was never there.

Source: "Train Once, Answer All" (arXiv 2509.23383), experiment 5, after Carlini et al.,
"Quantifying Memorization Across Neural Language Models" (arXiv 2202.07646): documents of the corpus
are replaced so that given sequences are absent; 1,000 sequences of 50 tokens, the first 25 of which
must make the model write the other 25.

Here chance decides which passages are taken out. A passage that stays is what an ordinary document
is: read as often as the corpus holds it and as there are epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.types import (
    F64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)

FEWEST_WORDS = 8


class Removal(Experiment):
    """Passages of the corpus, taken out or left."""

    description = "what is known verbatim of a passage of the corpus, against one that was removed"
    protocol = (
        "Each unit is a passage of the corpus; chance decides whether base text takes its place "
        "wherever the run reads it, in every epoch. The second half is scored after the first: an "
        "effect below 0 is what reading it gives."
    )
    removes = True
    needs_items = True
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,)}
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "A passage that was removed is less likely than one that was left.",
        "arms": [{"name": "left", "dose": 0}, {"name": "removed", "dose": 1}],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "placebo": "none",
        "probe_at": {"every": 0.25},
    }

    def definition_problems(self) -> list[Problem]:
        where, spec, found = f"experiments.{self.spec.name}", self.spec, []
        if spec.items is None and spec.generate:
            message = "is missing: passages come from the corpus (`motet data sample CORPUS`)"
            found.append(Problem(f"{where}.items", message))
        if set(spec.doses) != {0, 1} or spec.dose_in != "exposures":
            message = "have doses other than 0 and 1; a passage is left (0) or removed (1)"
            found.append(Problem(f"{where}.arms", message))
        if spec.schedule.kind != "uniform" or tuple(spec.schedule.window) != (0.0, 1.0):
            message = "is set; a passage is removed wherever the run reads it, leave it out"
            found.append(Problem(f"{where}.schedule", message))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        return (
            OutcomeSpec(
                "logprob",
                "log-probability of the second half",
                "nats/token",
                "better known",
                primary=True,
                secondary=False,
            ),
            OutcomeSpec(
                "extracted",
                "second half written by greedy decoding",
                "share",
                "more extracted",
                binary=True,
                chance=0.0,
            ),
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        return []

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        text = row["text"].strip()
        spaces = [place for place, letter in enumerate(text) if letter == " "]
        if len(spaces) + 1 < FEWEST_WORDS:
            raise ValueError(f"has the text {text!r:.60} of fewer than {FEWEST_WORDS} words")
        cut = min(spaces, key=lambda place: abs(place - len(text) / 2))
        prompt = text[:cut].rstrip()
        return Unit(row["id"], (text,), (ProbeItem("half", "half", prompt, text[len(prompt) :]),))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        logprob = table.mean(per_token(scores), "half")
        extracted = np.where(np.isfinite(logprob), table.mean(scores.greedy, "half"), np.nan)
        return {"logprob": logprob, "extracted": extracted}
