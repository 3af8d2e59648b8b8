"""When was it read? Ordinary documents in time windows, and none of them special.

Sources: "Train Once, Answer All" (arXiv 2509.23383), experiment 10: base text replaced by base text
of the same distribution, labelled by tenth of the run (recency) as a control of the whole pipeline;
and "Blackbox Model Provenance via Palimpsestic Membership Inference" (arXiv 2510.19796): the
log-likelihood of training examples correlates with the order in which a run read them.

The time is randomized with the arm: each arm has a part of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from motet.core.errors import Problem
from motet.experiments.design.spec import Arm
from motet.experiments.library.membership import Membership
from motet.experiments.types import F64, ItemScores, ItemTable, OutcomeSpec, Unit, per_token

LOGPROB = ("logprob", "log-probability of the document", "nats/token", "better known")


def timed_arms(name: str, parts: int, held_out: str, weight: int) -> list[dict[str, Any]]:
    """Arms as in YAML: one of dose 0 with a weight, then one for each part of the window."""
    shown = [
        {"name": f"{name}-{part}", "dose": 1, "window": [part / parts, (part + 1) / parts]}
        for part in range(parts)
    ]
    return [{"name": held_out, "dose": 0, "weight": weight}, *shown]


class Replacement(Membership):
    """Base text in place of base text."""

    description = "does replacing base text by base text leave a trace, and when (i.i.d., recency)"
    protocol = (
        "Each unit is an ordinary document, put in the place of base text in one tenth of the run "
        "or kept out; its log-probability at the end is compared, and followed over the tenths."
    )
    membership: ClassVar[tuple[str, ...]] = ("logprob",)
    order: ClassVar[str] = "logprob"
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "A document that was shown once is a little more likely, the later the more.",
        "generate": {"count": 400, "seed": 0},
        "arms": timed_arms("recency", 10, "kept_out", 10),
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "probe_at": {"every": 0.25},
    }

    def definition_problems(self) -> list[Problem]:
        found = super().definition_problems()
        if len(self.timed()) < 2:
            message = "need two or more with a window of their own, such as window: [0.0, 0.1]"
            found.append(Problem(f"experiments.{self.spec.name}.arms", message))
        return found

    def timed(self) -> list[Arm]:
        """Arms with a window, the earliest first."""
        own = [arm for arm in self.spec.arms if arm.window is not None]
        return sorted(own, key=lambda arm: arm.window or (0.0, 0.0))

    def halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the later and of the earlier half of the arms with a window."""
        names = [arm.name for arm in self.timed()]
        half = len(names) // 2
        return tuple(names[-half:]) if half else (), tuple(names[:half])

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        return (
            OutcomeSpec(*LOGPROB, primary=True, secondary=False),
            self._late(primary=False),
        )

    def _late(self, primary: bool) -> OutcomeSpec:
        return OutcomeSpec(
            "late_over_early",
            "log-probability of documents read late above that of those read early",
            "nats/token",
            "later ones better known",
            primary=primary,
            secondary=not primary,
            contrast=self.halves(),
            baseline="logprob",
        )

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        logprob = ItemTable(units).mean(per_token(scores), "rest")
        return {"logprob": logprob, "late_over_early": logprob}


class Palimpsest(Replacement):
    """The order test."""

    description = "does the model betray the order in which it read documents (palimpsest)"
    protocol = (
        "Each unit is a document, shown once in one of eight windows that chance chose; documents "
        "read late are compared with those read early, and likelihood is correlated with the step."
    )
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Documents that were read later are more likely at the end.",
        "generate": {"count": 400, "seed": 0},
        "arms": timed_arms("window", 8, "never", 2),
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "placement": "anywhere",
        "probe_at": {"every": 0.25},
    }

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        return (self._late(primary=True), OutcomeSpec(*LOGPROB))
