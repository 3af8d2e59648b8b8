"""Two-stage joint training: a low- and a high-capacity model that share layers train on the same
sequences, then apart. Torch-free.

Source: TSJT, "One-stop training" (arXiv:2305.14066). Its abstract says so much: composite models of
low and high capacity share layers; the first stage optimizes both on one batch, the second each by
itself. What is ours: the weights of the first stage's losses, that both are slices of one set of
weights at all times, and that apart means in turn: each share of a step trains one of the two.
(Copies that no longer share would be two runs: export the low one and train it from there.)
"""

from __future__ import annotations

from typing import NamedTuple

from motet.core.schema import MappingReader
from motet.models.member import Member, Term

KEYS = ("joint_until_step", "low_weight")


class TwoStage(NamedTuple):
    """Joint training, then in turn.

    Attributes:
        low: the low-capacity model; the whole model is the other.
        joint_until_step: the first step of the second stage.
        low_weight: of its loss in the first stage; the whole model's is 1 - that.
    """

    low: Member
    joint_until_step: int
    low_weight: float = 0.5

    def terms(self, step: int, share: int, draws: int) -> list[Term]:
        """Return who trains on a share."""
        if step < self.joint_until_step:
            return [Term(None, 1.0 - self.low_weight), Term(self.low, self.low_weight)]
        return [Term(self.low if (step * draws + share) % 2 else None)]

    def problems(self, steps: int) -> list[str]:
        """Say what of it never comes in a run of so many steps."""
        if self.joint_until_step < steps:
            return []
        return [f"tsjt.joint_until_step={self.joint_until_step}: the run has {steps} steps"]


def read_two_stage(read: MappingReader, members: list[Member]) -> TwoStage | None:
    """Return what `family.options.tsjt` asks for; problems go to the reader."""
    inner = read.inner("tsjt", KEYS)
    until = inner.whole("joint_until_step", None, 1)
    weight = inner.number("low_weight", 0.5, 0.0, 1.0)
    if until is None and not inner.values.get("joint_until_step"):
        inner.problem("joint_until_step", "must say at which step the two go apart")
    if len(members) != 1:
        why = f"are {len(members)}; tsjt trains one member beside the whole model"
        read.problem("members", why)
    return None if until is None or len(members) != 1 else TwoStage(members[0], until, weight)
