"""Noise on embeddings trains the same model on one process and on two, and can be found again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from motet.experiments.stream.noise import EmbeddingNoise
from motet.parallel.engines.embedding_noise import NoisyEmbeddings, refuse_noise
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout, LayoutError
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import BATCH, DENSE, LENGTH, Curve, Micro, assert_same, global_batch

ONE, SHARDED = Layout(micro_sequences=8), Layout(dp_shard=2, micro_sequences=8)
MARKED = 5


@dataclass
class NoisyMicro(Micro):
    noise: list[EmbeddingNoise] = field(default_factory=list)


def micro(step: int, first: int, count: int, noisy: bool) -> NoisyMicro:
    """Rows [first, first + count) of a step; every third row of the batch has noise."""
    whole, rows = global_batch(step, False), slice(first, first + count)
    marks = [
        EmbeddingNoise(row - first, 3, MARKED + row % 2, 11, "mark", row, 0.5)
        for row in range(0, BATCH, 3)
        if noisy and first <= row < first + count
    ]
    return NoisyMicro(whole.tokens_BT[rows], whole.labels_BT[rows], None, marks)


def trained(world: World, layout: Layout, noisy: bool) -> tuple[Curve, npt.NDArray[np.float32]]:
    """Three steps, then the gradient of one row, or none, on each rank."""
    engine = build_engine(DENSE, EngineOptions(), layout, world)
    assert isinstance(engine, NoisyEmbeddings)
    curve, gradients = Curve(), []
    first, count = layout.dp_sequences(BATCH, layout.dp_rank(world.rank))
    for step in range(3):
        batches = [micro(step, row, 8, noisy) for row in range(first, first + count, 8)]
        result = engine.step(batches, 1e-2, lambda loss, norm: True, lambda: False)
        curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        tokens, labels = rows_of(world.rank)
        gradients.append(engine.embedding_gradient(tokens, labels))
        engine.finish_scoring()
    curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
    return curve, np.stack(gradients)


def rows_of(rank: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """One row with labels; on rank 1 a row that counts nothing."""
    tokens = np.arange(LENGTH, dtype=np.int64)[None, :] % 8
    labels = np.full_like(tokens, -100)
    if rank == 0:
        labels[0, 4:20] = tokens[0, 5:21]
    return tokens, labels


def test_two_ranks_train_with_noise_as_one_does_and_have_the_same_gradient() -> None:
    ((one, mine),) = run_ranks(1, trained, ONE, True)
    two = run_ranks(2, trained, SHARDED, True)
    assert_same(two[0][0], one)
    np.testing.assert_allclose(two[0][1], mine, rtol=1e-4, atol=1e-6)
    assert not two[1][1].any()
    assert mine[:, 0, :20].any()
    assert not mine[:, 0, 20:].any()  # no label depends on what comes after it
    ((plain, _),) = run_ranks(1, trained, ONE, False)
    assert plain.steps[0] != one.steps[0]


def differences(world: World) -> tuple[Any, Any, bool]:
    """The gradient along one direction, and the slope of the loss there, by the noise itself."""
    engine = build_engine(DENSE, EngineOptions(), ONE, world)
    assert isinstance(engine, NoisyEmbeddings)
    whole = global_batch(0, False)
    tokens, labels = whole.tokens_BT[:8].astype(np.int64), whole.labels_BT[:8]
    before = {name: value.clone() for name, value in engine.full_model().items()}
    gradient = engine.embedding_gradient(tokens, labels)
    losses = []
    for deviation in (1e-3, -1e-3):
        marks = [EmbeddingNoise(2, 3, MARKED, 11, "mark", 4, deviation)]
        batch = NoisyMicro(whole.tokens_BT[:8], labels, None, marks)
        result = engine.step([batch], 0.0, lambda loss, norm: False, lambda: False)
        losses.append(result.loss * result.n_labels)
    same = all((before[name] == value).all() for name, value in engine.full_model().items())
    direction = EmbeddingNoise(2, 3, MARKED, 11, "mark", 4, 1.0).values(DENSE.d_model)
    slope = (losses[0] - losses[1]) / 2e-3
    return float((gradient[2, 3 : 3 + MARKED] * direction).sum()), slope, same


def test_the_gradient_is_the_slope_of_the_loss_along_the_noise_and_changes_no_weight() -> None:
    ((along, slope, same),) = run_ranks(1, differences)
    assert along == pytest.approx(slope, rel=0.02)
    assert abs(along) > 1e-2
    assert same


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tp=2), "layout.tp=2"),
        (Layout(pp=2), "layout.pp=2"),
        (Layout(cp=2), "layout.cp=2"),
        (Layout(engine="accelerate"), "layout.engine=accelerate"),
    ],
)
def test_other_layouts_are_refused_by_name(layout: Layout, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        refuse_noise({"mark": 0.075}, layout, False)
    refuse_noise({}, layout, False)
    refuse_noise({"mark": 0.075}, SHARDED, False)
    with pytest.raises(LayoutError, match="mixture of experts"):
        refuse_noise({"mark": 0.075}, ONE, True)
