"""One visit to an engine that tries everything: processes that import DeepSpeed start slowly, so
that each starts once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from motet.models.config import ModelConfig
from motet.parallel.engines.protocol import Engine, EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, Curve, share

STEPS = 20
OPTIONS = EngineOptions(z_loss=1e-3)
ONE = Layout(micro_sequences=8)


@dataclass
class Visit:
    """What an engine did.

    Attributes:
        curve: `STEPS` steps, the first refused and not part of it.
        scores: of labels that the model has not seen, before the steps.
        refused: (applied, stop told to all, all tensors bit-equal afterwards).
        broken: (loss, norm, applied, bit-equal) of a step with a weight that is not a number.
        restored: all tensors bit-equal after they were handed back to an engine that had gone on.
    """

    curve: Curve
    scores: npt.NDArray[np.float64]
    refused: tuple[bool, bool, bool]
    broken: tuple[float, float, bool, bool]
    restored: bool


def visit(
    world: World, layout: Layout, config: ModelConfig = DENSE, options: EngineOptions = OPTIONS
) -> Visit:
    """Train `STEPS` steps, probing and refusing on the way; the number of micro-batches differs
    between steps.
    """
    engine = build_engine(config, options, layout, world)
    scores = _score(engine, world)
    refused = _refused(engine, layout, world)
    curve = Curve()
    for step in range(STEPS):
        result = _step(engine, layout, world, step)
        assert result.applied
        curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        if step % 8 == 3:
            _score(engine, world)
    kept = {name: value.clone() for name, value in engine.tensors().items()}
    curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
    _step(engine, layout, world, STEPS)
    _hand_back(engine, kept)
    restored = _same(engine, kept)
    return Visit(curve, scores, refused, _broken(engine, layout, world, config), restored)


def _step(engine: Engine, layout: Layout, world: World, step: int) -> Any:
    micro = max(1, layout.micro_sequences // (1 + step % 2))
    batches, _ = share(replace(layout, micro_sequences=micro), world.rank, step, True)
    return engine.step(batches, 1e-3, lambda loss, norm: True, lambda: False)


def _score(engine: Engine, world: World) -> npt.NDArray[np.float64]:
    rows = 2 + world.rank  # ranks may bring different numbers of rows
    tokens = np.random.default_rng(1).integers(0, 96, (2, 21)).astype(np.int64)
    labels = np.roll(tokens, -1, axis=1)
    labels[:, ::3] = -100
    logprob, _ = engine.score(np.resize(tokens, (rows, 21)), np.resize(labels, (rows, 21)))
    engine.finish_scoring()
    return logprob[:2]


def _refused(engine: Engine, layout: Layout, world: World) -> tuple[bool, bool, bool]:
    before = {name: value.clone() for name, value in engine.tensors().items()}
    asked: list[tuple[float, float]] = []

    def judge(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return False

    batches, _ = share(layout, world.rank, 77, True)
    result = engine.step(batches, 1e-3, judge, lambda: world.rank == world.size - 1)
    assert asked == [(result.loss, result.grad_norm)], "asked once, with what is reported"
    return result.applied, result.stop, _same(engine, before)


def _broken(
    engine: Engine, layout: Layout, world: World, config: ModelConfig
) -> tuple[float, float, bool, bool]:
    state = {
        name: torch.zeros(shape) if "norm" not in name else torch.full(shape, torch.nan)
        for name, shape in shapes(config).items()
    }
    engine.load_model(state)
    before = {name: value.clone() for name, value in engine.tensors().items()}
    batches, _ = share(layout, world.rank, 0, True)
    result = engine.step(batches, 1e-3, lambda loss, norm: bool(np.isfinite(norm)), lambda: False)
    return result.loss, result.grad_norm, result.applied, _same(engine, before)


@cache
def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    from motet.models.decoder import Decoder

    with torch.device("meta"):
        return {name: value.shape for name, value in Decoder(config).named_parameters()}


def _hand_back(engine: Engine, kept: dict[str, torch.Tensor]) -> None:
    """Do what loading a checkpoint does: fill the engine's tensors in place, then hand them
    back.
    """
    tensors = engine.tensors()
    for name, value in tensors.items():
        local(value).copy_(local(kept[name]))
    engine.restore(tensors)


def _same(engine: Engine, kept: dict[str, torch.Tensor]) -> bool:
    found = engine.tensors()
    assert found.keys() == kept.keys()
    return all(
        torch.equal(
            torch.nan_to_num(local(found[name]), 7.0), torch.nan_to_num(local(kept[name]), 7.0)
        )
        for name in kept
    )


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


@cache
def visits(
    layout: Layout, config: ModelConfig = DENSE, options: tuple[tuple[str, Any], ...] = ()
) -> list[Visit]:
    """Return the visit of every rank; `options` are changes to `OPTIONS`."""
    return run_ranks(layout.world_size, visit, layout, config, replace(OPTIONS, **dict(options)))


def assert_like_one_process(found: list[Visit], expected: Visit) -> None:
    """Losses and norms within 1e-5 relative, weights within 1e-4, scores within 2e-6; nothing
    changed that was refused.
    """
    np.testing.assert_allclose(
        np.array(found[0].curve.steps), np.array(expected.curve.steps), rtol=1e-5
    )
    assert found[0].curve.weights.keys() == expected.curve.weights.keys()
    for name, value in expected.curve.weights.items():
        np.testing.assert_allclose(
            found[0].curve.weights[name], value, rtol=0, atol=1e-4, err_msg=name
        )
    for one in found:
        assert one.curve.steps == found[0].curve.steps, "ranks report the same numbers"
        np.testing.assert_allclose(one.scores, expected.scores, atol=2e-6)
        assert one.refused == (False, True, True)
        assert one.restored
        loss, norm, applied, same = one.broken
        assert not np.isfinite(loss)
        assert not np.isfinite(norm)
        assert not applied
        assert same
