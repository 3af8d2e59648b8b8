"""What the bounds of many degrees share: assignments of stages to groups, schedules that run, what
is sent between groups, for how many layers there is memory. Pure; no torch.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from motet.parallel.cost.pipeline import probe_s
from motet.parallel.cost.shapes import StageShape
from motet.parallel.planner.bounds import Terms, WorkBound
from motet.parallel.planner.context import Context
from motet.parallel.planner.linear import GroupLines, layers_that_fit, skeleton
from motet.parallel.planner.partition import dense_places
from motet.parallel.planner.placement import crossing_of
from motet.parallel.planner.rows import PipelineRows
from motet.parallel.planner.space import (
    InnerDegrees,
    ScheduleChoice,
    assignments,
    every_schedule,
    splits,
)


class Frontier:
    """Finds nodes, and remembers what they share."""

    def __init__(self, context: Context) -> None:
        self.context, self.question = context, context.question
        self.record, self.model = context.record, context.question.model
        # Bounds count layers of the kind that most are of, and correct for the rarer kind by what
        # it takes less at most.
        routed = sum(context.kinds)
        self.routed = routed or self.model.n_layers  # layers that memory is asked for
        self.most = int(2 * routed > self.model.n_layers)
        self.others = min(routed, self.model.n_layers - routed)
        close = not self.others or (self.most == 1 and context.dense_first > 0)
        dense = context.dense_first
        self.fronts = list(dense_places(dense, dense + 1)) if close else []
        self.ranks = GroupLines(context.lines, self.most)
        self.all_ways = every_schedule(context.question.limits.virtual_stages)
        self._assigned: dict[int, np.ndarray] = {}
        self._taken_of: dict[int, np.ndarray] = {}
        self._sends: dict[tuple[InnerDegrees, int], np.ndarray] = {}

    def terms(self, core: InnerDegrees, dp_ranks: int, n: int) -> Terms:
        """Return what of a step does not depend on a schedule."""
        question, layers = self.question, self.model.n_layers
        training, overlap = question.training, question.traits.data_overlap
        once = self.ranks.once(core, dp_ranks, question.splits(core, dp_ranks), layers)
        factor = 1.0 + probe_s(1.0, training)
        return Terms(n, layers, self.others, *once, overlap, factor, training.data_s)

    def sends_s(self, core: InnerDegrees, ranks: int) -> np.ndarray:
        """Return the seconds that one virtual stage sends to another group, and in the last column
        inside its own.
        """
        key = core._replace(ep=1, etp=1), ranks
        seconds = self._sends.get(key)
        if seconds is None:
            predictor, groups = self.context.predictor, range(len(self.question.cluster.groups))
            layout = skeleton(core, (1, core.ep * core.etp), 2, "none", ScheduleChoice("1f1b", 1))
            seconds = np.zeros((len(groups), len(groups) + 1))
            for g in groups:
                stage = self.context.lines.stub(layout, g, ranks)
                kept = StageShape(1 - self.most, self.most, False, False)
                seconds[g, -1] = seconds[g, g] = predictor.rank(layout, stage, kept, g).send_s
                for other in groups:
                    if other != g:
                        # All ranks of a stage send at the same time and share the link between the
                        # groups. No way across is taken as shorter than inside, where links are
                        # odd.
                        hop = crossing_of(predictor.cluster, sorted((g, other)), 2, ranks)
                        sent = predictor.rank(layout, replace(stage, hop=hop), kept, g).send_s
                        seconds[g, other] = max(sent, seconds[g, -1])
            self._sends[key] = seconds
        return seconds

    def slowest(
        self, done: WorkBound, core: InnerDegrees, dp_ranks: int, found: np.ndarray
    ) -> np.ndarray:
        """Return what the slowest rank needs at least, [assignment]."""
        return done.slowest_sending(found, self.sends_s(core, dp_ranks * core.cp * core.tp))

    def any_way_s(
        self, done: WorkBound, pp: np.ndarray, n: float, slowest: np.ndarray
    ) -> np.ndarray:
        """Return lower bounds of a step under any schedule, from what the slowest rank needs at
        least.
        """
        virtual = self.question.limits.virtual_stages
        return done.any_way_s(pp, n, slowest, self.model.n_layers, virtual)

    def wide(self, pp: np.ndarray) -> np.ndarray:
        """Return which pipelines have a rank for each of the layers that come first, if that is
        known how.
        """
        longest = max(map(len, self.fronts), default=0)
        return np.asarray((pp >= max(2, longest)) & bool(longest))

    # --- how many layers there is memory for

    def rooms_of(
        self,
        core: InnerDegrees,
        dp_ranks: int,
        recompute: str,
        rows: PipelineRows,
        rooms: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Return for how many layers (those with experts, where there are such) the ranks of a
        group have memory together, by schedule, [row, group].
        """
        # Schedules differ in how many micro-batches a rank keeps: the most layers that they leave
        # room for are bounds of their own.
        n, counts, pp = (
            self.question.micro_batches(core, dp_ranks),
            rows.counts,
            rows.counts.sum(axis=1),
        )
        # From the end of the pipeline, where ranks keep least; other schedules keep more
        # (`memory.micro_batches_held`).
        most = rooms[np.arange(counts.shape[1]), counts]
        each = np.diff(rooms, axis=1)[:, pp - 1].T
        few = self._room_of(core, dp_ranks, np.minimum(n, (pp + 1) / 2), recompute).T
        apart = counts * each
        return {
            "1f1b": most,
            "gpipe": most,
            "interleaved_1f1b": np.minimum(most, counts * few),
            "interleaved_zero_bubble": apart,
            "zbv_zero_bubble": apart,
        }

    def rooms_before(
        self, core: InnerDegrees, dp_ranks: int, n: int, pp: int, recompute: str
    ) -> np.ndarray:
        """Return the most layers on the last 0, 1, ... pp ranks of a pipeline, [group, ranks].

        Rank r of p keeps at least min(n, p - r) micro-batches. Where layers differ, those with
        experts are looked at.
        """
        rooms = self._room_of(core, dp_ranks, np.minimum(n, np.arange(1, pp + 1)), recompute)
        # Sums, because an assignment takes some ranks in a row: two look-ups instead of a loop.
        return np.concatenate((np.zeros((len(rooms), 1)), np.cumsum(rooms, axis=1)), axis=1)

    def _room_of(
        self, core: InnerDegrees, dp_ranks: int, held: np.ndarray, recompute: str
    ) -> np.ndarray:
        """Return the most layers on a rank of every [group, number of micro-batches held], weights
        divided most.
        """
        found = splits(self.model, core, dp_ranks)
        if not found:
            return np.zeros((len(self.question.cluster.groups), len(held)))
        # The first split divides weights most and needs least memory: no other has more room.
        rooms = layers_that_fit(self.context.lines, core, found[0], held, recompute)
        return np.minimum(rooms, self.model.n_layers)

    # --- what does not ask for the block's division

    def assignments(self, core: InnerDegrees, dp_ranks: int) -> np.ndarray:
        """Return how many stages every group may take, [assignment, group]."""
        ranks, question = dp_ranks * core.cp * core.tp, self.question
        if ranks not in self._assigned:
            sizes = [group.devices for group in question.cluster.groups]
            self._assigned[ranks] = assignments(sizes, ranks, question.most_stages, question.limits)
        return self._assigned[ranks]

    def taken(self, n: int) -> np.ndarray:
        """Return which schedules run with n micro-batches, [schedule, pipeline ranks]."""
        if n not in self._taken_of:
            most = self.question.most_stages
            taken = np.zeros((len(self.all_ways), most + 1), dtype=bool)
            for pp in range(1, most + 1):
                for way in self.question.schedules(pp, (n,)):
                    taken[self.all_ways.index(way), pp] = True
            self._taken_of[n] = taken
        return self._taken_of[n]
