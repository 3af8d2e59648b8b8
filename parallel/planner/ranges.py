"""Layers of two kinds in any order, such as experts in every second: ranks hold ranges of them.
Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from motet.parallel.planner.partition import Counts, Score
from motet.parallel.planner.steps import Load

_SLACK = 1e-9


def unlike(
    loads: Sequence[Load],
    kinds: Sequence[int],
    fits: Callable[[int, int, int], bool],
    score: Score,
) -> tuple[float, Counts] | None:
    """Return the best (seconds of a step, layers of every rank) where layers differ: ranks hold
    ranges of them.

    The slowest rank is as short as can be (every rank takes as many layers as a bound allows, and
    the least bound that suffices is found by halving); then layers move to the ranks that add least
    to the wait (dynamic programming over ranges). Exact where ranks are equally fast and layers are
    many more than ranks; else near.

    Args:
        kinds: 0 dense or 1 with experts, of every layer.
        fits: whether (rank, dense layers, layers with experts) fit into memory.
    """
    experts = [0, *accumulate(kinds)]
    low, high = 0.0, sum(load.fixed + max(load.each) * len(kinds) for load in loads)
    if not _suffices(loads, experts, fits, high):
        return None
    for _ in range(24):
        middle = (low + high) / 2
        if _suffices(loads, experts, fits, middle):
            high = middle
        else:
            low = middle
    best: tuple[float, Counts] | None = None
    for slack in (1.0, 1.02) if len({load.wait_each for load in loads}) > 1 else (1.0,):
        counts = _ranges(loads, experts, fits, high * slack * (1 + _SLACK))
        if counts is not None:
            value = score(counts)
            best = (value, counts) if best is None or value < best[0] else best
    return best


def _suffices(
    loads: Sequence[Load],
    experts: Sequence[int],
    fits: Callable[[int, int, int], bool],
    bound_s: float,
) -> bool:
    """Return whether all layers find a rank when each takes as many as a bound allows."""
    layers, first = len(experts) - 1, 0
    after = sum(load.least for load in loads)
    for r, load in enumerate(loads):
        after -= load.least
        end = first
        while end < layers - after:
            routed = experts[end + 1] - experts[first]
            dense = end + 1 - first - routed
            busy_s = load.fixed + load.each[0] * dense + load.each[1] * routed
            if busy_s > bound_s or not fits(r, dense, routed):
                break
            end += 1
        if end - first < load.least or (end == first and load.fixed > bound_s):
            return False
        first = end
    return first == layers


def _ranges(
    loads: Sequence[Load],
    experts: Sequence[int],
    fits: Callable[[int, int, int], bool],
    bound_s: float,
) -> Counts | None:
    """Return the partition that adds least to the wait with no rank slower than a bound; None where
    there is none.
    """
    layers = len(experts) - 1
    least_after = [0, *accumulate(load.least for load in reversed(loads))][::-1]
    costs: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for r, load in enumerate(loads):
        found: dict[int, tuple[float, int]] = {}
        for first, (wait_s, _) in costs[-1].items():
            for end in range(first + load.least, layers - least_after[r + 1] + 1):
                routed = experts[end] - experts[first]
                dense = end - first - routed
                busy_s = load.fixed + load.each[0] * dense + load.each[1] * routed
                if busy_s > bound_s or not fits(r, dense, routed):
                    break
                more_s = load.wait_fixed + load.wait_each[0] * dense + load.wait_each[1] * routed
                if end not in found or wait_s + more_s < found[end][0]:
                    found[end] = wait_s + more_s, first
        costs.append(found)
    if layers not in costs[-1]:
        return None
    end, counts = layers, []
    for found in reversed(costs[1:]):
        first = found[end][1]
        counts.append(end - first)
        end = first
    return tuple(reversed(counts))
