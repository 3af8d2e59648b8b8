"""Lower bounds of a step for many pipelines at once, almost as sharp as dividing their layers.

Pure; no torch.

The slowest rank's time x of one micro-batch decides how many whole layers every rank can hold, and
so what must lie on the slower groups. For a grid of x: x itself counts n times, less what the
slowest rank does not wait for itself; layers within their limits, those that add least first, make
the shortest wait; and the fewest layers that a group's fullest rank must hold make the shortest
transfer of gradients and update. The least of all x is the bound. Every number is the predictor's;
only that costs are straight lines in layers is assumed.
"""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import numpy as np

from motet.parallel.planner.rank_arrays import Cost
from motet.parallel.planner.space import ScheduleChoice

ALL_DENSE = 8
"""Up to this many layers of the rarer kind are packed exactly."""
_SLACK = 1e-9


class Rows(NamedTuple):
    """Pipelines: stages of every group, in one order of groups."""

    counts: np.ndarray  # [row, group]
    source: np.ndarray  # which assignment each comes from
    orders: list[tuple[int, ...]]
    first: np.ndarray  # group of the first rank, and of the last
    last: np.ndarray
    line: np.ndarray  # [row, group]: to which group the last rank of a group sends; as many as there are groups: to its own
    ring: np.ndarray  # the same where ranks have several stages
    end: np.ndarray  # [row, group]: ranks up to the last of a group
    loose: bool = (
        False  # nothing says which group is last: it sends to no other where ranks have one stage
    )


class Terms(NamedTuple):
    """What does not depend on a schedule."""

    n: float  # micro-batches
    layers: int
    others: int  # of the rarer kind
    front: bool  # these come first: no rank with a number above theirs has one
    sync_s: np.ndarray  # [group, layers of a rank], once a step
    update_s: np.ndarray
    common_sync_s: np.ndarray  # the same, [group, layers of the common kind]
    common_update_s: np.ndarray
    overlap: float
    factor: float  # of the pipeline's time, probes included
    data_s: float


def rows_of(found: np.ndarray) -> Rows:
    """Return every order of the groups of [assignment, group] numbers of stages."""
    groups = found.shape[1]
    masks = (found > 0) @ (1 << np.arange(groups))
    parts = []
    for mask in np.unique(masks):
        used = [g for g in range(groups) if mask >> g & 1]
        at = np.flatnonzero(masks == mask)
        for order in permutations(used):
            ring = np.full((len(at), groups), groups)
            if len(order) > 1:
                for one, other in zip(order, (*order[1:], order[0]), strict=True):
                    ring[:, one] = other
            line = ring.copy()
            line[:, order[-1]] = groups
            if len(order) > 1:  # a last rank alone in its group sends back to the group before
                line[found[at, order[-1]] == 1, order[-1]] = order[-2]
            end = np.zeros_like(found[at])
            end[:, order] = np.cumsum(found[at][:, order], axis=1)
            parts.append((at, [order] * len(at), line, ring, end))
    source = np.concatenate([one[0] for one in parts])
    orders = [order for one in parts for order in one[1]]
    return Rows(
        found[source],
        source,
        orders,
        np.array([order[0] for order in orders]),
        np.array([order[-1] for order in orders]),
        np.concatenate([one[2] for one in parts]),
        np.concatenate([one[3] for one in parts]),
        np.concatenate([one[4] for one in parts]),
    )


def unordered(found: np.ndarray, cost: Cost) -> Rows:
    """Return rows for assignments in any order: to another group is sent what `unplaced` says, and
    both ends are where a layer waits longest.
    """
    number, groups = found.shape
    several = (found > 0) & ((found > 0).sum(axis=1) > 1)[:, None]
    after = np.where(several, np.arange(groups), groups)
    some = np.where(found > 0, cost.wait_each, -np.inf).argmax(axis=1)
    end = np.cumsum(found, axis=1)
    return Rows(found, np.arange(number), [], some, some, after, after, end, loose=True)


def unplaced(cost: Cost) -> Cost:
    """Return the costs where there is no order of groups: without a head; what a group sends to
    itself is what it sends to the nearest other.
    """
    crossed = []
    for one in (cost.cross, cost.wait_cross):
        least, groups = one.copy(), len(one)
        itself = np.eye(groups, groups + 1, dtype=bool)
        others = np.where(itself, np.inf, one)[:, :-1]
        least[itself] = others.min(axis=1) if groups > 1 else 0.0
        crossed.append(least)
    return cost._replace(
        head=0 * cost.head,
        wait_head=0 * cost.wait_head,
        cross=crossed[0],
        wait_cross=crossed[1],
    )


