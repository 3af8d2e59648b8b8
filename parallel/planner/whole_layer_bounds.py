"""Lower bounds of a step for many pipelines at once, with whole layers and every place of the
layers that come first. Pure; no torch.

What `partition.alike` does for one pipeline, for many: the slowest rank's time goes from one
at which some rank can hold a layer more to the next, and under each the layers lie where they add
least to the wait. With ranks' neighbours where sending is fastest, the least over all is a bound;
nothing else is left open but what is paid once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from motet.parallel.planner.bounds import Terms, exposed_s, longer_of, pipe_and_data_s
from motet.parallel.planner.linear import GroupCosts
from motet.parallel.planner.partition import DenseFirst
from motet.parallel.planner.rows import PipelineRows
from motet.parallel.planner.space import ScheduleChoice

STEPS = 12
"""Times of the slowest rank that are looked at; what lies above the last is only bounded by it."""
_SLACK = 1e-9


class Cases(NamedTuple):
    """Pipelines with schedules: a case is a row with a cost.

    Attributes:
        fronts: every place of the layers that come first; no row has fewer ranks than the longest.
        rooms: layers with experts (or all, where all are alike) that the ranks of a group have
            memory for together, [case, group].
    """

    rows: PipelineRows
    costs: Sequence[tuple[GroupCosts, ScheduleChoice]]
    row: np.ndarray
    cost: np.ndarray
    rooms: np.ndarray
    fronts: Sequence[DenseFirst]


class _Each(NamedTuple):
    """What the cases cost: [case], [case, group]."""

    counts: np.ndarray
    virtual: np.ndarray
    both: np.ndarray  # the first rank has the head, too
    fixed: np.ndarray
    last: np.ndarray  # fixed, of the last rank of a group
    each: np.ndarray
    other: np.ndarray
    head: np.ndarray  # [case], of the first rank
    wait_fixed: np.ndarray  # [case]
    wait_each: np.ndarray
    wait_other: np.ndarray
    ratio: np.ndarray  # [case]


class _Parts(NamedTuple):
    """Ranks that are alike, [case, front, part]: the first ones each for itself, the last of every
    group, and the others of every group.
    """

    ranks: np.ndarray
    fixed: np.ndarray
    each: np.ndarray
    least: np.ndarray
    most: np.ndarray
    group: np.ndarray  # [case, part, group]: 1 where a part stands
    wait_fixed: np.ndarray  # [case, front]


def close_s(cases: Cases, terms: Terms, least_s: np.ndarray, limit_s: float) -> np.ndarray:
    """Return what a step takes at least, [case]; what is above the limit may be told as less.

    Args:
        least_s: what the slowest rank is known to need, [case].
    """
    own = _each(cases)
    parts = _parts(cases, own)
    # All places of the dense layers have the same number of them: what is left to divide is the
    # same.
    layers = terms.layers - sum(cases.fronts[0])
    longer = np.array([longer_of(cases.rows, terms, way)[:, 0] for _, way in cases.costs])
    waits = _Waits(own, parts, cases, terms, layers, longer[cases.cost, cases.row][:, None])
    # Below this the layers cannot lie, even if they could be cut: no whole division has a faster
    # slowest rank.
    x_s = np.maximum(_start_s(parts, layers), least_s[:, None])
    best_s = np.full(x_s.shape, np.inf)
    for _ in range(STEPS):
        # Every rank takes as many layers as fit under x, the slack against a layer that is missed
        # by a rounding error: a rank that holds one more is only a lower bound more.
        caps = np.floor((x_s[:, :, None] * (1 + _SLACK) - parts.fixed) / parts.each)
        caps = np.minimum(caps, parts.most)
        found = waits.step_s(x_s, caps)
        best_s = np.minimum(best_s, found)
        # Between two such times no rank can hold another layer: nothing else changes but x, which
        # costs n times. So only these times are looked at.
        more = np.where(caps < parts.most, parts.fixed + parts.each * (caps + 1), np.inf)
        x_s = np.minimum(np.where(parts.ranks > 0, more, np.inf).min(axis=2), 1e30)
        # Whatever x comes later, no division waits less than the cheapest of all: once that is
        # above what was seen, the best was seen.
        later_s = waits.later_s(x_s)
        if (later_s >= np.minimum(best_s, limit_s)).all():
            break
    return np.asarray(np.minimum(best_s, later_s).min(axis=1) * (1 - _SLACK))


def _each(cases: Cases) -> _Each:
    rows, row, number = cases.rows, cases.row, cases.cost
    costs = [cost for cost, _ in cases.costs]
    at, groups = np.arange(len(row)), np.arange(rows.counts.shape[1])

    def of(name: str) -> np.ndarray:
        return np.array([getattr(cost, name) for cost in costs])[number]

    virtual = np.array([way.virtual_stages for _, way in cases.costs])[number]
    both = np.array([way.schedule == "zbv_zero_bubble" for _, way in cases.costs])[number]
    counts = rows.counts[row]
    # With several stages per rank the pipeline goes around, and the last group sends to the first.
    after = np.where(virtual[:, None] == 1, rows.line[row], rows.ring[row])
    where = at[:, None], groups, after
    # A V begins and ends on the first rank, which therefore has the head.
    ends = np.where(both, rows.first[row], rows.last[row])
    fixed, head = of("fixed"), of("head")[at, ends]
    last = fixed + of("cross")[where]
    last[at, ends] += np.where(both, 0.0, head)
    waits = counts * of("wait_fixed") + of("wait_cross")[where] * (counts > 0)
    return _Each(
        counts,
        virtual,
        both,
        fixed,
        last,
        of("each"),
        of("other"),
        np.where(both, head, 0.0),
        waits.sum(axis=1) + of("wait_head")[at, ends],
        of("wait_each"),
        of("wait_other"),
        of("ratio"),
    )


def _parts(cases: Cases, own: _Each) -> _Parts:
    longest = max(map(len, cases.fronts))
    at = np.arange(longest)
    there = np.array([at < len(front) for front in cases.fronts])  # [front, rank]
    dense = np.array([front + (0,) * (longest - len(front)) for front in cases.fronts])
    ends = cases.rows.end[cases.row][:, None]
    inside = (ends - own.counts[:, None] <= at[:, None]) & (
        at[:, None] < ends
    )  # [case, rank, group]
    # The last rank of a group sends to another group, which takes longer than inside.
    closing = inside & (at[:, None] + 1 == ends)
    used = (own.counts > 0)[:, None]
    ranks = (
        np.broadcast_to(there, (len(inside), *there.shape)),
        # Ranks at the front are parts of their own, as each has its own dense layers; they are
        # taken off those that are counted together.
        used - there.astype(int) @ closing,
        own.counts[:, None] - used - there.astype(int) @ (inside & ~closing),
    )
    plain = np.where(closing, own.last[:, None], own.fixed[:, None])
    first = (plain * inside).sum(axis=2)
    first[:, 0] += own.head
    other, wait_other = ((inside * one[:, None]).sum(axis=2) for one in (own.other, own.wait_other))
    each = (inside * own.each[:, None]).sum(axis=2)
    one = np.eye(own.counts.shape[1])
    shape = (*ranks[0].shape[:2], -1)
    fixed = first[:, None] + dense * other[:, None]
    rest = np.broadcast_to(
        np.concatenate((own.last, own.fixed), axis=1)[:, None], (*shape[:2], 2 * len(one))
    )
    return _Parts(
        np.concatenate(ranks, axis=2),
        np.concatenate((fixed, rest), axis=2),
        np.concatenate((each, own.each, own.each), axis=1)[:, None],
        _least(cases, own, longest)[:, None],
        _most(cases, own, there),
        np.concatenate((inside, *np.broadcast_to(one, (2, len(inside), *one.shape))), axis=1),
        own.wait_fixed[:, None] + wait_other @ dense.T,
    )


def _least(cases: Cases, own: _Each, longest: int) -> np.ndarray:
    """Return the layers (but those that come first) that ranks must hold, [case, part]: one in
    every stage between the ends.
    """
    groups = np.arange(own.counts.shape[1])
    last = (cases.rows.last[cases.row][:, None] == groups) & ~own.both[:, None]
    # Every stage between the ends of the model holds a layer; the first rank has the model's first
    # stage, and in a V the last one as well.
    stages = np.repeat(own.virtual[:, None], longest, axis=1) - 1
    stages[:, 0] -= own.both
    pp = own.counts.sum(axis=1)[:, None]
    stages -= (np.arange(longest) == pp - 1) & ~own.both[:, None]
    inner = np.repeat(own.virtual[:, None], len(groups), axis=1)
    return np.concatenate((np.maximum(stages, 0), inner - last, inner), axis=1)


def _most(cases: Cases, own: _Each, there: np.ndarray) -> np.ndarray:
    """Return the layers that ranks may hold, [case, front, part]: with one stage, none where
    another follows with layers that come first.
    """
    full = np.zeros_like(there)
    for number, front in enumerate(cases.fronts):
        full[number, : len(front) - 1] = True
    # With several stages per rank, the later ones may hold layers with experts although the first
    # holds dense ones only.
    full = full & (own.virtual == 1)[:, None, None]
    rest = np.zeros((*full.shape[:2], 2 * own.counts.shape[1]), dtype=bool)
    return np.where(np.concatenate((full, rest), axis=2), 0.0, np.inf)


def _start_s(parts: _Parts, layers: int) -> np.ndarray:
    """Return what the slowest rank needs at least if layers could be cut, and with the layers that
    it must hold, [case, front].
    """
    there = parts.ranks > 0
    # Ranks that may hold no more are no help for what is left.
    open_ = parts.ranks * (parts.most > 0) / parts.each
    even_s = (layers + (open_ * parts.fixed).sum(axis=2)) / open_.sum(axis=2)
    floor_s = np.where(there, parts.fixed + parts.each * parts.least, 0.0).max(axis=2)
    return np.asarray(np.maximum(even_s, floor_s))


class _Waits:
    """Finds what a step takes at least under some time of the slowest rank."""

    def __init__(
        self,
        own: _Each,
        parts: _Parts,
        cases: Cases,
        terms: Terms,
        layers: int,
        longer: np.ndarray,
    ) -> None:
        self.parts, self.terms, self.layers, self.longer = parts, terms, layers, longer
        self.least = (parts.ranks * parts.least) @ parts.group  # [case, front, group]
        self.open = (parts.ranks * (parts.most > 0)) @ parts.group
        self.rooms, self.ratio = cases.rooms[:, None], own.ratio[:, None]
        # Layers go first where they add least to the wait; groups without ranks come last and have
        # no room.
        self.order = np.argsort(np.where(own.counts > 0, own.wait_each, np.inf), axis=1)
        self.each = np.where(own.counts > 0, own.wait_each, 0.0)
        rest = layers - self.least.sum(axis=2)
        cheapest = self.each[np.arange(len(rest)), self.order[:, 0]][:, None]
        any_s = (self.least @ self.each[:, :, None])[:, :, 0] + rest * cheapest
        self.any_s = np.where(rest >= 0, any_s, np.inf)

    def later_s(self, x_s: np.ndarray) -> np.ndarray:
        """Return the same however layers are divided."""
        return self._whole_s(x_s, self.any_s)

    def _whole_s(self, x_s: np.ndarray, waits_s: np.ndarray) -> np.ndarray:
        waits_s = np.maximum(waits_s + self.parts.wait_fixed, 0.0) * self.longer
        return pipe_and_data_s(self.terms, self.ratio * self.longer, x_s, waits_s)

    def step_s(self, x_s: np.ndarray, caps: np.ndarray) -> np.ndarray:
        """Return what a step takes at least, [case, front]; infinite where layers find no place."""
        parts, layers = self.parts, self.layers
        # A rank that cannot hold what its stages must makes the whole division impossible under
        # this x.
        sound = ((caps >= parts.least) | (parts.ranks == 0)).all(axis=2)
        held = (parts.ranks * np.minimum(np.maximum(caps, 0.0), layers)) @ parts.group
        # Memory limits the ranks of a group together: a sum is known, not which rank has how much.
        held = np.minimum(held, self.rooms)
        taken, left = self.least, layers - self.least.sum(axis=2)
        sound &= (held >= taken).all(axis=2) & (held.sum(axis=2) >= layers) & (left >= 0)
        waits_s = (taken @ self.each[:, :, None])[:, :, 0]
        at = np.arange(len(held))
        for turn in self.order.T:
            more = np.clip(held[at, :, turn] - taken[at, :, turn], 0.0, left)
            waits_s, left = waits_s + more * self.each[at, turn][:, None], left - more
        return np.where(sound, self._whole_s(x_s, waits_s) + self._once_s(x_s, held), np.inf)

    def _once_s(self, x_s: np.ndarray, held: np.ndarray) -> np.ndarray:
        """Return what of the gradients' transfer and of the update nothing hides."""
        terms, layers = self.terms, self.layers
        # If all other groups are as full as they can be, the rest is here, and the fullest rank
        # here has no less than its share of it.
        elsewhere = held.sum(axis=2, keepdims=True) - held
        fewest = np.ceil((layers - elsewhere) / np.maximum(self.open, 1) - _SLACK)
        fewest = np.clip(fewest, 0, layers).astype(int)
        groups = np.arange(held.shape[2])
        there = self.open > 0
        sync_s = np.where(there, terms.sync_s[groups, fewest], 0.0).max(axis=2)
        update_s = np.where(there, terms.update_s[groups, fewest], 0.0).max(axis=2)
        return exposed_s(terms, self.ratio * self.longer, x_s, sync_s, update_s)
