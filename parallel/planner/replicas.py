"""Layouts whose whole replicas stand in one group each: gradients cross between groups, and shares
of the step follow their speed. Pure.

Every group that takes part is filled with replicas. The micro-batches of a replica of group g, c_g,
satisfy sum over g of R_g c_g = N. If it needs at least c x_g + w_g for c micro-batches, then the
slowest takes no less than (N + sum of R_g w_g / x_g) / (sum of R_g / x_g), the mean weighted with
R_g / x_g. What is not slower than that is tried, whatever the shares.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from motet.parallel.cost.shapes import StageShape
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.bounds import gradients_crossing_s
from motet.parallel.planner.context import ONE, Context
from motet.parallel.planner.linear import layers_that_fit, skeleton
from motet.parallel.planner.partition import stage_layers
from motet.parallel.planner.placement import even, replicated
from motet.parallel.planner.question import kind_of
from motet.parallel.planner.space import (
    GroupAssignment,
    InnerDegrees,
    ScheduleChoice,
    divisors,
    splits,
)
from motet.parallel.planner.steps import value

MANY_DEVICES = 512
"""Clusters with fewer devices have `Limits.replica_shapes` raised in proportion: their shapes take
less time.
"""
PREDICTED = 10
"""So many layouts are predicted for each of `Limits.replica_shapes` at most."""
Known = dict[tuple[object, ...], list[tuple[float, float]]]


@dataclass
class Shape:
    """Degrees of a replica, and replicas on every group that takes part."""

    core: InnerDegrees
    shard: int
    pp: int
    spread: GroupAssignment
    number: int  # micro-batches of all replicas
    least_s: np.ndarray  # of the slowest rank and one micro-batch, for every group that takes part
    rest_s: np.ndarray  # what fills and drains the pipeline besides
    once_s: np.ndarray  # gradients and update
    placed: bool = False  # `once_s` is of the machines on which it stands

    @property
    def replicas(self) -> np.ndarray:
        """Return how many every group has."""
        return np.array([count for _, count in self.spread.blocks])

    def bound_s(self) -> float:
        """Return what a step takes at least."""
        rates = self.replicas / self.least_s
        return float((self.number + rates @ (self.rest_s + self.once_s)) / rates.sum())


def search(context: Context) -> None:
    """Try sets of at least two groups, degrees inside a replica, and shares of the step, those with
    the lowest bound first.
    """
    question, record, counts = context.question, context.record, context.record.counts
    groups = range(len(question.cluster.groups))
    if len(groups) < 2:
        return
    if not record.proving and record.enough(0):
        record.left_from(0.0)
        return
    sets = [one for size in groups for one in combinations(groups, size + 1) if size]
    crossing_s = {one: gradients_crossing_s(context.predictor, one) for one in sets}
    shapes: list[Shape] = []
    for core in question.inner_degrees():
        for one in sets:
            bound_s = _least_of_core_s(context, one, core, crossing_s[one])
            if bound_s < record.limit_s and record.late():
                counts["not tried"] += 1
                record.left_from(bound_s)
            elif bound_s < record.limit_s:
                shapes += _of_core(context, one, core, crossing_s[one])
    _take(context, shapes)


def _take(context: Context, shapes: list[Shape]) -> None:
    """Try shapes, lowest bound first; what their gradients take is found when their turn comes."""
    question, record, counts = context.question, context.record, context.record.counts
    known: Known = {}
    heap = [(shape.bound_s(), number) for number, shape in enumerate(shapes)]
    heapq.heapify(heap)
    most = question.limits.replica_shapes * max(1, MANY_DEVICES // question.cluster.devices)
    before = counts["predicted"]
    tried = 0
    while heap:
        bound_s, number = heapq.heappop(heap)
        if bound_s >= record.limit_s:
            counts["slower"] += 1 + len(heap)
            return
        shape = shapes[number]
        if not shape.placed:
            if _once(context, shape, known):
                heapq.heappush(heap, (shape.bound_s(), number))
            continue
        predicted = counts["predicted"] - before
        if tried >= most or predicted >= PREDICTED * most or record.late():
            counts["not tried"] += 1 + len(heap)
            record.left_from(bound_s)
            return
        tried += _shapes(context, shape)


def _least_of_core_s(
    context: Context, chosen: tuple[int, ...], core: InnerDegrees, sync_s: float
) -> float:
    """Return what a step takes at least with some core, whatever the shape: if all devices of the
    groups worked all the time.

    The slowest replica has one micro-batch or more, behind which no more of the gradients' transfer
    is hidden than the overlap allows.
    """
    done, at = context.work_bound(core, context.question.recomputes()[0]), list(chosen)
    sizes = np.array([context.question.cluster.groups[g].devices for g in chosen])
    # Micro-batches are whole layers on some rank: no device works faster than the fastest group's.
    each = np.maximum(np.minimum(done.whole[at], done.layer[at] * done.layers), done.least)
    micro_batches = context.question.training.sequences / core.micro_sequences
    passes_s = micro_batches * core.cp * core.tp / float((sizes / each).sum())
    # Of the passes the last micro-batch alone hides transfers; it is a part of them, at most all.
    return max(passes_s, sync_s + (1 - context.predictor.traits.data_overlap) * passes_s)


def _of_core(
    context: Context, chosen: tuple[int, ...], core: InnerDegrees, sync_s: float
) -> Iterator[Shape]:
    """Yield the shapes of a core whose bound is below the limit; `sync_s`: of gradients between the
    groups, at least.
    """
    question, done = context.question, context.work_bound(core, context.question.recomputes()[0])
    sequences, layers = question.training.sequences, context.question.model.n_layers
    sizes = np.array([context.question.cluster.groups[g].devices for g in chosen])
    at = list(chosen)
    shards = np.array(divisors(question.rank_unit // core.micro_sequences))
    pp = np.arange(1, question.most_stages + 1)
    each = shards[:, None] * (core.cp * core.tp) * pp  # [shard, pp]
    # Every group that takes part is filled: an idle device of a group that takes part would only
    # wait.
    replicas = sizes // each[:, :, None]
    number = (sequences // (core.micro_sequences * shards))[:, None]
    fullest = -(-done.layers // pp)  # layers of the kind that most are of
    # Some rank holds no fewer layers of the common kind than the mean, rounded up.
    whole = np.where(pp[:, None] == 1, done.whole[at], done.layer[at] * fullest[:, None])
    whole = np.maximum(whole, done.least / pp[:, None]) + np.where(pp[:, None] > 1, done.send, 0.0)
    most = np.clip((layers + 2) // pp, 1, question.limits.virtual_stages)[:, None]
    # The schedule is open: the least wait of any, the slowest rank's own part taken off.
    several = np.minimum((done.rest - whole) / most, done.inputs / 4 - whole)
    rest_s = np.where(most > 1, several, done.least - whole)
    rest_s = np.where(pp[:, None] == 1, 0.0, np.maximum(rest_s, 0.0))
    once_s = sync_s - context.predictor.traits.data_overlap * np.minimum(sync_s, whole)
    rates = replicas / whole
    added_s = (rates * (rest_s + once_s)).sum(axis=2)
    bound_s = (number + added_s) / np.maximum(rates.sum(axis=2), 1e-30)
    open_ = (
        (replicas.min(axis=2) > 0)
        & (replicas.sum(axis=2) <= number)
        & (bound_s < context.record.limit_s)
    )
    # Memory last, as it asks for lines that times do not need.
    open_ &= _has_room(context, chosen, core, shards, fullest, open_)
    for i, j in np.argwhere(open_):
        counts = [int(count) for count in replicas[i, j]]
        if question.allows(pp=int(pp[j]), dp_shard=int(shards[i]), dp_replicate=sum(counts)):
            spread = GroupAssignment("replicas", tuple(zip(chosen, counts, strict=True)))
            degrees = core, int(shards[i]), int(pp[j])
            # A copy: what is paid once is found for each shape, and shards share the row.
            once = once_s[j].copy()
            yield Shape(*degrees, spread, int(number[i, 0]), whole[j], rest_s[j], once)


def _has_room(
    context: Context,
    chosen: tuple[int, ...],
    core: InnerDegrees,
    shards: np.ndarray,
    fullest: np.ndarray,
    open_: np.ndarray,
) -> np.ndarray:
    """Return where ranks of all groups have memory for the layers that one of them holds at least,
    [shard, pp]; with one stage always.
    """
    found = np.zeros(open_.shape, dtype=bool)
    least = context.question.recomputes()[-1]  # keeps least
    for i in np.flatnonzero(open_.any(axis=1)):
        if splits(context.question.model, core, int(shards[i])):
            split = 1, int(shards[i])
            rooms = layers_that_fit(context.lines, core, split, np.ones(1), least)[list(chosen), 0]
            found[i] = fullest <= rooms.min()
    found[:, 0] = True
    return found


def _used(context: Context, shape: Shape) -> list[int]:
    """Return the devices of every group that a shape uses."""
    used = [0] * len(context.question.cluster.groups)
    for g, count in shape.spread.blocks:
        used[g] = count * shape.pp * shape.shard * shape.core.cp * shape.core.tp
    return used


def _once(context: Context, shape: Shape, known: Known) -> bool:
    """Find what gradients and the update take on the shape's machines; return whether it can stand
    there at all.
    """
    core, replicas, shard = shape.core, int(shape.replicas.sum()), shape.shard
    if (replicas, shard) not in splits(context.question.model, core, replicas * shard):
        context.record.counts["uneven"] += 1
        return False
    shape.placed = True
    key = core._replace(micro_sequences=1), shard, shape.pp, shape.spread
    if key not in known:
        known[key] = _at_least(context, key[0], (replicas, shard), shape.pp, shape.spread)
    overlap = context.predictor.traits.data_overlap
    for at, ((sync_s, update_s), least_s) in enumerate(zip(known[key], shape.least_s, strict=True)):
        # No more hides transfers than what the slowest rank does for one micro-batch.
        exposed_s = sync_s - overlap * min(sync_s, float(least_s))
        shape.once_s[at] = max(shape.once_s[at], exposed_s) + update_s
    return True


def _at_least(
    context: Context, core: InnerDegrees, dp: tuple[int, int], pp: int, spread: GroupAssignment
) -> list[tuple[float, float]]:
    """Return seconds of (transfer of gradients, update) of the fullest rank in every group that
    takes part, at least.

    Nothing where nodes are filled unevenly.
    """
    layout = skeleton(core, dp, pp, "none", ONE)
    # Where nodes are filled unevenly nothing is told but that transfers take some time: 0 is safe.
    if not even(context.question.cluster, layout, spread):
        return [(0.0, 0.0)] * len(spread.blocks)
    stage = replicated(context.question.cluster, layout, spread).stages[0]
    layers, routed = context.question.model.n_layers, sum(context.kinds)
    fullest = -(-(routed or layers) // pp)
    kept = (0, fullest) if routed else (fullest, 0)
    found = []
    for g, _ in spread.blocks:
        if pp == 1:
            rank = context.predictor.rank(
                layout, stage, StageShape(layers - routed, routed, True, True), g
            )
            found.append((rank.sync_s, rank.optimizer_s))
        else:
            line = context.lines.rank((core, dp, pp, spread), layout, stage, g, False, False)
            found.append((value(line.sync, *kept), value(line.update, *kept)))
    return found


def _shapes(context: Context, shape: Shape) -> bool:
    """Try the numbers of micro-batches, schedules and recomputation of some replicas; return
    whether there are such numbers.
    """
    core, pp, used = shape.core, shape.pp, _used(context, shape)
    replicas = int(shape.replicas.sum())
    names = tuple(context.question.cluster.groups[g].name for g, _ in shape.spread.blocks)
    plain = skeleton(core, (replicas, shape.shard), pp, "none", ONE)
    kind = (*kind_of(plain, shape.spread, names), None, "none")
    fits = False
    if context.machines(used) is None:
        context.record.counts["uneven"] += 1
        return False
    some = False
    for micro in _numbers(context, shape, kind):
        some = True
        for way in context.question.schedules(pp, micro):
            for recompute in context.question.recomputes():
                if _least_s(context, shape, micro, way, recompute) >= context.record.limit_of(kind):
                    context.record.counts["slower"] += 1
                    break
                layout = skeleton(core, (replicas, shape.shard), pp, recompute, way)
                layout = replace(layout, shares=_shares(shape.spread, micro))
                if _divided(context, layout, shape, micro, used, kind):
                    fits = True
                    break
    context.record.counts["memory"] += int(not fits)
    return some


def _least_s(
    context: Context,
    shape: Shape,
    micro: tuple[int, ...],
    way: ScheduleChoice,
    recompute: str,
    fullest: int = 0,
) -> float:
    """Return what a step takes at least with some shares; `fullest`: layers that some rank has at
    least, where it is known.
    """
    done = context.work_bound(shape.core, recompute)
    found = []
    for (g, _), n, least_s, more_s in zip(
        shape.spread.blocks, micro, shape.least_s, shape.once_s, strict=True
    ):
        slowest_s = max(float(least_s) - done.send * (shape.pp > 1), fullest * float(done.layer[g]))
        found.append(done.step_s(way, shape.pp, n, slowest_s) + float(more_s))
    return max(found)


def _numbers(context: Context, shape: Shape, kind: tuple[object, ...]) -> Iterator[tuple[int, ...]]:
    """Yield micro-batches of a replica of every group that may win, those nearest to proportional
    first.
    """
    replicas, number = shape.replicas, shape.number
    rest_s = shape.rest_s + shape.once_s
    limit_s = min(context.record.limit_of(kind), 1e30)
    # Within the limit no group can do more; what all others leave is then the least that a group
    # must do.
    most = np.floor(np.minimum((limit_s - rest_s) / shape.least_s, number / replicas))
    least = np.ceil((number - (most @ replicas - most * replicas)) / replicas)
    even = number / shape.least_s / (replicas / shape.least_s).sum()
    ranges = []
    for low, high, share in zip(least[:-1], most[:-1], even[:-1], strict=True):
        near = np.arange(max(1, int(low)), int(high) + 1)
        ranges.append(near[np.argsort(abs(near - share), kind="stable")].tolist())
    counts = [int(count) for count in replicas]
    for found in product(*ranges):
        left = number - sum(n * r for n, r in zip(found, counts[:-1], strict=True))
        if 0 < left <= most[-1] * counts[-1] and left % counts[-1] == 0:
            yield (*found, left // counts[-1])


def _shares(spread: GroupAssignment, micro: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shares of all replicas in lowest terms; () where they are equal."""
    if len(set(micro)) == 1:
        return ()
    unit = math.gcd(*micro)
    return tuple(
        n // unit for (_, count), n in zip(spread.blocks, micro, strict=True) for _ in range(count)
    )


