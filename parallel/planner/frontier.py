"""What may still win of some degrees: assignments of stages to groups, orders of groups, schedules,
recomputation, by lower bounds. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from motet.parallel.cost.shapes import StageShape
from motet.parallel.planner import space as plan_space
from motet.parallel.planner.bounds import WorkBound, with_room
from motet.parallel.planner.dense_first import dense_places
from motet.parallel.planner.grid_bounds import Rows, Terms, bounds_s, rows_of, unordered, unplaced
from motet.parallel.planner.linear import layers_that_fit, skeleton
from motet.parallel.planner.placement import crossing_of
from motet.parallel.planner.rank_arrays import Cost, Ranks
from motet.parallel.planner.space import InnerDegrees, ScheduleChoice, every_schedule, splits
from motet.parallel.planner.whole_layer_bounds import Cases, close_s

if TYPE_CHECKING:
    from motet.parallel.planner.best_first import Search

DIVED = 64
"""How many assignments are looked at closely where the most promising one is looked for."""
COARSE, FINE = 6, 32
"""Intervals of the slowest rank's time that are told apart, first and then where a layout may still
win.
"""
FEW = 256
"""Up to so many pipelines are told apart finely at once."""
WIDE = 4.0
"""Where nothing is known yet, bounds are told apart up to this many times the slowest rank's own."""


@dataclass(frozen=True)
class SearchNode:
    """Degrees and machines; what is open are schedule, recomputation, sharding and layers."""

    core: InnerDegrees
    readers: int
    stages: tuple[int, ...]  # of every group
    order: tuple[int, ...]  # groups along the pipeline
    bounds_s: dict[
        str, dict[ScheduleChoice, float]
    ]  # of a step, by recomputation and schedule that are open

    @property
    def bound_s(self) -> float:
        """What a step takes at least."""
        return min(min(bounds.values()) for bounds in self.bounds_s.values())


