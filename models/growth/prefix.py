"""Growth in width that leaves the old model as a slice of the new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from motet.core.errors import Problem
from motet.core.schema import is_whole
from motet.models.config import ModelConfig
from motet.models.growth.axes import Copies, copies
from motet.models.growth.operator import TIES, WIDTH, OperatorFacts
from motet.models.growth.state import Moments
from motet.models.growth.width import WidthOperator, axis_sizes, setting_of

GROUPED = ("keys", "hidden", "expert")
"""Axes that a slice takes the first channels of each group of; "queries" follow their keys."""


@dataclass(frozen=True)
class Prefix(WidthOperator):
    """Copies of channels that nothing reads yet: what reads a channel reads the old one alone.

    The new model computes what the old one does, and so does the slice of it that has the old
    widths, and every slice of that one: what a nested family needs. (Where copies share the weight,
    as in the other operators, a slice that leaves some out computes a part of it.)

    Attributes:
        groups: equal groups of heads and hidden channels, each of which gets copies of its own, as
            many as the nested family's.
    """

    groups: int = 1

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="prefix",
        source="ours: function-preserving copies (bert2BERT, arXiv:2110.07143, section 3.2) that "
        "are read with weight 0",
        exact="where every channel of the stream (and of heads that are normed together) has as "
        "many copies: whole factors. The slice of the old widths: always",
        loss_jump_nats=0.3,
        jump_seen="none for whole factors; else as bert2bert-fpi, by norms of the stream alone",
        symmetry="none is there: a copy is not read, its original is",
        moments=Moments.ASYMMETRIC,
        state="the old part keeps m and v, which are those of its gradient; zeros in copies; step "
        "stays",
        changes=(*WIDTH, *TIES),
    )

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if not is_whole(self.groups) or self.groups < 1:
            return [Problem("groups", f"{self.groups!r} is not a whole number >= 1")]
        for layer in range(min(source.n_layers, target.n_layers)):
            new = axis_sizes(target, layer)
            for axis, old in axis_sizes(source, layer).items():
                uneven = [size for size in (old, new.get(axis, old)) if size % self.groups]
                if axis in GROUPED and old != new.get(axis, old) and uneven:
                    why = f"{uneven[0]} ({axis}) cannot be cut in groups={self.groups} equal groups"
                    return [Problem(setting_of(axis, target), why)]
        return super().own_problems(source, target)

    def copied(self, axis: str, old: int, new: int) -> Copies:
        """See `WidthOperator.copied`: within groups."""
        groups = self.groups if axis in GROUPED else 1
        one = copies(old // groups, new // groups)
        firsts = torch.arange(groups)[:, None] * one.size
        return Copies((firsts + one.index_N).flatten(), one.old_N.repeat(groups), old)

    def fan_in(self, grown: Copies) -> Tensor:
        """Return 1 for the old channels and 0 for their copies."""
        return grown.old_N.float()
