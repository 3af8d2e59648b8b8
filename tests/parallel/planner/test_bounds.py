"""No lower bound of the search exceeds the true optimum of what it bounds: each bound against every
layout of small random questions (docs/planner_internals.md tells the inequalities).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from motet.models.config import ModelConfig
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.shapes import StageShape
from motet.parallel.cost.terms import Training
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.bound_table import BoundTable
from motet.parallel.planner.bounds import gradients_crossing_s, with_room
from motet.parallel.planner.context import Context
from motet.parallel.planner.frontier import Frontier
from motet.parallel.planner.linear import skeleton
from motet.parallel.planner.placement import places_of, renumbered
from motet.parallel.planner.question import PlanQuestion
from motet.parallel.planner.replicas import Shape, _of_core, _once, _shares
from motet.parallel.planner.rows import rows_of
from motet.parallel.planner.space import (
    GroupAssignment,
    InnerDegrees,
    ScheduleChoice,
    divisors,
    every_schedule,
)
from motet.parallel.planner.steps import value
from tests.parallel.planner.questions import questions

MIXED = ((0, 2), (1, 2))  # experts in every second layer
SLACK = 1 + 1e-9
LAYOUTS = 4_000  # of one example at most
run = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass
class Degrees:
    """Some degrees of a question, and the tables that bound them."""

    context: Context
    frontier: Frontier
    core: InnerDegrees
    dp_ranks: int
    assignments: np.ndarray  # [assignment, group]

    @property
    def micro_batches(self) -> int:
        return self.context.question.micro_batches(self.core, self.dp_ranks)

    def table(self, recompute: str) -> BoundTable:
        return BoundTable(self.frontier, self.core, self.dp_ranks, recompute, self.assignments)


@st.composite
def degrees(draw: st.DrawFn) -> Degrees:
    question = draw(questions(MIXED))
    assume(question.model.n_layers <= 4)
    context = Context(question)
    core = draw(st.sampled_from([one for one in question.inner_degrees() if one.cp == 1]))
    dp_ranks = draw(st.sampled_from(divisors(question.training.sequences // core.micro_sequences)))
    frontier = Frontier(context)
    found = frontier.assignments(core, dp_ranks)
    fit = [context.machines(row * dp_ranks * core.tp) is not None for row in found]
    found = found[np.array(fit, dtype=bool) & (found.sum(axis=1) <= 4)]
    assume(len(found) and question.splits(core, dp_ranks))
    return Degrees(context, frontier, core, dp_ranks, found)


def partitions(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Layers of every stage; the first and the last may have none."""
    if stages == 1:
        yield (layers,)
        return
    for first in range(layers + 1):
        for rest in partitions(layers - first, stages - 1):
            if all(rest[:-1]):
                yield (first, *rest)


def layouts(
    case: Degrees, row: Sequence[int], order: tuple[int, ...], way: ScheduleChoice, recompute: str
) -> Iterator[tuple[float, bool]]:
    """(seconds, fits) of every sharding and division of layers, up to `LAYOUTS`."""
    question, pp = case.context.question, int(sum(row))
    spread = GroupAssignment("pipeline", tuple((g, int(row[g])) for g in order))
    ranks = case.dp_ranks * case.core.cp * case.core.tp
    machines = case.context.machines([int(count) * ranks for count in row])
    assert machines is not None
    seen = 0
    for split in question.splits(case.core, case.dp_ranks):
        plain = skeleton(case.core, split, pp, recompute, way)
        where = places_of(machines[0], plain, renumbered(spread))
        for stages in partitions(question.model.n_layers, plain.stages) if pp > 1 else [()]:
            prediction = machines[1].predict(replace(plain, stage_layers=stages), where)
            yield prediction.step_time_s, prediction.fits
            seen += 1
            if seen > LAYOUTS:
                return


def schedules(case: Degrees, pp: int) -> list[ScheduleChoice]:
    return case.context.question.schedules(pp, (case.micro_batches,))


def optimum(case: Degrees, at: int, way: ScheduleChoice, recompute: str, fits: bool) -> float:
    """The least time of an assignment in any order of groups."""
    row = case.assignments[at]
    orders = permutations([g for g, count in enumerate(row) if count])
    return min(
        (
            time_s
            for order in orders
            for time_s, room in layouts(case, row, order, way, recompute)
            if room or not fits
        ),
        default=math.inf,
    )


def each(case: Degrees, recompute: str) -> Iterator[tuple[int, int, ScheduleChoice]]:
    """(assignment, number of the schedule, schedule) of what can run."""
    every = every_schedule(case.context.question.limits.virtual_stages)
    for at, row in enumerate(case.assignments):
        for way in schedules(case, int(row.sum())):
            yield at, every.index(way), way


@run
@given(degrees())
def test_all_ranks_at_once_are_no_slower_than_any_pipeline(case: Degrees) -> None:
    question = case.context.question
    recompute = question.recomputes()[0]
    done = case.context.work_bound(case.core, recompute)
    most = case.frontier.assignments(case.core, case.dp_ranks).max(axis=0)
    bound_s = case.micro_batches * done.share / float(most @ (1 / done.whole))
    for at, _, way in each(case, recompute):
        assert bound_s <= optimum(case, at, way, recompute, fits=False) * SLACK


@run
@given(degrees(), st.data())
def test_the_work_of_a_pipeline_bounds_it_under_any_schedule(
    case: Degrees, data: st.DataObject
) -> None:
    recompute = data.draw(st.sampled_from(case.context.question.recomputes()))
    table = case.table(recompute)
    done = case.context.work_bound(case.core, recompute)
    plain = done.slowest(case.assignments)
    for at, number, way in each(case, recompute):
        best_s = optimum(case, at, way, recompute, fits=False)
        pp = int(case.assignments[at].sum())
        assert table.least_s[number, at] <= best_s * SLACK
        assert done.step_s(way, pp, case.micro_batches, float(plain[at])) <= best_s * SLACK


