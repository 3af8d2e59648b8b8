"""DeepSpeed trains what one process trains, refuses what the judge refuses, and shares its
checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.runs.rundir import RunDir
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.engines.test_layouts import MOE
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, Curve, assert_same, one_step, train
from tests.parallel.visits import ONE, assert_like_one_process, visits

DEEPSPEED = Layout(engine="deepspeed", dp_shard=2, micro_sequences=4)
NATIVE = Layout(dp_shard=2, micro_sequences=4)
MODES = [
    (1, "none"),
    (2, "none"),
    (3, "none"),
    (1, "optimizer"),
    (2, "optimizer"),
    (3, "parameters"),
]


@pytest.mark.parametrize(("stage", "offload"), MODES)
def test_zero_trains_what_one_process_trains(stage: int, offload: str) -> None:
    found = visits(DEEPSPEED, DENSE, (("zero_stage", stage), ("offload", offload)))
    expected = visits(ONE)[0]
    assert expected.curve.steps[0][0] > expected.curve.steps[-1][0], "it learns"
    assert_like_one_process(found, expected)


def test_deepspeed_on_one_process_is_that_process() -> None:
    layout = Layout(engine="deepspeed", micro_sequences=8)
    assert_like_one_process(visits(layout), visits(ONE)[0])


def curves(world: World, cases: list[tuple[Layout, Any, EngineOptions]]) -> list[Curve]:
    return [train(world, layout, 3, True, config, options) for layout, config, options in cases]


def test_experts_recomputation_and_tied_embeddings_change_nothing() -> None:
    options = EngineOptions(z_loss=1e-3)
    cases = []
    for stage in (2, 3):
        zero = replace(options, zero_stage=stage)
        for recompute in ("none", "selective", "full"):
            layout = replace(DEEPSPEED, recompute=recompute)
            cases += [(layout, MOE, zero)]
            cases += [(layout, replace(DENSE, tied_embeddings=True), zero)]
    plain = [(ONE, config, options) for _, config, options in cases[:2]]
    expected = run_ranks(1, curves, plain)[0]
    for number, found in enumerate(run_ranks(2, curves, cases)[0]):
        assert_same(found, expected[number % 2])


def test_bf16_is_the_bf16_of_one_process() -> None:
    low = EngineOptions(z_loss=1e-3, precision="bf16")
    one = replace(ONE, micro_sequences=4)  # the same micro-batches: their sums are rounded
    expected, plain = run_ranks(1, curves, [(one, DENSE, low), (one, DENSE, EngineOptions())])[0]
    assert expected.steps[0][0] != plain.steps[0][0], "it does compute in bf16"
    zero = [(DEEPSPEED, DENSE, replace(low, zero_stage=stage)) for stage in (2, 3)]
    for found in run_ranks(2, curves, zero)[0]:
        assert_same(found, expected)


def test_compiled_blocks_train_the_same_model() -> None:
    compiled = EngineOptions(z_loss=1e-3, compile=True, zero_stage=2)
    expected = run_ranks(1, curves, [(ONE, DENSE, EngineOptions(z_loss=1e-3))])[0][0]
    assert_same(run_ranks(2, curves, [(DEEPSPEED, DENSE, compiled)])[0][0], expected)


SAVED_AT, RESUMED_TO = 3, 6


def saved(world: World, layout: Layout, options: EngineOptions, folder: Path) -> list[float]:
    engine = build_engine(MOE, options, layout, world)
    run = RunDir(folder)
    run.create()
    checkpoints = Checkpoints(run, world)
    losses = []
    for step in range(RESUMED_TO):
        if step == SAVED_AT:  # training goes on while it is written
            checkpoints.save(step, engine.tensors(), {"segment": 1})
        losses.append(one_step(engine, layout, world.rank, step).loss)
    checkpoints.close()
    return losses


def resumed(
    world: World, layout: Layout, options: EngineOptions, folder: Path
) -> tuple[list[float], dict[str, Any]]:
    engine = build_engine(MOE, replace(options, seed=99), layout, world)
    checkpoints = Checkpoints(RunDir(folder), world)
    tensors = engine.tensors()
    checkpoints.load(SAVED_AT, tensors)
    engine.restore(tensors)
    checkpoints.close()
    losses = [
        one_step(engine, layout, world.rank, step).loss for step in range(SAVED_AT, RESUMED_TO)
    ]
    return losses, {name: value.numpy() for name, value in engine.full_model().items()}


def zero(stage: int, offload: str = "none") -> tuple[Layout, EngineOptions]:
    return DEEPSPEED, EngineOptions(zero_stage=stage, offload=offload)


NATIVE_PAIR = NATIVE, EngineOptions()
TENSOR_PARALLEL = Layout(tp=2, micro_sequences=8), EngineOptions()
ACCELERATE = replace(NATIVE, engine="accelerate"), EngineOptions()
ACCELERATE_DDP = (
    Layout(engine="accelerate", dp_replicate=2, micro_sequences=4),
    EngineOptions(),
)
PAIRS = {
    "one process to ZeRO 2": ((ONE, EngineOptions()), zero(2)),
    "ZeRO 1 to FSDP2": (zero(1), NATIVE_PAIR),
    "ZeRO 2 to one process": (zero(2), (ONE, EngineOptions())),
    "FSDP2 to ZeRO 3": (NATIVE_PAIR, zero(3)),
    "ZeRO 3 to tensor parallel": (zero(3), TENSOR_PARALLEL),
    "tensor parallel to ZeRO 1": (TENSOR_PARALLEL, zero(1)),
    "ZeRO 3 offloaded to ZeRO 2 offloaded": (zero(3, "parameters"), zero(2, "optimizer")),
    "ZeRO 2 to Accelerate's FSDP2": (zero(2), ACCELERATE),
    "Accelerate's DDP to ZeRO 3 offloaded": (ACCELERATE_DDP, zero(3, "parameters")),
    "Accelerate's FSDP2 to its DDP": (ACCELERATE, ACCELERATE_DDP),
    "Accelerate's DDP to one process": (ACCELERATE_DDP, (ONE, EngineOptions())),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_checkpoint_resumes_under_another_engine(pair: str, tmp_path: Path) -> None:
    """A model of experts, so that their frequencies and biases travel too."""
    (first, before), (second, after) = PAIRS[pair]
    losses = run_ranks(first.world_size, saved, first, before, tmp_path)[0]
    found, weights = run_ranks(second.world_size, resumed, second, after, tmp_path)[0]
    np.testing.assert_allclose(found, losses[SAVED_AT:], rtol=1e-5)
    for name, value in uninterrupted().items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-4, err_msg=name)


_weights: dict[str, Any] = {}


def uninterrupted() -> dict[str, Any]:
    """Return the weights of one process that never stopped."""
    if not _weights:
        curve = run_ranks(1, train, ONE, RESUMED_TO, False, MOE, EngineOptions())[0]
        _weights.update(curve.weights)
    return _weights
