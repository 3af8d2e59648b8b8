"""One order of groups along a pipeline: schedules, recomputation, sharding and layers for it.

Pure; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from motet.parallel.cost.memory import micro_batches_held
from motet.parallel.cost.pipeline import own_share
from motet.parallel.cost.topology import StageGroups
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.context import ONE, Context
from motet.parallel.planner.linear import MemoryLines, skeleton
from motet.parallel.planner.open_degrees import SearchNode
from motet.parallel.planner.partition import (
    Counts,
    DenseFirst,
    Rest,
    alike,
    dense_places,
    feasible,
    least_s,
    rest,
    stage_layers,
    stages_with,
)
from motet.parallel.planner.placement import places_of, renumbered
from motet.parallel.planner.ranges import unlike
from motet.parallel.planner.space import GroupAssignment, ScheduleChoice
from motet.parallel.planner.steps import Load, RankLines, load, step_s


class PipelineSearch:
    """One order of groups along a pipeline."""

    def __init__(self, context: Context, node: SearchNode, spread: GroupAssignment, n: int) -> None:
        self.context, self.node, self.spread, self.n = context, node, spread, n
        self.pp = sum(count for _, count in spread.blocks)
        self.groups = [g for g, count in spread.blocks for _ in range(count)]
        self.fitted: set[tuple[ScheduleChoice, tuple[int, int]]] = set()
        self._places: dict[tuple[object, ...], list[tuple[int, StageGroups]]] = {}
        self._costs: dict[tuple[object, ...], list[RankLines]] = {}
        self._helds: dict[tuple[object, ...], list[MemoryLines]] = {}
        self.kind = context.kind_of(node.core, node.stages)

    @property
    def limit_s(self) -> float:
        """What a layout must stay below to be ranked."""
        return self.context.record.limit_of(self.kind)

    def search(self, found: list[tuple[int, int]]) -> None:
        """Try recomputation from least to most; what fits with less needs no more."""
        for recompute, bounds in self.node.bounds_s.items():
            # No schedule holds less than 1F1B, and no split less than the first.
            layout = skeleton(self.node.core, found[0], self.pp, recompute, ONE)
            ordered = sorted(bounds.items(), key=lambda item: item[1])
            if ordered and ordered[0][1] < self.limit_s and self._has_room(layout):
                for way, bound_s in ordered:
                    # Schedules come by their bound: the rest is slower, too.
                    if bound_s >= self.limit_s:
                        break
                    self._way(found, recompute, way)
        self.context.record.counts["memory"] += int(not self.fitted)

    def _has_room(self, layout: Layout) -> bool:
        return sum(self._rooms(layout, self._kept(layout))) >= len(self.context.kinds)

    def _way(self, found: list[tuple[int, int]], recompute: str, way: ScheduleChoice) -> None:
        layers = len(self.context.kinds)
        open_ = [split for split in found if (way, split) not in self.fitted]
        for number, split in enumerate(open_):
            layout = skeleton(self.node.core, split, self.pp, recompute, way)
            kept = self._kept(layout)
            most = self._rooms(layout, kept)
            if sum(most) < layers:
                return  # the splits that follow divide less
            ranks = self._ranks(layout, split)
            loads = self._loads(layout, way, ranks)
            if number == 0 and self._least_s(layout, loads, kept) >= self.limit_s:
                return
            best = self._divide(layout, ranks, loads, most, kept)
            if best is None:
                continue
            # It fits with this much recomputation: more would only take longer.
            self.fitted.add((way, split))
            if best[0] < self.limit_s and best[1] is not None:
                self.context.judge(replace(layout, stage_layers=best[1]), self.spread)

    def _loads(self, layout: Layout, way: ScheduleChoice, ranks: list[RankLines]) -> list[Load]:
        known: dict[tuple[int, int], Load] = {}
        out = []
        for rank, least in zip(ranks, _least(layout), strict=True):
            key = id(rank), least
            if key not in known:
                known[key] = load(rank, way, self.pp, self.n, least)
            out.append(known[key])
        return out

    def _least_s(self, layout: Layout, loads: list[Load], kept: list[MemoryLines]) -> float:
        """Return what a step takes at least, whatever the partition."""
        share, own = _share(self.context.kinds), own_share(layout.schedule, layout.virtual_stages)
        if self.context.dense_first:
            rests = [one for _, one in self._rests(layout, loads, kept)]
            routed = sum(self.context.kinds)
            return min(least_s(one.loads, routed, self.n, own) for one in rests)
        if 0.0 < share < 1.0 and layout.virtual_stages == 1:
            return 0.0  # ranks hold ranges of unlike layers: `unlike` looks at the limit itself
        return least_s(_mixed(loads, share), len(self.context.kinds), self.n, own)

    def _rests(
        self, layout: Layout, loads: list[Load], kept: list[MemoryLines]
    ) -> Iterator[tuple[DenseFirst, Rest]]:
        """Yield what is left to divide for all places of dense layers that come first."""
        stages_of = [layout.stages_of(r) for r in range(self.pp)]
        held, routed = self._held(layout), sum(self.context.kinds)
        for front in dense_places(self.context.dense_first, layout.stages):
            one = rest(front, loads, kept, held, stages_of, layout.stages, routed)
            yield front, one

    def _kept(self, layout: Layout) -> list[MemoryLines]:
        """Return what every rank holds."""
        split = layout.dp_replicate, layout.dp_shard
        both = layout.schedule == "zbv_zero_bubble"
        key = split, layout.recompute, both
        if key not in self._helds:
            plain, read = (
                replace(layout, schedule="1f1b", virtual_stages=1),
                self.context.lines.held,
            )
            core = self.node.core, split, layout.recompute
            inner = {g: read(core, plain, g, False, False) for g, _ in self.spread.blocks}
            found = [inner[g] for g in self.groups]
            # The embedding is on the first rank, the head on the last, or on the first of a V:
            # these hold and cost more.
            found[0] = read(core, plain, self.groups[0], True, both)
            if not both:
                found[-1] = read(core, plain, self.groups[-1], False, True)
            self._helds[key] = found
        return self._helds[key]

    def _ranks(self, layout: Layout, split: tuple[int, int]) -> list[RankLines]:
        """Return what every rank costs."""
        both = layout.schedule == "zbv_zero_bubble"
        key = split, layout.recompute, both, layout.virtual_stages > 1
        if key not in self._costs:
            plain, read = (
                replace(layout, schedule="1f1b", virtual_stages=1),
                self.context.lines.rank,
            )
            core = self.node.core, split, layout.recompute
            self._costs[key] = [
                read((*core, number), plain, stage, g, *_ends(layout, r))
                for r, ((number, stage), g) in enumerate(
                    zip(self._stages(layout, split), self.groups, strict=True)
                )
            ]
        return self._costs[key]

    def _stages(self, layout: Layout, split: tuple[int, int]) -> list[tuple[int, StageGroups]]:
        """Return where the stages stand, in the pipeline's order, each with its number."""
        key = split, layout.virtual_stages > 1
        if key not in self._places:
            used = [count * layout.stage_ranks for count in self.node.stages]
            machines = self.context.machines(used)
            assert machines is not None, "checked before"
            where = places_of(machines[0], layout, renumbered(self.spread))
            unique = {id(stage): stage for stage in where.stages}
            numbers = {key: self.context.number_of(stage) for key, stage in unique.items()}
            self._places[key] = [(numbers[id(stage)], stage) for stage in where.stages]
        return self._places[key]

    def _held(self, layout: Layout) -> list[float]:
        number = math.ceil(self.n)
        return [micro_batches_held(layout, r, number) for r in range(self.pp)]

    def _rooms(self, layout: Layout, kept: list[MemoryLines]) -> list[int]:
        """Return the most layers that fit into the memory of every rank."""
        layers, share = len(self.context.kinds), _share(self.context.kinds)
        # Ranges of layers and dense layers that come first are fitted one by one.
        # What kind of layers a rank gets is open where it holds a range: the kind that takes less
        # memory gives the most that can fit.
        ranged = 0.0 < share < 1.0 and (layout.virtual_stages == 1 or self.context.dense_first > 0)
        most = []
        for one, count in zip(kept, self._held(layout), strict=True):
            dense, routed = (one.fixed[k] + count * one.saved[k] for k in (1, 2))
            each = min(dense, routed) if ranged else dense * (1 - share) + routed * share
            most.append(min(layers, int(max(0.0, one.capacity - one.fixed[0]) / each)))
        return most

    def _divide(
        self,
        layout: Layout,
        ranks: list[RankLines],
        loads: list[Load],
        most: list[int],
        kept: list[MemoryLines],
    ) -> tuple[float, tuple[int, ...] | None] | None:
        """Return seconds of a step and layers of all stages of the best partition; None where none
        fits into memory.
        """
        context, n = self.context, self.n
        dense, routed = context.lines.kinds
        stages_of = [layout.stages_of(r) for r in range(self.pp)]
        if context.dense_first:
            return self._fronted(layout, ranks, loads, kept)
        if dense and routed and layout.virtual_stages == 1:
            total, held = [0, *accumulate(context.kinds)], self._held(layout)

            def fits(r: int, dense: np.ndarray, experts: np.ndarray) -> np.ndarray:
                return kept[r].bytes(dense, experts, held[r]) <= kept[r].capacity

            def score(counts: Counts) -> float:
                return step_s(layout, ranks, _ranges(counts, total), n, context.predictor)

            found = unlike(loads, context.kinds, fits, score, n, self.limit_s)
        else:
            # Stages of one rank lie apart: where layers differ, each rank has its share of both
            # kinds.
            share = _share(context.kinds)

            def score_alike(counts: Counts) -> float:
                mixed = [(k * (1 - share), k * share) for k in counts]
                return step_s(layout, ranks, mixed, n, context.predictor)

            even, layers = _mixed(loads, share), len(context.kinds)
            own, limit_s = own_share(layout.schedule, layout.virtual_stages), self.limit_s
            found = alike(even, layers, most, n, score_alike, limit_s, own)
        return found and (found[0], stage_layers(found[1], stages_of, layout.stages))

    def _fronted(
        self, layout: Layout, ranks: list[RankLines], loads: list[Load], kept: list[MemoryLines]
    ) -> tuple[float, tuple[int, ...] | None] | None:
        """Do the same where dense layers come first."""
        stages_of = [layout.stages_of(r) for r in range(self.pp)]
        context, own = self.context, own_share(layout.schedule, layout.virtual_stages)
        layers = sum(context.kinds)
        best: tuple[float, tuple[int, ...] | None] | None = None
        for front, left in self._rests(layout, loads, kept):
            if not feasible(left.loads, layers, left.most):
                continue
            best = best or (math.inf, None)
            limit_s = min(self.limit_s, best[0])
            # A place of the dense layers that cannot win needs no division.
            if least_s(left.loads, layers, self.n, own) >= limit_s:
                continue

            def score(counts: Counts, dense: Counts = left.dense) -> float:
                both = list(zip(dense, counts, strict=True))
                return step_s(layout, ranks, both, self.n, context.predictor)

            found = alike(left.loads, layers, left.most, self.n, score, limit_s, own)
            if found is not None and found[0] < best[0]:
                best = found[0], stages_with(front, found[1], stages_of, layout.stages)
        return best


