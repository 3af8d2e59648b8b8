"""Layouts whose whole replicas stand in one group each: gradients cross between groups, and shares of the step follow their speed. Pure.

Every group that takes part is filled with replicas. The micro-batches of a replica of group g, c_g, satisfy sum over g of R_g c_g = N; those
near the proportional numbers are tried, and layers are divided nearly evenly: this part of the search is not exhaustive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from motet.parallel.cost_terms import Prediction
from motet.parallel.layout import Layout
from motet.parallel.plan_lines import skeleton
from motet.parallel.plan_partition import stage_layers
from motet.parallel.plan_space import Core, Spread, Way, divisors, splits
from motet.parallel.plan_terms import kind_of

if TYPE_CHECKING:
    from motet.parallel.planner import Search

NEAR = 3
"""How far from the proportional number of micro-batches others are tried."""
HOPEFUL = 1.02
"""A layout that takes this much longer than what is ranked, evenly divided, is not divided otherwise."""
HOPELESS = 1.3
"""Where a layout takes this much longer than what is ranked, no other schedule or share of its degrees is tried."""
MANY_DEVICES = 512
"""Clusters with fewer devices have `Limits.replica_shapes` raised in proportion: their shapes take less time."""
ONE = Way("1f1b", 1)


class Shape(NamedTuple):
    """Degrees of a replica, and replicas on every group that takes part."""

    bound_s: float  # of a step, any way it is done
    core: Core
    shard: int
    pp: int
    spread: Spread
    number: int  # micro-batches of all replicas


def search(search: Search) -> None:
    """Try sets of at least two groups, degrees inside a replica, and shares of the step, those with the lowest bound first."""
    groups, counts = range(len(search.cluster.groups)), search.answer.counts
    found: list[Shape] = []
    for size in range(2, len(groups) + 1):
        for chosen in combinations(groups, size):
            for core in search.cores():
                found += _of_core(search, chosen, core)
    found.sort(key=lambda shape: shape.bound_s)
    most = search.question.limits.replica_shapes * max(1, MANY_DEVICES // search.cluster.devices)
    for tried, shape in enumerate(found):
        if shape.bound_s >= search.limit_s:
            counts["slower"] += len(found) - tried
            return
        if tried == most:
            counts["not tried"] += len(found) - tried
            earlier_s = search.answer.bound_s or shape.bound_s
            search.answer.bound_s = min(earlier_s, shape.bound_s)
            return
        _shapes(search, shape.core, shape.shard, shape.pp, shape.spread, shape.number)


def _of_core(search: Search, chosen: tuple[int, ...], core: Core) -> Iterator[Shape]:
    question = search.question
    sequences, done = question.training.sequences, search.work_of(core, search.recomputes()[0])
    sizes = [search.cluster.groups[g].devices for g in chosen]
    for shard in divisors(sequences // core.micro_sequences):
        each = shard * core.cp * core.tp
        number = sequences // (core.micro_sequences * shard)
        for pp in range(1, min(search.most_stages(), min(sizes) // each) + 1):
            replicas = [devices // (each * pp) for devices in sizes]
            if sum(replicas) > number or not question.allows(
                pp=pp, dp_shard=shard, dp_replicate=sum(replicas)
            ):
                continue
            pairs = list(zip(chosen, replicas, strict=True))
            rate = sum(count * pp / float(done.whole[g]) for g, count in pairs)
            bound_s = number * done.share / rate
            if bound_s >= search.limit_s:
                search.answer.counts["slower"] += 1
                continue
            yield Shape(bound_s, core, shard, pp, Spread("replicas", tuple(pairs)), number)


def _shapes(search: Search, core: Core, shard: int, pp: int, spread: Spread, number: int) -> None:
    """Try the numbers of micro-batches, schedules and recomputation of some replicas."""
    replicas = sum(count for _, count in spread.blocks)
    if (replicas, shard) not in splits(search.model, core, replicas * shard):
        return
    used = [0] * len(search.cluster.groups)
    for g, count in spread.blocks:
        used[g] = count * pp * shard * core.cp * core.tp
    if search.machines(used) is None:
        search.answer.counts["uneven"] += 1
        return
    done = search.work_of(core, search.recomputes()[0])
    names = tuple(search.cluster.groups[g].name for g, _ in spread.blocks)
    plain = skeleton(core, (replicas, shard), pp, "none", ONE)
    kind = (*kind_of(plain, spread, names), None, "none")
    fits = False
    for micro in _numbers(spread, number, done.whole):
        for way in search.ways(pp, micro):
            bounds = [
                done.step_s(way, pp, n, float(done.slowest(_only(len(used), g, pp))))
                for (g, _), n in zip(spread.blocks, micro, strict=True)
            ]
            if max(bounds) >= search.limit_of(kind):
                search.answer.counts["slower"] += 1
                continue
            for recompute in search.recomputes():
                layout = skeleton(core, (replicas, shard), pp, recompute, way)
                layout = replace(layout, shares=_shares(spread, micro))
                found = _divided(search, layout, spread, used, kind)
                if found.step_time_s > HOPELESS * search.limit_of(kind):
                    return  # gradients between groups take too long, however the rest is done
                if found.fits:
                    fits = True
                    break
    search.answer.counts["memory"] += int(not fits)


def _only(groups: int, g: int, pp: int) -> np.ndarray:
    out = np.zeros(groups)
    out[g] = pp
    return out


def _numbers(spread: Spread, number: int, whole: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Yield micro-batches of a replica of every group, those nearest to proportional first."""
    replicas = [count for _, count in spread.blocks]
    speed = [1 / float(whole[g]) for g, _ in spread.blocks]
    total = sum(r * s for r, s in zip(replicas, speed, strict=True))
    even = [number * s / total for s in speed]
    ranges = []
    for share, r in zip(even[:-1], replicas[:-1], strict=True):
        low, high = max(1, int(share) - NEAR), min(number // r, math.ceil(share) + NEAR)
        ranges.append(sorted(range(low, high + 1), key=lambda n: abs(n - share)))
    for found in product(*ranges):
        left = number - sum(n * r for n, r in zip(found, replicas[:-1], strict=True))
        if left > 0 and left % replicas[-1] == 0:
            yield (*found, left // replicas[-1])


def _shares(spread: Spread, micro: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shares of all replicas in lowest terms; () where they are equal."""
    if len(set(micro)) == 1:
        return ()
    unit = math.gcd(*micro)
    return tuple(
        n // unit for (_, count), n in zip(spread.blocks, micro, strict=True) for _ in range(count)
    )


def _divided(
    search: Search, layout: Layout, spread: Spread, used: list[int], kind: tuple[object, ...]
) -> Prediction:
    """Judge a layout with its layers divided evenly, and where that is near the best with less on the ends; return the first that fits."""
    if layout.pp == 1:
        return search.judge(layout, spread, used)
    stages_of = [layout.stages_of(rank) for rank in range(layout.pp)]
    first: Prediction | None = None
    for counts in _partitions(search.model.n_layers, layout.pp):
        stages = stage_layers(counts, stages_of, layout.stages)
        if stages is None:
            continue
        found = search.judge(replace(layout, stage_layers=stages), spread, used)
        if first is None or (found.fits and not first.fits):
            first = found
        if found.step_time_s > HOPEFUL * search.limit_of(kind):
            break
    return first or search.judge(replace(layout, stage_layers=()), spread, used)


def _partitions(layers: int, pp: int) -> Iterator[tuple[int, ...]]:
    """Yield layers per rank: as even as can be, then with up to two less on the first and on the last."""
    base, over = divmod(layers, pp)
    yield tuple([base] * (pp - over) + [base + 1] * over)
    for first, last in product(range(max(0, base - 2), base + 2), repeat=2):
        left, inner = layers - first - last, pp - 2
        if left < 0 or (inner == 0) != (left == 0):
            continue
        each, more = divmod(left, inner) if inner else (0, 0)
        yield (first, *[each + 1] * more, *[each] * (inner - more), last)
