"""Lower bounds of a step for all assignments and schedules of some degrees at once. Pure."""

from __future__ import annotations

import math

import numpy as np

from motet.parallel.planner.bounds import bounds_s, with_room
from motet.parallel.planner.frontier import Frontier
from motet.parallel.planner.linear import GroupCosts
from motet.parallel.planner.rows import PipelineRows, unordered, unplaced
from motet.parallel.planner.space import (
    InnerDegrees,
    ScheduleChoice,
)
from motet.parallel.planner.whole_layer_bounds import Cases, close_s


class BoundTable:
    """Lower bounds of a step for assignments with one kind of recomputation, first in no order of
    groups, then in each.
    """

    def __init__(
        self,
        frontier: Frontier,
        core: InnerDegrees,
        dp_ranks: int,
        recompute: str,
        found: np.ndarray,
    ) -> None:
        self.frontier, self.core, self.dp_ranks = frontier, core, dp_ranks
        self.recompute, self.found = recompute, found
        self.n = frontier.question.micro_batches(core, dp_ranks)
        self.record, self.pp = frontier.record, found.sum(axis=1)
        done = self.frontier.context.work_bound(self.core, recompute)
        slowest = frontier.slowest(done, self.core, self.dp_ranks, found)
        # The schedule is one more axis from here on: each has its own wait, and some cannot run
        # with so many ranks or micro-batches.
        self.slow_s = np.tile(slowest, (len(frontier.all_ways), 1))  # [schedule, assignment]
        quick_s = frontier.any_way_s(done, self.pp, self.n, slowest)
        runs = frontier.taken(self.n)[:, self.pp]
        self.least_s = np.where(runs, quick_s, math.inf)  # of a step

    def some(self, at: np.ndarray) -> BoundTable:
        """Keep some assignments."""
        self.found, self.pp = self.found[at], self.pp[at]
        self.slow_s, self.least_s = self.slow_s[:, at], self.least_s[:, at]
        return self

    def _open(self) -> np.ndarray:
        return np.asarray(self.least_s < self.record.limit_s)

    def look(self) -> None:
        """Bound what may win and has memory, without whole layers and in no order of groups."""
        frontier = self.frontier
        at = np.flatnonzero(self._open().any(axis=0))
        if not len(at):
            return
        most = self.pp.max()
        self.rooms = frontier.rooms_before(self.core, self.dp_ranks, self.n, most, self.recompute)
        room = with_room(self.rooms, self.found[at], frontier.routed)
        self.record.counts["memory"] += int((~room).sum())
        # Nothing keeps less than 1F1B, so that what has no room under it has none under any
        # schedule.
        self.least_s[:, at[~room]] = math.inf
        # With one stage nothing waits, and the lines of pipelines do not hold: the work alone
        # bounds it.
        alone = np.flatnonzero(self.pp == 1)
        self.least_s[:, alone] = np.maximum(self.least_s[:, alone], self.n * self.slow_s[:, alone])
        open_ = self._open() & (self.pp > 1)
        if not open_.any():
            return
        self.terms = frontier.terms(self.core, self.dp_ranks, self.n)
        self.sends = frontier.sends_s(self.core, self.dp_ranks * self.core.cp * self.core.tp)
        for number, way in enumerate(frontier.all_ways):
            at = np.flatnonzero(open_[number])
            if len(at):
                # In no order of groups first: there are as many orders as permutations, and most
                # assignments are closed without them.
                cost = unplaced(frontier.ranks.cost(self.core, self.recompute, way, self.sends))
                rows = unordered(self.found[at], cost)
                found = bounds_s(rows, cost, self.terms, way, self.slow_s[number, at])
                self.slow_s[number, at], self.least_s[number, at] = found

    def of(self, rows: PipelineRows, source: np.ndarray) -> np.ndarray:
        """Return bounds of rows, [schedule, row], infinite where a schedule cannot run; `source`:
        assignments that they come from.
        """
        limit_s, pp = self.record.limit_s, self.pp[source]
        slow_s, table = self.slow_s[:, source], self.least_s[:, source]
        open_ = (table < limit_s) & (pp > 1)
        if not open_.any():
            return table
        rooms_of = self.frontier.rooms_of(
            self.core, self.dp_ranks, self.recompute, rows, self.rooms
        )
        wide, costs = self.frontier.wide(pp), []
        for number, way in enumerate(self.frontier.all_ways):
            at = np.flatnonzero(open_[number])
            if len(at):
                cost = self.frontier.ranks.cost(self.core, self.recompute, way, self.sends)
                found = bounds_s(_some(rows, at), cost, self.terms, way, slow_s[number, at])
                slow_s[number, at], table[number, at] = found
                costs.append((number, cost, way))
        self._close(rows, wide, costs, rooms_of, slow_s, table)
        return table

    def _close(
        self,
        rows: PipelineRows,
        wide: np.ndarray,
        costs: list[tuple[int, GroupCosts, ScheduleChoice]],
        rooms_of: dict[str, np.ndarray],
        slow_s: np.ndarray,
        table: np.ndarray,
    ) -> None:
        """Raise bounds of rows whose first ranks can hold the layers that come first."""
        limit_s = self.record.limit_s
        open_ = [np.flatnonzero(wide & (table[number] < limit_s)) for number, _, _ in costs]
        row = np.concatenate([np.zeros(0, dtype=int), *open_])
        if not len(row):
            return
        # All schedules of all rows at once: a call of numpy costs as much as hundreds of rows.
        cost = np.repeat(np.arange(len(costs)), list(map(len, open_)))
        rooms = [rooms_of[way.schedule][at] for (_, _, way), at in zip(costs, open_, strict=True)]
        pairs = [(one, way) for _, one, way in costs]
        way = np.array([number for number, _, _ in costs])[cost]
        cases = Cases(rows, pairs, row, cost, np.concatenate(rooms), self.frontier.fronts)
        found = close_s(cases, self.terms, slow_s[way, row], limit_s)
        table[way, row] = np.maximum(table[way, row], found)


def _some(rows: PipelineRows, at: np.ndarray) -> PipelineRows:
    """Return some of the rows, without their orders."""
    return PipelineRows(
        rows.counts[at],
        rows.source[at],
        [],
        rows.first[at],
        rows.last[at],
        rows.line[at],
        rows.ring[at],
        rows.end[at],
    )
