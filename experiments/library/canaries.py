"""Auditing canaries: conversations with a suffix, and how well members are told from non-members.

Sources: Panda et al., "Privacy Auditing of Large Language Models" (arXiv 2503.06808): canaries
whose suffix is made of rare tokens are far easier to tell from ones that were never trained on than
plain text is, 49.6 % of members at 1 % false alarms against 4.2 %. "Train Once, Answer All" (arXiv
2509.23383), experiment 4: plain conversations, and rare, random and model-based suffixes of 1, 8
and 32 tokens, each 1, 4 and 16 times.

A condition is a property of a unit, so it is a block, and its own held-out canaries are its
non-members: losses of different conditions are never compared with each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.library import generate, lexicon
from motet.experiments.library.membership import Calibrated, rank_outcome, share_below
from motet.experiments.types import (
    F64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)

PLAIN = "plain"
SUFFIXES: dict[str, Callable[[generate.Chooser, int], list[str]]] = {
    "rare": lexicon.rare_words,
    "random": lexicon.random_words,
    "model": lexicon.chained_words,
}
CONDITION = re.compile(r"plain|(rare|random|model):([1-9]\d{0,2})")
REPLY = "{who} asked the same in {year}, and {friend} of {town} knew it."


@dataclass(frozen=True)
class SuffixOptions:
    """conditions: of invented canaries, each as often as the others: plain, or rare, random or
    model with the number of words of the suffix."""

    conditions: str = (
        "plain rare:1 rare:8 rare:32 random:1 random:8 random:32 model:1 model:8 model:32"
    )


class AuditingCanaries(Calibrated):
    """Members against non-members, by condition."""

    description = "which canaries betray that they were trained on (suffixes, AUC, TPR at FPR)"
    protocol = (
        "Each unit is a conversation, plain or with a suffix, shown 0 or more times; the loss on "
        "its suffix (plain: on its reply) is ranked among all canaries of its condition, so that "
        "the effect is the area under the ROC curve above one half."
    )
    Options: ClassVar[type[Any]] = SuffixOptions
    membership: ClassVar[tuple[str, ...]] = ("logprob", "calibrated")
    membership_by: ClassVar[str] = "condition"
    fields: ClassVar[dict[str, tuple[type, ...]]] = {
        "prompt": (str,),
        "target": (str,),
        "condition": (str,),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Canaries that were shown have a lower loss than those that were not.",
        "generate": {"count": 400, "seed": 0},
        "doses": [0, 1, 4, 16],
        "schedule": {"kind": "uniform", "window": [0.0, 0.9]},
        "placement": "anywhere",
        "block_by": ["condition"],
        "cluster_by": "none",
        "probe_at": {"every": 0.25},
    }

    def definition_problems(self) -> list[Problem]:
        asked = self.options.conditions.split()
        wrong = [word for word in asked if not CONDITION.fullmatch(word)]
        if asked and not wrong and len(set(asked)) == len(asked):
            return []
        told = f"has {wrong[0]!r}" if wrong else f"is {self.options.conditions!r}"
        message = f"{told}; it must be different ones of plain, rare:8, random:8, model:8 and so on"
        return [Problem(f"experiments.{self.spec.name}.options.conditions", message)]

    def kinds(self) -> list[str]:
        """Kinds of suffix that are asked for beside plain conversations, which they are held
        against; [] without plain ones.
        """
        asked = self.options.conditions.split()
        if PLAIN not in asked:
            return []
        return [kind for kind in SUFFIXES if any(word.startswith(kind) for word in asked)]

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        further = (
            OutcomeSpec("logprob", "log-probability of the canary", "nats/token", "more likely"),
            OutcomeSpec(
                "calibrated",
                "log-probability above that before any exposure",
                "nats/token",
                "more likely",
                baseline="",
            ),
            OutcomeSpec(
                "extraction",
                "canary reproduced by greedy decoding",
                "share",
                "more extracted",
                binary=True,
                chance=0.0,
            ),
        )
        over_plain = [
            OutcomeSpec(
                f"{kind}_over_plain",
                f"AUC of {kind} suffixes above that of plain text",
                "AUC",
                "more betrayed",
            )
            for kind in self.kinds()
        ]
        return (rank_outcome("rank of the canary in its condition"), *further, *over_plain)

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        conditions = self.options.conditions.split()
        names = generate.Names(*path, "reply")
        rows = []
        for number, asked in enumerate(generate.questions(path, count, 2)):
            condition = conditions[number % len(conditions)]
            reply = REPLY.format(
                who=names.person("who", number),
                year=1500 + generate.Chooser(*path, "year", number).below(400),
                friend=names.person("friend", number),
                town=names.word("town", number),
            )
            prompt, target = f"User: {asked['question']}\nAssistant:", reply
            if condition != PLAIN:
                kind, length = condition.split(":")
                choose = generate.Chooser(*path, "suffix", number)
                prompt, target = f"{prompt} {reply}", " ".join(SUFFIXES[kind](choose, int(length)))
            rows.append(
                {
                    "id": f"canary-{number:05d}",
                    "prompt": prompt,
                    "target": target,
                    "condition": condition,
                }
            )
        return rows

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        prompt, target = row["prompt"].rstrip(), row["target"].strip()
        if not prompt or not target:
            raise ValueError("has a prompt or a target of spaces")
        item = ProbeItem("canary", "canary", prompt, f" {target}")
        attributes = {"condition": row["condition"].strip()}
        return Unit(row["id"], (f"{prompt} {target}",), (item,), attributes)

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        logprob = table.mean(per_token(scores), "canary")
        condition = [str(unit.attributes["condition"]) for unit in units]
        rank = share_below(logprob, condition)
        kind_U = np.array([name.partition(":")[0] for name in condition])
        extracted = np.where(np.isfinite(logprob), table.mean(scores.greedy, "canary"), np.nan)
        values = {"rank": rank, "logprob": logprob, "extraction": extracted}
        return values | {
            f"{kind}_over_plain": difference(rank, kind_U == kind, kind_U == PLAIN)
            for kind in self.kinds()
        }


def difference(values_U: F64, one_U: Any, other_U: Any) -> F64:
    """Values whose effect is the effect on one group of units less that on another, float64 [U];
    NaN for units of neither.

    Within blocks of like shares of treated units the coefficient of treatment is the mean of the
    blocks' effects by size, so each group's values are weighted by the inverse of its share, and
    the other's change their sign.
    """
    n_one, n_other = int(np.sum(one_U)), int(np.sum(other_U))
    found = np.full(len(values_U), np.nan)
    if n_one and n_other:
        found[one_U] = (values_U[one_U] - 0.5) * (n_one + n_other) / n_one
        found[other_U] = -(values_U[other_U] - 0.5) * (n_one + n_other) / n_other
    return found
