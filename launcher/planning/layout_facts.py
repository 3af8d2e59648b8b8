"""What a layout is, as plain values: where every rank stands, what it holds, what it does in a
step. No torch.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

from motet.launcher.config.sections import RunSettings
from motet.models.config import ModelConfig
from motet.parallel.cost.stages import pass_times, stage_costs
from motet.parallel.cost.timeline import TimedPass, bubble, most_held, orders, timeline
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.rules import micro_batches

DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERTS = ("pp", "dp_replicate", "edp", "ep", "etp")


def layout_facts(settings: RunSettings, model: ModelConfig, nodes: int) -> dict[str, Any]:
    """Return everything that `motet layout show` draws; the settings and the model have no
    problem.
    """
    layout = settings.layout_for(settings.layout.processes * nodes)
    length = settings.data.sequence_length
    facts: dict[str, Any] = {
        "name": settings.name,
        "engine": layout.engine,
        "world_size": layout.world_size,
        "nodes": nodes,
        "processes_per_node": settings.layout.processes,
        "degrees": {name: getattr(layout, name) for name in (*DENSE, "ep", "etp")},
        "ranks": _ranks(layout, settings.layout.processes),
        "crossing": crossing(layout, settings.layout.processes) if nodes > 1 else {},
        "stages": _stages(layout, model, length),
        "experts": _experts(layout, model),
        "batch": _batch(settings, layout),
        "pipeline": None,
    }
    if layout.pp > 1:
        facts["pipeline"] = _pipeline(layout, model, length, settings.batch.sequences)
    return facts


def _process_of(layout: Layout, rank: int) -> int:
    """The launched process that stands at a position of the grid."""
    return layout.placement[rank] if layout.placement else rank


def _ranks(layout: Layout, processes: int) -> list[dict[str, int]]:
    return [
        {
            "rank": rank,
            "process": _process_of(layout, rank),
            "node": _process_of(layout, rank) // processes,
            **dataclasses.asdict(layout.place(rank)),
            "reads": layout.dp_rank(rank),
        }
        for rank in range(layout.world_size)
    ]


def crossing(layout: Layout, processes: int) -> dict[str, bool]:
    """Return, for every degree above 1, whether ranks that work together in it lie on different
    nodes.
    """
    dense = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
    experts = (layout.pp, layout.dp_replicate, layout.edp, layout.ep, layout.etp)
    out = {}
    for names, sizes in ((DENSE, dense), (EXPERTS[3:], experts)):
        axes = dict(zip(names, range(5 - len(names), 5), strict=True))
        for name, axis in axes.items():
            if sizes[axis] == 1:
                continue
            groups = defaultdict(set)
            for rank, place in enumerate(product(*map(range, sizes))):
                node = _process_of(layout, rank) // processes
                groups[place[:axis] + place[axis + 1 :]].add(node)
            out[name] = any(len(group) > 1 for group in groups.values())
    return out


def _stages(layout: Layout, model: ModelConfig, length: int) -> list[dict[str, Any]]:
    costs = stage_costs(layout, model, length)
    whole = sum(cost.forward_flops for cost in costs)
    holder = {stage: rank for rank in range(layout.pp) for stage in layout.stages_of(rank)}
    return [
        {
            "stage": number,
            "pipeline_rank": holder[number] if layout.pp > 1 else 0,
            "layers": list(cost.layers),
            "embedding": cost.first,
            "head": cost.last,
            "parameters": cost.parameters,
            "parameters_per_rank": cost.held_parameters,
            "share_of_compute": cost.forward_flops / whole,
        }
        for number, cost in enumerate(costs)
    ]


def _experts(layout: Layout, model: ModelConfig) -> dict[str, Any] | None:
    """Which ranks of the first replica's first stage hold which experts: the others repeat the
    pattern.
    """
    if model.n_experts == 0:
        return None
    each = model.n_experts // layout.ep
    inside: dict[int, list[int]] = defaultdict(list)
    for rank, (_, ep, _) in enumerate(product(*map(range, (layout.edp, layout.ep, layout.etp)))):
        inside[ep].append(_process_of(layout, rank))
    return {
        "n_experts": model.n_experts,
        "edp": layout.edp,
        "groups": [
            {"experts": list(range(ep * each, (ep + 1) * each)), "processes": processes}
            for ep, processes in sorted(inside.items())
        ],
    }


def _batch(settings: RunSettings, layout: Layout) -> list[dict[str, Any]]:
    """The batch of the first step, and of every stage of the ramp."""
    steps = {0: settings.batch.sequences, **{s.step: s.sequences for s in settings.batch.ramp}}
    return [
        {
            "step": step,
            "sequences": sequences,
            "tokens": sequences * settings.data.sequence_length,
            "readers": layout.dp_size,
            "micro_sequences": layout.micro_sequences,
            "micro_batches": list(micro_batches(layout, sequences)),
        }
        for step, sequences in sorted(steps.items())
    ]


def _pipeline(layout: Layout, model: ModelConfig, length: int, sequences: int) -> dict[str, Any]:
    number = max(micro_batches(layout, sequences))
    works = pipeline_works(layout, model, length, number)
    order = orders(layout.schedule, layout.pp, layout.virtual_stages, number)
    return {
        "schedule": layout.schedule,
        "virtual_stages": layout.virtual_stages,
        "micro_batches": number,
        "bubble": bubble(works),
        "most_held": [most_held(actions) for actions in order],
        "unit_of_time": "one forward pass of one micro-batch through the whole model",
        "timeline": [work._asdict() for work in works],
    }


def pipeline_works(
    layout: Layout, model: ModelConfig, length: int, number: int
) -> Sequence[TimedPass]:
    """The timeline of a step of `number` micro-batches, by arithmetic alone: sending takes no
    time.
    """
    forward, backward, weight = pass_times(stage_costs(layout, model, length), layout)
    return timeline(
        layout.schedule, layout.pp, layout.virtual_stages, number, forward, backward, weight
    )
