"""A rank's seconds as straight lines in its layers, and a step made of them: the formula of
`cost/pipeline.py` for a search that asks it many times. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from motet.parallel.cost.pipeline import exposed, half_passes, pipeline_s, wait_s
from motet.parallel.cost.pipeline import step_s as whole_step_s
from motet.parallel.cost.predictor import Predictor
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.space import ScheduleChoice

Line = tuple[float, float, float]  # fixed, per dense layer, per layer with experts


class RankLines(NamedTuple):
    """Seconds of a pipeline rank: of one micro-batch, and `sync`, `update` of a step."""

    forward: Line
    backward: Line  # without sending
    weight: Line
    send: float  # of one virtual stage
    sync: Line
    update: Line


@dataclass(frozen=True)
class Load:
    """What one pipeline rank adds to a step, by the layers that it holds (of each kind: dense, with
    experts).

    Attributes:
        fixed, each: busy seconds of one micro-batch: embedding, head and transfers, and every layer
            of a kind.
        wait_fixed, wait_each: seconds that it adds to the filling and draining of the pipeline.
        least: layers that it must hold: one for every stage but the first and the last.
        once: (fixed, of a layer of each kind) seconds once a step, of gradients' transfer and of
            the update: of all ranks the longest counts.
    """

    fixed: float
    each: tuple[float, float]
    wait_fixed: float
    wait_each: tuple[float, float]
    least: int
    once: tuple[tuple[float, float, float], tuple[float, float, float]] = ((0.0,) * 3, (0.0,) * 3)


def value(line: Line, dense: float, experts: float) -> float:
    """Return a line's value."""
    return line[0] + dense * line[1] + experts * line[2]


def load(rank: RankLines, way: ScheduleChoice, pp: int, n: float, least: int) -> Load:
    """Return what a rank adds to a step of n micro-batches under a schedule."""
    busy = [f + b for f, b in zip(rank.forward, rank.backward, strict=True)]
    busy[0] += rank.send * way.virtual_stages
    inputs = [b - w for b, w in zip(rank.backward, rank.weight, strict=True)]
    # The longer of two passes is no line. One of the two for all of the rank: the line is then
    # nowhere above what the rank adds, so that bounds made of it stay bounds.
    longer = rank.forward if sum(rank.forward[1:]) >= sum(inputs[1:]) else inputs
    passes = half_passes(pp, n) if way.schedule == "zbv_zero_bubble" else 0.0
    wait = [
        wait_s(way.schedule, way.virtual_stages, passes, own, weight, half / 2)
        for own, weight, half in zip(busy, rank.weight, longer, strict=True)
    ]
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
        # Most ranks of a long pipeline are alike: each is valued once.
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
    # What the slowest rank does in one micro-batch hides transfers, as in `Predictor`: the others
    # wait for it anyway.
    window_s = windows[busy.index(max(busy))]
    overlap = predictor.traits.data_overlap
    sync_s = max(exposed(one[3], window_s, overlap) for one in seen.values())
    update_s = max(one[4] for one in seen.values())
    return whole_step_s(pipe_s, sync_s, update_s, predictor.training)