def _divided(
    context: Context,
    layout: Layout,
    shape: Shape,
    micro: tuple[int, ...],
    used: list[int],
    kind: tuple[object, ...],
) -> bool:
    """Judge a layout with every division of layers that may win; return whether one fits."""
    if layout.pp == 1:
        return context.judge(layout, shape.spread, used).fits
    stages_of = [layout.stages_of(rank) for rank in range(layout.pp)]
    way, fits = ScheduleChoice(layout.schedule, layout.virtual_stages), False
    layers, pp = context.question.model.n_layers, layout.pp
    for fullest in range(-(-layers // pp), layers + 1):
        # With two ranks fewer than stages the ends may be empty: a fuller rank than that is slower
        # with no gain.
        if fits and fullest > -(-layers // max(1, pp - 2)):
            break
        routed = fullest - (layers - sum(context.kinds)) if any(context.kinds) else fullest
        least_s = _least_s(context, shape, micro, way, layout.recompute, max(0, routed))
        if least_s >= context.record.limit_of(kind):
            break
        for counts in _partitions(layers, pp, fullest):
            stages = stage_layers(counts, stages_of, layout.stages)
            if stages is not None:
                found = context.judge(replace(layout, stage_layers=stages), shape.spread, used)
                fits = fits or found.fits
    return fits


def _partitions(layers: int, pp: int, fullest: int) -> Iterator[tuple[int, ...]]:
    """Yield layers per rank with no more than `fullest` on one: as few as can be on the first and
    on the last, in every proportion.

    All ranks of a replica stand in one group, so that only the fullest, the first and the last
    count; where others may have fewer, those are at the front, where ranks keep most.
    """
    inner = pp - 2
    ends = max(0, layers - fullest * inner)
    for first in range(max(0, ends - fullest), min(ends, fullest) + 1):
        left = layers - ends
        each, more = divmod(left, inner) if inner else (0, 0)
        yield (first, *[each] * (inner - more), *[each + 1] * more, ends - first)
