"""Layers for every rank of a pipeline, such that a step is as short as it can be. Pure; no torch.

A step of n micro-batches takes n x (the slowest rank's time for one) + what the others add to fill
and drain the pipeline (`pipeline.pipeline_s`). With a bound on the slowest rank, every rank
has a largest number of layers; among the partitions inside the bound the best gives layers to the
ranks that add least. Raising the bound step by step, until the slowest rank alone costs more than
the best found, makes the search exact (against the proportional rule of Holmes, arXiv:2312.03549,
section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from motet.parallel.planner.linear import MemoryLines
from motet.parallel.planner.steps import Load

MOST_BOUNDS = 64
"""Bounds on the slowest rank that are tried at most; more are only passed where ranks differ
wildly.
"""
_SLACK = 1e-9


Counts = tuple[int, ...]
Score = Callable[[Counts], float]
"""Seconds of a step with these layers on every rank; infinite where it cannot be."""


def alike(
    loads: Sequence[Load],
    layers: int,
    most: Sequence[int],
    n: float,
    score: Score,
    limit_s: float = math.inf,
    own: float = 1.0,
) -> tuple[float, Counts] | None:
    """Return the best (seconds of a step, layers of every rank) where layers do not differ; None
    where memory is too small.

    Args:
        most: layers that fit into the memory of every rank.
        n: micro-batches.
        limit_s: partitions that take longer are of no use; the first is returned all the same.
        own: share of its own time for one micro-batch that the slowest rank does not wait, at most.
    """
    if not feasible(loads, layers, most):
        return None
    least = [load.least for load in loads]
    slopes = [load.each[0] for load in loads]
    ranks_of = _by_wait(loads)
    wait_s = _wait_s(loads, _filled(layers, least, most, ranks_of))
    best: tuple[float, Counts] | None = None
    bound_s = _first_bound(loads, slopes, least, most, layers)
    # Only times at which some rank can hold a layer more make a difference: between them the same
    # divisions are possible, and a slower slowest rank is no better.
    for _ in range(MOST_BOUNDS):
        caps = _caps(loads, slopes, most, bound_s)
        least_s = (n - own) * bound_s
        # Within the bound, more wait may buy a shorter transfer or update: of these the longest of
        # all ranks counts, which evens out against the wait.
        for counts in _eased(loads, layers, caps, ranks_of):
            if best is None or least_s + _wait_s(loads, counts) < min(best[0], limit_s):
                value = score(tuple(counts))
                best = (value, tuple(counts)) if best is None or value < best[0] else best
        assert best is not None, "the first partition is always scored"
        bound_s = _next_bound(loads, slopes, most, caps)
        # The others wait for no less than this; the slowest rank itself is no part of it.
        if bound_s == math.inf or (n - own) * bound_s + wait_s >= min(best[0], limit_s):
            break
    return best


def feasible(loads: Sequence[Load], layers: int, most: Sequence[int]) -> bool:
    """Return whether ranks can hold what they must, and have memory for all layers together."""
    least = [load.least for load in loads]
    return sum(least) <= layers <= sum(most) and not any(map(int.__gt__, least, most))


def least_s(loads: Sequence[Load], layers: int, n: float, own: float = 1.0) -> float:
    """Return what the passes of a step take at least, whatever the partition of layers that do not
    differ; `own` as of `alike`.
    """
    least, most = [load.least for load in loads], [layers] * len(loads)
    if sum(least) > layers:
        return math.inf
    slopes = [load.each[0] for load in loads]
    bound_s = _first_bound(loads, slopes, least, most, layers)
    wait_s = _wait_s(loads, _filled(layers, least, most, _by_wait(loads)))
    return max(n * bound_s, (n - own) * bound_s + wait_s)


def _by_wait(loads: Sequence[Load]) -> list[list[int]]:
    """Return ranks whose layers cost the others as much, those that cost least first."""
    found: dict[float, list[int]] = {}
    for r, load in enumerate(loads):
        found.setdefault(load.wait_each[0], []).append(r)
    return [found[wait] for wait in sorted(found)]


def _wait_s(loads: Sequence[Load], counts: Sequence[int]) -> float:
    waits = [one.wait_fixed + one.wait_each[0] * k for one, k in zip(loads, counts, strict=True)]
    return max(sum(waits), 0.0)


def _caps(
    loads: Sequence[Load], slopes: Sequence[float], most: Sequence[int], bound_s: float
) -> list[int]:
    """Return the layers with which every rank is within a bound."""
    top_s = bound_s * (1 + _SLACK)
    found = [int((top_s - one.fixed) / slope) for one, slope in zip(loads, slopes, strict=True)]
    return list(map(min, found, most))


def _next_bound(
    loads: Sequence[Load], slopes: Sequence[float], most: Sequence[int], caps: Sequence[int]
) -> float:
    """Return the next time of a slowest rank above a bound; infinite where there is no memory."""
    times = [
        one.fixed + slope * (cap + 1)
        for one, slope, cap, top in zip(loads, slopes, caps, most, strict=True)
        if cap < top
    ]
    return min(times, default=math.inf)


def _first_bound(
    loads: Sequence[Load],
    slopes: Sequence[float],
    least: Sequence[int],
    most: Sequence[int],
    layers: int,
) -> float:
    """Return the least time of the slowest rank under which all layers find a place."""
    # Two lower ends: what ranks must hold, and the even share if layers could be cut.
    floor = max(load.fixed + slope * k for load, slope, k in zip(loads, slopes, least, strict=True))
    rate = sum(1 / slope for slope in slopes)
    even = layers + sum(load.fixed / slope for load, slope in zip(loads, slopes, strict=True))
    bound_s = max(floor, even / rate)
    caps = _caps(loads, slopes, most, bound_s)
    while sum(caps) < layers:
        bound_s = _next_bound(loads, slopes, most, caps)
        caps = _caps(loads, slopes, most, bound_s)
    return bound_s


def _filled(
    layers: int, least: Sequence[int], most: Sequence[int], ranks_of: Sequence[Sequence[int]]
) -> list[int]:
    """Return layers per rank: first where they cost the others least, evenly among equals."""
    counts = list(least)
    left = layers - sum(counts)
    for ranks in ranks_of:
        # Ranks whose layers add as much are filled together: among them the order is free, and even
        # is best for what is paid once.
        room = sum(most[r] - counts[r] for r in ranks)
        # There is not enough room here: these are full, and the next dearer ranks take the rest.
        if room <= left:
            for r in ranks:
                counts[r] = most[r]
            left -= room
            continue
        _level(counts, most, ranks, left)
        return counts
    return counts


def _level(counts: list[int], most: Sequence[int], ranks: Sequence[int], left: int) -> None:
    """Give `left` layers to some ranks, so that the fullest has as few as can be."""
    low, high = 0, max(most[r] for r in ranks)
    start = sum(counts[r] for r in ranks)
    while low < high:
        level = (low + high) // 2
        if sum(max(counts[r], min(most[r], level)) for r in ranks) - start >= left:
            high = level
        else:
            low = level + 1
    full = [max(counts[r], min(most[r], low)) for r in ranks]
    over = sum(full) - start - left
    for r, value in zip(ranks, full, strict=True):
        if over and value == low and value > counts[r]:
            value, over = value - 1, over - 1
        counts[r] = value


def _eased(
    loads: Sequence[Load], layers: int, caps: Sequence[int], ranks_of: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Yield partitions within `caps` that wait least, then those whose longest transfer, or update,
    once a step is ever shorter.
    """
    least = [load.least for load in loads]
    outer: Sequence[int] | None = caps
    while outer is not None:
        inner: Sequence[int] | None = outer
        first = None
        while inner is not None:
            counts = _filled(layers, least, inner, ranks_of)
            first = first or counts
            yield counts
            inner = _shorter(loads, counts, inner, layers, 1)
        outer = _shorter(loads, first or [], outer, layers, 0)


