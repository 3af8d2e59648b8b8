"""The native engine by itself: precision, probes that leave no trace, resuming bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.runs.rundir import RunDir
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, one_step, train

STEPS = 6
ONE = Layout(micro_sequences=8)
SHARDED = Layout(dp_shard=2, micro_sequences=4)
REPLICATED = Layout(dp_replicate=2, micro_sequences=4)
GRID = Layout(tp=2, pp=2, micro_sequences=4)


@pytest.mark.parametrize("layout", [ONE, SHARDED, GRID], ids=["one", "sharded", "grid"])
def test_bf16_stays_near_fp32(layout: Layout) -> None:
    plain = run_ranks(1, train, ONE, 4)[0]
    options = EngineOptions(precision="bf16", z_loss=1e-3)
    low = run_ranks(layout.world_size, train, layout, 4, False, DENSE, options)[0]
    losses = [row[0] for row in low.steps]
    np.testing.assert_allclose(losses, [row[0] for row in plain.steps], rtol=2e-2)
    assert losses != [row[0] for row in plain.steps], "it does compute in bf16"


def probed_curve(world: World, layout: Layout, probing: bool) -> list[float]:
    engine = build_engine(DENSE, EngineOptions(), layout, world)
    losses = []
    for step in range(4):
        if probing:
            dp_rank = layout.dp_rank(world.rank)
            rows = 1 + (step + dp_rank) % 3  # shapes differ between ranks and steps
            tokens = np.arange(rows * 8).reshape(rows, 8).astype(np.int64)
            engine.score(tokens, tokens)
            engine.score(tokens[:, :5], tokens[:, :5])
            engine.finish_scoring()
        losses.append(one_step(engine, layout, world.rank, step).loss)
    return losses


@pytest.mark.parametrize(
    "layout", [ONE, SHARDED, REPLICATED, GRID], ids=["one", "sharded", "replicated", "grid"]
)
def test_losses_after_probes_are_bit_equal_to_losses_without(layout: Layout) -> None:
    plain = run_ranks(layout.world_size, probed_curve, layout, False)[0]
    probed = run_ranks(layout.world_size, probed_curve, layout, True)[0]
    assert plain == probed


def scores(world: World, layout: Layout) -> Any:
    engine = build_engine(DENSE, EngineOptions(), layout, world)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 96, (12, 20)).astype(np.int64)
    labels = np.roll(tokens, -1, axis=1)
    together = engine.score(tokens, labels)[0]
    alone = np.concatenate(
        [engine.score(tokens[row : row + 1], labels[row : row + 1])[0] for row in range(12)]
    )
    padded_tokens = np.pad(tokens, ((0, 0), (0, 44)))
    padded_labels = np.pad(labels, ((0, 0), (0, 44)), constant_values=-100)
    padded = engine.score(padded_tokens, padded_labels)[0]
    return together, alone, padded


@pytest.mark.parametrize("layout", [ONE, SHARDED], ids=["one", "sharded"])
def test_padding_and_batch_size_change_no_score(layout: Layout) -> None:
    together, alone, padded = run_ranks(layout.world_size, scores, layout)[0]
    np.testing.assert_allclose(alone, together, atol=2e-6)
    np.testing.assert_allclose(padded[:, :20], together, atol=2e-6)
    assert np.all(padded[:, 20:] == 0)


def saved(world: World, layout: Layout, folder: Path) -> list[float]:
    engine = build_engine(DENSE, EngineOptions(), layout, world)
    run = RunDir(folder)
    run.create()
    checkpoints = Checkpoints(run, world)
    losses = []
    for step in range(STEPS):
        if step == 3:
            engine.score(np.zeros((2, 8), dtype=np.int64), np.ones((2, 8), dtype=np.int64))
            # Training goes on while it is written.
            checkpoints.save(3, engine.tensors(), {"segment": 1})
        losses.append(one_step(engine, layout, world.rank, step).loss)
    checkpoints.close()
    return losses


def resumed(world: World, layout: Layout, folder: Path) -> list[float]:
    engine = build_engine(DENSE, EngineOptions(seed=99), layout, world)
    checkpoints = Checkpoints(RunDir(folder), world)
    tensors = engine.tensors()
    assert checkpoints.load(3, tensors)["segment"] == 1
    engine.restore(tensors)
    checkpoints.close()
    return [one_step(engine, layout, world.rank, step).loss for step in range(3, STEPS)]


@pytest.mark.parametrize("layout", [SHARDED, GRID], ids=["sharded", "grid"])
def test_resuming_under_the_same_layout_is_bit_exact(layout: Layout, tmp_path: Path) -> None:
    losses = run_ranks(layout.world_size, saved, layout, tmp_path)[0]
    assert run_ranks(layout.world_size, resumed, layout, tmp_path)[0] == losses[3:]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ONE, id="one"),
        pytest.param(Layout(tp=2, micro_sequences=8), id="tp"),
        pytest.param(GRID, id="grid", marks=pytest.mark.long),
    ],
)
def test_compiled_blocks_train_the_same_model(layout: Layout) -> None:
    plain = run_ranks(1, train, ONE, 2)[0]
    options = EngineOptions(compile=True, z_loss=1e-3)
    found = run_ranks(layout.world_size, train, layout, 2, False, DENSE, options)[0]
    np.testing.assert_allclose(np.array(found.steps), np.array(plain.steps), rtol=1e-5)
