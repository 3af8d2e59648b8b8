"""What a pipeline rank costs as a straight line in its layers, read off the cost model at two or
three points. Pure; no torch.

With pipeline stages every term of `predict` is linear in a rank's dense layers d and layers with
experts e, so that a partition can be judged without asking the model again for every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from motet.parallel.cost import memory
from motet.parallel.cost.links import strided
from motet.parallel.cost.pipeline import Number
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.shapes import StageShape
from motet.parallel.cost.topology import StageGroups, strides
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.space import InnerDegrees, ScheduleChoice
from motet.parallel.planner.steps import Line, RankLines, load


class MemoryLines(NamedTuple):
    """Bytes of a pipeline rank: `fixed` and `saved` of one micro-batch that it keeps, as lines;
    capacity of its device.
    """

    fixed: Line
    saved: Line
    capacity: float

    def bytes(self, dense: Number, experts: Number, held: float) -> Number:
        """Return what it holds with some layers and micro-batches."""
        fixed = self.fixed[0] + dense * self.fixed[1] + experts * self.fixed[2]
        return fixed + held * (dense * self.saved[1] + experts * self.saved[2])


def skeleton(
    core: InnerDegrees, dp: tuple[int, int], pp: int, recompute: str, way: ScheduleChoice
) -> Layout:
    """Return a layout without placement and partition."""
    return Layout(
        dp_replicate=dp[0],
        dp_shard=dp[1],
        tp=core.tp,
        pp=pp,
        cp=core.cp,
        ep=core.ep,
        etp=core.etp,
        virtual_stages=way.virtual_stages,
        schedule=way.schedule,
        micro_sequences=core.micro_sequences,
        recompute=recompute,
        sequence_parallel=core.sequence_parallel,
    )


class Lines:
    """Reads lines off a predictor, and remembers them."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.kinds = (predictor.dense_layers > 0, predictor.routed_layers > 0)
        self._ranks: dict[tuple[object, ...], RankLines] = {}
        self._held: dict[tuple[object, ...], MemoryLines] = {}
        self._stubs: dict[
            tuple[int, ...], list[StageGroups]
        ] = {}  # by degrees and group: hops to the next node, and on it

    def stub(self, layout: Layout, group: int, ranks: int = 1) -> StageGroups:
        """Return a stage inside one group, with its neighbours where sending to them is fastest: on
        its node or on the next.

        Args:
            ranks: of a stage, at least; two stages that do not fit on a node stand on two.
        """
        predictor, whole = self.predictor, self.predictor.cluster.groups[group]
        degrees = layout.tp, layout.cp, layout.ep, layout.etp, layout.dp_shard, layout.dp_replicate
        stubs = self._stubs.get((*degrees, group))
        if stubs is None:
            parts = {name: strided(whole, *where) for name, where in strides(layout).items()}
            # The next stage is on this node or on the next one. Bounds take the faster way, as a
            # placement that has it may exist.
            hops = strided(whole, 2, whole.devices_per_node), strided(whole, 2, 1)
            stubs = self._stubs[*degrees, group] = [
                StageGroups((group,), **parts, hop=h) for h in hops
            ]
        # Two stages do not fit on one node, so that they never send inside one.
        if 2 * ranks > whole.devices_per_node:
            return stubs[0]
        tokens = layout.micro_sequences * predictor.training.sequence_length / layout.cp
        size = tokens * predictor.model.d_model * predictor.costs[group].value / layout.tp
        own = predictor.constants[group]
        return min(stubs, key=lambda stage: stage.hop.send_s(size, own))

    def _points(self, first: bool, last: bool) -> tuple[StageShape, StageShape, StageShape]:
        """Return a point, and the same with a dense layer and with a layer with experts more (if
        the model has such).
        """
        # From one layer of every kind upwards: with none, some transfers fall away as a whole, and
        # the line would be wrong for all others.
        dense, routed = map(int, self.kinds)
        base = StageShape(dense, routed, first, last)
        return (
            base,
            StageShape(2 * dense, routed, first, last),
            StageShape(dense, 2 * routed, first, last),
        )

    def _line(self, values: Sequence[float]) -> Line:
        # Three points give a line in two numbers exactly, by the contract of `cost/pipeline.py`.
        dense, routed = values[1] - values[0], values[2] - values[0]
        return values[0] - dense - routed, dense, routed

    def rank(
        self,
        key: tuple[object, ...],
        layout: Layout,
        stage: StageGroups,
        group: int,
        first: bool,
        last: bool,
    ) -> RankLines:
        """Return the seconds of a rank.

        Args:
            key: what stands for the layout's degrees, micro-batch and recomputation, and for the
                stage.
            layout: with one virtual stage.
        """
        key = (*key, group, first, last)
        lines = self._ranks.get(key)
        if lines is None:
            points = self._points(first, last)
            read = {
                point: self.predictor.rank(layout, stage, point, group) for point in set(points)
            }
            ranks = [read[point] for point in points]
            lines = self._ranks[key] = RankLines(
                self._line([sum(one.forward) for one in ranks]),
                self._line([sum(one.backward) for one in ranks]),
                self._line([one.weight_s for one in ranks]),
                ranks[0].send_s,
                self._line([one.sync_s for one in ranks]),
                self._line([one.optimizer_s for one in ranks]),
            )
        return lines

    def held(
        self, key: tuple[object, ...], layout: Layout, group: int, first: bool, last: bool
    ) -> MemoryLines:
        """Return the bytes of a rank; arguments as of `rank`, with a pipeline of 1F1B.

        Memory does not ask which links there are.
        """
        key = (*key, group, first, last)
        lines = self._held.get(key)
        if lines is None:
            predictor, at = self.predictor, layout.pp - 1  # that rank holds one micro-batch
            stage = self.stub(layout, group)
            points = self._points(first, last)
            read = {
                point: predictor.rank_memory(layout, stage, point, at, 2.0, group)[:2]
                for point in set(points)
            }
            saved = [0.0, 0.0, 0.0]
            for kind, there in enumerate(self.kinds):
                if there:
                    block = predictor.block(layout, stage, group, bool(kind))
                    kept = memory.block_bytes(block, layout.recompute, predictor.traits)[0]
                    saved[kind + 1] = kept * predictor.constants[group].activation
            whole = self._line([read[point][0] for point in points])
            # One micro-batch is in the measured bytes: taken off, so that it can be counted as
            # often as a schedule keeps it.
            fixed = (whole[0], whole[1] - saved[1], whole[2] - saved[2])
            capacity = read[points[0]][1]
            lines = self._held[key] = MemoryLines(fixed, (0.0, saved[1], saved[2]), capacity)
        return lines


