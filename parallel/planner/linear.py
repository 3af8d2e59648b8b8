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
from motet.parallel.cost.pipeline import half_passes, pipeline_s
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.shapes import StageShape
from motet.parallel.cost.topology import StageGroups, strides
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.partition import Load
from motet.parallel.planner.space import InnerDegrees, ScheduleChoice

Line = tuple[float, float, float]  # fixed, per dense layer, per layer with experts


class RankLines(NamedTuple):
    """Seconds of a pipeline rank: of one micro-batch, and `sync`, `update` of a step."""

    forward: Line
    backward: Line  # without sending
    weight: Line
    send: float  # of one virtual stage
    sync: Line
    update: Line


class MemoryLines(NamedTuple):
    """Bytes of a pipeline rank: `fixed` and `saved` of one micro-batch that it keeps, as lines;
    capacity of its device.
    """

    fixed: Line
    saved: Line
    capacity: float

    def bytes(self, dense: int, experts: int, held: float) -> float:
        """Return what it holds with some layers and micro-batches."""
        fixed = self.fixed[0] + dense * self.fixed[1] + experts * self.fixed[2]
        return fixed + held * (dense * self.saved[1] + experts * self.saved[2])


def value(line: Line, dense: float, experts: float) -> float:
    """Return a line's value."""
    return line[0] + dense * line[1] + experts * line[2]


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
        found = self._stubs.get((*degrees, group))
        if found is None:
            parts = {name: strided(whole, *where) for name, where in strides(layout).items()}
            hops = strided(whole, 2, whole.devices_per_node), strided(whole, 2, 1)
            found = self._stubs[*degrees, group] = [
                StageGroups((group,), **parts, hop=h) for h in hops
            ]
        if 2 * ranks > whole.devices_per_node:
            return found[0]
        tokens = layout.micro_sequences * predictor.training.sequence_length / layout.cp
        size = tokens * predictor.model.d_model * predictor.costs[group].value / layout.tp
        own = predictor.constants[group]
        return min(found, key=lambda stage: stage.hop.send_s(size, own))

    def _points(self, first: bool, last: bool) -> tuple[StageShape, StageShape, StageShape]:
        """Return a point, and the same with a dense layer and with a layer with experts more (if
        the model has such).
        """
        dense, routed = map(int, self.kinds)
        base = StageShape(dense, routed, first, last)
        return (
            base,
            StageShape(2 * dense, routed, first, last),
            StageShape(dense, 2 * routed, first, last),
        )

    def _line(self, values: Sequence[float]) -> Line:
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
        found = self._ranks.get(key)
        if found is None:
            points = self._points(first, last)
            read = {
                point: self.predictor.rank(layout, stage, point, group) for point in set(points)
            }
            ranks = [read[point] for point in points]
            found = self._ranks[key] = RankLines(
                self._line([sum(one.forward) for one in ranks]),
                self._line([sum(one.backward) for one in ranks]),
                self._line([one.weight_s for one in ranks]),
                ranks[0].send_s,
                self._line([one.sync_s for one in ranks]),
                self._line([one.optimizer_s for one in ranks]),
            )
        return found

    def held(
        self, key: tuple[object, ...], layout: Layout, group: int, first: bool, last: bool
    ) -> MemoryLines:
        """Return the bytes of a rank; arguments as of `rank`, with a pipeline of 1F1B.

        Memory does not ask which links there are.
        """
        key = (*key, group, first, last)
        found = self._held.get(key)
        if found is None:
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
            fixed = (whole[0], whole[1] - saved[1], whole[2] - saved[2])
            capacity = read[points[0]][1]
            found = self._held[key] = MemoryLines(fixed, (0.0, saved[1], saved[2]), capacity)
        return found


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
        each = one.fixed[kind] + held * one.saved[kind]
        rooms.append(max(0.0, one.capacity - one.fixed[0]) / each)
    return np.floor(np.array(rooms) + 1e-9)


def load(rank: RankLines, way: ScheduleChoice, pp: int, n: float, least: int) -> Load:
    """Return what a rank adds to a step under a schedule (see `cost_pipeline.pipeline_s`)."""
    send_s = rank.send * way.virtual_stages
    busy = [f + b for f, b in zip(rank.forward, rank.backward, strict=True)]
    busy[0] += send_s
    wait: list[float]
    if way.schedule == "interleaved_zero_bubble":
        rest = [b - 2 * w for b, w in zip(busy, rank.weight, strict=True)]
        wait = [value / way.virtual_stages for value in rest]
    elif way.schedule == "zbv_zero_bubble":
        inputs = [b - w for b, w in zip(rank.backward, rank.weight, strict=True)]
        # One of the two for all of the rank, so that the line is nowhere above what the rank adds.
        chosen = rank.forward if sum(rank.forward[1:]) >= sum(inputs[1:]) else inputs
        longer = [value / 2 for value in chosen]
        wait = [value * half_passes(pp, n) for value in longer]
    else:
        wait = [value / way.virtual_stages for value in busy]
    once = rank.sync, rank.update
    return Load(busy[0], (busy[1], busy[2]), wait[0], (wait[1], wait[2]), least, once)


def step_s(
    layout: Layout,
    ranks: Sequence[RankLines],
    layers: Sequence[tuple[float, float]],
    n: float,
    predictor: Predictor,
) -> float:
    """Return the seconds of a step, as `Predictor.predict` does for one kind of replica.

    Args:
        layers: dense layers and layers with experts of every rank.
    """
    seen: dict[tuple[int, tuple[float, float]], tuple[float, ...]] = {}
    read = []
    for rank, kept in zip(ranks, layers, strict=True):
        key = id(rank), kept
        found = seen.get(key)
        if found is None:
            ahead, back = value(rank.forward, *kept), value(rank.backward, *kept)
            sums = value(rank.weight, *kept), value(rank.sync, *kept), value(rank.update, *kept)
            found = ahead, back + layout.virtual_stages * rank.send, *sums, ahead + back
            seen[key] = found
        read.append(found)
    forward, backward, weight, _, _, windows = zip(*read, strict=True)
    pipe_s = pipeline_s(layout, n, forward, backward, weight)
    busy = [n * (f + b) for f, b in zip(forward, backward, strict=True)]
    window_s = windows[busy.index(max(busy))]
    training = predictor.training
    overlap = predictor.traits.data_overlap
    sync_s = max(one[3] - overlap * min(one[3], window_s) for one in seen.values())
    update_s = max(one[4] for one in seen.values())
    tokens = training.sequences * training.sequence_length
    probe_s = pipe_s * training.probe_tokens / tokens / 3.0
    return pipe_s + sync_s + update_s + probe_s + training.data_s
