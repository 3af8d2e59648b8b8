"""Slices in every axis train under every layout as in one process, each micro-batch another."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
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
    order: list[Choice] = [(Term(None),), (Term(half),), (Term(wide),), (Term(half),)]
    if kind == "depths":  # and a teacher that does not train there: one pass more
        silent = (Term(None, 0.0), Term(half, 0.2, 0.8))
        order = [(Term(None),), (Term(short),), silent, (Term(short),)]
    return [order[(draw + step) % DRAWS] for draw in range(DRAWS)]


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
    batch = global_batch(9, False)
    tokens, labels = batch.tokens_BT[:2].astype(np.int64), batch.labels_BT[:2]
    losses.append(engine.score(tokens, labels, members(whole)["short"])[0].ravel().tolist())
    engine.finish_scoring()
    curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
    return curve, losses


def all_losses(
    world: World, layout: Layout, whole: ModelConfig, alone: bool, kinds: list[str]
) -> dict[str, Any]:
    return {kind: train(world, layout, whole, kind, alone) for kind in kinds}


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
    pytest.param(Layout(pp=2, micro_sequences=2), DENSE, False, id="pp-2"),
    pytest.param(Layout(pp=2, dp_shard=2, micro_sequences=2), DENSE, False, id="pp-fsdp-4"),
    pytest.param(
        Layout(pp=2, tp=2, schedule="gpipe", micro_sequences=2), DENSE, False, id="pp-tp-4"
    ),
    pytest.param(
        Layout(pp=2, virtual_stages=2, schedule="interleaved_1f1b", micro_sequences=4),
        DENSE,
        False,
        id="pp-interleaved",
    ),
    pytest.param(
        Layout(pp=2, virtual_stages=2, schedule="zbv_zero_bubble", micro_sequences=4),
        DENSE,
        False,
        id="pp-zero-bubble",
    ),
    pytest.param(Layout(dp_shard=2, micro_sequences=2), DENSE, True, id="by-replica-2"),
    pytest.param(Layout(dp_shard=4, micro_sequences=2), DENSE, True, id="by-replica-4"),
]


def kinds_for(layout: Layout, alone: bool) -> list[str]:
    """Beside other pipelines the dear ones need show only what is their own."""
    if layout.pp > 1 and (layout.tp > 1 or layout.virtual_stages > 1):
        return ["depths"]
    return LOSSES[:3] if alone else LOSSES


@cache
def one_process(micro_sequences: int, whole: ModelConfig) -> dict[str, Any]:
    layout = Layout(micro_sequences=micro_sequences)
    found: dict[str, Any] = run_ranks(1, all_losses, layout, whole, False, LOSSES)[0]
    return found


@pytest.mark.parametrize(("layout", "whole", "alone"), LAYOUTS)
def test_slices_train_on_several_ranks_as_on_one(
    layout: Layout, whole: ModelConfig, alone: bool
) -> None:
    known = list(members(whole).values())
    assert member_problems(whole, known) == []
    assert layout.pp > 1 or refusals(layout, whole, known) == []
    expected, kinds = one_process(layout.micro_sequences, whole), kinds_for(layout, alone)
    found = run_ranks(layout.world_size, all_losses, layout, whole, alone, kinds)[0]
    for kind, (curve, losses) in found.items():
        other, theirs = expected[kind]
        assert_same(curve, other)
        for mine, reference in zip(losses, theirs, strict=True):
            assert mine == pytest.approx(reference, rel=1e-5, abs=1e-6)