def layers_that_fit(
    lines: Lines, core: InnerDegrees, split: tuple[int, int], held: np.ndarray, recompute: str
) -> np.ndarray:
    """Return for how many layers (those with experts, where there are such) ranks of every group
    have memory, [group, held].

    Args:
        held: numbers of micro-batches whose activations a rank keeps.
    """
    layout = skeleton(core, split, 2, recompute, ScheduleChoice("1f1b", 1))
    key, kind = (core, split, recompute), 2 if lines.kinds[1] else 1
    rooms = []
    for g in range(len(lines.predictor.cluster.groups)):
        one = lines.held(key, layout, g, False, False)
        # Layers with experts where there are such: they hold most, and what is asked is how many
        # ranks have room for them.
        each = one.fixed[kind] + held * one.saved[kind]
        rooms.append(max(0.0, one.capacity - one.fixed[0]) / each)
    return np.floor(np.array(rooms) + 1e-9)


Once = tuple[np.ndarray, np.ndarray]
_PLENTY = 1 << 40  # micro-batches: too many for a V to run short of them


class GroupCosts(NamedTuple):
    """Seconds of one micro-batch under a schedule, on ranks of every group. "Wait" is what they add
    to filling and draining.
    """

    fixed: np.ndarray  # [group]
    each: np.ndarray  # of a layer of the kind that most are of
    other: np.ndarray  # of a layer of the other kind
    cheaper: np.ndarray  # what that takes less, or 0
    wait_fixed: np.ndarray
    wait_each: np.ndarray
    wait_other: np.ndarray
    wait_cheaper: float
    head: np.ndarray
    wait_head: np.ndarray
    cross: (
        np.ndarray
    )  # [group, group that is sent to]: longer than inside the group, which is the last column
    wait_cross: np.ndarray
    ratio: float  # of a rank's time, what it adds to the wait, at most