class Frontier:
    """Finds nodes, and remembers what they share."""

    def __init__(self, search: Search) -> None:
        self.search_, self.model = search, search.model
        routed = sum(search.routed)
        self.routed = routed or self.model.n_layers  # layers that memory is asked for
        self.most = int(2 * routed > self.model.n_layers)
        self.others = min(routed, self.model.n_layers - routed)
        kinds = [kind != self.most for kind in search.routed]
        self.front = all(kinds[: self.others])
        close = not self.others or (self.most == 1 and search.dense_first > 0)
        dense = search.dense_first
        self.fronts = list(dense_places(dense, dense + 1)) if close else []
        self.ranks = Ranks(search.lines, self.most)
        self.all_ways = every_schedule(search.question.limits.virtual_stages)
        self.looked = 0  # assignments
        self._assigned: dict[int, np.ndarray] = {}
        self._taken_of: dict[int, np.ndarray] = {}
        self._sends: dict[tuple[InnerDegrees, int], np.ndarray] = {}

    def terms(self, core: InnerDegrees, readers: int, n: int) -> Terms:
        search = self.search_
        training, layers = search.question.training, self.model.n_layers
        open_ = search.splits_of(core, readers)
        once = self.ranks.once(core, readers, open_, layers, self.others)
        tokens = training.sequences * training.sequence_length
        factor = 1.0 + training.probe_tokens / tokens / 3.0
        overlap = search.question.traits.data_overlap
        return Terms(n, layers, self.others, self.front, *once, overlap, factor, training.data_s)

    def sends_s(self, core: InnerDegrees, ranks: int) -> np.ndarray:
        """Return the seconds that one virtual stage sends to another group, and in the last column
        inside its own.
        """
        key = core._replace(ep=1, etp=1), ranks
        found = self._sends.get(key)
        if found is None:
            predictor, groups = self.search_.predictor, range(len(self.search_.cluster.groups))
            layout = skeleton(core, (1, core.ep * core.etp), 2, "none", ScheduleChoice("1f1b", 1))
            found = np.zeros((len(groups), len(groups) + 1))
            for g in groups:
                stage = self.search_.lines.stub(layout, g, ranks)
                kept = StageShape(1 - self.most, self.most, False, False)
                found[g, -1] = found[g, g] = predictor.rank(layout, stage, kept, g).send_s
                for other in groups:
                    if other != g:
                        hop = crossing_of(predictor.cluster, sorted((g, other)), 2, ranks)
                        sent = predictor.rank(layout, replace(stage, hop=hop), kept, g).send_s
                        found[g, other] = max(sent, found[g, -1])
            self._sends[key] = found
        return found

    def slowest(
        self, done: WorkBound, core: InnerDegrees, readers: int, found: np.ndarray
    ) -> np.ndarray:
        """Return what the slowest rank needs at least, [assignment]."""
        return done.slowest_sending(found, self.sends_s(core, readers * core.cp * core.tp))

    def wide(self, pp: np.ndarray) -> np.ndarray:
        """Return which pipelines have a rank for each of the layers that come first, if that is
        known how.
        """
        longest = max(map(len, self.fronts), default=0)
        return np.asarray((pp >= max(2, longest)) & bool(longest))

    # --- how many layers there is memory for

    def rooms_of(
        self, core: InnerDegrees, readers: int, recompute: str, rows: Rows, rooms: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return for how many layers the ranks of a group have memory together, by schedule, [row,
        group].
        """
        n, found, pp = self.number(core, readers), rows.counts, rows.counts.sum(axis=1)
        # From the end of the pipeline, where ranks keep least; other schedules keep more
        # (`cost_memory.micro_batches_held`).
        most = rooms[np.arange(found.shape[1]), found]
        each = np.diff(rooms, axis=1)[:, pp - 1].T
        few = self._room_of(core, readers, np.minimum(n, (pp + 1) / 2), recompute).T
        apart = found * each
        if any(self.search_.routed) and not self.most:
            # Rooms are for layers with experts, of which there are few here.
            most, few, apart = (np.full(found.shape, self.model.n_layers) for _ in range(3))
        return {
            "1f1b": most,
            "gpipe": most,
            "interleaved_1f1b": np.minimum(most, found * few),
            "interleaved_zero_bubble": apart,
            "zbv_zero_bubble": apart,
        }

    def rooms_before(
        self, core: InnerDegrees, readers: int, n: int, pp: int, recompute: str
    ) -> np.ndarray:
        """Return the most layers on the last 0, 1, ... pp ranks of a pipeline, [group, ranks].

        Rank r of p keeps at least min(n, p - r) micro-batches. Where layers differ, those with
        experts are looked at.
        """
        rooms = self._room_of(core, readers, np.minimum(n, np.arange(1, pp + 1)), recompute)
        return np.concatenate((np.zeros((len(rooms), 1)), np.cumsum(rooms, axis=1)), axis=1)

    def _room_of(
        self, core: InnerDegrees, readers: int, held: np.ndarray, recompute: str
    ) -> np.ndarray:
        """Return the most layers on a rank of every [group, number of micro-batches held], weights
        divided most.
        """
        found = splits(self.model, core, readers)
        if not found:
            return np.zeros((len(self.search_.cluster.groups), len(held)))
        rooms = layers_that_fit(self.search_.lines, core, found[0], held, recompute)
        return np.minimum(rooms, self.model.n_layers)

    # --- what does not ask for the block's division

    def number(self, core: InnerDegrees, readers: int) -> int:
        """Return the micro-batches of a step."""
        return self.search_.question.training.sequences // (readers * core.micro_sequences)

    def assignments(self, core: InnerDegrees, readers: int) -> np.ndarray:
        ranks, search = readers * core.cp * core.tp, self.search_
        if ranks not in self._assigned:
            sizes = [group.devices for group in search.cluster.groups]
            limits = search.question.limits
            self._assigned[ranks] = plan_space.assignments(
                sizes, ranks, search.most_stages(), limits
            )
        return self._assigned[ranks]

    def taken(self, n: int) -> np.ndarray:
        """Return which schedules run with n micro-batches, [schedule, pipeline ranks]."""
        if n not in self._taken_of:
            most = self.search_.most_stages()
            found = np.zeros((len(self.all_ways), most + 1), dtype=bool)
            for pp in range(1, most + 1):
                for way in self.search_.ways(pp, (n,)):
                    found[self.all_ways.index(way), pp] = True
            self._taken_of[n] = found
        return self._taken_of[n]


class OpenDegrees:
    """Degrees of a stage: what they bound is made sharper step by step, and in the end they yield
    nodes.
    """

    def __init__(self, nodes: Frontier, core: InnerDegrees, readers: int, bound_s: float) -> None:
        self.nodes, self.search, self.core, self.readers = nodes, nodes.search_, core, readers
        self.n, self.bound_s = nodes.number(core, readers), bound_s
        self.names = self.search.recomputes()
        self.found, self.tables = np.zeros((0, 0), dtype=int), list[_Table]()
        self.known_s = bound_s  # before orders of groups were looked at
        self.quick_s = np.zeros(0)  # of every assignment, while it is asked for
        self.sharpness, self.following = 0, list[SearchNode]()
        self._rest: Iterator[SearchNode] = iter(())

    def sharpen(self) -> None:
        """Raise the lower bound."""
        self.sharpness += 1
        if self.sharpness == 1:
            self._quick()
            self.known_s = self.bound_s
        elif self.sharpness == 2:
            self._look()
            self.known_s = self.bound_s
        else:
            if self.sharpness == 3:
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
        found = self.nodes.assignments(self.core, self.readers)
        done = self.search.work_of(self.core, self.names[0])
        pp = found.sum(axis=1)
        slowest = self.nodes.slowest(done, self.core, self.readers, found)
        quick_s = self.search.bound_s(done, pp, self.n, slowest)
        quick_s[~self._runs(pp)] = math.inf
        self.quick_s = quick_s
        self.bound_s = float(quick_s.min(initial=math.inf))

    def _runs(self, pp: np.ndarray) -> np.ndarray:
        asked = np.asarray(pp == self.search.question.fixed.get("pp", pp))
        return asked & np.asarray(self.nodes.taken(self.n).any(axis=0))[pp]

    def _roomy(self, found: np.ndarray) -> np.ndarray:
        """Return the assignments that have memory with what keeps least."""
        most = found.sum(axis=1).max(initial=0)
        rooms = self.nodes.rooms_before(self.core, self.readers, self.n, most, self.names[-1])
        room = with_room(rooms, found, self.nodes.routed)
        self.search.answer.counts["memory"] += int((~room).sum()) * len(self.names)
        return np.asarray(found[room])

    def _look(self) -> None:
        """Look at every assignment and schedule, in no order of groups."""
        counts, limit_s = self.search.answer.counts, self.search.limit_s
        found = self.nodes.assignments(self.core, self.readers)
        runs = np.isfinite(self.quick_s)
        counts["micro-batches"] += int((~runs).sum())
        self.nodes.looked += int(runs.sum())
        quick = self.quick_s < limit_s
        counts["slower"] += int((runs & ~quick).sum())
        found, self.quick_s = self._roomy(found[quick]), np.zeros(0)
        if not len(found):
            self.bound_s = math.inf
            return
        tables = [_Table(self.nodes, self, name, found) for name in self.names]
        for table in tables:
            table.look()
        least_s = np.min([table.least_s.min(axis=0) for table in tables], axis=0)
        open_ = np.flatnonzero(least_s < limit_s)
        counts["slower"] += len(found) - len(open_)
        self.found, self.tables = found[open_], [table.some(open_) for table in tables]
        self.bound_s = float(least_s.min(initial=math.inf))

    def _ordered(self, at: np.ndarray) -> Iterator[SearchNode]:
        """Yield nodes of some assignments, those with the lowest bound first."""
        counts, search = self.search.answer.counts, self.search
        if not len(at):
            return
        rows = rows_of(self.found[at])
        bounds = {table.recompute: table.of(rows, at[rows.source]) for table in self.tables}
        best_s = np.min([table.min(axis=0) for table in bounds.values()], axis=0)
        order = np.argsort(best_s, kind="stable")
        for place, row in enumerate(order):
            if best_s[row] >= search.limit_s:
                counts["slower"] += len(order) - place
                return
            stages = tuple(map(int, rows.counts[row]))
            limit_s = search.limit_of(search.kind_of(self.core, stages))
            if best_s[row] >= limit_s:
                counts["slower"] += 1
                continue
            open_ = {}
            for name, table in bounds.items():
                ways = np.flatnonzero(table[:, row] < limit_s)
                if len(ways):
                    found = {self.nodes.all_ways[way]: float(table[way, row]) for way in ways}
                    open_[name] = found
            yield SearchNode(self.core, self.readers, stages, rows.orders[row], open_)


class _Table:
    """Lower bounds of a step for assignments with one kind of recomputation, first in no order of
    groups, then in each.
    """

    def __init__(
        self, nodes: Frontier, pair: OpenDegrees, recompute: str, found: np.ndarray
    ) -> None:
        self.nodes, self.core, self.readers = nodes, pair.core, pair.readers
        self.recompute, self.n, self.found = recompute, pair.n, found
        self.search, self.pp = nodes.search_, found.sum(axis=1)
        done = self.search.work_of(self.core, recompute)
        slowest = nodes.slowest(done, self.core, self.readers, found)
        self.slow_s = np.tile(slowest, (len(nodes.all_ways), 1))  # [schedule, assignment]
        quick_s = self.search.bound_s(done, self.pp, self.n, slowest)
        runs = nodes.taken(self.n)[:, self.pp]
        self.least_s = np.where(runs, quick_s, math.inf)  # of a step

    def some(self, at: np.ndarray) -> _Table:
        """Keep some assignments."""
        self.found, self.pp = self.found[at], self.pp[at]
        self.slow_s, self.least_s = self.slow_s[:, at], self.least_s[:, at]
        return self

    def _open(self) -> np.ndarray:
        return np.asarray(self.least_s < self.search.limit_s)

    def look(self) -> None:
        """Bound what may win and has memory without whole layers and what is sent between groups."""
        nodes = self.nodes
        at = np.flatnonzero(self._open().any(axis=0))
        if not len(at):
            return
        most = self.pp.max()
        self.rooms = nodes.rooms_before(self.core, self.readers, self.n, most, self.recompute)
        room = with_room(self.rooms, self.found[at], nodes.routed)
        self.search.answer.counts["memory"] += int((~room).sum())
        self.least_s[:, at[~room]] = math.inf
        alone = np.flatnonzero(self.pp == 1)
        self.least_s[:, alone] = np.maximum(self.least_s[:, alone], self.n * self.slow_s[:, alone])
        open_ = self._open() & (self.pp > 1)
        if not open_.any():
            return
        self.terms = nodes.terms(self.core, self.readers, self.n)
        self.sends = nodes.sends_s(self.core, self.readers * self.core.cp * self.core.tp)
        for number, way in enumerate(nodes.all_ways):
            at = np.flatnonzero(open_[number])
            if len(at):
                cost = unplaced(nodes.ranks.cost(self.core, self.recompute, way, self.sends))
                rows, slowest = unordered(self.found[at], cost), (self.slow_s[number, at], math.inf)
                found = bounds_s(rows, cost, self.terms, way, rows.counts, slowest, 0)
                self.slow_s[number, at], self.least_s[number, at] = found

    def of(self, rows: Rows, source: np.ndarray) -> np.ndarray:
        """Return bounds of rows, [schedule, row], infinite where a schedule cannot run; `source`:
        assignments that they come from.
        """
        limit_s, pp = self.search.limit_s, self.pp[source]
        slow_s, table = self.slow_s[:, source], self.least_s[:, source]
        open_ = (table < limit_s) & (pp > 1)
        if not open_.any():
            return table
        rooms_of = self.nodes.rooms_of(self.core, self.readers, self.recompute, rows, self.rooms)
        high_s = min(limit_s / self.n, WIDE * float(slow_s[open_].max()))
        wide, costs = self.nodes.wide(pp), []
        for number, way in enumerate(self.nodes.all_ways):
            at = np.flatnonzero(open_[number])
            if not len(at):
                continue
            cost = self.nodes.ranks.cost(self.core, self.recompute, way, self.sends)
            for fine in (0, COARSE, FINE):
                if fine == FINE:
                    at = at[~wide[at]]
                if len(at) and (fine != COARSE or len(at) > FEW):
                    mine, slowest = rooms_of[way.schedule][at], (slow_s[number, at], high_s)
                    found = bounds_s(_some(rows, at), cost, self.terms, way, mine, slowest, fine)
                    slow_s[number, at], table[number, at] = found
                    at = at[found[1] < limit_s]
            costs.append((number, cost, way))
        self._close(rows, wide, costs, rooms_of, slow_s, table)
        return table

    def _close(
        self,
        rows: Rows,
        wide: np.ndarray,
        costs: list[tuple[int, Cost, ScheduleChoice]],
        rooms_of: dict[str, np.ndarray],
        slow_s: np.ndarray,
        table: np.ndarray,
    ) -> None:
        """Raise bounds of rows whose first ranks can hold the layers that come first."""
        limit_s = self.search.limit_s
        open_ = [np.flatnonzero(wide & (table[number] < limit_s)) for number, _, _ in costs]
        row = np.concatenate([np.zeros(0, dtype=int), *open_])
        if not len(row):
            return
        cost = np.repeat(np.arange(len(costs)), list(map(len, open_)))
        rooms = [rooms_of[way.schedule][at] for (_, _, way), at in zip(costs, open_, strict=True)]
        pairs = [(one, way) for _, one, way in costs]
        way = np.array([number for number, _, _ in costs])[cost]
        cases = Cases(rows, pairs, row, cost, np.concatenate(rooms), self.nodes.fronts)
        found = close_s(cases, self.terms, slow_s[way, row], limit_s)
        table[way, row] = np.maximum(table[way, row], found)


def _some(rows: Rows, at: np.ndarray) -> Rows:
    """Return some of the rows, without their orders."""
    return Rows(
        rows.counts[at],
        rows.source[at],
        [],
        rows.first[at],
        rows.last[at],
        rows.line[at],
        rows.ring[at],
        rows.end[at],
    )
