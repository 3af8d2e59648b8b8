"""What may still win of some degrees, found by bounds that are made sharper step by step. Pure; no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from motet.parallel.planner.bound_table import BoundTable
from motet.parallel.planner.bounds import with_room
from motet.parallel.planner.frontier import Frontier
from motet.parallel.planner.rows import rows_of
from motet.parallel.planner.space import (
    InnerDegrees,
    ScheduleChoice,
)

DIVED = 64
"""How many assignments are looked at closely where the most promising one is looked for."""


@dataclass(frozen=True)
class SearchNode:
    """Degrees and machines; what is open are schedule, recomputation, sharding and layers."""

    core: InnerDegrees
    dp_ranks: int
    stages: tuple[int, ...]  # of every group
    order: tuple[int, ...]  # groups along the pipeline
    bounds_s: dict[
        str, dict[ScheduleChoice, float]
    ]  # of a step, by recomputation and schedule that are open

    @property
    def bound_s(self) -> float:
        """What a step takes at least."""
        return min(min(bounds.values()) for bounds in self.bounds_s.values())


class OpenDegrees:
    """Degrees of a stage: what they bound is made sharper step by step, and in the end they yield
    nodes.
    """

    def __init__(
        self, frontier: Frontier, core: InnerDegrees, dp_ranks: int, bound_s: float
    ) -> None:
        self.frontier, self.record, self.core, self.dp_ranks = (
            frontier,
            frontier.record,
            core,
            dp_ranks,
        )
        self.n, self.bound_s = frontier.question.micro_batches(core, dp_ranks), bound_s
        self.names = frontier.question.recomputes()
        self.found, self.tables = np.zeros((0, 0), dtype=int), list[BoundTable]()
        self.known_s = bound_s  # before orders of groups were looked at
        self.quick_s = np.zeros(0)  # of every assignment, while it is asked for
        self.sharpness, self.following = 0, list[SearchNode]()
        self._rest: Iterator[SearchNode] = iter(())

    def sharpen(self) -> None:
        """Raise the lower bound."""
        # One step at a time: most degrees are closed by a cheap bound, when another layout has
        # become known meanwhile.
        self.sharpness += 1
        if self.sharpness == 1:
            self._quick()
            self.known_s = self.bound_s
        elif self.sharpness == 2:
            self._look()
            self.known_s = self.bound_s
        else:
            if self.sharpness == 3:
                # Nodes are made when they are asked for: the limit may have fallen by then.
                self._rest = self._ordered(np.arange(len(self.found)))
            self.following = [node for node in (next(self._rest, None),) if node is not None]
            self.bound_s = self.following[0].bound_s if self.following else math.inf

    def promising(self) -> Iterator[SearchNode]:
        """Yield what looks best among the assignments that look best."""
        least_s = np.min([table.least_s.min(axis=0) for table in self.tables], axis=0)
        for node in self._ordered(np.argsort(least_s, kind="stable")[:DIVED]):
            yield node
            return

    def _quick(self) -> None:
        """Bound all assignments at once."""
        found = self.frontier.assignments(self.core, self.dp_ranks)
        done = self.frontier.context.work_bound(self.core, self.names[0])
        pp = found.sum(axis=1)
        slowest = self.frontier.slowest(done, self.core, self.dp_ranks, found)
        quick_s = self.frontier.any_way_s(done, pp, self.n, slowest)
        # What cannot run is no candidate, and must not keep the pair open with a low bound.
        quick_s[~self._runs(pp)] = math.inf
        self.quick_s = quick_s
        self.bound_s = float(quick_s.min(initial=math.inf))

    def _runs(self, pp: np.ndarray) -> np.ndarray:
        asked = np.asarray(pp == self.frontier.question.fixed.get("pp", pp))
        return asked & np.asarray(self.frontier.taken(self.n).any(axis=0))[pp]

    def _roomy(self, found: np.ndarray) -> np.ndarray:
        """Return the assignments that have memory with what keeps least."""
        most = found.sum(axis=1).max(initial=0)
        rooms = self.frontier.rooms_before(self.core, self.dp_ranks, self.n, most, self.names[-1])
        # With the most recomputation and sharding, which holds least: what has no room now has none
        # at all.
        room = with_room(rooms, found, self.frontier.routed)
        self.record.counts["memory"] += int((~room).sum()) * len(self.names)
        return np.asarray(found[room])

    def _look(self) -> None:
        """Look at every assignment and schedule, in no order of groups."""
        counts, limit_s = self.record.counts, self.record.limit_s
        rows = self.frontier.assignments(self.core, self.dp_ranks)
        runs = np.isfinite(self.quick_s)
        counts["micro-batches"] += int((~runs).sum())
        self.record.looked += int(runs.sum())
        quick = self.quick_s < limit_s
        counts["slower"] += int((runs & ~quick).sum())
        rows, self.quick_s = self._roomy(rows[quick]), np.zeros(0)
        if not len(rows):
            self.bound_s = math.inf
            return
        tables = [
            BoundTable(self.frontier, self.core, self.dp_ranks, name, rows) for name in self.names
        ]
        for table in tables:
            table.look()
        least_s = np.min([table.least_s.min(axis=0) for table in tables], axis=0)
        open_ = np.flatnonzero(least_s < limit_s)
        counts["slower"] += len(rows) - len(open_)
        self.found, self.tables = rows[open_], [table.some(open_) for table in tables]
        self.bound_s = float(least_s.min(initial=math.inf))

    def _ordered(self, at: np.ndarray) -> Iterator[SearchNode]:
        """Yield nodes of some assignments, those with the lowest bound first."""
        counts, record = self.record.counts, self.record
        if not len(at):
            return
        rows = rows_of(self.found[at])
        bounds = {table.recompute: table.of(rows, at[rows.source]) for table in self.tables}
        # Recomputation is open in a node: its bound is that of the best kind.
        best_s = np.min([table.min(axis=0) for table in bounds.values()], axis=0)
        order = np.argsort(best_s, kind="stable")
        for place, row in enumerate(order):
            # Rows come by their bound: behind the first that is too slow all are.
            if best_s[row] >= record.limit_s:
                counts["slower"] += len(order) - place
                return
            stages = tuple(map(int, rows.counts[row]))
            # Once the first choice is proven, a row must be the best of its own kind to be ranked.
            limit_s = record.limit_of(self.frontier.context.kind_of(self.core, stages))
            if best_s[row] >= limit_s:
                counts["slower"] += 1
                continue
            open_ = {}
            for name, table in bounds.items():
                ways = np.flatnonzero(table[:, row] < limit_s)
                if len(ways):
                    found = {self.frontier.all_ways[way]: float(table[way, row]) for way in ways}
                    open_[name] = found
            yield SearchNode(self.core, self.dp_ranks, stages, rows.orders[row], open_)
