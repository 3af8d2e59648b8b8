from __future__ import annotations

import dataclasses

import pytest

from motet.models import counts
from motet.models.config import ModelConfig, preset
from motet.parallel.cost.stages import pass_times, stage_costs
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks

MOE = ModelConfig(
    vocabulary_size=96,
    d_model=32,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    d_ffn=64,
    qk_norm="full",
    n_experts=4,
    d_expert=16,
    n_shared_experts=1,
    n_dense_layers=1,
)
MODELS = [
    preset("1b", 32_000),
    preset("190m", 32_000, qk_norm="full", tied_embeddings=True),
    dataclasses.replace(MOE, shared_gate=True),
]


@pytest.mark.parametrize("model", MODELS, ids=["dense", "tied", "experts"])
def test_the_stages_together_are_the_whole_model(model: ModelConfig) -> None:
    for pp in (1,) if model.tied_embeddings else (1, 2, 4):
        costs = stage_costs(Layout(pp=pp), model, 512)
        assert sum(cost.parameters for cost in costs) == counts.parameters(model)
        flops = 3 * sum(cost.forward_flops for cost in costs)
        assert flops == pytest.approx(counts.training_flops_per_token(model, 512), rel=1e-12)


def test_full_recomputation_makes_the_forward_pass_again() -> None:
    costs = stage_costs(Layout(pp=2), MODELS[0], 512)
    forward, backward, weight = pass_times(costs, Layout(pp=2))
    assert sum(forward) == pytest.approx(1.0)
    assert sum(backward) == pytest.approx(2.0)
    assert all(w < f for w, f in zip(weight, forward, strict=True))
    again = pass_times(costs, Layout(pp=2, recompute="full"))[1]
    assert sum(again) == pytest.approx(3.0)


def held(world: World, layout: Layout, model: ModelConfig) -> int:
    """Weights in this rank's memory under the native engine."""
    from motet.parallel.engines.native import NativeEngine
    from motet.parallel.engines.protocol import EngineOptions, build_engine
    from motet.parallel.runtime.dtensors import local

    engine = build_engine(model, EngineOptions(), layout, world)
    assert isinstance(engine, NativeEngine)
    return sum(local(parameter).numel() for parameter in engine.parameters.values())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, tp=2, ep=4),
        Layout(tp=2, pp=2, ep=2, stage_layers=(1, 3)),
        Layout(dp_replicate=2, tp=2, vocabulary_parallel=False),
    ],
    ids=["folded", "stages", "replicas"],
)
def test_every_rank_holds_the_weights_that_are_told(layout: Layout) -> None:
    found = run_ranks(4, held, layout, MOE)
    costs = stage_costs(layout, MOE, 32)
    told = [
        sum(costs[stage].held_parameters for stage in layout.stages_of(layout.place(rank).pp))
        for rank in range(4)
    ]
    assert found == told