@run
@given(degrees(), st.data())
def test_a_pipeline_in_no_order_of_groups_is_no_slower_than_in_any(
    case: Degrees, data: st.DataObject
) -> None:
    recompute = data.draw(st.sampled_from(case.context.question.recomputes()))
    table = case.table(recompute)
    table.look()
    for at, number, way in each(case, recompute):
        best_s = optimum(case, at, way, recompute, fits=True)
        assert table.least_s[number, at] <= best_s * SLACK


@run
@given(degrees(), st.data())
def test_whole_layers_in_every_place_bound_each_order_of_groups(
    case: Degrees, data: st.DataObject
) -> None:
    recompute = data.draw(st.sampled_from(case.context.question.recomputes()))
    table = case.table(recompute)
    table.look()
    rows = rows_of(case.assignments)
    found = table.of(rows, rows.source)
    every = every_schedule(case.context.question.limits.virtual_stages)
    for at, order in enumerate(rows.orders):
        for way in schedules(case, int(rows.counts[at].sum())):
            bound_s = found[every.index(way), at]
            for time_s, fits in layouts(case, rows.counts[at], order, way, recompute):
                assert not fits or bound_s <= time_s * SLACK


@run
@given(degrees(), st.data())
def test_what_has_no_room_by_the_bound_fits_in_no_way(case: Degrees, data: st.DataObject) -> None:
    question = case.context.question
    recompute = data.draw(st.sampled_from(question.recomputes()))
    most = int(case.assignments.sum(axis=1).max())
    n = case.micro_batches
    rooms = case.frontier.rooms_before(case.core, case.dp_ranks, n, most, recompute)
    room = with_room(rooms, case.assignments, case.frontier.routed)
    for at, _, way in each(case, recompute):
        if not room[at]:
            assert math.isinf(optimum(case, at, way, recompute, fits=True))


def shared(
    case: Degrees, shape: Shape, micro: tuple[int, ...], recompute: str
) -> Iterator[tuple[Layout, float]]:
    """Every layout of replicas with some numbers of micro-batches, and its time."""
    question, context = case.context.question, case.context
    inside = shape.pp * shape.shard * shape.core.cp * shape.core.tp
    used = [dict(shape.spread.blocks).get(g, 0) * inside for g in range(2)]
    machines = context.machines(used)
    if machines is None:
        return
    split = sum(count for _, count in shape.spread.blocks), shape.shard
    for way in question.schedules(shape.pp, micro):
        plain = skeleton(shape.core, split, shape.pp, recompute, way)
        plain = replace(plain, shares=_shares(shape.spread, micro))
        where = places_of(machines[0], plain, renumbered(shape.spread))
        layers = question.model.n_layers
        for stages in partitions(layers, plain.stages) if shape.pp > 1 else [()]:
            layout = replace(plain, stage_layers=stages)
            yield layout, machines[1].predict(layout, where).step_time_s


@run
@given(degrees())
def test_replicas_in_groups_take_no_less_than_their_shape_and_their_gradients(
    case: Degrees,
) -> None:
    context, question = case.context, case.context.question
    assume(len(question.cluster.groups) == 2)
    crossing_s = gradients_crossing_s(context.predictor, (0, 1))
    recompute = question.recomputes()[0]
    tried = 0
    for shape in _of_core(context, (0, 1), case.core, crossing_s):
        coarse_s = shape.bound_s()
        if not _once(context, shape, {}) or shape.pp > 3:
            continue
        tried += 1
        first, second = (int(count) for count in shape.replicas)
        for n in range(1, shape.number):
            left = shape.number - n * first
            if left > 0 and left % second == 0:
                for _, time_s in shared(case, shape, (n, left // second), recompute):
                    assert coarse_s <= time_s * SLACK
                    assert shape.bound_s() <= time_s * SLACK
        if tried > 3:
            return


def test_lines_read_off_the_cost_model_are_its_own_numbers() -> None:
    """The contract of `cost/pipeline.py`: a rank's seconds are straight lines in its layers."""
    model = ModelConfig(1024, 256, 8, 4, 4, 512, n_experts=8, d_expert=256, moe_every=2)
    question = PlanQuestion(model, homogeneous("h100", 1), Training(8, 512))
    context = Context(question)
    predictor: Predictor = context.predictor
    core = next(one for one in question.inner_degrees() if one.tp == 1)
    layout = skeleton(core, (1, 2), 2, "none", ScheduleChoice("1f1b", 1))
    stage = context.lines.stub(layout, 0)
    lines = context.lines.rank(("test",), layout, stage, 0, True, False)
    for dense in range(4):
        for routed in range(4):
            if dense + routed:
                shape = StageShape(dense, routed, True, False)
                rank = predictor.rank(layout, stage, shape, 0)
                assert value(lines.forward, dense, routed) == pytest.approx(sum(rank.forward))
                assert value(lines.backward, dense, routed) == pytest.approx(sum(rank.backward))
                assert value(lines.weight, dense, routed) == pytest.approx(rank.weight_s)
                # Without a layer with experts their group's latency falls away.
                latency_s = 0.0 if routed else 1e-4
                sync_s = value(lines.sync, dense, routed)
                assert rank.sync_s * (1 - 1e-9) <= sync_s <= rank.sync_s * (1 + 1e-9) + latency_s
                assert value(lines.update, dense, routed) == pytest.approx(rank.optimizer_s)
