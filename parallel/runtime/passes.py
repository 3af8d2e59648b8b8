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
        """Of the objective that the decoder returns; with teachers or exits that has its weights
        inside.
        """
        term = self.term
        return 1.0 if term.distill or term.kept or term.exits else term.labels

    def keywords(self, taught: Taught, kept: tuple[Teacher, ...] = ()) -> dict[str, Any]:
        """Return what a decoder is called with to compute this pass's loss.

        Args:
            taught: the states of those that teach.
            kept: those of the kept teacher, if somebody of the micro-batch follows it.
        """
        term = self.term
        own = [Teacher(taught[term.teacher], term.teacher)] if term.distill else []
        return {
            "member": term.member,
            "teaches": self.teaches,
            "teachers": [*own, *(kept if term.kept else ())],
            "weights": [term.labels, *filter(None, (term.distill, term.kept))],
            "skips": term.skips,
            "times": term.times,
            "exits": {out.member.layers[-1]: out.labels for out in term.exits},
        }
