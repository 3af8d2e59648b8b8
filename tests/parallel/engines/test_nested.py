"""Slices in every axis train under every layout as in one process, each micro-batch another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motet.models.config import ModelConfig
from motet.models.family.base import Choice, Member, StepChoices, Term, member_problems
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.engines.refusals import refusals
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import BATCH, Curve, assert_same, global_batch, part

DENSE = ModelConfig(
    vocabulary_size=96, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, d_ffn=64, head_dim=8
)
MIXED = replace(DENSE, n_experts=4, d_expert=32, balance_loss=0.01, bias_rate=0.001)
DRAWS = 4
LOSSES = ["turns", "sandwich", "follow", "depths"]


def members(whole: ModelConfig) -> dict[str, Member]:
    """A narrow one of all layers, and one that is short as well."""
    fewer = {"n_experts": 2, "d_expert": 16} if whole.n_experts else {}
    half = replace(whole, d_model=16, n_heads=4, n_kv_heads=2, d_ffn=32, **fewer)
    widths = (32, 64, 64, 32) if not whole.n_experts else None
    wide = replace(whole, d_model=24, layer_ffn=widths)
    short = replace(half, n_layers=2)
    return {
        "half": Member("half", half, (0, 1, 2, 3), groups=2),
        "wide": Member("wide", wide, (0, 1, 2, 3), groups=2),
        "short": Member("short", short, (0, 3), groups=2),
    }


def choices(kind: str, whole: ModelConfig, step: int) -> list[Choice]:
    """Who trains on each quarter of a step."""
    known = members(whole)
    half, wide, short = known["half"], known["wide"], known["short"]
    if kind == "sandwich":
        return [(Term(None, 0.5), Term(half, 0.3), Term(wide, 0.2))] * DRAWS
    if kind == "follow":
        return [(Term(None), Term((half, wide)[draw % 2], 0.2, 0.8)) for draw in range(DRAWS)]
    order = (None, short, half, short) if kind == "depths" else (None, half, wide, half)
    return [(Term(order[(draw + step) % DRAWS]),) for draw in range(DRAWS)]


def train(world: World, layout: Layout, whole: ModelConfig, kind: str, alone: bool) -> Any:
    """Train as the feed shares a step: each rank has its part of every quarter, or with `alone`
    of one quarter after the other.
    """
    engine = build_engine(whole, EngineOptions(z_loss=1e-3), layout, world)
    curve, losses = Curve(), []
    micro, size = layout.micro_sequences, BATCH // DRAWS
    for step in range(3):
        batch, chosen = global_batch(step, True), choices(kind, whole, step)
        starts = []
        for draw in range(1 if alone else DRAWS):
            offset, count = layout.dp_sequences(
                BATCH if alone else size, layout.dp_rank(world.rank)
            )
            first = draw * size + offset
            starts += list(range(first, first + count, micro))
        mine = tuple(chosen[start // size] for start in starts)
        names = tuple(dict.fromkeys(t.member and t.member.name for c in chosen for t in c))
        batches = [part(batch, start, micro) for start in starts]
        who = StepChoices(mine, names)
        result = engine.step(batches, 1e-3, lambda *all: True, lambda: False, who)
        curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        losses.append([result.losses[name] for name in names] + [result.balance_loss])
    curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
    return curve, losses


def all_losses(world: World, layout: Layout, whole: ModelConfig, alone: bool) -> list[Any]:
    kinds = LOSSES[:3] if alone else LOSSES
    return [train(world, layout, whole, kind, alone) for kind in kinds]


LAYOUTS = [
    pytest.param(Layout(dp_shard=2, micro_sequences=2), DENSE, False, id="fsdp-2"),
    pytest.param(Layout(dp_shard=2, dp_replicate=2), DENSE, False, id="hsdp-4"),
    pytest.param(Layout(tp=2, micro_sequences=2), DENSE, False, id="tp-2"),
    pytest.param(Layout(tp=2, dp_shard=2, micro_sequences=2), DENSE, False, id="tp-fsdp-4"),
    pytest.param(Layout(cp=2, micro_sequences=2), DENSE, False, id="cp-2"),
    pytest.param(Layout(dp_shard=2, ep=2, micro_sequences=2), MIXED, False, id="ep-2"),
    pytest.param(
        Layout(dp_shard=2, micro_sequences=2, recompute="full"), DENSE, False, id="recompute"
    ),
    pytest.param(Layout(dp_shard=2, micro_sequences=2), DENSE, True, id="by-replica-2"),
    pytest.param(Layout(dp_shard=4, micro_sequences=2), DENSE, True, id="by-replica-4"),
]


@pytest.mark.parametrize(("layout", "whole", "alone"), LAYOUTS)
def test_slices_train_on_several_ranks_as_on_one(
    layout: Layout, whole: ModelConfig, alone: bool
) -> None:
    known = list(members(whole).values())
    assert member_problems(whole, known) == []
    assert refusals(layout, whole, known) == []
    one = Layout(micro_sequences=layout.micro_sequences)
    expected = run_ranks(1, all_losses, one, whole, False)[0]
    found = run_ranks(layout.world_size, all_losses, layout, whole, alone)[0]
    for (curve, losses), (other, theirs) in zip(found, expected, strict=False):
        assert_same(curve, other)
        for mine, reference in zip(losses, theirs, strict=True):
            assert mine == pytest.approx(reference, rel=1e-5)
