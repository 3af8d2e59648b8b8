"""The native engine: every layout trains the model that one process trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from motet.launcher.checkpoint import Checkpoints
from motet.launcher.rundir import RunDir
from motet.models.config import ModelConfig
from motet.parallel.engine import EngineOptions
from motet.parallel.engine_native import NativeEngine
from motet.parallel.mesh import World
from tests.parallel.ranks import run_ranks

CONFIG = ModelConfig(
    vocabulary_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=64, qk_norm="head"
)
BATCH, LENGTH, STEPS = 8, 24, 6


@dataclass
class Micro:
    tokens_BT: npt.NDArray[np.int32]
    labels_BT: npt.NDArray[np.int64]
    document_ids_BT: npt.NDArray[np.int32] | None = None


def global_batch(step: int, masked: bool) -> Micro:
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, 8, (BATCH, LENGTH)).astype(np.int32)
    labels = np.full(tokens.shape, -100, dtype=np.int64)
    labels[:, :-1] = tokens[:, 1:]
    ids = None
    if masked:
        ids = np.cumsum(generator.random(tokens.shape) < 0.2, axis=1).astype(np.int32)
        labels[:, :-1][np.diff(ids, axis=1) > 0] = -100
        labels[: BATCH // 2, LENGTH // 2 :] = -100  # ranks hold different numbers of labels
    return Micro(tokens, labels, ids)


def share(world: World, step: int, micro: int, masked: bool) -> list[Micro]:
    whole = global_batch(step, masked)
    count = BATCH // world.size
    rows = range(world.rank * count, (world.rank + 1) * count, micro)
    return [
        Micro(
            whole.tokens_BT[row : row + micro],
            whole.labels_BT[row : row + micro],
            None if whole.document_ids_BT is None else whole.document_ids_BT[row : row + micro],
        )
        for row in rows
    ]


def one_step(
    world: World, engine: NativeEngine, step: int, micro: int = 2, masked: bool = False, **kw: Any
) -> Any:
    judge = kw.get("judge", lambda loss, norm: True)
    batches = share(world, step, micro, masked)
    return engine.step(batches, BATCH * (LENGTH - 1), 1e-2, judge, kw.get("stop", False))


def curve(world: World, options: EngineOptions, micro: int, masked: bool) -> Any:
    engine = NativeEngine(CONFIG, options, world)
    results = [one_step(world, engine, step, micro, masked) for step in range(STEPS)]
    losses = [(r.loss, r.grad_norm, r.n_labels) for r in results]
    return losses, {name: value.numpy() for name, value in engine.full_model().items()}


def assert_same(found: Any, expected: Any) -> None:
    losses, weights = found
    np.testing.assert_allclose(np.array(losses), np.array(expected[0]), rtol=1e-5)
    for name, value in expected[1].items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("masked", [False, True])
def test_every_world_size_and_both_layouts_train_the_same_model(masked: bool) -> None:
    reference = run_ranks(1, curve, EngineOptions(z_loss=1e-3), 8, masked)[0]
    assert reference[0][0][0] > reference[0][-1][0], "it learns"
    for world, shard, micro in ((1, True, 2), (2, True, 2), (4, True, 1), (2, False, 4)):
        found = run_ranks(world, curve, EngineOptions(z_loss=1e-3, shard=shard), micro, masked)
        assert_same(found[0], reference)
        assert all(part[0] == found[0][0] for part in found), "ranks report the same losses"


def test_recomputation_and_bf16_train_too() -> None:
    plain = run_ranks(1, curve, EngineOptions(), 8, False)[0]
    assert_same(run_ranks(2, curve, EngineOptions(recompute=True), 2, False)[0], plain)
    low = run_ranks(2, curve, EngineOptions(precision="bf16"), 2, False)[0]
    np.testing.assert_allclose([row[0] for row in low[0]], [row[0] for row in plain[0]], rtol=2e-2)


def probed_curve(world: World, shard: bool, probing: bool) -> list[float]:
    engine = NativeEngine(CONFIG, EngineOptions(shard=shard), world)
    losses = []
    for step in range(4):
        if probing:
            rows = 1 + (step + world.rank) % 3  # shapes that differ between ranks and steps
            tokens = np.arange(rows * 8).reshape(rows, 8).astype(np.int64)
            engine.score(tokens, tokens)
            engine.score(tokens[:, :5], tokens[:, :5])
            engine.finish_scoring()
        losses.append(one_step(world, engine, step).loss)
    return losses


@pytest.mark.parametrize(("world", "shard"), [(1, True), (2, True), (2, False)])
def test_losses_after_probes_are_bit_equal_to_losses_without(world: int, shard: bool) -> None:
    plain = run_ranks(world, probed_curve, shard, False)[0]
    probed = run_ranks(world, probed_curve, shard, True)[0]
    assert plain == probed


def scores(world: World) -> Any:
    engine = NativeEngine(CONFIG, EngineOptions(), world)
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


@pytest.mark.parametrize("world", [1, 2])
def test_padding_and_batch_size_change_no_score(world: int) -> None:
    together, alone, padded = run_ranks(world, scores)[0]
    np.testing.assert_allclose(alone, together, atol=2e-6)
    np.testing.assert_allclose(padded[:, :20], together, atol=2e-6)
    assert np.all(padded[:, 20:] == 0)


def refused(world: World) -> Any:
    engine = NativeEngine(CONFIG, EngineOptions(), world)
    one_step(world, engine, 0)
    before = {name: value.clone() for name, value in engine.tensors().items()}
    result = one_step(world, engine, 1, judge=lambda loss, norm: False)
    same = all(
        torch.equal(_local(value), _local(before[name])) for name, value in engine.tensors().items()
    )
    return result.applied, same


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def test_a_refused_update_leaves_weights_and_optimizer_alone() -> None:
    assert run_ranks(2, refused) == [(False, True)] * 2


def stopped(world: World) -> list[bool]:
    engine = NativeEngine(CONFIG, EngineOptions(), world)
    return [
        one_step(world, engine, step, stop=step == 1 and world.rank == 1).stop for step in range(2)
    ]


def test_a_stop_asked_of_one_rank_reaches_all_in_the_same_step() -> None:
    assert run_ranks(2, stopped) == [[False, True]] * 2


def saved(world: World, folder: Path) -> list[float]:
    engine = NativeEngine(CONFIG, EngineOptions(), world)
    run = RunDir(folder)
    run.create()
    checkpoints = Checkpoints(run, world)
    losses = []
    for step in range(STEPS):
        if step == 3:
            engine.score(np.zeros((2, 8), dtype=np.int64), np.ones((2, 8), dtype=np.int64))
            checkpoints.save(
                3, engine.tensors(), {"segment": 1}
            )  # training goes on while it is written
        losses.append(one_step(world, engine, step).loss)
    checkpoints.close()
    return losses


def resumed(world: World, folder: Path, shard: bool) -> list[float]:
    engine = NativeEngine(CONFIG, EngineOptions(shard=shard, seed=99), world)
    checkpoints = Checkpoints(RunDir(folder), world)
    assert checkpoints.load(3, engine.tensors())["segment"] == 1
    checkpoints.close()
    return [one_step(world, engine, step).loss for step in range(3, STEPS)]


def test_resuming_is_bit_exact_at_the_same_world_size_and_close_at_others(tmp_path: Path) -> None:
    losses = run_ranks(2, saved, tmp_path)[0]
    assert run_ranks(2, resumed, tmp_path, True)[0] == losses[3:]
    for world, shard in ((1, True), (4, True), (2, False)):
        found = run_ranks(world, resumed, tmp_path, shard)[0]
        np.testing.assert_allclose(found, losses[3:], rtol=1e-5)
