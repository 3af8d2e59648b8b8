"""Ranges of tokens: which are taken, and which of many can stay beside each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.random import U64

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Claims:
    """Token ranges that are taken: sorted, disjoint, in positions slot * sequence_length +
    offset.
    """

    start: I64
    stop: I64

    @classmethod
    def none(cls) -> Claims:
        """Return no claims."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def overlap(self, start: I64, stop: I64) -> npt.NDArray[np.bool_]:
        """Return which of the ranges [start, stop) overlap a claim."""
        if len(self.start) == 0 or len(start) == 0:
            return np.zeros(len(start), dtype=bool)
        before = np.searchsorted(self.start, stop, side="left") - 1
        return (before >= 0) & (self.stop[np.maximum(before, 0)] > start)

    def add(self, start: I64, stop: I64) -> Claims:
        """Return these claims and new disjoint ones."""
        if len(self.start) == 0:
            order = np.argsort(start)
            return Claims(start[order], stop[order])
        starts = np.concatenate([self.start, start])
        order = np.argsort(starts, kind="stable")
        return Claims(starts[order], np.concatenate([self.stop, stop])[order])


def disjoint(start: I64, stop: I64, priority: U64) -> I64:
    """Return indices of ranges, none of which overlap: of two that do, the lower priority number
    stays.

    With ranges sorted by start, any overlap implies an overlap between neighbours, so removing the
    losing neighbour until no neighbours overlap is enough.
    """
    order = np.argsort(start)
    while True:
        first, second = order[:-1], order[1:]
        clash = stop[first] > start[second]
        if not clash.any():
            return order
        first, second = first[clash], second[clash]
        first_wins = priority[first] <= priority[second]
        losers = np.where(first_wins, second, first)
        keep = np.ones(len(start), dtype=bool)
        keep[losers] = False
        order = order[keep[order]]
