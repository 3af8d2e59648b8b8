"""A few steps of a tiny model under any layout, to be compared with one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.models.config import ModelConfig
from motet.parallel.engines.protocol import Engine, EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World

DENSE = ModelConfig(
    vocabulary_size=96, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_ffn=64, qk_norm="head"
)
BATCH, LENGTH = 16, 32


@dataclass
class Micro:
    tokens_BT: npt.NDArray[np.int32]
    labels_BT: npt.NDArray[np.int64]
    document_ids_BT: npt.NDArray[np.int32] | None = None


@dataclass
class Curve:
    """What a run shows: per step (loss, gradient norm, labels), then the weights; and the rows that
    each rank read.
    """

    steps: list[tuple[float, float, int]] = field(default_factory=list)
    weights: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    rows: list[list[int]] = field(default_factory=list)


def global_batch(step: int, masked: bool) -> Micro:
    """Return [BATCH, LENGTH] tokens; masked = several documents per sequence, and
    data-parallel ranks with different numbers of labels.
    """
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, 8, (BATCH, LENGTH)).astype(np.int32)
    labels = np.full(tokens.shape, -100, dtype=np.int64)
    labels[:, :-1] = tokens[:, 1:]
    ids = None
    if masked:
        ids = np.cumsum(generator.random(tokens.shape) < 0.2, axis=1).astype(np.int32)
        labels[:, :-1][np.diff(ids, axis=1) > 0] = -100
        labels[: BATCH // 2, LENGTH // 2 :] = -100
    return Micro(tokens, labels, ids)


def share(layout: Layout, rank: int, step: int, masked: bool) -> tuple[list[Micro], list[int]]:
    """Return a rank's micro-batches of a step, and their rows in the global batch."""
    whole = global_batch(step, masked)
    first, count = layout.dp_sequences(BATCH, layout.dp_rank(rank))
    micro = layout.micro_sequences
    batches = [part(whole, row, micro) for row in range(first, first + count, micro)]
    return batches, list(range(first, first + count))


def part(batch: Micro, first: int, count: int) -> Micro:
    """Return some rows of a batch."""
    rows, ids = slice(first, first + count), batch.document_ids_BT
    return Micro(batch.tokens_BT[rows], batch.labels_BT[rows], None if ids is None else ids[rows])


def one_step(engine: Engine, layout: Layout, rank: int, step: int, masked: bool = False) -> Any:
    batches, _ = share(layout, rank, step, masked)
    return engine.step(batches, 1e-3, lambda loss, norm: True, lambda: False)


def train(
    world: World,
    layout: Layout,
    steps: int,
    masked: bool = False,
    config: ModelConfig = DENSE,
    options: EngineOptions = EngineOptions(z_loss=1e-3),  # noqa: B008 (frozen)
) -> Curve:
    """Train some steps from step 0."""
    engine = build_engine(config, options, layout, world)
    curve = Curve()
    for step in range(steps):
        result = one_step(engine, layout, world.rank, step, masked)
        curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        curve.rows.append(share(layout, world.rank, step, masked)[1])
    curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
    return curve


def assert_same(found: Curve, expected: Curve) -> None:
    """Losses and gradient norms within 1e-5 relative, weights within 1e-4."""
    np.testing.assert_allclose(np.array(found.steps), np.array(expected.steps), rtol=1e-5)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        np.testing.assert_allclose(found.weights[name], value, rtol=0, atol=1e-4, err_msg=name)