def _shorter(
    loads: Sequence[Load], counts: Sequence[int], caps: Sequence[int], layers: int, which: int
) -> list[int] | None:
    """Return the caps under which what is paid once (0 transfers, 1 updates) is shorter than with
    `counts`; None where layers find no place.
    """
    lines = [load.once[which] for load in loads]
    top_s = max(line[0] + line[1] * k for line, k in zip(lines, counts, strict=True)) * (1 - _SLACK)
    found = []
    for load, line, cap in zip(loads, lines, caps, strict=True):
        # This rank needs as long without any layer: no division makes the longest shorter.
        if line[0] >= top_s:
            return None
        found.append(min(cap, int((top_s - line[0]) / line[1])) if line[1] > 0 else cap)
        if found[-1] < load.least:
            return None
    return found if sum(found) >= layers else None


def stage_layers(
    counts: Counts, stages_of: Sequence[Sequence[int]], stages: int
) -> tuple[int, ...] | None:
    """Return layers of every stage from those of every rank; None where a stage between the ends
    would have none.
    """
    out = [0] * stages
    for count, stages_here in zip(counts, stages_of, strict=True):
        inner = [stage for stage in stages_here if 0 < stage < stages - 1]
        for stage in inner:
            out[stage] = 1
        left = count - len(inner)
        if left < 0:
            return None
        while left:
            stage = min(stages_here, key=lambda s: (out[s], s in (0, stages - 1)))
            # One by one, so that stages of a rank stay even; with one stage all at once, which is
            # the same and quick.
            more = 1 if len(stages_here) > 1 else left
            out[stage] += more
            left -= more
    return tuple(out)


