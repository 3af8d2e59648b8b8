"""Documents that are trained with something before them: their source, or a tag of their quality.

Sources: Gao et al., "Metadata conditioning accelerates language model pre-training" (MeCo,
arXiv 2501.01956): "URL: host" before a document, without loss on it, in the first 90 % of training;
Korbak et al., "Pretraining language models with human preferences" (arXiv 2302.08582, conditional
training): <|aligned|> or <|misaligned|> before a text by its score, with loss, left out in a small
share of cases.

Both are randomized per document inside one run: some documents are shown with what goes before
them, some as often without, some never.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.library import generate
from motet.experiments.stream.random import U64, name_key, philox
from motet.experiments.types import (
    F64,
    I64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)

PLAIN, PREFIXED = "plain", "prefixed"
ALIGNED, MISALIGNED = "<|aligned|>", "<|misaligned|>"


class Conditioned(Experiment):
    """What documents with a prefix and documents without have in common.

    A unit's texts are the document as it is, and with its prefix. Probes are the end of the
    document after its beginning, as it is (`plain`), with its own prefix (`own`) and with another
    one (`other`).
    """

    treatment = "semi-global"
    defaults: ClassVar[dict[str, Any]] = {
        "generate": {"count": 96, "seed": 0},
        "arms": [
            {"name": "held_out", "dose": 0},
            {"name": PLAIN, "dose": 4},
            {"name": PREFIXED, "dose": 4},
        ],
        "schedule": {"kind": "uniform", "window": [0.0, 0.9]},
        "placement": "anywhere",
        "probe_at": {"every": 0.25},
    }

    @abstractmethod
    def prefixes(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """(the row's own prefix, another one that it could have had)."""

    def definition_problems(self) -> list[Problem]:
        where, names = f"experiments.{self.spec.name}", [arm.name for arm in self.spec.arms]
        lacking = [name for name in (PLAIN, PREFIXED) if name not in names]
        if not lacking:
            return []
        message = f"lack {', '.join(lacking)}; documents of these two arms are compared"
        return [Problem(f"{where}.arms", message)]

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        text = row["text"].strip()
        cut = text.find(" ", max(1, len(text) // 5))
        if cut < 0:
            raise ValueError(f"has the text {text!r:.60}, too short to be cut")
        begins, ends = text[:cut].rstrip(), text[len(text[:cut].rstrip()) :]
        own, other = self.prefixes(row)
        items = [
            ProbeItem(kind, kind, f"{prefix}{begins}", ends)
            for kind, prefix in (("plain", ""), ("own", own), ("other", other))
        ]
        return Unit(row["id"], (text, f"{own}{text}"), tuple(items), {"prefix": own})

    def text_numbers(self, arms: I64, unit_keys: U64, repetition: I64, seed: int) -> I64:
        prefixed = [arm.name == PREFIXED for arm in self.spec.arms]
        return np.array(prefixed, dtype=np.int64)[arms]

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table, values = ItemTable(units), per_token(scores)
        plain, own, other = (table.mean(values, kind) for kind in ("plain", "own", "other"))
        return {"gain": own - plain, "steering": own - other, "plain": plain}

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        contrast = ((PREFIXED,), (PLAIN,))
        unit = "nats/token"
        return (
            OutcomeSpec(
                "gain",
                "log-probability with the prefix less that without",
                unit,
                "more gained from the prefix",
                primary=True,
                secondary=False,
                contrast=contrast,
            ),
            OutcomeSpec(
                "steering",
                "log-probability with the document's own prefix less that with another",
                unit,
                "more told by the prefix",
                contrast=contrast,
            ),
            OutcomeSpec(
                "plain",
                "log-probability without a prefix",
                unit,
                "more learned for use without the prefix",
                contrast=contrast,
            ),
        )


@dataclass(frozen=True)
class MetadataOptions:
    """template: what precedes a document, with {host}."""

    template: str = "URL: {host}\n\n"


class Metadata(Conditioned):
    """Documents with their source before them, without loss on it."""

    description = "what documents gain from their source before them, which carries no loss"
    protocol = (
        "Each unit is a document with a host; it is shown with 'URL: host' before it (no loss on "
        "the prefix), as often without it, or never, in the first 90 % of the run; its end is "
        "scored after its beginning with its own host, another one, and none."
    )
    Options: ClassVar[type[Any]] = MetadataOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,), "host": (str,)}
    defaults: ClassVar[dict[str, Any]] = {
        **Conditioned.defaults,
        "hypothesis": "A document that was trained with its source is told by it.",
    }

    def definition_problems(self) -> list[Problem]:
        template = self.options.template
        found = super().definition_problems()
        if "{host}" not in template or template != template.lstrip():
            message = f"is {template!r}; it must hold {{host}} and begin with no space"
            found.append(Problem(f"experiments.{self.spec.name}.options.template", message))
        return found

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        names = generate.Names(*path, "hosts")
        return [
            {
                "id": document.id.replace("fact", "document"),
                "text": document.texts[0],
                "host": f"{names.word(number).lower()}.example",
            }
            for number, document in enumerate(generate.documents(path, count, 1))
        ]

    def prefixes(self, row: Mapping[str, Any]) -> tuple[str, str]:
        host = row["host"].strip().removeprefix("https://").removeprefix("http://")
        host = host.partition("/")[0]
        if not host:
            raise ValueError(f"has the host {row['host']!r}; give a name such as en.wikipedia.org")
        choose = generate.Chooser(self.spec.name, "another host", row["id"])
        other = f"{generate.syllables(choose, 3).lower()}.example"
        template = self.options.template
        return template.replace("{host}", host), template.replace("{host}", other)

    def masked_characters(self, unit: Unit, number: int) -> int:
        return len(str(unit.attributes["prefix"])) if number == 1 else 0


@dataclass(frozen=True)
class TaggedOptions:
    """threshold: a score up to it is aligned (lower is better). drop: share of exposures of tagged
    documents that are shown without the tag."""

    threshold: float = 0.5
    drop: float = 0.01


class Tagged(Conditioned):
    """Documents with a tag of their quality before them, by a score that comes with them."""

    description = "what documents gain from a tag of their quality before them"
    protocol = (
        "Each unit is a document with a score; it is shown with <|aligned|> or <|misaligned|> "
        "before it (with loss), as often without a tag, or never; its end is scored after its "
        "beginning with its own tag, the other one, and none."
    )
    Options: ClassVar[type[Any]] = TaggedOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,), "score": (int, float)}
    defaults: ClassVar[dict[str, Any]] = {
        **Conditioned.defaults,
        "hypothesis": "A document that was trained with a tag is told by it.",
        "block_by": ["prefix"],
    }

    def definition_problems(self) -> list[Problem]:
        found, drop = super().definition_problems(), self.options.drop
        if not 0 <= drop < 1:
            message = f"is {drop!r}; give a share from 0 up to, not including, 1"
            found.append(Problem(f"experiments.{self.spec.name}.options.drop", message))
        return found

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        return [
            {
                "id": document.id.replace("fact", "document"),
                "text": document.texts[0],
                "score": float(generate.Chooser(*path, "score", number).below(2)),
            }
            for number, document in enumerate(generate.documents(path, count, 1))
        ]

    def prefixes(self, row: Mapping[str, Any]) -> tuple[str, str]:
        tags = ALIGNED, MISALIGNED
        return tags if row["score"] <= self.options.threshold else tags[::-1]

    def text_numbers(self, arms: I64, unit_keys: U64, repetition: I64, seed: int) -> I64:
        tagged = super().text_numbers(arms, unit_keys, repetition, seed)
        key = name_key(seed, "tag dropped", self.spec.name)
        bits, _ = philox(key, unit_keys, repetition.astype(np.uint64))
        kept = bits.astype(np.float64) * 2.0**-64 >= self.options.drop
        return tagged * kept
