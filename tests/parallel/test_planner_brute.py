"""The search against every layout there is, on small clusters and models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motet.models.config import ModelConfig
from motet.parallel.cluster import Cluster, Group, Link, device
from motet.parallel.cost_terms import Training
from motet.parallel.layout import RECOMPUTE, SCHEDULES, Layout
from motet.parallel.layout_rules import problems
from motet.parallel.plan_space import Limits
from motet.parallel.plan_terms import Question
from motet.parallel.planner import plan
from motet.parallel.predict import Predictor

LENGTH = 512
EXAMPLES = int(
    os.environ.get("MOTET_PLANNER_EXAMPLES", "12")
)  # 200 take about 10 minutes on one core


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
    """Every choice of whole nodes, or of a part of one node, of every group: those left out are gone."""
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


def least_by_brute_force(question: Question) -> float:
    """Return the least time of any layout that fits, and infinity where none does."""
    model, training = question.model, question.training
    best = float("inf")
    node = max(group.devices_per_node for group in question.cluster.groups)
    for cluster, sizes in used_nodes(question.cluster):
        predictor = Predictor(model, cluster, training)
        for found in degrees(sum(sizes)):
            if found["tp"] > node:
                continue
            for layout in shapes(question, found):
                for whole in placed(cluster, layout):
                    prediction = predictor.predict(whole)
                    if prediction.fits:
                        best = min(best, prediction.step_time_s)
    return best


def shapes(question: Question, found: dict[str, int]) -> Iterator[Layout]:
    """Every schedule, micro-batch, recomputation, switch and partition of layers that obeys the rules."""
    model, training = question.model, question.training
    pp = found["pp"]
    if pp > model.n_layers + 2:
        return
    for schedule, virtual, micro in product(SCHEDULES, (1, 2, 3), (1, 2, 4, 8)):
        start = Layout(**found, schedule=schedule, virtual_stages=virtual, micro_sequences=micro)
        number = training.sequences // (micro * start.readers)
        if (pp > 1 and number < 2) or (pp == 1 and schedule != "1f1b"):
            continue
        for recompute, parallel in product(
            RECOMPUTE, (True, False) if found["tp"] > 1 else (True,)
        ):
            layout = replace(start, recompute=recompute, sequence_parallel=parallel)
            for stages in parts_of(model.n_layers, layout.stages) if pp > 1 else [()]:
                whole = replace(layout, stage_layers=stages)
                if problems(whole, model, training.sequence_length, [training.sequences], None):
                    break  # rules do not ask how many layers a stage has, as long as these are a sound sum
                yield whole


@st.composite
def questions(draw: st.DrawFn) -> Question:
    heads = draw(st.sampled_from((2, 4)))
    model = ModelConfig(
        vocabulary_size=draw(st.sampled_from((1024, 32_768))),
        d_model=draw(st.sampled_from((256, 1024, 4096))),
        n_layers=draw(st.integers(2, 6)),
        n_heads=heads,
        n_kv_heads=2,
        d_ffn=draw(st.sampled_from((512, 4096))),
        tied_embeddings=draw(st.booleans()) and draw(st.booleans()),
    )
    kinds = ("h100", "t4", "a100-40")
    groups = []
    for number in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(kinds))
        memory = draw(st.sampled_from((4.0, 6.0, 12.0, 40.0)))
        inside = Link(draw(st.sampled_from((10.0, 300.0))), 3.0, "nvlink")
        outside = Link(draw(st.sampled_from((1.0, 25.0))), 5.0, "infiniband")
        nodes, size = draw(
            st.sampled_from(((1, 2), (2, 1), (1, 4), (2, 2)) if number == 0 else ((1, 2), (2, 1)))
        )
        groups.append(
            Group(f"g{number}", device(kind, memory_gib=memory), nodes, size, inside, outside)
        )
    slow = Link(draw(st.sampled_from((0.1, 1.0, 10.0))), 100.0, "ethernet")
    training = Training(draw(st.sampled_from((4, 8))), LENGTH)
    links = {("g0", "g1"): slow}
    limits = Limits(micro_sequences=8, virtual_stages=3, nodes=1_000_000, replica_shapes=1_000)
    return Question(model, Cluster(tuple(groups), links), training, top=1, limits=limits)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(questions())
def test_the_search_finds_what_trying_every_layout_finds(question: Question) -> None:
    answer = plan(question)
    best = least_by_brute_force(question)
    found = answer.best.prediction.step_time_s if answer.choices else float("inf")
    if answer.choices and answer.best.spread.across == "replicas":
        assert found <= best * (
            1 + 1e-9
        )  # replicas in different groups, which the brute force leaves out
    else:
        assert found == pytest.approx(best, rel=1e-9)
