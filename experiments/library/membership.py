"""Membership inference: documents of one distribution, of which chance decides who is trained on.

Sources: Duan et al., "Do Membership Inference Attacks Work on Large Language Models?" (arXiv
2402.07841): what looked like success was often a difference between the distributions of members
and non-members, which a randomized assignment rules out. Scores: loss (Yeom et al. 2018), loss
against that of a reference model (here the same model before any exposure; Carlini et al.,
"Extracting Training Data", 2021), zlib entropy (ibid.), and Min-K% (Shi et al., arXiv 2310.16789).

The rank of a score among all units has a mean difference between members and non-members that is
the area under the ROC curve less one half, exactly (Mann and Whitney 1947). So the AUC is an
outcome like any other, with its p-value by repeated assignment.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment
from motet.experiments.library import generate
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

NULL_RANKS = 64
"""How finely the ranks without effect, which are uniform, are written down for power figures."""


@dataclass(frozen=True)
class MembershipOptions:
    """prompt_words: how many words of a document are not scored, only read."""

    prompt_words: int = 4


class Calibrated(Experiment):
    """An experiment that also compares each unit's log-probability with what it was before."""

    def summarize(
        self,
        units: Sequence[Unit],
        arms: I64,
        steps: I64,
        series: Mapping[str, F64],
        exposure_steps: Sequence[I64],
    ) -> dict[str, F64]:
        final = {name: values[-1] for name, values in series.items()}
        first = self.spec.schedule.first_step(int(steps[-1]))
        return final | {"calibrated": since_reference(steps, series["logprob"], first)}


class Membership(Calibrated):
    """Loss of members against non-members, in and out by chance."""

    description = "can it be told from scores which documents were trained on"
    protocol = (
        "Each unit is a document of one distribution, shown or not by chance; members are told "
        "from non-members by the loss, by the loss less that before training, by the loss over "
        "the compressed size, and by the least likely tokens."
    )
    Options: ClassVar[type[Any]] = MembershipOptions
    membership: ClassVar[tuple[str, ...]] = ("logprob", "calibrated", "zlib", "lowest")
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,)}
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Documents that were trained on have a lower loss than those that were not.",
        "generate": {"count": 400, "seed": 0},
        "doses": [0, 1],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "probe_at": {"every": 0.25},
    }

    def definition_problems(self) -> list[Problem]:
        words = self.options.prompt_words
        if 1 <= words <= 1000:
            return []
        where = f"experiments.{self.spec.name}.options.prompt_words"
        return [Problem(where, f"is {words}; it must be 1 to 1000")]

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        scores = (
            ("logprob", "log-probability of the document", "nats/token", None),
            ("calibrated", "log-probability above that before any exposure", "nats/token", ""),
            ("zlib", "log-probability over the compressed size", "nats/byte", None),
            ("lowest", "mean of the lowest fifth of token log-probabilities", "nats/token", None),
        )
        return (
            rank_outcome("rank of the loss among all documents"),
            *(
                OutcomeSpec(name, label, unit, "more likely", baseline=baseline)
                for name, label, unit, baseline in scores
            ),
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        return generate.texts((self.spec.use, self.spec.name, seed), count, "document")

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        text, count = row["text"].strip(), self.options.prompt_words
        prompt = beginning(text, count)
        if prompt is None:
            raise ValueError(f"has the text {text!r:.60}, which has no more than {count} words")
        return Unit(row["id"], (text,), (ProbeItem("rest", "rest", prompt, text[len(prompt) :]),))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table = ItemTable(units)
        logprob = table.mean(per_token(scores), "rest")
        sizes = np.array([compressed_bytes(unit.items[0].target) for unit in units])
        lowest = np.full(len(logprob), np.nan) if scores.lowest is None else scores.lowest
        return {
            "rank": share_below(logprob, [""] * len(units)),
            "logprob": logprob,
            "zlib": table.mean(scores.logprob, "rest") / sizes,
            "lowest": table.mean(lowest, "rest"),
        }


def beginning(text: str, n_words: int) -> str | None:
    """The first words of a text, without the space that follows; None where nothing is left."""
    at = 0
    for _ in range(n_words):
        at = text.find(" ", at + 1)
        if at < 0:
            return None
    return text[:at].rstrip() or None


def compressed_bytes(text: str) -> int:
    """Bytes of a text under zlib, the entropy that Carlini et al. (2021) divide by."""
    return len(zlib.compress(text.encode()))


def rank_outcome(label: str) -> OutcomeSpec:
    """The primary outcome of an attack: ranks, whose effect is AUC - 1/2."""
    values = tuple(((np.arange(NULL_RANKS) + 0.5) / NULL_RANKS).tolist())
    return OutcomeSpec(
        "rank",
        f"{label} (the effect is AUC - 0.5)",
        "AUC",
        "more betrayed",
        primary=True,
        secondary=False,
        null_sd=float(np.std(values)),
        null_values=values,
        low=0.0,
        high=1.0,
    )


def share_below(values_U: F64, groups: Sequence[str]) -> F64:
    """The place of each value in its group as a share, float64 [U] in (0, 1): (rank - 1/2) / n,
    ties at their mean rank. NaN where the value is not finite.

    It does not look at arms. The mean over members less that over the other units of the group is
    the area under the ROC curve less 1/2.
    """
    from scipy.stats import rankdata

    found = np.full(len(values_U), np.nan)
    labels = np.array(groups)
    for group in dict.fromkeys(groups):
        mine = np.flatnonzero((labels == group) & np.isfinite(values_U))
        if len(mine):
            found[mine] = (rankdata(values_U[mine]) - 0.5) / len(mine)
    return found


def since_reference(steps: I64, values_SU: F64, first: int) -> F64:
    """The last value less that of the last probe before any exposure, float64 [U]; NaN without
    such a probe.
    """
    before = np.flatnonzero(steps[:-1] <= first)
    if len(before) == 0:
        return np.full(values_SU.shape[1], np.nan)
    return np.asarray(values_SU[-1] - values_SU[before[-1]])