class GroupLines:
    """Reads ranks off the predictor as lines, and remembers them."""

    def __init__(self, lines: Lines, most: int) -> None:
        """`most`: the kind of layers that most are of, 0 dense or 1 with experts."""
        self.lines, self.most = lines, most
        self._ranks: dict[tuple[InnerDegrees, str, str], list[RankLines]] = {}
        self._once: dict[tuple[object, ...], Once] = {}
        self._parts_of: dict[tuple[object, ...], tuple[np.ndarray, ...]] = {}

    def ranks(self, core: InnerDegrees, recompute: str, at: str) -> list[RankLines]:
        """Return a rank of every group, with layers only, with the head, or with both ends of the
        model.
        """
        key = core, recompute, at
        costs = self._ranks.get(key)
        if costs is None:
            layout = skeleton(
                core, (1, core.ep * core.etp), 2, recompute, ScheduleChoice("1f1b", 1)
            )
            ends = {"inner": (False, False), "head": (False, True), "both": (True, True)}[at]
            predictor, named = self.lines.predictor, ("inner", core, recompute)
            costs = self._ranks[key] = [
                self.lines.rank(named, layout, self.lines.stub(layout, g), g, *ends)
                for g in range(len(predictor.cluster.groups))
            ]
        return costs

    def cost(
        self, core: InnerDegrees, recompute: str, way: ScheduleChoice, sends: np.ndarray
    ) -> GroupCosts:
        """Return the lines of all groups.

        Args:
            sends: seconds that one virtual stage sends, [group, group that is sent to]; the last
                column is inside the group.
        """
        plain, slope, head = self._parts(core, recompute, way)
        inside = sends[:, -1]
        own = plain + slope * inside
        most, other = self.most, 1 - self.most
        # What a layer of the rarer kind takes less, at most: bounds that count layers of the common
        # kind take this off.
        cheaper = np.zeros((2, len(sends)))
        if all(self.lines.kinds):
            cheaper = np.maximum(
                (own[1 + most] - own[1 + other], own[4 + most] - own[4 + other]), 0
            )
        busy, waits = (
            np.vstack((own[:3], own[:1] + head[:1])),
            np.vstack((own[3:], own[3:4] + head[3:4])),
        )
        # Of every line's coefficient: then it holds for any number of layers, as sums keep ratios
        # in between.
        ratio = float(np.max(waits[busy > 0] / busy[busy > 0]))
        longer = sends - inside[:, None]
        return GroupCosts(
            own[0],
            own[1 + most],
            own[1 + other],
            cheaper[0],
            own[3],
            own[4 + most],
            own[4 + other],
            float(cheaper[1].max()),
            head[0],
            head[3],
            longer * slope[0][:, None],
            longer * slope[3][:, None],
            max(0.0, ratio),
        )

    def _parts(
        self, core: InnerDegrees, recompute: str, way: ScheduleChoice
    ) -> tuple[np.ndarray, ...]:
        """Return (rows of `_row` without sending, what a second of sending adds to them, what the
        head adds), [number, group] each.
        """
        key = core, recompute, way
        if key not in self._parts_of:
            both = way.schedule == "zbv_zero_bubble"
            inner = self.ranks(core, recompute, "inner")
            heads = self.ranks(core, recompute, "both" if both else "head")
            plain = np.array([_row(one, way, 0.0) for one in inner]).T
            # Read off `load` itself with and without a second of sending: no schedule's formula is
            # written down here.
            slope = np.array([_row(one, way, 1.0) for one in inner]).T - plain
            head = np.array([_row(one, way, 0.0) for one in heads]).T - plain
            self._parts_of[key] = plain, slope, head
        return self._parts_of[key]

    def once(
        self, core: InnerDegrees, dp_ranks: int, open_: list[tuple[int, int]], layers: int
    ) -> Once:
        """Return the least seconds of gradients' transfer, and of the update, of a step, [group,
        layers of a rank], of the kind that most are of.

        Args:
            open_: (dp_replicate, dp_shard) that may be chosen.
        """
        key = core._replace(micro_sequences=1), dp_ranks
        if key not in self._once:
            groups = range(len(self.lines.predictor.cluster.groups))
            count = np.arange(layers + 1.0)
            least_s = np.full((2, len(groups), layers + 1), np.inf)
            # The split is open: the least of all is what a bound may count on.
            for split in open_:
                layout = skeleton(key[0], split, 2, "none", ScheduleChoice("1f1b", 1))
                for g in groups:
                    stage = self.lines.stub(layout, g)
                    rank = self.lines.rank(("once", key, split), layout, stage, g, False, False)
                    for at, line in enumerate((rank.sync, rank.update)):
                        own_s = line[0] + line[1 + self.most] * count
                        least_s[at, g] = np.minimum(least_s[at, g], own_s)
            self._once[key] = least_s[0], least_s[1]
        return self._once[key]


def _row(rank: RankLines, way: ScheduleChoice, send_s: float) -> tuple[float, ...]:
    """Return (busy, waits) of a rank, each fixed, of a dense layer, of a layer with experts."""
    one = load(rank._replace(send=send_s), way, 2, _PLENTY, 0)
    return (one.fixed, *one.each, one.wait_fixed, *one.wait_each)