# --- dense layers that come first (as those of DeepSeek-V3, arXiv:2412.19437)

MOST_DENSE = 6
"""More dense layers are divided like any that differ (`ranges.unlike`): there are 2 to the
power of their number of ways.
"""

DenseFirst = tuple[int, ...]
"""Dense layers of the first stages; of these only the first may have none, and only the last may
have others.
"""


class Rest(NamedTuple):
    """What is left to divide when the dense layers have their places."""

    dense: Counts  # of every rank
    loads: list[Load]  # what ranks add, their dense layers included, by layers with experts
    most: list[int]  # layers with experts that fit into the memory of every rank


def dense_first(kinds: Sequence[int]) -> int:
    """Return how many dense layers there are if all come first and they are few, else 0; `kinds`: 1
    for layers with experts.
    """
    dense = len(kinds) - sum(kinds)
    return dense if dense <= MOST_DENSE and dense < len(kinds) and not any(kinds[:dense]) else 0


def dense_places(dense: int, stages: int) -> Iterator[DenseFirst]:
    """Yield every way to put some dense layers on the first of some stages."""

    def parts(left: int, room: int) -> Iterator[DenseFirst]:
        if not left:
            yield ()
        elif room:
            for here in range(left, 0, -1):
                for rest in parts(left - here, room - 1):
                    yield (here, *rest)

    # The first stage may hold none, as the embedding is there; all others hold at least one, since
    # a stage must.
    for first in range(dense, -1, -1):
        for rest in parts(dense - first, stages - 1):
            yield (first, *rest)


def rest(
    front: DenseFirst,
    loads: Sequence[Load],
    kept: Sequence[MemoryLines],
    held: Sequence[float],
    stages_of: Sequence[Sequence[int]],
    stages: int,
    layers: int,
) -> Rest:
    """Return what is left to divide.

    Args:
        held: micro-batches whose activations every rank keeps.
        stages_of: stages of every rank.
        layers: with experts.
    """
    dense, costs = [], {}
    out, most = [], []
    for rank, (load, own, count) in enumerate(zip(loads, kept, held, strict=True)):
        stages_here = stages_of[rank]
        here = sum(front[stage] for stage in stages_here if stage < len(front))
        # Layers are in order: a stage behind which dense layers follow can hold none with experts.
        full = all(stage < len(front) - 1 for stage in stages_here)
        least = sum(0 < stage < stages - 1 and stage >= len(front) for stage in stages_here)
        dense.append(here)
        key = id(load), here, least
        if key not in costs:
            costs[key] = _with_dense(load, here, least)
        out.append(costs[key])
        left = own.capacity - own.bytes(here, 0, count)
        each = own.fixed[2] + count * own.saved[2]
        # Negative room means that the dense layers alone are too much: -1 can never hold what it
        # must.
        most.append(0 if full else min(layers, int(left / each)) if left >= 0 else -1)
    return Rest(tuple(dense), out, most)


def _with_dense(load: Load, dense: int, least: int) -> Load:
    """Return a load by layers with experts."""
    # A rank's dense layers are fixed work: they move from `each` into `fixed`.
    return replace(
        load,
        fixed=load.fixed + dense * load.each[0],
        each=(load.each[1], load.each[1]),
        wait_fixed=load.wait_fixed + dense * load.wait_each[0],
        wait_each=(load.wait_each[1], load.wait_each[1]),
        least=least,
        once=(_after(load.once[0], dense), _after(load.once[1], dense)),
    )


def _after(line: tuple[float, float, float], dense: int) -> tuple[float, float, float]:
    """Return a line by layers with experts, where some dense layers are there."""
    return line[0] + dense * line[1], line[2], line[2]


def stages_with(
    front: DenseFirst, counts: Counts, stages_of: Sequence[Sequence[int]], stages: int
) -> tuple[int, ...]:
    """Return layers of every stage, dense ones included; `counts`: layers with experts of every
    rank.
    """
    out = [*front, *[0] * (stages - len(front))]
    for count, mine in zip(counts, stages_of, strict=True):
        open_ = [stage for stage in mine if stage >= len(front) - 1]
        # A stage between the ends must hold a layer before any gets a second.
        empty = [stage for stage in open_ if 0 < stage < stages - 1 and not out[stage]]
        for stage in empty:
            out[stage] = 1
        for _ in range(count - len(empty)):
            stage = min(open_, key=lambda s: (out[s], s in (0, stages - 1)))
            out[stage] += 1
    return tuple(out)