def _ends(layout: Layout, rank: int) -> tuple[bool, bool]:
    """Return whether a rank holds the embedding, and the head: the first rank of a V holds both."""
    if layout.schedule == "zbv_zero_bubble":
        return rank == 0, rank == 0
    return rank == 0, rank == layout.pp - 1


def _least(layout: Layout) -> list[int]:
    """Return the stages of every rank that must hold a layer."""
    found = [layout.virtual_stages] * layout.pp
    for rank in (0, layout.pp - 1):
        found[rank] -= sum(_ends(layout, rank))
    return found


def _mixed(loads: Sequence[Load], share: float) -> list[Load]:
    """Return loads whose layers are all alike: a share of them has experts."""
    if share == 0.0:
        return list(loads)
    known = {}
    for one in loads:
        if id(one) not in known:
            each = one.each[0] * (1 - share) + one.each[1] * share
            wait = one.wait_each[0] * (1 - share) + one.wait_each[1] * share
            sync, update = (line[1] * (1 - share) + line[2] * share for line in one.once)
            once = (one.once[0][0], sync, sync), (one.once[1][0], update, update)
            known[id(one)] = replace(one, each=(each, each), wait_each=(wait, wait), once=once)
    return [known[id(one)] for one in loads]


def _share(kinds: Sequence[int]) -> float:
    return sum(kinds) / len(kinds)


def _ranges(counts: Counts, sums: Sequence[int]) -> list[tuple[int, int]]:
    """Return (dense, expert) layers of ranks that hold `counts` layers in order."""
    out, first = [], 0
    for count in counts:
        routed = sums[first + count] - sums[first]
        out.append((count - routed, routed))
        first += count
    return out
