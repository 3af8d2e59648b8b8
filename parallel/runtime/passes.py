"""One pass of a member over a micro-batch: what a decoder is called with, and what it hands on."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from motet.models.distill import Teacher
from motet.models.member import Member, Term

Taught = Mapping[Member | None, Tensor]
"""The states [B, T, S] of those that teach, by who they are."""
NOBODY: Taught = MappingProxyType({})


class Pass(NamedTuple):
    """One pass of a member over a micro-batch.

    Attributes:
        share: of the reported loss of its micro-batch; shares sum to 1.
        trains: it has a gradient: some weight of its loss is not 0.
        teaches: a later member of the same micro-batch follows it.
        last: no pass of the step with a gradient comes after it.
    """

    term: Term
    share: float
    trains: bool
    teaches: bool
    last: bool

    @property
    def weight(self) -> float:
        """Of the objective that the decoder returns; a member that follows one has its weights in
        it.
        """
        return 1.0 if self.term.distill else self.term.labels

    def keywords(self, taught: Taught) -> dict[str, Any]:
        """Return what a decoder is called with to compute this pass's loss."""
        term = self.term
        found: dict[str, Any] = {"member": term.member, "teaches": self.teaches}
        if term.distill:
            found["teacher"] = Teacher(taught[term.teacher], term.teacher)
            found["weights"] = term.labels, term.distill
        return found
