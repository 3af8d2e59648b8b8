"""Layers of two kinds in any order, such as experts in every second: ranks hold ranges of them.
Pure; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from motet.parallel.planner.partition import Counts, Score
from motet.parallel.planner.steps import Load

_SLACK = 1e-9
HALVINGS = 24
Fits = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""Whether (rank, dense layers, layers with experts) fit into memory, element by element."""


def unlike(
    loads: Sequence[Load],
    kinds: Sequence[int],
    fits: Fits,
    score: Score,
    n: float = 1.0,
    limit_s: float = math.inf,
) -> tuple[float, Counts] | None:
    """Return the best (seconds of a step, layers of every rank) where layers differ: ranks hold
    ranges of them. None where memory is too small, or any partition takes longer than a limit.

    The slowest rank is as short as can be (every rank takes as many layers as a bound allows, and
    the least bound that suffices is found by halving); then layers move to the ranks that add least
    to the wait (dynamic programming over ranges). Exact where ranks are equally fast and layers are
    many more than ranks; else near.

    Args:
        kinds: 0 dense or 1 with experts, of every layer.
        n: micro-batches.
        limit_s: partitions that take longer are of no use.
    """
    ranges = _Ranges(loads, kinds, fits)
    low, high = 0.0, sum(load.fixed + max(load.each) * len(kinds) for load in loads)
    high = min(high, limit_s / n)  # n times the slowest rank is a part of the step
    if not ranges.suffices(high):
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if ranges.suffices(middle):
            high = middle
        else:
            low = middle
    best: tuple[float, Counts] | None = None
    # A slightly slower slowest rank may leave others so much less to wait for that it pays.
    for slack in (1.0, 1.02) if len({load.wait_each for load in loads}) > 1 else (1.0,):
        counts = ranges.least_wait(high * slack * (1 + _SLACK))
        if counts is not None:
            value = score(counts)
            best = (value, counts) if best is None or value < best[0] else best
    return best


class _Ranges:
    """Seconds of every rank with every range of layers, [first layer, layer after the last]."""

    def __init__(self, loads: Sequence[Load], kinds: Sequence[int], fits: Fits) -> None:
        self.loads, self.layers = loads, len(kinds)
        sums = np.array([0, *accumulate(kinds)])
        self.routed = np.maximum(sums[None, :] - sums[:, None], 0)
        length = np.arange(self.layers + 1)
        length = length[None, :] - length[:, None]
        self.there = length >= 0
        self.dense = np.maximum(length, 0) - self.routed
        # Layers that the ranks behind must hold.
        self.after = [0, *accumulate(load.least for load in reversed(loads))][-2::-1]
        known: dict[int, np.ndarray] = {}
        self.busy_s = []
        for rank, load in enumerate(loads):
            if id(load) not in known:
                known[id(load)] = (
                    load.fixed + load.each[0] * self.dense + load.each[1] * self.routed
                )
            room = self.there & fits(rank, self.dense, self.routed)
            self.busy_s.append(np.where(room, known[id(load)], np.inf))

    def suffices(self, bound_s: float) -> bool:
        """Return whether all layers find a rank when each takes as many as a bound allows."""
        first = 0
        for load, after, busy_s in zip(self.loads, self.after, self.busy_s, strict=True):
            # Seconds and bytes grow with every layer, so that what is allowed comes first.
            row = busy_s[first, first : self.layers - after + 1]
            count = int(row.searchsorted(bound_s, side="right")) - 1
            if count < load.least:
                return False
            first += count
        return first == self.layers

    def least_wait(self, bound_s: float) -> Counts | None:
        """Return the partition that adds least to the wait with no rank slower than a bound; None
        where there is none.
        """
        wait_s = np.full(self.layers + 1, np.inf)
        wait_s[0] = 0.0
        known: dict[int, np.ndarray] = {}
        chosen = []
        for load, after, busy_s in zip(self.loads, self.after, self.busy_s, strict=True):
            if id(load) not in known:
                more = load.wait_each[0] * self.dense + load.wait_each[1] * self.routed
                far = self.dense + self.routed >= load.least
                known[id(load)] = np.where(far & self.there, load.wait_fixed + more, np.inf)
            sums = np.where(busy_s <= bound_s, wait_s[:, None] + known[id(load)], np.inf)
            sums[:, self.layers - after + 1 :] = np.inf
            chosen.append(sums.argmin(axis=0))
            wait_s = sums.min(axis=0)
        if not math.isfinite(wait_s[self.layers]):
            return None
        end, counts = self.layers, []
        for first_of in reversed(chosen):
            first = int(first_of[end])
            counts.append(end - first)
            end = first
        return tuple(reversed(counts))