class Ahead(NamedTuple):
    """Most layers under every interval of the slowest rank's time."""

    held: np.ndarray  # [row, group, interval]
    gain: np.ndarray  # [interval]: layers more because those of the rarer kind take less
    sound: np.ndarray  # [row, interval]: every stage between the ends has a layer


def edges_of(cost: Cost, terms: Terms, low_s: float, high_s: float, fine: int) -> np.ndarray:
    """Return times of the slowest rank at which some rank can hold a layer more, between two times,
    and these.
    """
    fixed = np.stack((*cost.cross.T, *(cost.cross + cost.head[:, None]).T), axis=1)
    starts = (cost.fixed[:, None] + fixed)[:, :, None]
    times = starts + cost.each[:, None, None] * np.arange(1, terms.layers + 1)
    inside = np.unique(times[(times > low_s) & (times < high_s)])
    if len(inside) > fine - 1:
        inside = inside[np.linspace(0, len(inside) - 1, fine - 1).astype(int)]
    return np.concatenate(([low_s], inside, [high_s])) * (1 - _SLACK)


def bounds_s(
    rows: Rows,
    cost: Cost,
    terms: Terms,
    way: ScheduleChoice,
    rooms: np.ndarray,
    slowest: tuple[np.ndarray, float],
    fine: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the slowest rank needs at least, and a step, [row].

    Args:
        rooms: layers for which the ranks of a group have memory together, [row, group].
        slowest: what the slowest rank is known to need, [row]; above the other number a step is too
            long.
        fine: intervals of that time; 0: only a bound without whole layers.
    """
    longer = longer_of(rows, terms, way)
    least_s, high_s = slowest
    if not fine:
        least_s = np.maximum(least_s, _even_s(rows, cost, terms, way))
        waits_s = _any_waits_s(rows, cost, terms, way)[:, None] * longer
        x_s = least_s[:, None]
        found = _step_s(terms, cost.ratio * longer, x_s, waits_s)
        once = once_any_s(rows.counts, terms)
        return least_s, (found + exposed_s(terms, cost.ratio * longer, x_s, *once))[:, 0]
    edges = edges_of(cost, terms, min(float(least_s.min()), high_s), high_s, fine)
    ahead = _ahead(rows, cost, terms, way, rooms, edges[1:])
    x_s = np.maximum(edges[:-1], least_s[:, None])
    waits_s = _waits_s(rows, cost, terms, way, ahead) * longer
    found = _step_s(terms, cost.ratio * longer, x_s, waits_s)
    sync_s, update_s = _once_s(rows, terms, ahead)
    found += exposed_s(terms, cost.ratio * longer, x_s, sync_s, update_s)
    found[~ahead.sound | (ahead.held.sum(axis=1) + ahead.gain < terms.layers)] = np.inf
    return least_s, np.minimum(found.min(axis=1), terms.n * high_s * terms.factor)


def longer_of(rows: Rows, terms: Terms, way: ScheduleChoice) -> np.ndarray:
    """Return by what the wait is longer where micro-batches are too few to fill a V, [row, 1] (see
    `cost_pipeline`).
    """
    pp = rows.counts.sum(axis=1)[:, None]
    if way.schedule != "zbv_zero_bubble":
        return np.ones((len(pp), 1))
    return np.asarray(1.0 + np.clip((2 * pp - 1 - terms.n) / np.maximum(pp - 1, 1), 0.0, 1.0))


def _step_s(terms: Terms, own: np.ndarray, x_s: np.ndarray, waits_s: np.ndarray) -> np.ndarray:
    """Return what a step takes at least without what is paid once; `own`: of x, what the slowest
    rank does not wait for.
    """
    pipe_s = np.maximum((terms.n - own) * x_s + waits_s, terms.n * x_s)
    return np.asarray(pipe_s * terms.factor + terms.data_s)


def exposed_s(
    terms: Terms, own: np.ndarray, x_s: np.ndarray, sync_s: np.ndarray, update_s: np.ndarray
) -> np.ndarray:
    """Return what is paid once a step and hidden by nothing; `own` as of `_step_s`: a longer x
    hides no more than it costs.
    """
    window_s = np.where(terms.n - own >= terms.overlap, x_s, np.inf)
    return np.asarray(sync_s - terms.overlap * np.minimum(sync_s, window_s) + update_s)


def once_any_s(counts: np.ndarray, terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds of gradients' transfer, and of the update, of a rank with no fewer layers than
    the mean, [row, 1]; `counts`: [row, group].
    """
    groups = np.arange(counts.shape[1])
    mean = -(-(terms.layers - terms.others) // np.maximum(counts.sum(axis=1), 1))[:, None]
    found = []
    for table in (terms.common_sync_s, terms.common_update_s):
        least = np.where(counts > 0, table[groups, mean], np.inf).min(axis=1, keepdims=True)
        found.append(np.where(np.isfinite(least), least, 0.0))
    return found[0], found[1]


def _crossed(values: np.ndarray, rows: Rows, way: ScheduleChoice) -> np.ndarray:
    """Return the sum of what groups add that send to others, [row]; `values`: [row, group]."""
    total = values.sum(axis=1)
    if rows.loose and way.virtual_stages == 1:
        total = total - values.max(axis=1)
    return np.asarray(total)


def _even_s(rows: Rows, cost: Cost, terms: Terms, way: ScheduleChoice) -> np.ndarray:
    """Return what the slowest rank needs at least if layers could be cut, [row]."""
    groups = np.arange(rows.counts.shape[1])
    after = rows.line if way.virtual_stages == 1 else rows.ring
    at = rows.first if way.schedule == "zbv_zero_bubble" else rows.last
    taken = rows.counts @ (cost.fixed / cost.each) + (cost.head / cost.each)[at]
    crossed = cost.cross[groups, after] * (rows.counts > 0)
    layers = terms.layers - terms.others * (cost.cheaper / cost.each).max()
    taken = taken + _crossed(crossed / cost.each, rows, way)
    even_s = (layers + taken) / (rows.counts @ (1 / cost.each))
    # Every rank but those at the ends holds a layer in each of its stages.
    few = rows.counts <= terms.others + 2  # else some rank has none of the rarer kind
    stages_s = cost.fixed + way.virtual_stages * cost.each - few * terms.others * cost.cheaper
    return np.maximum(even_s, np.where(rows.counts > 2, stages_s, 0.0).max(axis=1))


def _caps(cost: Cost, more: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """Return the layers of a rank that is busy for `more` besides, [*more's shape, interval]."""
    shape = (-1, *[1] * more.ndim)
    left_s = tops - cost.fixed.reshape(shape) - more[..., None]
    return np.asarray(np.floor(left_s / cost.each.reshape(shape)))


def _ahead(
    rows: Rows, cost: Cost, terms: Terms, way: ScheduleChoice, rooms: np.ndarray, tops: np.ndarray
) -> Ahead:
    groups, each_row = np.arange(rows.counts.shape[1]), np.arange(len(rows.counts))
    virtual, counts = way.virtual_stages, rows.counts[:, :, None]
    after = rows.line if virtual == 1 else rows.ring
    caps = _caps(cost, np.zeros(len(groups)), tops)
    heads = _caps(cost, cost.cross + cost.head[:, None], tops)
    gain = _gain(cost, terms, tops)
    ends = _caps(cost, cost.cross, tops)[groups, after]
    both = way.schedule == "zbv_zero_bubble"
    at = rows.first if both else rows.last
    least = np.full(rows.counts.shape, virtual)  # layers of the last rank of a group
    least[each_row, rows.first] -= (1 + both) * (rows.counts[each_row, rows.first] == 1)
    least[each_row, rows.last] -= 1 - both
    headed = heads[at, after[each_row, at]]
    held_more = np.zeros_like(headed)
    if (
        way.schedule == "zbv_zero_bubble"
    ):  # the first rank has the head, the last of the group sends to another
        several = rows.counts[each_row, at] > 1
        alone = heads[at, len(groups)]
        held_more[several] = (alone - caps[at])[several]
        headed = np.where(several[:, None], ends[each_row, at], headed)
    ends[each_row, at] = headed
    held = np.where(counts > 0, (counts - 1) * caps + ends, 0.0)
    held[each_row, at] += held_more
    # Where there are more ranks between the ends than layers of the rarer kind, some of them has
    # none of these.
    few = rows.counts <= terms.others + 2
    early = np.ones(few.shape, dtype=bool)
    if terms.front:
        early &= (rows.counts[each_row, rows.first] <= terms.others + 1)[:, None]
        few &= early | (np.arange(few.shape[1]) == rows.first[:, None])
    enough = (ends + gain * early[:, :, None] >= least[:, :, None]) | (counts == 0)
    enough &= (caps + gain * few[:, :, None] >= virtual) | (counts <= 2)
    return Ahead(np.minimum(held, rooms[:, :, None] + terms.others), gain, enough.all(axis=1))


def _gain(cost: Cost, terms: Terms, tops: np.ndarray) -> np.ndarray:
    """Return by how many layers more than of the common kind all ranks hold at most, thanks to the
    rarer kind, [interval].
    """
    if not terms.others or not cost.cheaper.any():
        return np.zeros(len(tops))
    if terms.others > ALL_DENSE:
        return np.full(len(tops), float(terms.others))
    fixed = np.stack((*cost.cross.T, *(cost.cross + cost.head[:, None]).T), axis=1)
    left = (tops - cost.fixed[:, None, None] - fixed[:, :, None]) / cost.each[:, None, None]
    part = (left - np.floor(left)).max(axis=1)  # of a layer that is left at most, [group, interval]
    share = (cost.cheaper / cost.each)[:, None]
    best = [np.zeros(len(tops))]
    for number in range(1, terms.others + 1):
        own = [np.floor(part + one * share + _SLACK).max(axis=0) for one in range(1, number + 1)]
        best.append(np.max([own[one - 1] + best[number - one] for one in range(1, number + 1)], 0))
    return best[-1]


def _least(rows: Rows, way: ScheduleChoice) -> np.ndarray:
    """Return how many layers the ranks of a group must hold together, [row, group]."""
    each_row, both = np.arange(len(rows.counts)), way.schedule == "zbv_zero_bubble"
    least = rows.counts * way.virtual_stages
    least[each_row, rows.first] -= 1 + both
    least[each_row, rows.last] -= 1 - both
    return np.maximum(least, 0)


def _fixed_waits_s(rows: Rows, cost: Cost, way: ScheduleChoice) -> np.ndarray:
    """Return what ranks without layers add to filling and draining, [row]."""
    groups, both = np.arange(rows.counts.shape[1]), way.schedule == "zbv_zero_bubble"
    after = rows.line if way.virtual_stages == 1 else rows.ring
    crossed = cost.wait_cross[groups, after] * (rows.counts > 0)
    own = rows.counts @ cost.wait_fixed + cost.wait_head[rows.first if both else rows.last]
    return np.asarray(own + _crossed(crossed, rows, way))


def _any_waits_s(rows: Rows, cost: Cost, terms: Terms, way: ScheduleChoice) -> np.ndarray:
    """Return what all ranks together add to filling and draining at least, however layers are
    divided, [row].
    """
    least = _least(rows, way)
    rest = terms.layers - least.sum(axis=1)
    cheapest = np.where(rows.counts > 0, cost.wait_each, np.inf).min(axis=1)
    found = _fixed_waits_s(rows, cost, way) + least @ cost.wait_each + rest * cheapest
    return np.maximum(found - terms.others * cost.wait_cheaper, 0.0)


def _waits_s(rows: Rows, cost: Cost, terms: Terms, way: ScheduleChoice, ahead: Ahead) -> np.ndarray:
    """Return the same with no more layers than ranks can hold, [row, interval]."""
    held = np.maximum(ahead.held, 0.0)
    taken = np.minimum(_least(rows, way)[:, :, None], held)
    left = terms.layers - taken.sum(axis=1)
    found = _fixed_waits_s(rows, cost, way)[:, None] + taken.transpose(0, 2, 1) @ cost.wait_each
    for g in np.argsort(cost.wait_each):
        more = np.minimum(left, held[:, g] - taken[:, g])
        found, left = found + more * cost.wait_each[g], left - more
    return np.maximum(found - terms.others * cost.wait_cheaper, 0.0)


def _once_s(rows: Rows, terms: Terms, ahead: Ahead) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds of gradients' transfer and of the update that the fullest ranks need at least,
    [row, interval].
    """
    counts, held = rows.counts[:, :, None], np.maximum(ahead.held, 0.0)
    elsewhere = held.sum(axis=1, keepdims=True) - held
    fewest = (terms.layers - ahead.gain - elsewhere) / np.maximum(counts, 1)
    fewest = np.clip(np.ceil(fewest - _SLACK), 0, terms.layers).astype(int)
    groups = np.arange(held.shape[1])[:, None]
    common = (terms.layers - terms.others - elsewhere) / np.maximum(counts, 1)
    common = np.clip(np.ceil(common - _SLACK), 0, terms.layers).astype(int)
    sync_s = np.maximum(terms.sync_s[groups, fewest], terms.common_sync_s[groups, common])
    update_s = np.maximum(terms.update_s[groups, fewest], terms.common_update_s[groups, common])
    sync_s, update_s = (np.where(counts > 0, one, 0.0) for one in (sync_s, update_s))
    return sync_s.max(axis=1), update_s.max(axis=1)
