"""The search against every layout there is, on small clusters and models."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, permutations, product

import pytest
from hypothesis import HealthCheck, given, settings

from motet.models.config import ModelConfig
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.predictor import Predictor
from motet.parallel.layout.layout import RECOMPUTE, SCHEDULES, Layout
from motet.parallel.layout.rules import problems
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.placement import placement, trimmed
from motet.parallel.planner.question import PlanQuestion
from motet.parallel.planner.space import GroupAssignment
from tests.parallel.planner.questions import questions

EXAMPLES = int(os.environ.get("MOTET_PLANNER_EXAMPLES", "6"))
MANY_EXAMPLES = 200  # about four minutes on one core: `make test-long`


def parts_of(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as an ordered sum, the first and the last of which may be 0."""
    if count == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in parts_of(total - first, count - 1):
            if all(part > 0 for part in rest[:-1]):
                yield (first, *rest)


def degrees(devices: int) -> Iterator[dict[str, int]]:
    """Every product of degrees that a number of devices has."""
    names = ("tp", "cp", "dp_replicate", "dp_shard", "pp")
    for values in product(range(1, devices + 1), repeat=4):
        inside = values[0] * values[1] * values[2] * values[3]
        if devices % inside == 0:
            yield dict(zip(names, (*values, devices // inside), strict=True))


def used_nodes(cluster: Cluster) -> Iterator[tuple[Cluster, tuple[int, ...]]]:
    """Every choice of whole nodes, or of a part of one node, of every group: those left out are
    gone.
    """
    choices = []
    for group in cluster.groups:
        parts = [(1, n) for n in range(1, group.devices_per_node)]
        choices.append(
            [(0, 0), *parts, *((n, group.devices_per_node) for n in range(1, group.nodes + 1))]
        )
    for chosen in product(*choices):
        groups = tuple(
            replace(group, nodes=nodes, devices_per_node=size)
            for group, (nodes, size) in zip(cluster.groups, chosen, strict=True)
            if nodes
        )
        if groups:
            yield Cluster(groups, cluster.links), tuple(group.devices for group in groups)


def placed(cluster: Cluster, layout: Layout) -> Iterator[Layout]:
    """Every order of the groups along the pipeline, each stage inside one group."""
    sizes = [group.devices for group in cluster.groups]
    if any(size % layout.stage_ranks for size in sizes):
        return
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for order in permutations(range(len(sizes))):
        devices = [d for g in order for d in range(starts[g], starts[g] + sizes[g])]
        plain = devices == sorted(devices)
        yield replace(layout, placement=() if plain else tuple(devices))


def least_by_brute_force(question: PlanQuestion) -> float:
    """Return the least time of any layout that fits, and infinity where none does."""
    best = float("inf")
    for predictor, layouts in chain(pipelined(question), replicated(question)):
        for layout in layouts:
            prediction = predictor.predict(layout)
            if prediction.fits:
                best = min(best, prediction.step_time_s)
    return best


Machines = Iterator[tuple[Predictor, Iterator[Layout]]]


def pipelined(question: PlanQuestion) -> Machines:
    """Every layout whose stages stand inside one group each."""
    node = max(group.devices_per_node for group in question.cluster.groups)
    for cluster, sizes in used_nodes(question.cluster):
        layouts = (
            whole
            for found in degrees(sum(sizes))
            if found["tp"] <= node
            for layout in shapes(question, found)
            for whole in placed(cluster, layout)
        )
        yield Predictor(question.model, cluster, question.training), layouts


def replicated(question: PlanQuestion) -> Machines:
    """Every layout that fills both groups with whole replicas, with all shares of the step."""
    sizes = [group.devices for group in question.cluster.groups]
    node = max(group.devices_per_node for group in question.cluster.groups)
    for tp, cp, shard, pp in product(range(1, max(sizes) + 1), repeat=4):
        counts = [size // (tp * cp * shard * pp) for size in sizes]
        cluster = trimmed(question.cluster, [n * tp * cp * shard * pp for n in counts])
        if len(sizes) == 2 and all(counts) and tp <= node and cluster is not None:
            found = {"dp_replicate": sum(counts), "dp_shard": shard, "tp": tp, "cp": cp, "pp": pp}
            spread = GroupAssignment("replicas", ((0, counts[0]), (1, counts[1])))
            layouts = (
                replace(layout, placement=placement(cluster, layout, spread))
                for shares in product(range(1, question.training.sequences), repeat=2)
                if math.gcd(*shares) == 1
                for layout in shapes(question, found, shares_of(shares, counts))
            )
            yield Predictor(question.model, cluster, question.training), layouts


def shares_of(shares: tuple[int, ...], counts: list[int]) -> tuple[int, ...]:
    """The shares of all replicas, () where they are equal."""
    if len(set(shares)) == 1:
        return ()
    return tuple(share for share, n in zip(shares, counts, strict=True) for _ in range(n))


def shapes(
    question: PlanQuestion, found: dict[str, int], shares: tuple[int, ...] = ()
) -> Iterator[Layout]:
    """Every schedule, micro-batch, recomputation, switch and partition of layers that obeys the
    rules.
    """
    model, training = question.model, question.training
    pp = found["pp"]
    if pp > model.n_layers + 2:
        return
    for schedule, virtual, micro in product(SCHEDULES, (1, 2, 3), (1, 2, 4, 8)):
        start = Layout(
            **found,
            schedule=schedule,
            virtual_stages=virtual,
            micro_sequences=micro,
            shares=shares,
        )
        parts = sum(shares) if shares else start.dp_replicate
        number = training.sequences // (micro * start.dp_shard * parts) * min(shares, default=1)
        if (pp > 1 and number < 2) or (pp == 1 and schedule != "1f1b"):
            continue
        for recompute, (parallel, ep, etp) in product(RECOMPUTE, switches(model, found["tp"])):
            layout = replace(start, recompute=recompute, sequence_parallel=parallel, ep=ep, etp=etp)
            for stages in parts_of(model.n_layers, layout.stages) if pp > 1 else [()]:
                whole = replace(layout, stage_layers=stages)
                if problems(whole, model, training.sequence_length, [training.sequences], None):
                    break  # rules do not ask how many layers a stage has, as long as these are a sound sum
                yield whole


def switches(model: ModelConfig, tp: int) -> list[tuple[bool, int, int]]:
    """Every (sequence_parallel, ep, etp); with experts, the stream is always divided along the
    sequence.
    """
    if model.n_experts:
        return [(True, ep, etp) for ep in (1, 2, 4) for etp in sorted({1, tp})]
    return [(parallel, 1, 1) for parallel in ((True, False) if tp > 1 else (True,))]


def check(question: PlanQuestion) -> None:
    answer = plan(question)
    best = least_by_brute_force(question)
    found = answer.best.prediction.step_time_s if answer.choices else float("inf")
    assert answer.bound_s == 0.0
    assert found == pytest.approx(best, rel=1e-9)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(questions())
def test_the_search_finds_what_trying_every_layout_finds(question: PlanQuestion) -> None:
    check(question)


@pytest.mark.long
@settings(max_examples=MANY_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(questions())
def test_the_search_finds_what_trying_every_layout_finds_many_times(question: PlanQuestion) -> None:
    check(question)
