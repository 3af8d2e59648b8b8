"""Gaussian embedding watermark: noise on the input embeddings of some sequences in training.

Source: "Train Once, Answer All" (arXiv 2509.23383), experiment 6: N(0, 0.075^2) is added to the
input embeddings of given batches, and the normalised dot product of the loss gradient with respect
to the embeddings with that noise tells them from fresh noise; above chance always, more so for
later batches.

Here the randomized unit is a text with a noise key of its own. Texts of treated units are shown
with their noise, again and again with the same; the key of a held-out unit is used nowhere. A
held-out key is independent of everything that was trained, so its product with any gradient is
symmetric about 0, and the difference between arms is what training on the noise left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.library import generate
from motet.experiments.types import (
    F64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)


@dataclass(frozen=True)
class WatermarkOptions:
    """deviation: standard deviation of the noise."""

    deviation: float = 0.075


class EmbeddingWatermark(Experiment):
    """Whether noise on input embeddings can be found in the trained model's gradient."""

    description = "whether noise that was added to input embeddings in training can be found again"
    protocol = (
        "Each unit is a text with a noise key of its own; treated texts are shown with their noise "
        "on the input embeddings, and the loss gradient with respect to the embeddings of the text "
        "without noise is compared with the key's noise (cosine, against the gradient)."
    )
    Options: ClassVar[type[Any]] = WatermarkOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,)}
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "The loss falls along the noise that a text was trained with.",
        "generate": {"count": 64, "seed": 0},
        "doses": [0, 4],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "probe_at": {"every": 0.25},
    }

    @property
    def noise_deviation(self) -> float:
        return float(self.options.deviation)

    def definition_problems(self) -> list[Problem]:
        deviation = self.options.deviation
        if isinstance(deviation, (int, float)) and 0 < deviation <= 10:
            return []
        where = f"experiments.{self.spec.name}.options.deviation"
        return [Problem(where, f"is {deviation!r}; give a number above 0, up to 10 (0.075)")]

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        return (
            OutcomeSpec(
                "alignment",
                "cosine of the noise with the direction in which the loss falls",
                "cosine",
                "more of the noise is in the model",
                primary=True,
                secondary=False,
                low=-1.0,
                high=1.0,
            ),
            OutcomeSpec(
                "logprob",
                "log-probability of the text",
                "nats/token",
                "more of the text is remembered",
            ),
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        return generate.texts((self.spec.use, self.spec.name, seed), count, "key")

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        text = row["text"].strip()
        cut = text.find(" ")
        if len(text) < 20 or cut < 0:
            raise ValueError(f"has the text {text!r}, too short to carry noise; give a sentence")
        item = ProbeItem("text", "text", text[:cut], text[cut:])
        return Unit(row["id"], (text,), (item,))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        found = scores.alignment
        if found is None:
            found = np.full(len(scores.logprob), np.nan)
        return {
            "alignment": table.mean(found, "text"),
            "logprob": table.mean(per_token(scores), "text"),
        }
